"""Verdicts of the metrics and of the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from trainyard.documents.evidence import (
    QUALITY,
    Block,
    JudgeSpec,
    MetricSpec,
    MetricVerdict,
    Outcome,
    Verdict,
)
from trainyard.rollout.judge.averages import average_path
from trainyard.rollout.judge.blocks import (
    PairedBlock,
    Side,
    closed_blocks,
    counts_for_promotion,
    without_repeats,
)
from trainyard.rollout.judge.counts import count_path
from trainyard.rollout.judge.drift import find_drift, now_drifting, without_drift
from trainyard.rollout.judge.guards import latencies_are_missing, share_is_off, stable_is_sick
from trainyard.rollout.judge.history import learn
from trainyard.rollout.judge.paths import EvidencePath

_WAITING = (
    "no closed block yet: both releases need requests in the same slice of time, "
    "and missing data are no evidence"
)

_NOT_AWAITED = "no closed block; it could only show harm, and promotion does not wait for it"

_SCATTERED = (
    "held: the candidate's pods differ among themselves more than stable's did, so the release and "
    "its pods cannot be told apart"
)
_OFF_SHARE = "Held: the candidate's share of the requests is not its weight (sessions that stick?)."
_MISSING = (
    "Held: far more of the candidate's requests than of stable's have no first token, so its "
    "latencies are those of a part of them (do requests hang, or are they refused?)."
)
_SICK = "Held: the stable release fails so many requests itself that it is no measure."


@dataclass(frozen=True, slots=True)
class Values:
    """Both tracks' averages (seconds) or shares over some blocks."""

    stable: float
    candidate: float

    @property
    def ratio(self) -> float | None:
        """Candidate's value over stable's; None where that is no number."""
        if self.stable <= 0:
            return None
        ratio = self.candidate / self.stable
        return ratio if isfinite(ratio) else None


def verdict(rows: Sequence[Block], spec: JudgeSpec) -> Verdict:
    """Return the verdict on a log of blocks."""
    kept = without_repeats(rows)
    spec = learn(kept, spec)
    drift = find_drift(kept, spec)
    closed = {
        metric.name: without_drift(closed_blocks(kept, metric, spec), metric.name, drift)
        for metric in spec.metrics
    }
    metrics = tuple(metric_verdict(closed[metric.name], metric, spec) for metric in spec.metrics)
    outcome = _outcome(metrics, closed, spec)
    drifting = now_drifting(drift)
    held = (drifting or _held(closed, kept)) if outcome == "NON_INFERIOR" else ""
    if held:
        outcome = "UNDECIDED"
    return Verdict(
        outcome=outcome,
        metrics=metrics,
        looks=max(one.blocks for one in metrics),
        exposed_requests=_exposed_requests(kept, spec),
        at=max((row.t for row in kept), default=0.0),
        reason=held
        or _reason(outcome, metrics, closed, spec)
        + (f" {drifting}" if drifting and outcome == "UNDECIDED" else ""),
    )


def path_of(blocks: Sequence[PairedBlock], metric: MetricSpec, spec: JudgeSpec) -> EvidencePath:
    """Return the evidence on one metric after each of its closed blocks."""
    if metric.kind == "mean":
        return average_path(blocks, metric, spec)
    return count_path(blocks, metric, spec)


