"""Judges a stable release by its own objectives, once its rollout is over. Pure.

There is nothing left to compare with, so absolute objectives count: the share of requests that must
not fail, and the share that must be fast. How fast a release uses up what its objectives allow is
its **burn rate**: the share of bad requests over the share that is allowed. At 1 the allowance
lasts exactly for the period (30 days), at 14.4 for two days.

Rules, after the SRE workbook (chapter 5, multi-window, multi-burn-rate). A rule holds when both of
its windows burn faster than its rate: the long one shows that it matters, the short one that it has
not ended. Rates are for a period of 30 days; they are the budget's share over the window's share of
the period.

======  =====  ======  =====  ===================================================
rule    long   short   burns  what follows
======  =====  ======  =====  ===================================================
fast    1 h    5 min   14.4   rollback while the old servers are warm, else alarm
steady  6 h    30 min  6      rollback while the old servers are warm, else alarm
slow    3 d    6 h     1      alarm
======  =====  ======  =====  ===================================================

Whatever was not seen is missing: it is no good request and no bad one. A window needs
`min_requests` and, in its short part, figures for half of the time; a metric without any figure for
`BLIND_S` is told as blind. A release younger than a window is judged as if it had burned nothing
before it was stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf
from typing import Literal

from trainyard.documents.channel import Channel
from trainyard.documents.look import Histogram, PodCounters, RouteCounters, edge_of
from trainyard.documents.watch import Counted, Reading, Sample, WatchState
from trainyard.spec.model import LatencyObjective, ServingSlo

Metric = Literal["errors", "ttft", "tpot"]
METRICS: tuple[Metric, ...] = ("errors", "ttft", "tpot")

BLIND_S = 900.0
"""Seconds without any figure of a metric after which people are told."""

SLACK = 0.1
"""Share of a window by which a sample may reach out of it."""

FEWEST_COVERED = 0.5
"""Share of a short window for which there must be figures."""


@dataclass(frozen=True)
class Rule:
    """When a budget burns too fast."""

    name: str
    long_s: float
    short_s: float
    budget: float
    """Share of the period's budget that the long window may use."""
    alarm: Literal["page", "ticket"]
    """`page`: somebody must act now, or we do by a rollback."""

    def rate(self, period_s: float) -> float:
        """Return the burn rate at which the rule holds."""
        return self.budget * period_s / self.long_s


RULES = (
    Rule("fast", 3600.0, 300.0, 0.02, "page"),
    Rule("steady", 6 * 3600.0, 1800.0, 0.05, "page"),
    Rule("slow", 3 * 86400.0, 6 * 3600.0, 0.10, "ticket"),
)

RESOLUTIONS = ((3600.0, 0.0), (6 * 3600.0, 300.0), (3 * 86400.0 * (1 + SLACK), 3600.0))
"""Samples up to this age in seconds are merged to stretches of this length; older ones go."""


# --- counting -------------------------------------------------------------------------------------


def begin(channel: Channel, reading: Reading, slot: int) -> WatchState:
    """Return the state of a watch that begins. The channel has a stable release and a rollout."""
    assert channel.stable is not None
    assert channel.rollout is not None
    return WatchState(
        model=channel.model,
        environment=channel.environment,
        rollout=channel.rollout.number,
        slot=slot,
        release_id=channel.stable.release_id,
        since=reading.at,
        reading=reading,
    )


def go_on(
    state: WatchState | None, channel: Channel, reading: Reading, slot: int, slo: ServingSlo
) -> WatchState:
    """Return the state after another reading; of another release, it begins anew."""
    assert channel.stable is not None
    if state is None or state.release_id != channel.stable.release_id:
        return begin(channel, reading, slot)
    sample = count(state.reading, reading, state.release_id, slo)
    samples = compacted((*state.samples, sample), reading.at)
    assert channel.rollout is not None
    return state.model_copy(
        update={
            "created_at": reading.at,
            "rollout": channel.rollout.number,
            "slot": slot,
            "reading": reading,
            "samples": samples,
        }
    )


def count(before: Reading, after: Reading, release_id: str, slo: ServingSlo) -> Sample:
    """Return what happened between two readings."""
    covered_s = (after.at - before.at).total_seconds()
    return Sample(
        start=before.at,
        end=after.at,
        errors=_errors(before.route, after.route, release_id, covered_s),
        ttft=_latency(before, after, "ttft", slo.ttft, covered_s),
        tpot=_latency(before, after, "tpot", slo.tpot, covered_s),
    )


