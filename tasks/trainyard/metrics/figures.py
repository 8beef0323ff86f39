"""Makes samples of what was read from the store. Pure: values in, metrics out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import get_args

from prometheus_client.core import GaugeMetricFamily

from trainyard.documents.channel import Channel, HistoryEntry, Phase, Rollout
from trainyard.documents.evidence import MetricVerdict
from trainyard.documents.evidence import Outcome as VerdictOutcome
from trainyard.documents.measurement import GateVerdict
from trainyard.documents.status import StepStatus
from trainyard.metrics.families import FAMILIES

EVENTS = ("rollout_started", "held", "promoted", "returned", "rolled_back", "withdrawn")
"""Events of a channel's history whose last time is told."""

ENDS = ("promoted", "returned", "rolled_back", "withdrawn")
"""Events that end a rollout. `returned`: a rollback that somebody asked for."""


@dataclass(frozen=True)
class RolloutTrace:
    """What lies in the folder of a channel's present or last rollout."""

    looks: int = 0
    last_look_at: datetime | None = None
    guard_events: Mapping[str, int] = field(default_factory=dict)
    """How often the guard began to do something by itself, by what."""
    unreadable: int = 0
    """Looks and histories that its driver cannot read."""


@dataclass(frozen=True)
class Published:
    """A model's releases."""

    number: int
    last_at: datetime | None


@dataclass(frozen=True)
class Seen:
    """What was read from a store at one moment."""

    at: datetime
    channels: tuple[Channel, ...] = ()
    traces: Mapping[tuple[str, str], RolloutTrace] = field(default_factory=dict)
    """By environment and model."""
    releases: Mapping[str, Published] = field(default_factory=dict)
    """By model."""
    statuses: tuple[StepStatus, ...] = ()
    verdicts: tuple[GateVerdict, ...] = ()
    unreadable: Mapping[str, int] = field(default_factory=dict)
    """Documents that could not be parsed, by folder."""


def model_of_plan(plan_id: str) -> str:
    """Return the model of a plan: its id is `<model>-<digits>`."""
    return plan_id.rpartition("-")[0] or plan_id


class _Page:
    """Families that fill up."""

    def __init__(self) -> None:
        self._families = {name: family.empty() for name, family in FAMILIES.items()}

    def add(self, name: str, labels: Iterable[str], value: float) -> None:
        self._families[name].add_metric(list(labels), value)

    def add_time(self, name: str, labels: Iterable[str], moment: datetime | None) -> None:
        """Add the seconds since 1970, or nothing."""
        if moment is not None:
            self.add(name, labels, moment.timestamp())

    def filled(self) -> Iterator[GaugeMetricFamily]:
        return (family for family in self._families.values() if family.samples)


def families(seen: Seen) -> list[GaugeMetricFamily]:
    """Return all metrics that have samples, in the order of the table."""
    page = _Page()
    for channel in seen.channels:
        labels = (channel.environment, channel.model)
        _channel(page, channel, labels)
        if channel.rollout is not None:
            trace = seen.traces.get(labels, RolloutTrace())
            _rollout(page, channel, channel.rollout, labels)
            _trace(page, trace, labels)
    for model, published in sorted(seen.releases.items()):
        page.add("trainyard_releases", (model,), published.number)
        page.add_time(
            "trainyard_release_last_published_timestamp_seconds", (model,), published.last_at
        )
    _gates(page, seen.verdicts)
    _steps(page, seen.statuses)
    _work(page, seen.statuses)
    page.add_time("trainyard_metrics_last_look_timestamp_seconds", (), seen.at)
    for folder, number in sorted(seen.unreadable.items()):
        page.add("trainyard_metrics_unreadable_documents", (folder,), number)
    return list(page.filled())


# --- channels and rollouts ------------------------------------------------------------------------


def _channel(page: _Page, channel: Channel, labels: tuple[str, str]) -> None:
    tracks = [("stable", channel.stable), ("candidate", channel.candidate)]
    tracks += [("previous", channel.previous[0])] if channel.previous else []
    for role, track in tracks:
        if track is not None:
            verified = "true" if track.verified else "false"
            page.add(
                "trainyard_channel_release_info", (*labels, role, track.release_id, verified), 1
            )
    page.add("trainyard_channel_generation", labels, channel.generation)
    for role in ("stable", "candidate"):
        weight = getattr(channel.weights, role)
        page.add("trainyard_channel_weight_percent", (*labels, role), weight)
    now = channel.rollout.phase if channel.rollout and channel.in_progress else "idle"
    for phase in get_args(Phase):
        page.add("trainyard_channel_phase", (*labels, phase), phase == now)
    page.add("trainyard_channel_rejected_releases", labels, len(channel.rejected))
    for event in EVENTS:
        times = [entry.at for entry in channel.history if entry.event == event]
        if times:
            page.add_time(
                "trainyard_channel_last_event_timestamp_seconds", (*labels, event), times[-1]
            )
    ended = Counter(each.event for each in channel.history)
    for outcome in ENDS:
        page.add("trainyard_rollouts_ended", (*labels, outcome), ended[outcome])
    seconds = rollback_seconds(channel.history)
    if seconds is not None:
        page.add("trainyard_rollback_seconds", labels, seconds)


def rollback_seconds(history: Iterable[HistoryEntry]) -> float | None:
    """Return how long the last rollback took until the losing side was gone; None without one.

    One after harm begins with `ending`, one that somebody asked for with its start.
    """
    begun: dict[tuple[int | None, str], datetime] = {}
    seconds = None
    for entry in history:
        if entry.event in {"ending", "rollout_started"}:
            begun[(entry.rollout, entry.event)] = entry.at
        elif entry.event in {"rolled_back", "returned"}:
            begin = "ending" if entry.event == "rolled_back" else "rollout_started"
            since = begun.get((entry.rollout, begin))
            seconds = (entry.at - since).total_seconds() if since else seconds
    return seconds