def metric_verdict(
    blocks: Sequence[PairedBlock], metric: MetricSpec, spec: JudgeSpec
) -> MetricVerdict:
    """Return the verdict on one metric from its closed blocks."""
    path = path_of(blocks, metric, spec)
    if not blocks:
        return _before_any_block(metric)
    harmed_at = path.first_harm()
    index = len(blocks) - 1 if harmed_at is None else harmed_at
    seen = blocks[: index + 1]
    values = values_of(seen, metric)
    outcome: Outcome = "UNDECIDED"
    note = ""
    if harmed_at is not None:
        outcome = "HARM"
        note = f"harm was shown at {seen[-1].end_s:g} s of exposure, after {len(seen)} blocks"
    elif metric.harm_only:
        note = ""
    elif path.is_non_inferior()[-1]:
        now = values_of(since_weight_changed(blocks), metric)
        if contradicts_promotion(now, metric):
            note = (
                f"good enough over all blocks, but at {blocks[-1].weight} % of the traffic the "
                f"candidate has {_figure(now.candidate, metric)} against "
                f"{_figure(now.stable, metric)}"
            )
        else:
            outcome = "NON_INFERIOR"
    elif path.is_held():
        note = _SCATTERED
    elif not counts_for_promotion(blocks, metric.name, spec).any():
        note = f"evidence for promotion counts from {spec.last_weight} % of the traffic on"
    return MetricVerdict(
        metric=metric.name,
        outcome=outcome,
        stable_value=values.stable,
        candidate_value=values.candidate,
        ratio=values.ratio,
        harm_margin=metric.harm_margin,
        promote_margin=metric.promote_margin,
        harm_evidence=float(path.harm[index]),
        harm_threshold=float(path.harm_threshold[index]),
        promote_evidence=0.0 if metric.harm_only else float(path.promote[index]),
        promote_threshold=0.0 if metric.harm_only else float(path.promote_threshold[index]),
        stable_requests=sum(block.stable.all.requests for block in seen),
        candidate_requests=sum(block.candidate.all.requests for block in seen),
        blocks=len(blocks),
        note=note,
    )


def values_of(blocks: Sequence[PairedBlock], metric: MetricSpec) -> Values:
    """Return both tracks' values over blocks, of which there is at least one.

    Stable's is weighted with the candidate's requests. Otherwise it would be mostly about the first
    steps, when stable had most of the traffic, and the candidate's about the last.
    """
    weights = [block.candidate.all.requests for block in blocks]
    stable = [
        _sum(block.stable, metric) / block.stable.all.requests * weight
        for block, weight in zip(blocks, weights, strict=True)
    ]
    candidate = [_sum(block.candidate, metric) for block in blocks]
    return Values(stable=sum(stable) / sum(weights), candidate=sum(candidate) / sum(weights))


def since_weight_changed(blocks: Sequence[PairedBlock]) -> Sequence[PairedBlock]:
    """Return the newest blocks, those at the weight of the last one."""
    start = len(blocks)
    while start > 0 and blocks[start - 1].weight == blocks[-1].weight:
        start -= 1
    return blocks[start:]


def contradicts_promotion(now: Values, metric: MetricSpec) -> bool:
    """Tell whether the candidate looks bad at the newest weight, whatever all blocks together say.

    Where loads were equal at all steps, earlier ones count for promotion too; they must not promote
    a candidate that has become slow since. This is an estimate, not a test; it can only hold a
    promotion back.
    """
    if metric.kind == "mean":
        return now.candidate > (1 + metric.harm_margin) * now.stable
    return (
        now.candidate > metric.promote_ceiling
        and now.candidate > metric.promote_margin * now.stable
    )


def blocks_that_count(blocks: Sequence[PairedBlock], metric: str, spec: JudgeSpec) -> int:
    """Return how many closed blocks count for `min_blocks_last_step`.

    They are those of users' requests with the last step's weight or more. Of `quality`, which only
    probes have and which no load changes, it is all of them.
    """
    if metric == QUALITY:
        return len(blocks)
    return sum(block.weight >= spec.last_weight and not block.stratum for block in blocks)


def _sum(side: Side, metric: MetricSpec) -> float:
    return side.all.total if metric.kind == "mean" else side.all.bad


def _before_any_block(metric: MetricSpec) -> MetricVerdict:
    return MetricVerdict(
        metric=metric.name,
        outcome="UNDECIDED",
        stable_value=None,
        candidate_value=None,
        ratio=None,
        harm_margin=metric.harm_margin,
        promote_margin=metric.promote_margin,
        harm_evidence=0.0,
        harm_threshold=1.0,
        promote_evidence=0.0,
        promote_threshold=0.0 if metric.harm_only else 1.0,
        stable_requests=0,
        candidate_requests=0,
        blocks=0,
        note=_NOT_AWAITED if metric.harm_only else _WAITING,
    )


def _outcome(
    metrics: Sequence[MetricVerdict],
    closed: dict[str, tuple[PairedBlock, ...]],
    spec: JudgeSpec,
) -> Outcome:
    if any(one.outcome == "HARM" for one in metrics):
        return "HARM"
    proven = all(one.outcome == "NON_INFERIOR" for one in metrics if not one.harm_only)
    return "NON_INFERIOR" if proven and not _short_of_blocks(closed, spec) else "UNDECIDED"


