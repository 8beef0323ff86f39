"""Slices in which the tracks' requests were not alike, so that latencies say nothing.

===============  =======================================  ======================================
drift            what it compares                         whose blocks it takes out
===============  =======================================  ======================================
prompts          mean tokens of a prompt, as a ratio      `ttft`, `tpot`, `ttft_tail`,
                                                          `truncated`, `empty`
prefix cache     shares of prompt tokens found there      `ttft`, `ttft_tail`
===============  =======================================  ======================================

Routers that keep sessions together, or send what looks alike to the same pod, make the prompts
differ; a new pod has a cold cache. Both can look like harm, and both can hide it. Slices are
compared over the newest `DRIFT_SLICES`: their differences, weighted by how much was counted, with
the standard error that they themselves show. What decides are covariates, never latencies or
errors, so leaving blocks out favours no answer. It is a guard: the answer is only later, or never.

Rows of metrics `prompts` and `prefix_hits` carry the figures; a log without them has no drift.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import expm1, log, log1p, sqrt

from trainyard.documents.evidence import Block, JudgeSpec, Track
from trainyard.rollout.judge import defaults
from trainyard.rollout.judge.blocks import PairedBlock

PROMPTS = "prompts"
PREFIX_HITS = "prefix_hits"

TAKEN_OUT: Mapping[str, tuple[str, ...]] = {
    PROMPTS: ("ttft", "tpot", "ttft_tail", "truncated", "empty"),
    PREFIX_HITS: ("ttft", "ttft_tail"),
}
"""Judged metrics that each covariate speaks about."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What one covariate says about a log."""

    covariate: str
    beyond: tuple[tuple[float, float], ...]
    """Slices (start, end) at whose end the tracks differed."""
    now: str
    """The difference at the newest slice, in words; empty if there is none."""


@dataclass(frozen=True, slots=True)
class _Slice:
    start_s: float
    end_s: float
    difference: float
    weight: float


def find_drift(rows: Sequence[Block], spec: JudgeSpec) -> tuple[Drift, ...]:
    """Return the drifts of a log without repeats. Each slice is judged by what came before it."""
    found = []
    if spec.prompt_drift > 0:
        slices = _slices(rows, PROMPTS, _log_mean)
        found.append(_drift(PROMPTS, slices, log1p(spec.prompt_drift), _say_prompts))
    if spec.prefix_drift > 0:
        slices = _slices(rows, PREFIX_HITS, _share)
        found.append(_drift(PREFIX_HITS, slices, spec.prefix_drift, _say_prefix))
    return tuple(found)


def without_drift(
    blocks: Sequence[PairedBlock], metric: str, drifts: Sequence[Drift]
) -> tuple[PairedBlock, ...]:
    """Return those closed blocks of a metric in which the tracks' requests were alike."""
    spans = [
        span for drift in drifts if metric in TAKEN_OUT[drift.covariate] for span in drift.beyond
    ]
    return tuple(
        block
        for block in blocks
        if block.stratum
        or not any(start < block.end_s and end > block.start_s for start, end in spans)
    )


def now_drifting(drifts: Sequence[Drift]) -> str:
    """Return what differs at the newest slice, in a sentence; empty if nothing does."""
    told = [drift.now for drift in drifts if drift.now]
    return f"Held: {'; '.join(told)}, so latencies are not comparable." if told else ""


def _drift(
    covariate: str, slices: Sequence[_Slice], margin: float, say: Callable[[float], str]
) -> Drift:
    beyond, now = [], ""
    for index, slice_ in enumerate(slices):
        window = slices[max(0, index + 1 - defaults.DRIFT_SLICES) : index + 1]
        difference = _difference_beyond(window, margin)
        now = say(difference) if difference is not None else ""
        if difference is not None:
            beyond.append((slice_.start_s, slice_.end_s))
    return Drift(covariate, tuple(beyond), now)


def _difference_beyond(window: Sequence[_Slice], margin: float) -> float | None:
    """Return the mean difference if it is surely larger than the margin, in either direction."""
    if len(window) < defaults.LEAST_DRIFT_SLICES:
        return None
    total = sum(one.weight for one in window)
    mean = sum(one.weight * one.difference for one in window) / total
    scatter = sum(one.weight * (one.difference - mean) ** 2 for one in window)
    error = sqrt(scatter / (len(window) - 1) / total)
    return mean if abs(mean) - defaults.DRIFT_SCORE * error > margin else None


def _slices(
    rows: Sequence[Block], metric: str, value: Callable[[int, float, int], float | None]
) -> list[_Slice]:
    """Return the differences (candidate minus stable) of those slices in which both were seen."""
    sums: dict[float, dict[Track, list[float]]] = defaultdict(dict)
    starts: dict[float, float] = {}
    for row in rows:
        if row.metric != metric or row.weight_candidate <= 0 or row.stratum:
            continue
        mine = sums[row.t].setdefault(row.track, [0, 0.0, 0])
        for index, figure in enumerate((row.requests, row.total, row.bad)):
            mine[index] += figure
        start_s = row.t - row.duration_s
        starts[row.t] = min(starts.get(row.t, start_s), start_s)
    found: list[_Slice] = []
    for end_s in sorted(sums):
        sides = [sums[end_s].get(track) for track in ("stable", "candidate")]
        values = [
            None if side is None else value(int(side[0]), side[1], int(side[2])) for side in sides
        ]
        stable, candidate = sides
        if stable is None or candidate is None or values[0] is None or values[1] is None:
            continue
        weight = stable[0] * candidate[0] / (stable[0] + candidate[0])
        found.append(_Slice(starts[end_s], end_s, values[1] - values[0], weight))
    return found


def _log_mean(requests: int, total: float, bad: int) -> float | None:
    return log(total / requests) if requests and total > 0 else None


def _share(requests: int, total: float, bad: int) -> float | None:
    return bad / requests if requests else None


def _say_prompts(difference: float) -> str:
    return f"the candidate's prompts differ from stable's by {expm1(difference):+.0%} in length"


def _say_prefix(difference: float) -> str:
    return (
        f"the candidate finds {100 * difference:+.0f} percentage points of its prompt tokens in "
        "its prefix cache, compared with stable"
    )