def _errors(
    before: RouteCounters | None, after: RouteCounters | None, release_id: str, covered_s: float
) -> Counted | None:
    if before is None or after is None or before.epoch != after.epoch:
        return None
    old, new = before.releases.get(release_id), after.releases.get(release_id)
    if old is None or new is None:
        return None
    bad = new.errors - old.errors
    ended = (new.arrivals - new.in_flight) - (old.arrivals - old.in_flight)
    if bad < 0 or ended < bad:
        return None
    return Counted(total=ended, bad=bad, covered_s=covered_s)


def _latency(
    before: Reading,
    after: Reading,
    metric: Literal["ttft", "tpot"],
    objective: LatencyObjective | None,
    covered_s: float,
) -> Counted | None:
    if objective is None:
        return None
    earlier = {(pod.pod, pod.started_at): pod for pod in before.pods}
    total = bad = 0
    seen = False
    for pod in after.pods:
        new: Histogram | None = getattr(pod, metric)
        old = _start_of(pod, earlier.get((pod.pod, pod.started_at)), metric, before.at)
        found = _late(old, new, objective.within_s)
        if found is not None:
            seen = True
            total, bad = total + found[0], bad + found[1]
    return Counted(total=total, bad=bad, covered_s=covered_s) if seen else None


def _start_of(
    pod: PodCounters, old: PodCounters | None, metric: str, before: datetime
) -> Histogram | None:
    """Return what a server's counters are compared with; zero if it started since then."""
    if old is not None:
        found: Histogram | None = getattr(old, metric)
        return found
    if pod.started_at is not None and pod.started_at >= before:
        return Histogram(count=0, total=0.0)
    return None


def _late(old: Histogram | None, new: Histogram | None, within_s: float) -> tuple[int, int] | None:
    """Return observations in between and those later than the objective; None if unknown.

    The edge that counts is the lowest one that is not below the objective, so that nobody is called
    late who was not.
    """
    if old is None or new is None:
        return None
    edges = [label for label in new.buckets if within_s <= (edge_of(label) or 0.0) < inf]
    if not edges:
        return None
    edge = min(edges, key=float)
    total = new.count - old.count
    in_time = new.buckets[edge] - old.buckets.get(edge, 0)
    if total < 0 or not 0 <= in_time <= total:
        return None
    return total, total - in_time


def compacted(samples: Sequence[Sample], now: datetime) -> tuple[Sample, ...]:
    """Return samples with the older ones merged, and without those that no window reaches."""
    merged: list[Sample] = []
    last: tuple[float, int] | None = None
    for sample in samples:
        place = _place(sample, now)
        if place is None:
            continue
        if place[0] and place == last:
            merged[-1] = _merged(merged[-1], sample)
        else:
            merged.append(sample)
        last = place
    return tuple(merged)


