"""How often the judge is wrong, and how fast it is right, in simulated rollouts.

    python tests/benchmarks/judge_calibration.py [--runs 100] [--seed 1] [--cell TEXT]

Each row is one kind of traffic and one kind of candidate, seen by the judge with its default
settings and, in the same runs, by a rule with fixed thresholds as rollout controllers offer it:
each minute, over the last five, "candidate's average TTFT or TPOT above 1.15 times stable's, or its
share of errors more than 0.5 points higher", rolled back at the fourth such minute and otherwise
promoted at the end.

Traffic: Poisson arrivals; two candidate pods and six stable ones; latencies are log-normal, times a
load that all pods share and that wanders, times the pod's own lasting effect, times its own AR(1)
noise. Slices of 30 s; 30 minutes; weights 10, 25, 50 % for ten minutes each.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainyard.documents.evidence import Block, JudgeSpec, Outcome, Track, default_metrics
from trainyard.rollout.judge import judge
from trainyard.rollout.judge.blocks import closed_blocks, without_repeats
from trainyard.rollout.judge.combine import path_of

Floats = NDArray[np.float64]
Step = tuple[int, float]
"""Candidate's percent of the traffic, seconds."""

SLICE_S = 30.0
PLANS: dict[str, tuple[Step, ...]] = {
    "10/25/50": ((10, 600.0), (25, 600.0), (50, 600.0)),
    "fast": ((10, 240.0), (25, 240.0), (50, 1320.0)),
}
TTFT_S, TTFT_SIGMA = 0.2, 0.6
TPOT_S, TPOT_SIGMA = 0.02, 0.25
TAIL_S = TTFT_S * float(np.exp(2.326 * TTFT_SIGMA))
"""The slowest 1 % of stable's requests are above this."""


@dataclass(frozen=True)
class World:
    """A kind of traffic, and what is wrong with the candidate."""

    rate: float = 8.0
    """Requests a second."""
    stable_pods: int = 6
    candidate_pods: int = 2
    pod_sd: float = 0.03
    minute_sd: float = 0.1
    minute_rho: float = 0.6
    """Between slices."""
    surge: bool = False
    """Twice the traffic at 1.3 times the latency in minutes 10 to 15."""
    error_share: float = 0.002
    burst: int = 0
    """A pod loses so many requests at once, on average every second rollout."""
    ttft: float = 1.0
    """Candidate's factor."""
    tpot: float = 1.0
    candidate_errors: float = 0.002
    slow_share: float = 0.0
    """Share of the candidate's requests that take 5 s more."""


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    name: str
    world: World
    truth: Literal["good", "bad", "grey"]
    """grey: between the margins, where neither answer is wrong."""


CELLS: tuple[Cell, ...] = (
    Cell("no change", World(), "good"),
    Cell("no change, 1 rps", World(rate=1.0), "good"),
    Cell("no change, surge", World(surge=True), "good"),
    Cell("no change, minutes 0.95", World(minute_rho=0.95), "good"),
    Cell("no change, noisy pods", World(pod_sd=0.08, minute_sd=0.2), "good"),
    Cell("no change, one pod a side", World(stable_pods=1, candidate_pods=1), "good"),
    Cell("no change, bursts of 20", World(burst=20), "good"),
    Cell("no change, errors 4 %", World(error_share=0.04, candidate_errors=0.04), "good"),
    Cell("ttft +10 %, harm margin", World(ttft=1.10), "grey"),
    Cell("ttft +15 %, promotion margin", World(ttft=1.15), "bad"),
    Cell("ttft +30 %", World(ttft=1.3), "bad"),
    Cell("ttft +50 %", World(ttft=1.5), "bad"),
    Cell("ttft +50 %, one pod a side", World(ttft=1.5, stable_pods=1, candidate_pods=1), "bad"),
    Cell("ttft x3", World(ttft=3.0), "bad"),
    Cell("tpot +30 %", World(tpot=1.3), "bad"),
    Cell("5 % of requests 5 s late", World(slow_share=0.05), "bad"),
    Cell("errors 1 %", World(candidate_errors=0.01), "bad"),
    Cell("errors 2 %", World(candidate_errors=0.02), "bad"),
    Cell("errors 5 %", World(candidate_errors=0.05), "bad"),
    Cell("errors 30 %", World(candidate_errors=0.3), "bad"),
)


@dataclass
class Tally:
    """What one rule did in the runs of one cell."""

    rolled_back_at_s: list[float] = field(default_factory=list)
    promoted_at_s: list[float] = field(default_factory=list)
    exposed: list[int] = field(default_factory=list)
    """Candidate's requests up to each rollback."""
    runs: int = 0

    def add(self, outcome: Outcome, at_s: float, exposed: int) -> None:
        self.runs += 1
        if outcome == "HARM":
            self.rolled_back_at_s.append(at_s)
            self.exposed.append(exposed)
        elif outcome == "NON_INFERIOR":
            self.promoted_at_s.append(at_s)

    @property
    def rolled_back(self) -> float:
        return len(self.rolled_back_at_s) / self.runs

    @property
    def promoted(self) -> float:
        return len(self.promoted_at_s) / self.runs


