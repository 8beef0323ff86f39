"""Looks at a channel and at what serves it: store, lease, router, host; none of Airflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TypeVar

from trainyard.documents.channel import Channel
from trainyard.errors import Refused, TrainyardError
from trainyard.reports.standing import RouteLine, ServerLine, Standing, standing_of
from trainyard.rollout.by_hand import driver_sight
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import rollback_goal
from trainyard.rollout.plan_rollout import rollback_target
from trainyard.rollout.state_machine import pause_refusal, promotion_refusal, resume_refusal
from trainyard.serving.protocol import RouteStatus, ServerStatus

AnswerT = TypeVar("AnswerT")


ANSWER_S = 1.0
"""Whoever lets us wait for longer than that, and does not answer then, is not asked again."""


def take_standing(deps: RolloutDeps, channel: Channel) -> Standing:
    """Return where a channel stands. Whoever cannot be asked is said to be so."""
    return _Taker(deps).take(channel)


def take_standings(
    deps: RolloutDeps, channels: Iterable[Channel], *, with_servers: bool
) -> tuple[Standing, ...]:
    """Return where channels stand; of an environment that does not answer, nothing is asked twice.

    Args:
        deps: the world.
        channels: all of them.
        with_servers: False: the hosts are not asked.
    """
    taker = _Taker(deps)
    return tuple(taker.take(channel, with_servers=with_servers) for channel in channels)


class _Taker:
    """Asks about one channel after the other, and nobody twice who let it wait in vain."""

    def __init__(self, deps: RolloutDeps) -> None:
        self._deps = deps
        self._silent: set[tuple[str, str]] = set()

    def take(self, channel: Channel, *, with_servers: bool = True) -> Standing:
        """Return where a channel stands."""
        deps, place = self._deps, (channel.environment, channel.model)
        now = deps.now()
        sight = driver_sight(deps, channel)
        route = self._ask("router", channel.environment, lambda: deps.router.status(*place))
        servers: Sequence[ServerStatus] | None = None
        if with_servers:
            servers = self._ask("host", channel.environment, lambda: deps.host.servers(*place))
        return standing_of(channel, now).model_copy(
            update={
                "lease": sight.state if sight is not None else "unknown",
                "route": _route_line(route) if route is not None else None,
                "servers": _server_lines(servers) if servers is not None else None,
                "can": commands_that_can_be_given(channel, now),
            }
        )

    def _ask(
        self, whom: str, environment: str, question: Callable[[], AnswerT | None]
    ) -> AnswerT | None:
        if (whom, environment) in self._silent:
            return None
        began = time.monotonic()
        try:
            answer = question()
        except (TrainyardError, OSError):
            answer = None
        if answer is None and time.monotonic() - began > ANSWER_S:
            self._silent.add((whom, environment))
        return answer


def commands_that_can_be_given(channel: Channel, now: datetime) -> tuple[str, ...]:
    """Return the commands that the channel does not refuse now, with what they need to be told."""
    rollout = channel.rollout
    running = channel.in_progress and rollout is not None and rollout.ending is None
    found = {
        "pause": not pause_refusal(channel, now),
        "resume": not resume_refusal(channel),
        "promote-now": not promotion_refusal(channel),
        "abort": running,
    }
    return (*(name for name, possible in found.items() if possible), *_rollback(channel))


def _rollback(channel: Channel) -> tuple[str, ...]:
    """Return the rollback that is not refused: without a name it only undoes a promotion."""
    try:
        rollback_goal(channel, None)
    except Refused:
        return (f"rollback --to {rollback_target(channel, None)}",)
    except TrainyardError:
        return ()
    return ("rollback",)


def _route_line(route: RouteStatus) -> RouteLine:
    return RouteLine(
        weights=dict(route.weights), guard=route.guard, guard_reason=route.guard_reason
    )


def _server_lines(servers: Sequence[ServerStatus]) -> tuple[ServerLine, ...]:
    return tuple(
        ServerLine(
            name=each.name, release_id=each.release_id, state=each.state, message=each.message
        )
        for each in servers
    )
