"""Builders of channels, plans and verdicts for tests of the state machine."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tests.rollout_world import ENVIRONMENT, MODEL, release_id

from trainyard.documents.channel import Channel, RolloutPlan, Track
from trainyard.documents.evidence import JudgeSpec, Outcome, Verdict, default_metrics
from trainyard.rollout.events import (
    RolloutRequested,
    RouteSeen,
    ServerSeen,
    ServersSeen,
    TrafficSeen,
)
from trainyard.rollout.state_machine import step
from trainyard.spec.model import RolloutStep

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
OLD = release_id("old")
NEW = release_id("new")


def make_plan(**changes: Any) -> RolloutPlan:
    """Return the plan of a canary of one server with two steps."""
    values: dict[str, Any] = {
        "kind": "canary",
        "capacity": "surge",
        "replicas": 1,
        "stable_replicas": 1,
        "steps": (RolloutStep(weight=10, hold_s=60), RolloutStep(weight=50, hold_s=60)),
        "bake_s": 60.0,
        "holdback_weight": 10,
        "max_duration_s": 600.0,
        "on_undecided": "hold",
        "max_hold_s": 300.0,
        "warm_up_requests": 3,
        "deploy_timeout_s": 300.0,
        "drain_timeout_s": 30.0,
        "lease_s": 120.0,
        "judge": JudgeSpec(metrics=default_metrics(), max_duration_s=600.0),
    }
    return RolloutPlan(**{**values, **changes})


def empty_channel() -> Channel:
    """Return a channel that nobody has used."""
    return Channel(model=MODEL, environment=ENVIRONMENT)


def used_channel() -> Channel:
    """Return a channel with a stable release."""
    return empty_channel().model_copy(update={"stable": Track(release_id=OLD, since=NOW)})


def requested(channel: Channel, plan: RolloutPlan, *, release: str = NEW) -> Channel:
    """Return the channel with a rollout that has just begun."""
    number = channel.rollout.number + 1 if channel.rollout else 1
    event = RolloutRequested(number=number, release_id=release, plan=plan, run_id="run")
    return step(channel, event, NOW)[0]


def make_verdict(outcome: Outcome, *, exposed: int = 100) -> Verdict:
    """Return a verdict without figures."""
    return Verdict(
        outcome=outcome,
        metrics=(),
        looks=1,
        exposed_requests=exposed,
        at=1.0,
        reason=f"The judge says {outcome}.",
    )


def servers(**states: str | tuple[str, ...]) -> ServersSeen:
    """Return servers of `old` and `new` in the given states."""
    seen = []
    for name, given in states.items():
        for index, state in enumerate((given,) if isinstance(given, str) else given):
            server = f"{release_id(name)}-{index}"
            seen.append(ServerSeen(server, release_id(name), state, started_at=NOW))  # type: ignore[arg-type]
    return ServersSeen(tuple(seen))


def route(
    weights: dict[str, int], arrivals: dict[str, int] | None = None, **other: Any
) -> RouteSeen:
    """Return what a router says, by short release names."""
    errors = other.pop("errors", {})
    in_flight = other.pop("in_flight", {})
    epoch = other.pop("epoch", "1")
    assert not other
    names = {*weights, *(arrivals or {})}
    return RouteSeen(
        epoch=epoch,
        weights={release_id(name): share for name, share in weights.items()},
        traffic={
            release_id(name): TrafficSeen(
                (arrivals or {}).get(name, 0), errors.get(name, 0), in_flight.get(name, 0)
            )
            for name in names
        },
    )