def _rollout(page: _Page, channel: Channel, rollout: Rollout, labels: tuple[str, str]) -> None:
    page.add("trainyard_rollout_number", labels, rollout.number)
    page.add("trainyard_rollout_in_progress", labels, channel.in_progress)
    page.add_time("trainyard_rollout_started_timestamp_seconds", labels, rollout.started_at)
    if channel.in_progress:
        page.add_time(
            "trainyard_rollout_phase_since_timestamp_seconds", labels, rollout.phase_since
        )
        page.add_time("trainyard_rollout_held_since_timestamp_seconds", labels, rollout.held_since)
        page.add("trainyard_rollout_lease_seconds", labels, rollout.plan.lease_s)
        for kind, replicas in (("desired", rollout.replicas), ("ready", rollout.ready)):
            for role in ("stable", "candidate"):
                number = getattr(replicas, role)
                page.add("trainyard_channel_servers", (*labels, role, kind), number)
    verdict = rollout.verdict
    if verdict is None:
        return
    for outcome in get_args(VerdictOutcome):
        page.add("trainyard_rollout_verdict", (*labels, outcome), outcome == verdict.outcome)
    page.add("trainyard_rollout_exposed_requests", labels, verdict.exposed_requests)
    for metric in verdict.metrics:
        _evidence(page, metric, labels)


def _evidence(page: _Page, metric: MetricVerdict, labels: tuple[str, str]) -> None:
    for direction, evidence, threshold in (
        ("harm", metric.harm_evidence, metric.harm_threshold),
        ("promote", metric.promote_evidence, metric.promote_threshold),
    ):
        if threshold > 0:
            page.add(
                "trainyard_rollout_evidence_ratio",
                (*labels, metric.metric, direction),
                evidence / threshold,
            )
    if metric.ratio is not None:
        page.add("trainyard_rollout_metric_ratio", (*labels, metric.metric), metric.ratio)


def _trace(page: _Page, trace: RolloutTrace, labels: tuple[str, str]) -> None:
    page.add("trainyard_rollout_looks", labels, trace.looks)
    page.add_time("trainyard_rollout_last_look_timestamp_seconds", labels, trace.last_look_at)
    for event, number in sorted(trace.guard_events.items()):
        page.add("trainyard_rollout_guard_events", (*labels, event), number)


# --- steps ----------------------------------------------------------------------------------------


def _gates(page: _Page, verdicts: Iterable[GateVerdict]) -> None:
    found = Counter((model_of_plan(each.plan_id), each.gate, each.outcome) for each in verdicts)
    for labels, number in sorted(found.items()):
        page.add("trainyard_gate_verdicts", labels, number)


def _steps(page: _Page, statuses: Iterable[StepStatus]) -> None:
    states: Counter[tuple[str, str, str]] = Counter()
    failures: Counter[tuple[str, str, str]] = Counter()
    ends: dict[tuple[str, str, str], datetime] = {}
    beats: dict[tuple[str, str], datetime] = {}
    for each in statuses:
        step = (model_of_plan(each.plan_id), each.step)
        states[(*step, each.state)] += 1
        if each.state == "running":
            beats[step] = min(beats.get(step, each.updated_at), each.updated_at)
            continue
        end = (*step, each.state)
        ends[end] = max(ends.get(end, each.updated_at), each.updated_at)
        if each.state == "failed":
            failures[(*step, str(each.exit_code))] += 1
    for labels, number in sorted(states.items()):
        page.add("trainyard_steps", labels, number)
    for labels, number in sorted(failures.items()):
        page.add("trainyard_step_failures", labels, number)
    for labels, moment in sorted(ends.items()):
        page.add_time("trainyard_step_last_end_timestamp_seconds", labels, moment)
    for beat, moment in sorted(beats.items()):
        page.add_time("trainyard_step_heartbeat_timestamp_seconds", beat, moment)


def _work(page: _Page, statuses: Iterable[StepStatus]) -> None:
    """Tell what steps that are done found or made; of two attempts, the last one counts."""
    done = sorted(
        (each for each in statuses if each.state == "done"), key=lambda each: each.updated_at
    )
    lookups = Counter(
        (model_of_plan(each.plan_id), "hit" if each.reused else "miss")
        for each in done
        if each.step == "compile"
    )
    for lookup, number in sorted(lookups.items()):
        page.add("trainyard_bundle_lookups", lookup, number)
    made = [each for each in done if not each.reused]
    moved: Counter[tuple[str, str]] = Counter()
    last: dict[tuple[str, str, str], StepStatus] = {}
    for each in made:
        model = model_of_plan(each.plan_id)
        last[(model, each.step, each.target)] = each
        if each.step in {"download", "compile"}:
            moved[(model, each.step)] += int(_number(each, "bytes") or 0)
    for mover, size in sorted(moved.items()):
        page.add("trainyard_moved_bytes", mover, size)
    for (model, step, target), each in sorted(last.items()):
        duration_s = (each.updated_at - each.started_at).total_seconds()
        page.add("trainyard_step_seconds", (model, step, target), duration_s)
        if step == "compile":
            _compile(page, each, (model, target))


def _compile(page: _Page, status: StepStatus, labels: tuple[str, str]) -> None:
    for figure, name in (
        ("compile_s", "trainyard_compile_seconds"),
        ("peak_memory_bytes", "trainyard_compile_peak_memory_bytes"),
    ):
        value = _number(status, figure)
        if value is not None:
            page.add(name, labels, value)


def _number(status: StepStatus, name: str) -> float | None:
    value = status.detail.get(name)
    return float(value) if isinstance(value, int | float) else None
