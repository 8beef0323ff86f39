"""A channel in a line and a rollout in its stages: what pages say before any detail."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from trainyard.documents.channel import Channel, Rollout

Tone = Literal["pass", "warn", "fail", "skipped", "busy"]
StageState = Literal["done", "now", "stopped", "open"]

_OUTCOMES: dict[str, tuple[str, Tone]] = {
    "promoted": ("serving", "pass"),
    "rolled_back": ("rolled back", "fail"),
    "withdrawn": ("withdrawn", "warn"),
}


@dataclass(frozen=True)
class Glance:
    """One row of the overview."""

    model: str
    environment: str
    state: str
    """In words, such as `holding, step 1 of 2`."""
    tone: Tone
    stable: str
    """Release id; empty if there is none."""
    candidate: str
    stable_weight: int
    candidate_weight: int
    since: datetime | None
    """When the state began: of the phase during a rollout, else of the stable release."""
    by: str
    """Who asked for it; empty if that is not on record."""
    in_progress: bool


def glance(channel: Channel) -> Glance:
    """Return what the overview says of `channel`."""
    rollout = channel.rollout
    state, tone = _state(channel)
    since = channel.stable.since if channel.stable else None
    by = _who_made_stable(channel)
    if channel.in_progress and rollout is not None:
        since, by = rollout.phase_since, rollout.requested_by
    return Glance(
        model=channel.model,
        environment=channel.environment,
        state=state,
        tone=tone,
        stable=channel.stable.release_id if channel.stable else "",
        candidate=channel.candidate.release_id if channel.candidate else "",
        stable_weight=channel.weights.stable,
        candidate_weight=channel.weights.candidate,
        since=since,
        by=by,
        in_progress=channel.in_progress,
    )


def _state(channel: Channel) -> tuple[str, Tone]:
    rollout = channel.rollout
    if rollout is None:
        return ("serving", "pass") if channel.stable else ("empty", "skipped")
    if rollout.outcome is not None:
        return _OUTCOMES[rollout.outcome]
    words = rollout.phase.replace("_", " ")
    if rollout.phase == "rolling_back":
        return words, "fail"
    if rollout.paused is not None:
        return f"{words}, paused", "warn"
    if rollout.held_since is not None:
        return f"{words}, undecided", "warn"
    if rollout.phase in ("shifting", "holding") and rollout.plan.steps:
        return f"{words}, step {rollout.step_index + 1} of {len(rollout.plan.steps)}", "busy"
    return words, "busy"


def _who_made_stable(channel: Channel) -> str:
    """Return who asked for the stable release to be there."""
    stable, rollout = channel.stable, channel.rollout
    if stable is None:
        return ""
    if rollout is not None and rollout.release_id == stable.release_id and rollout.requested_by:
        return rollout.requested_by
    for entry in reversed(channel.history):
        if entry.release_id == stable.release_id and entry.who:
            return entry.who
    return ""


@dataclass(frozen=True)
class Stage:
    """One stage of a rollout."""

    label: str
    state: StageState


def stages(rollout: Rollout) -> tuple[Stage, ...]:
    """Return the stages of `rollout` in their order, and how far it is."""
    labels = ["deploy", "warm up"]
    if rollout.plan.kind == "canary":
        labels += [f"{step.weight} %" for step in rollout.plan.steps]
    labels.append("all traffic" if rollout.plan.kind == "rollback" else "bake")
    if rollout.outcome == "promoted" or rollout.ending == "promoted":
        return tuple(Stage(label, "done") for label in labels)
    here = min(_position(rollout, len(labels)), len(labels) - 1)
    ends = rollout.phase == "rolling_back" and rollout.plan.kind != "rollback"
    stopped = ends or rollout.outcome is not None
    return tuple(
        Stage(label, "done" if index < here else _here(stopped) if index == here else "open")
        for index, label in enumerate(labels)
    )


def _here(stopped: bool) -> StageState:
    return "stopped" if stopped else "now"


def _position(rollout: Rollout, stages_count: int) -> int:
    """Return the index of the stage that a rollout has reached."""
    last = stages_count - 1
    if rollout.phase == "deploying":
        return 0
    if rollout.phase in ("warming", "scaling"):
        return 1
    if rollout.phase == "baking" or rollout.plan.kind != "canary":
        return last
    if rollout.exposed_since is None:
        return 1
    return 2 + rollout.step_index