def _held(closed: dict[str, tuple[PairedBlock, ...]], rows: Sequence[Block]) -> str:
    """Return why a promotion waits although every metric is good enough; else empty.

    Errors are counted at the router, which sees all requests of both tracks; what servers count may
    lack a server that could not be read.
    """
    errors = closed.get("errors", ())
    if share_is_off(errors):
        return _OFF_SHARE
    if latencies_are_missing(rows):
        return _MISSING
    return _SICK if stable_is_sick(errors) else ""


def _short_of_blocks(closed: dict[str, tuple[PairedBlock, ...]], spec: JudgeSpec) -> list[str]:
    awaited = [metric.name for metric in spec.metrics if not metric.harm_only]
    return [
        name
        for name in awaited
        if blocks_that_count(closed[name], name, spec) < spec.min_blocks_last_step
    ]


def _exposed_requests(rows: Sequence[Block], spec: JudgeSpec) -> int:
    """Return users' requests to the candidate by the metric that counts most of them."""
    judged = {metric.name for metric in spec.metrics if not metric.harm_only}
    by_metric: dict[str, int] = {}
    for row in rows:
        exposed = row.track == "candidate" and row.weight_candidate > 0 and not row.stratum
        if exposed and row.metric in judged:
            by_metric[row.metric] = by_metric.get(row.metric, 0) + row.requests
    return max(by_metric.values(), default=0)


def _reason(
    outcome: Outcome,
    metrics: Sequence[MetricVerdict],
    closed: dict[str, tuple[PairedBlock, ...]],
    spec: JudgeSpec,
) -> str:
    kinds = {metric.name: metric for metric in spec.metrics}
    if outcome == "HARM":
        harmed = [one for one in metrics if one.outcome == "HARM"]
        return "Harm: " + "; ".join(_comparison(one, kinds[one.metric]) for one in harmed) + "."
    metrics = [one for one in metrics if not one.harm_only]
    if outcome == "NON_INFERIOR":
        compared = "; ".join(_comparison(one, kinds[one.metric]) for one in metrics)
        return f"Good enough in every metric: {compared}."
    blind = [one.metric for one in metrics if not one.blocks]
    if blind:
        return f"Undecided: {', '.join(blind)}: {_WAITING}."
    open_ = [one for one in metrics if one.outcome == "UNDECIDED"]
    if open_:
        compared = "; ".join(_progress(one, kinds[one.metric]) for one in open_)
        return f"Undecided: {compared}."
    short = _short_of_blocks(closed, spec)
    have = min(blocks_that_count(closed[name], name, spec) for name in short)
    return (
        f"Undecided: good enough in every metric, but only {have} of {spec.min_blocks_last_step} "
        f"blocks at {spec.last_weight} % of the traffic so far."
    )


def _comparison(one: MetricVerdict, metric: MetricSpec) -> str:
    if one.stable_value is None or one.candidate_value is None:
        return f"{one.metric}: {one.note}"
    margin = one.harm_margin if one.outcome == "HARM" else one.promote_margin
    allowed = f"{1 + margin:.4g}" if metric.kind == "mean" else f"{margin:.4g}"
    level = metric.harm_floor if one.outcome == "HARM" else metric.promote_ceiling
    if metric.kind == "count" and level > 0:
        allowed += f" or {level:.2%}"
    ratio = "" if one.ratio is None else f", {one.ratio:.2f} times stable's"
    return (
        f"{one.metric} {_figure(one.candidate_value, metric)} against "
        f"{_figure(one.stable_value, metric)}{ratio} (allowed {allowed}) "
        f"in {one.candidate_requests} requests"
    )


def _progress(one: MetricVerdict, metric: MetricSpec) -> str:
    done = min(max(one.promote_evidence / one.promote_threshold, 0.0), 1.0)
    return f"{_comparison(one, metric)}, {done:.0%} of the evidence that promotion needs" + (
        f" ({one.note})" if one.note else ""
    )


def _figure(value: float, metric: MetricSpec) -> str:
    return f"{value:.4g} s" if metric.kind == "mean" else f"{value:.2%}"
