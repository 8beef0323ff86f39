"""Tells what a release is doing: one line for each new event in its documents."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainyard.documents.channel import Channel, Rollout
from trainyard.documents.evidence import MetricVerdict, Verdict
from trainyard.documents.plan import plan_id_of_run
from trainyard.documents.status import StepStatus
from trainyard.rollout.channel_store import read_channel
from trainyard.rollout.words import describe_entry
from trainyard.steps.status import list_statuses
from trainyard.store.protocol import Store

STEPS = ("plan", "download", "compile", "measure", "accuracy-gate", "latency-gate", "publish")


@dataclass
class Narrator:
    """Follows one run of the release DAG and the rollout that it starts."""

    store: Store
    model: str
    environment: str
    dag_id: str
    run_id: str
    _told_steps: dict[tuple[str, str], str] = field(default_factory=dict)
    _told_look: tuple[int, int] = (0, 0)
    """Number of the rollout and of the look."""
    _told_generation: int = 0
    _earlier_rollout: int = 0

    def __post_init__(self) -> None:
        """Begin after what the channel went through before."""
        channel = self.channel()
        self._told_generation = channel.generation
        if channel.rollout is not None:
            self._earlier_rollout = channel.rollout.number

    @property
    def plan_id(self) -> str:
        """The plan that the run makes."""
        return plan_id_of_run(self.model, self.dag_id, self.run_id)

    def statuses(self) -> list[StepStatus]:
        """Return the steps of the run so far, in the order in which they started."""
        return list_statuses(self.store, self.plan_id)

    def channel(self) -> Channel:
        """Return the channel as it is now."""
        return read_channel(self.store, self.model, self.environment)

    def rollout(self) -> Rollout | None:
        """Return the rollout that the run has started; one of an earlier run does not count."""
        rollout = self.channel().rollout
        return rollout if rollout is not None and rollout.number > self._earlier_rollout else None

    def news(self) -> list[str]:
        """Return one line for each thing that happened since the last call."""
        lines = []
        for status in self.statuses():
            key = (status.step, status.target)
            if status.state != "running" and self._told_steps.get(key) != status.state:
                self._told_steps[key] = status.state
                lines.append(_step_line(status))
        channel = self.channel()
        return [*lines, *self._events(channel), *self._looks(channel)]

    def _events(self, channel: Channel) -> list[str]:
        """Return the channel's new events; those of earlier runs are old news."""
        fresh = [e for e in channel.history if e.generation > self._told_generation]
        self._told_generation = max(self._told_generation, channel.generation)
        return [describe_entry(entry) for entry in fresh]

    def _looks(self, channel: Channel) -> list[str]:
        rollout = self.rollout()
        if rollout is None or rollout.verdict is None:
            return []
        seen = (rollout.number, rollout.verdict.looks)
        if seen <= self._told_look:
            return []
        self._told_look = seen
        return [_look_line(rollout.verdict, channel.weights.candidate)]

    def progress(self) -> tuple[float, str]:
        """Return how far the run is, from 0 to 1, and what it does now."""
        statuses = self.statuses()
        done = sum(status.state == "done" for status in statuses)
        running = [status for status in statuses if status.state == "running"]
        share = len(STEPS) + 1
        if running:
            within = running[-1].progress or 0.0
            return (done + within) / share, f"{running[-1].step}: {running[-1].reason}"
        channel = self.channel()
        if done >= len(STEPS) and channel.rollout is not None and channel.in_progress:
            weight = channel.weights.candidate
            return done / share, f"rollout: {channel.rollout.phase}, candidate {weight} %"
        return done / share, "waiting for Airflow"


def _step_line(status: StepStatus) -> str:
    seconds = (status.updated_at - status.started_at).total_seconds()
    if status.state == "failed":
        return f"[red]{status.step} failed[/]: {status.reason}"
    how = "[cyan]reused[/]" if status.reused else f"done in {seconds:.0f} s"
    return f"{status.step} {how}: {status.reason}"


def _look_line(verdict: Verdict, weight: int) -> str:
    """Return a look in one line: both sides' values, and how far the evidence is."""
    figures = [
        _figures(metric)
        for metric in verdict.metrics
        if metric.candidate_value is not None and metric.needs_a_word
    ]
    outcome = verdict.outcome.replace("_", "-").lower()
    return (
        f"look {verdict.looks} at {weight} %: {'; '.join(figures) or 'no figures yet'}; {outcome}"
    )


def _figures(metric: MetricVerdict) -> str:
    candidate, stable = metric.candidate_value or 0.0, metric.stable_value or 0.0
    if metric.metric in {"ttft", "tpot"}:
        values = f"{candidate * 1000:.3g} ms (stable {stable * 1000:.3g})"
    else:
        values = f"{candidate:.1%} (stable {stable:.1%})"
    if metric.outcome != "UNDECIDED":
        return f"{metric.metric} {values} {metric.outcome.replace('_', '-').lower()}"
    harm = metric.harm_evidence / metric.harm_threshold
    shares = [(harm, "harm")]
    if not metric.harm_only:
        shares.append((metric.promote_evidence / metric.promote_threshold, "quality"))
    share, what = max(shares)
    return f"{metric.metric} {values} {min(max(share, 0.0), 1.0):.0%} of a proof of {what}"


def describe_ending(narrator: Narrator) -> tuple[str, str, str]:
    """Return release id (may be empty), how the run ended, and why."""
    statuses = {status.step: status for status in narrator.statuses()}
    for step, status in statuses.items():
        if status.state == "failed":
            ending = f"stopped by the {step.replace('-', ' ')}"
            if not step.endswith("-gate"):
                ending = f"failed in {step}"
            return "", ending, status.reason
    publish = statuses.get("publish")
    if publish is None:
        return "", "failed before it was published", "see the run in Airflow"
    release_id = publish.output_key.rsplit("/", 1)[-1].removesuffix(".json")
    rollout = narrator.rollout()
    if rollout is None:
        return release_id, "published, not promoted", "see the run in Airflow"
    endings = {
        "promoted": "first stable release" if rollout.plan.kind == "bootstrap" else "promoted",
        "rolled_back": "rolled back",
        "withdrawn": "withdrawn",
    }
    why = rollout.reason
    if rollout.verdict is not None:
        why = f"{why} {_evidence(rollout.verdict)}".strip()
    return release_id, endings.get(rollout.outcome or "", "unfinished"), why


def _evidence(verdict: Verdict) -> str:
    """Return in one sentence what a verdict rests on: evidence, looks, exposed requests."""
    if verdict.outcome == "HARM":
        shown = [
            f"{one.metric} {one.harm_evidence:.1f} (needed {one.harm_threshold:.1f})"
            for one in verdict.metrics
            if one.outcome == "HARM"
        ]
    else:
        shown = [
            f"{one.metric} {one.promote_evidence:.1f} (needed {one.promote_threshold:.1f})"
            for one in verdict.metrics
            if not one.harm_only
        ]
    evidence = f"Evidence: {', '.join(shown)}; " if shown else ""
    return f"{evidence}{verdict.looks} looks, {verdict.exposed_requests} requests exposed."