def _place(sample: Sample, now: datetime) -> tuple[float, int] | None:
    """Return the stretch that a sample is merged into, as its length and number; None: too old."""
    age_s = (now - sample.end).total_seconds()
    for until_s, length_s in RESOLUTIONS:
        if age_s < until_s:
            number = int(sample.end.timestamp() // length_s) if length_s else 0
            return length_s, number
    return None


def _merged(one: Sample, two: Sample) -> Sample:
    return Sample(
        start=one.start,
        end=two.end,
        errors=_sum(one.errors, two.errors),
        ttft=_sum(one.ttft, two.ttft),
        tpot=_sum(one.tpot, two.tpot),
    )


def _sum(one: Counted | None, two: Counted | None) -> Counted | None:
    if one is None or two is None:
        return one or two
    return Counted(
        total=one.total + two.total,
        bad=one.bad + two.bad,
        covered_s=one.covered_s + two.covered_s,
    )


# --- judging --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alert:
    """Something that people must hear of."""

    name: str
    """Such as `errors-page`, `errors-ticket` or `ttft-blind`; the same alert keeps its name."""
    message: str
    rolls_back: bool = False
    """It is worth a rollback."""


@dataclass(frozen=True)
class Judged:
    """What a look at the watch's state says."""

    alerts: tuple[Alert, ...]
    notes: tuple[str, ...]
    """Objectives that could not be judged, a line each."""


def allowed_share(slo: ServingSlo, metric: Metric) -> float | None:
    """Return the share of requests that may be bad; None: the metric has no objective."""
    if metric == "errors":
        return None if slo.availability is None else 1.0 - slo.availability
    objective: LatencyObjective | None = getattr(slo, metric)
    return None if objective is None else 1.0 - objective.share


def judge_watch(state: WatchState, slo: ServingSlo) -> Judged:
    """Return which rules hold at the moment of the last reading."""
    alerts: list[Alert] = []
    notes: list[str] = []
    for metric in METRICS:
        allowed = allowed_share(slo, metric)
        if allowed is None:
            continue
        blind = _blind(state, metric)
        if blind is not None:
            alerts.append(blind)
            continue
        for rule in RULES:
            found = _holds(state, metric, allowed, rule, slo)
            if isinstance(found, Alert):
                alerts.append(found)
                break
            if found:
                notes.append(found)
    return Judged(tuple(alerts), tuple(notes))


def _blind(state: WatchState, metric: Metric) -> Alert | None:
    """Return an alert if a metric has not been seen for long."""
    now = state.reading.at
    seen = [sample.end for sample in state.samples if getattr(sample, metric) is not None]
    silent_s = (now - max(seen, default=state.since)).total_seconds()
    if silent_s < BLIND_S:
        return None
    return Alert(f"{metric}-blind", f"{metric} could not be read for {silent_s:.0f} s.")


def _holds(
    state: WatchState, metric: Metric, allowed: float, rule: Rule, slo: ServingSlo
) -> Alert | str | None:
    """Return an alert, a note why the rule says nothing, or None if all is well."""
    long, short = (window(state, metric, s) for s in (rule.long_s, rule.short_s))
    lived_s = max(1.0, (state.reading.at - state.since).total_seconds())
    if short.covered_s < FEWEST_COVERED * min(rule.short_s, lived_s):
        return (
            f"{metric}, {rule.name}: figures for {short.covered_s:.0f} s of the last "
            f"{rule.short_s:g} s only."
        )
    if long.total < slo.min_requests or short.total == 0:
        return f"{metric}, {rule.name}: {long.total} requests are too few to tell."
    rate = rule.rate(slo.period_s)
    burns = [
        one.bad / one.total / allowed * min(1.0, lived_s / span_s)
        for one, span_s in ((long, rule.long_s), (short, rule.short_s))
    ]
    if min(burns) < rate:
        return None
    return Alert(
        f"{metric}-{rule.alarm}",
        f"{metric}: {long.bad} of {long.total} requests in {_span(rule.long_s)} missed the "
        f"objective, {long.bad / long.total:.2%}; allowed are {allowed:.2%}. The budget burns "
        f"{burns[0]:.1f} times too fast ({burns[1]:.1f} in {_span(rule.short_s)}); the limit is "
        f"{rate:.1f}.",
        rolls_back=rule.alarm == "page",
    )


def window(state: WatchState, metric: Metric, length_s: float) -> Counted:
    """Return the sum of a metric over the last `length_s` seconds, as far as it was seen."""
    begin = state.reading.at - timedelta(seconds=length_s * (1 + SLACK))
    total = bad = 0
    covered_s = 0.0
    for sample in state.samples:
        counted: Counted | None = getattr(sample, metric)
        if counted is not None and sample.start >= begin:
            total, bad = total + counted.total, bad + counted.bad
            covered_s += counted.covered_s
    return Counted(total=total, bad=bad, covered_s=covered_s)


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


# --- what to do about it --------------------------------------------------------------------------


def rollback_target(channel: Channel, now: datetime) -> str | None:
    """Return the release that the watch may go back to by itself; None: people must decide.

    That is the one before the present, while its servers are kept warm, and only if the present one
    came by a promotion: a rollback is not rolled back.
    """
    rollout = channel.rollout
    if rollout is None or channel.in_progress or not channel.previous:
        return None
    if rollout.outcome != "promoted" or rollout.plan.kind != "canary":
        return None
    before = channel.previous[0]
    if before.release_id != rollout.reference_id:
        return None
    warm = before.warm_until is not None and before.warm_until > now
    return before.release_id if warm else None


def rollback_run_id(channel: Channel) -> str:
    """Return the id of the run that rolls back by itself: one for each rollout, however often."""
    assert channel.rollout is not None
    return f"watch__{channel.model}__rollout-{channel.rollout.number}"
