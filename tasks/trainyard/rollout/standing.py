"""Looks at a channel and at what serves it: store, lease, router, host; none of Airflow."""

from __future__ import annotations

from datetime import datetime

from trainyard.documents.channel import Channel
from trainyard.errors import TrainyardError
from trainyard.reports.standing import RouteLine, ServerLine, Standing, standing_of
from trainyard.rollout.by_hand import driver_sight
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.state_machine import pause_refusal, promotion_refusal, resume_refusal


def take_standing(deps: RolloutDeps, channel: Channel) -> Standing:
    """Return where a channel stands. Whoever cannot be asked is said to be so."""
    now = deps.now()
    sight = driver_sight(deps, channel)
    return standing_of(channel, now).model_copy(
        update={
            "lease": sight.state if sight is not None else "unknown",
            "route": _route(deps, channel),
            "servers": _servers(deps, channel),
            "can": commands_that_can_be_given(channel, now),
        }
    )


def commands_that_can_be_given(channel: Channel, now: datetime) -> tuple[str, ...]:
    """Return the names of commands that the channel does not refuse now."""
    rollout = channel.rollout
    running = channel.in_progress and rollout is not None and rollout.ending is None
    found = {
        "pause": not pause_refusal(channel, now),
        "resume": not resume_refusal(channel),
        "promote-now": not promotion_refusal(channel),
        "abort": running,
        "rollback": bool(channel.previous)
        or bool(running and rollout is not None and rollout.reference_id),
    }
    return tuple(name for name, possible in found.items() if possible)


def _route(deps: RolloutDeps, channel: Channel) -> RouteLine | None:
    try:
        route = deps.router.status(channel.environment, channel.model)
    except (TrainyardError, OSError):
        return None
    if route is None:
        return None
    return RouteLine(
        weights=dict(route.weights), guard=route.guard, guard_reason=route.guard_reason
    )


def _servers(deps: RolloutDeps, channel: Channel) -> tuple[ServerLine, ...] | None:
    try:
        servers = deps.host.servers(channel.environment, channel.model)
    except (TrainyardError, OSError):
        return None
    return tuple(
        ServerLine(
            name=each.name, release_id=each.release_id, state=each.state, message=each.message
        )
        for each in servers
    )
