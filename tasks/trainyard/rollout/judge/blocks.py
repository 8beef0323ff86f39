"""From rows of the log to closed blocks: the units that the tests count in.

A row is one slice of one pod. A block is a run of slices with the same weight, in which both tracks
were observed and have enough requests. Whether a block closes depends on numbers of requests and on
time only, never on latencies or errors, so closing cannot favour an answer.

Averages are averages of sums over requests, as counters give them. (Trimming single slow requests
would need each request's own value, which histograms do not give; tails have their own metric.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf, log

import numpy as np
from numpy.typing import NDArray

from trainyard.documents.evidence import QUALITY, Block, JudgeSpec, MetricSpec, Track
from trainyard.rollout.judge.defaults import LEAST_LOAD, MAX_SHARE_OF_AGE

_LENGTH_TOLERANCE = 0.9
"""Slices are cut by clocks; one that is a little short still counts as a whole one."""


@dataclass(slots=True)
class Sums:
    """Sums over the requests of a block."""

    requests: int = 0
    total: float = 0.0
    bad: int = 0

    def add(self, row: Block) -> None:
        self.requests += row.requests
        self.total += row.total
        self.bad += row.bad


@dataclass(slots=True)
class Side:
    """One track in a block: all of it, and pod by pod. Pods without requests are left out."""

    all: Sums = field(default_factory=Sums)
    pods: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))


@dataclass(slots=True)
class PairedBlock:
    """Both tracks over the same time at the same weight (`quality`: the weight at its start)."""

    start_s: float
    end_s: float
    weight: int
    stratum: str = ""
    stable: Side = field(default_factory=Side)
    candidate: Side = field(default_factory=Side)

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2

    @property
    def load_ratio(self) -> float:
        """Return the load of a candidate's server over that of a stable one, as weighted.

        Servers are those with requests in the block.
        """
        candidate = self.weight / max(1, len(self.candidate.pods))
        stable = (100 - self.weight) / max(1, len(self.stable.pods))
        return candidate / stable if stable > 0 else inf

    def side(self, track: Track) -> Side:
        return self.stable if track == "stable" else self.candidate

    def add(self, row: Block) -> None:
        self.start_s = min(self.start_s, row.t - row.duration_s)
        self.end_s = max(self.end_s, row.t)
        if row.requests:
            side = self.side(row.track)
            side.all.add(row)
            side.pods[row.pod].add(row)


def without_repeats(rows: Iterable[Block]) -> list[Block]:
    """Return one row for each (t, release, pod, metric, stratum), whatever the order of `rows`.

    A look that was tried again may have written its rows twice. If they differ, the row with the
    most requests is the later reading.
    """
    kept: dict[tuple[float, str, str, str, str], Block] = {}
    for row in rows:
        key = (row.t, row.release, row.pod, row.metric, row.stratum)
        other = kept.get(key)
        if other is None or _preference(row) > _preference(other):
            kept[key] = row
    return [kept[key] for key in sorted(kept)]


def _preference(row: Block) -> tuple[int, int, float, float, int, str, str]:
    return (
        row.requests,
        row.bad,
        row.total,
        row.duration_s,
        row.weight_candidate,
        row.track,
        row.kind,
    )


def closed_blocks(
    rows: Sequence[Block], metric: MetricSpec, spec: JudgeSpec
) -> tuple[PairedBlock, ...]:
    """Return the closed blocks of one metric, oldest first, those of all strata together.

    Args:
        rows: rows without repeats, of any metrics.

    Slices are merged until each track has `min_requests_per_block` and the block is as long as
    `block_s`. What is still open at the end waits; what is open when the weight changes is left
    out, because the two tracks would be compared over different mixes of load. What answers say
    does not depend on load, so blocks of `quality` go on across weights: there are only so many
    prompts. Each stratum closes blocks of its own, so no mix of strata is ever compared with
    another mix.
    """
    usable = [row for row in rows if row.metric == metric.name and _is_usable(row, metric)]
    strata = sorted({row.stratum for row in usable})
    blocks = [
        block
        for stratum in strata
        for block in _closed(
            [row for row in usable if row.stratum == stratum],
            stratum,
            spec,
            across_weights=metric.name == QUALITY,
        )
    ]
    return tuple(sorted(blocks, key=lambda block: (block.end_s, block.start_s, block.stratum)))


def _closed(
    usable: Sequence[Block], stratum: str, spec: JudgeSpec, *, across_weights: bool
) -> list[PairedBlock]:
    blocks: list[PairedBlock] = []
    current: PairedBlock | None = None
    ordered = sorted(_seen_together(usable), key=lambda row: (row.t, row.weight_candidate))
    for (end_s, weight), slice_ in groupby(ordered, key=lambda row: (row.t, row.weight_candidate)):
        if current is None or (current.weight != weight and not across_weights):
            current = PairedBlock(start_s=end_s, end_s=end_s, weight=weight, stratum=stratum)
        for row in slice_:
            current.add(row)
        if _is_closed(current, spec):
            blocks.append(current)
            current = None
    return blocks


def restarts(blocks: Sequence[PairedBlock]) -> tuple[int, ...]:
    """Return where evidence of harm starts afresh: at block 0 and wherever the weight rose.

    A fault that only shows under load must not have to make up for the quiet steps before it.
    """
    rises = (i for i in range(1, len(blocks)) if blocks[i].weight > blocks[i - 1].weight)
    return (0, *rises) if blocks else ()


def counts_for_promotion(
    blocks: Sequence[PairedBlock], metric: str, spec: JudgeSpec
) -> NDArray[np.bool_]:
    """Tell of each block whether loads were equal, or those of the last step.

    A server that gets less traffic answers sooner, so what a candidate shows in the quiet steps may
    find harm but never proves that it is good enough. Where its servers are as many as its weight
    asks for, all steps load them alike. Which blocks count depends on weights and on numbers of
    servers only. What answers say does not depend on load: all blocks of `quality` count.
    """
    return np.array(
        [
            metric == QUALITY or block.weight >= spec.last_weight or block.load_ratio >= LEAST_LOAD
            for block in blocks
        ],
        dtype=bool,
    )


def log_start_weight(number: int) -> float:
    """Return ln of the share of the budget that start `number` (from 0) gets: 1/2, 1/4, ..."""
    return -(number + 1) * log(2.0)


def _is_usable(row: Block, metric: MetricSpec) -> bool:
    exposed = row.weight_candidate > 0
    unreadable = metric.kind == "mean" and row.requests > 0 and row.total <= 0
    return exposed and row.kind == metric.kind and not unreadable


def _is_closed(block: PairedBlock, spec: JudgeSpec) -> bool:
    enough = min(block.stable.all.requests, block.candidate.all.requests)
    least_s = max(spec.block_s, MAX_SHARE_OF_AGE * block.end_s)
    return enough >= spec.min_requests_per_block and block.length_s >= _LENGTH_TOLERANCE * least_s


def _seen_together(rows: Sequence[Block]) -> list[Block]:
    """Return the rows during most of which the other track was observed too.

    Where one track could not be read, the other's rows have nothing to be compared with.
    """
    spans = {
        track: _union((row.t - row.duration_s, row.t) for row in rows if row.track == track)
        for track in ("stable", "candidate")
    }
    return [
        row
        for row in rows
        if _covered_s(row, spans["candidate" if row.track == "stable" else "stable"])
        >= 0.5 * row.duration_s
    ]


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _covered_s(row: Block, spans: Sequence[tuple[float, float]]) -> float:
    start, end = row.t - row.duration_s, row.t
    covered = 0.0
    index = bisect_right(spans, (end, float("inf"))) - 1
    while index >= 0 and spans[index][1] > start:
        covered += min(end, spans[index][1]) - max(start, spans[index][0])
        index -= 1
    return covered
