"""What the judge and the peers did in the cells of the benchmark: counts and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta
from tests.benchmarks.judge import fast
from tests.benchmarks.judge.peers import Minutes, Peer, minutes_of, tuned
from tests.benchmarks.judge.traffic import DEFAULT, SLICE_S, SLICES, Cell, simulate

Floats = NDArray[np.float64]

END_S = SLICES * SLICE_S


@dataclass
class PeerTally:
    """What one peer did in the runs of a cell."""

    runs: int = 0
    at_min: list[float] = field(default_factory=list)
    exposed: list[int] = field(default_factory=list)

    @property
    def harmed(self) -> int:
        return len(self.at_min)

    @property
    def promoted(self) -> int:
        return self.runs - self.harmed


@dataclass
class Tally:
    """What the judge did in the runs of a cell."""

    cell: Cell
    runs: int = 0
    harm_min: list[float] = field(default_factory=list)
    exposed: list[int] = field(default_factory=list)
    """The candidate's requests up to each rollback."""
    promote_min: list[float] = field(default_factory=list)
    by_metric: dict[str, int] = field(default_factory=dict)
    """Runs in which a metric alone would have been harm."""
    oracle: float = 0.0
    """Power of a single look at the end by a test that knows the truth (`fast.oracle`)."""
    peers: dict[str, PeerTally] = field(default_factory=dict)

    @property
    def harmed(self) -> int:
        return len(self.harm_min)

    @property
    def promoted(self) -> int:
        return len(self.promote_min)

    @property
    def undecided(self) -> int:
        """Return the runs that ended in a hold or a time-out."""
        return self.runs - self.harmed - self.promoted

    def detected_by(self, minutes: float) -> int:
        return sum(at <= minutes for at in self.harm_min)

    def delay(self, q: float) -> float:
        """Return the minute by which a share `q` of all runs was harm; `inf` if never."""
        ordered = sorted(self.harm_min)
        place = int(np.ceil(q * self.runs)) - 1
        return ordered[place] if place < len(ordered) else float("inf")


def clopper_pearson(count: int, runs: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share."""
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, count, runs - count + 1)) if count else 0.0
    high = float(beta.isf(tail, count + 1, runs - count)) if count < runs else 1.0
    return low, high


def measure(cell: Cell, runs: int, *, seed: int) -> Tally:
    """Return what the judge did in the runs of a cell."""
    tally = Tally(cell)
    for rollouts in simulate(cell, runs, seed):
        decisions = fast.decide(rollouts)
        size = len(rollouts.n)
        exposed = rollouts.exposed
        for run in range(size):
            if decisions.harmed[run]:
                tally.harm_min.append(decisions.harm_s[run] / 60)
                tally.exposed.append(int(exposed[run, int(decisions.harm_s[run] / SLICE_S) - 1]))
            elif decisions.promoted[run]:
                tally.promote_min.append(decisions.promote_s[run] / 60)
        for name, at in decisions.by_metric.items():
            tally.by_metric[name] = tally.by_metric.get(name, 0) + int(np.isfinite(at).sum())
        power = fast.oracle(rollouts, END_S)
        tally.oracle = (tally.oracle * tally.runs + power * size) / (tally.runs + size)
        tally.runs += size
    return tally


def measure_peers(
    cell: Cell, runs: int, *, seed: int, peers: Sequence[Peer]
) -> dict[str, PeerTally]:
    """Return what the peers did in the first runs of a cell, the same ones that the judge saw.

    Where the tail is given as a share, latencies, which the peers compare, do not show it, and
    nothing is asked.
    """
    tallies: dict[str, PeerTally] = {}
    if not peers or cell.world.late_share is not None:
        return tallies
    for rollouts in simulate(cell, runs, seed):
        minutes = minutes_of(rollouts)
        exposed = rollouts.exposed
        last = int(END_S / 60)
        for peer in peers:
            at = peer.decide(minutes, peer.setting)
            mine = tallies.setdefault(peer.name, PeerTally())
            mine.runs += len(at)
            for run in np.flatnonzero(at <= last):
                mine.at_min.append(float(at[run]))
                mine.exposed.append(int(exposed[run, int(at[run] * 60 / SLICE_S) - 1]))
    return tallies


def tuned_peers(runs: int, seed: int) -> tuple[Peer, ...]:
    """Return the peers' tuned forms: 1 % on unchanged releases of the default world."""
    cell = Cell("tuning of the peers", "good", DEFAULT)
    minutes: list[Minutes] = [minutes_of(one) for one in simulate(cell, runs, seed + 1000)]
    return tuned(minutes)