def simulate(world: World, plan: Sequence[Step], rng: np.random.Generator) -> list[Block]:
    """Return the blocks of one rollout."""
    weights = np.concatenate([np.full(int(s / SLICE_S), percent) for percent, s in plan])
    slices = len(weights)
    minute = np.arange(slices) * SLICE_S / 60
    surging = world.surge & (minute >= 10) & (minute < 15)
    load = np.exp(_ar(1, slices, 0.1, 0.9, rng)[0]) * np.where(surging, 1.3, 1.0)
    rate = world.rate * np.where(surging, 2.0, 1.0) * SLICE_S
    pods: list[tuple[Track, Floats]] = [
        ("stable", rate * (1 - weights / 100) / world.stable_pods)
    ] * world.stable_pods
    pods += [("candidate", rate * weights / 100 / world.candidate_pods)] * world.candidate_pods
    noise = _ar(len(pods), slices, world.minute_sd, world.minute_rho, rng)
    noise += rng.normal(0, world.pod_sd, (len(pods), 1))

    rows: list[Block] = []
    for number, (track, expected) in enumerate(pods):
        changed = track == "candidate"
        n = rng.poisson(expected)
        level = np.repeat(load * np.exp(noise[number]), n)
        ttft = rng.lognormal(0.0, TTFT_SIGMA, n.sum()) * TTFT_S * level
        tpot = rng.lognormal(0.0, TPOT_SIGMA, n.sum()) * TPOT_S * level
        if changed:
            ttft = ttft * world.ttft + 5.0 * (rng.random(n.sum()) < world.slow_share)
            tpot = tpot * world.tpot
        share = world.candidate_errors if changed else world.error_share
        bad = rng.binomial(n, np.minimum(share * load, 1.0))
        if world.burst:
            lost = rng.random(slices) < 0.5 / slices
            bad = np.minimum(n, bad + world.burst * lost)
        late = _sums((ttft > TAIL_S).astype(float), n)
        rows += _rows(track, number, n, _sums(ttft, n), _sums(tpot, n), bad, late, weights)
    return rows


def decide(blocks: Sequence[Block], spec: JudgeSpec) -> tuple[Outcome, float, int]:
    """Return what a judge that looks after every slice decides first, when, and the exposure then.

    The same as following `replay`, but it asks the judge only where the evidence of every metric
    has crossed a threshold.
    """
    rows = without_repeats(blocks)
    harmed_at = [float("inf")]
    proven_at: list[set[float]] = []
    for metric in spec.metrics:
        closed = closed_blocks(rows, metric, spec)
        path = path_of(closed, metric, spec)
        first = path.first_harm()
        if first is not None:
            harmed_at.append(closed[first].end_s)
        proven = zip(closed, path.is_non_inferior(), strict=True)
        proven_at.append({block.end_s for block, crossed in proven if crossed})
    for at_s in sorted(set.intersection(*proven_at)):
        if at_s < min(harmed_at):
            seen = [row for row in rows if row.t <= at_s]
            if judge(seen, spec).outcome == "NON_INFERIOR":
                return "NON_INFERIOR", at_s, 0
    if min(harmed_at) == float("inf"):
        return "UNDECIDED", max(row.t for row in rows), 0
    seen = [row for row in rows if row.t <= min(harmed_at)]
    return "HARM", min(harmed_at), judge(seen, spec).exposed_requests


def fixed_threshold(blocks: Sequence[Block]) -> tuple[Outcome, float, int]:
    """Return what the rule with fixed thresholds decides, when, and the exposure then."""
    end_s = max(row.t for row in blocks)
    sums: dict[tuple[str, str], Callable[[float], Floats]] = {}
    for metric in ("ttft", "tpot", "errors"):
        for track in ("stable", "candidate"):
            sums[metric, track] = _running(blocks, metric, track)
    failures = 0
    for at_s in np.arange(60.0, end_s + 1, 60.0):
        window = {key: sum_(at_s) - sum_(at_s - 300.0) for key, sum_ in sums.items()}
        if window["errors", "candidate"][0] > 0 and _is_failure(window):
            failures += 1
        if failures > 3:
            return "HARM", float(at_s), int(sums["errors", "candidate"](at_s)[0])
    return "NON_INFERIOR", float(end_s), 0


def run(cell: Cell, plan: Sequence[Step], runs: int, seed: int) -> tuple[Tally, Tally]:
    """Return what the judge and what the fixed thresholds did in `runs` rollouts."""
    spec = JudgeSpec(metrics=default_metrics(), max_duration_s=sum(s for _, s in plan))
    ours, fixed = Tally(), Tally()
    for number in range(runs):
        rng = np.random.default_rng([seed, zlib.crc32(cell.name.encode()), number])
        blocks = simulate(cell.world, plan, rng)
        ours.add(*decide(blocks, spec))
        fixed.add(*fixed_threshold(blocks))
    return ours, fixed


def line(cell: Cell, ours: Tally, fixed: Tally) -> str:
    """Return one line of the table."""
    return (
        f"{cell.name:30} {cell.truth:6}| {100 * ours.rolled_back:9.1f} "
        f"{_minutes(ours.rolled_back_at_s)} {_median(ours.exposed)} "
        f"{100 * ours.promoted:6.1f} {_minutes(ours.promoted_at_s)} "
        f"| {100 * fixed.rolled_back:9.1f} {_minutes(fixed.rolled_back_at_s)} "
        f"{_median(fixed.exposed)} {100 * fixed.promoted:6.1f}"
    )


def _is_failure(window: dict[tuple[str, str], Floats]) -> bool:
    def mean(metric: str, track: str) -> float:
        n, value = window[metric, track]
        return float(value / n)

    slower = any(mean(m, "candidate") > 1.15 * mean(m, "stable") for m in ("ttft", "tpot"))
    return slower or mean("errors", "candidate") - mean("errors", "stable") > 0.005


def _running(blocks: Sequence[Block], metric: str, track: str) -> Callable[[float], Floats]:
    """Return the function time -> (requests, sum or bad events) so far."""
    chosen = sorted(
        (row.t, row.requests, row.total + row.bad)
        for row in blocks
        if row.metric == metric and row.track == track
    )
    times = np.array([row[0] for row in chosen])
    sums = np.vstack([np.zeros(2), np.cumsum([row[1:] for row in chosen], axis=0)])

    def so_far(at_s: float) -> Floats:
        return np.asarray(sums[np.searchsorted(times, at_s, side="right")])

    return so_far


def _ar(series: int, length: int, sd: float, rho: float, rng: np.random.Generator) -> Floats:
    """Return stationary AR(1) series, series x length."""
    shocks = rng.normal(0, sd, (series, length))
    out = shocks.copy()
    for i in range(1, length):
        out[:, i] = rho * out[:, i - 1] + np.sqrt(1 - rho**2) * shocks[:, i]
    return out


def _sums(values: Floats, n: NDArray[np.int64]) -> Floats:
    """Return the sums of consecutive runs of `values`, `n` values each."""
    ends = np.cumsum(n)
    running = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(running[ends] - running[ends - n])


def _rows(
    track: Track,
    number: int,
    n: NDArray[np.int64],
    ttft: Floats,
    tpot: Floats,
    bad: NDArray[np.int64],
    late: Floats,
    weights: NDArray[np.int64],
) -> list[Block]:
    rows = []
    for i, requests in enumerate(n):
        empty = Block(
            t=SLICE_S * (i + 1),
            duration_s=SLICE_S,
            release=track,
            track=track,
            pod=f"{track}-{number}",
            metric="errors",
            kind="count",
            requests=int(requests),
            weight_candidate=int(weights[i]),
        )
        mean = {"kind": "mean", "total": max(float(ttft[i]), 0.0)}
        rows += [
            empty.model_copy(update={"bad": int(bad[i])}),
            empty.model_copy(update={"metric": "ttft_tail", "bad": round(late[i])}),
            empty.model_copy(update={"metric": "ttft", **mean}),
            empty.model_copy(update={"metric": "tpot", **mean, "total": max(float(tpot[i]), 0.0)}),
        ]
    return rows


def _minutes(at_s: Sequence[float]) -> str:
    return f"{np.median(at_s) / 60:5.1f}" if at_s else "    -"


def _median(values: Sequence[int]) -> str:
    return f"{np.median(values):5.0f}" if values else "    -"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Calibration of the judge by simulation.")
    parser.add_argument("--runs", type=int, default=100, help="rollouts a line (100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cell", default="", help="only lines whose name contains this")
    parser.add_argument("--plan", choices=sorted(PLANS), default="10/25/50")
    args = parser.parse_args()
    print(
        f"{args.runs} runs a line, weights {args.plan}, seed {args.seed}; "
        "r = rolled back %, @ = median minutes, n = median exposed requests, p = promoted %\n"
        f"{'':30} {'truth':6}| {'judge: r':>9} {'@':>5} {'n':>5} {'p':>6} {'@':>5} "
        f"| {'fixed: r':>9} {'@':>5} {'n':>5} {'p':>6}"
    )
    for cell in CELLS:
        if args.cell in cell.name:
            print(line(cell, *run(cell, PLANS[args.plan], args.runs, args.seed)), flush=True)


if __name__ == "__main__":
    main()
