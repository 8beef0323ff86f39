"""Walks through all that the state machine can do with a small alphabet of events.

From each situation that is new, every event of the alphabet happens, some time later. Situations
are the same if they differ in times and figures only, so there are a few thousand of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pytest
from tests.unit.rollout.machine import (
    NEW,
    NOW,
    OLD,
    empty_channel,
    make_plan,
    make_verdict,
    route,
    servers,
    used_channel,
)

from trainyard.documents.channel import Channel, Phase, RolloutPlan
from trainyard.rollout import state_machine
from trainyard.rollout.events import (
    AbortRequested,
    ControllerLost,
    Event,
    FuseBlown,
    Looked,
    PauseRequested,
    PromotionForced,
    RolloutRequested,
    Sighted,
    TimePassed,
    UndoRequested,
    WarmedUp,
)
from trainyard.rollout.state_machine import step
from trainyard.spec.model import RolloutStep


class Taken(NamedTuple):
    """An edge that the machine took."""

    before: str
    after: str
    event: str
    """Name of the event's class."""


@contextmanager
def recorded() -> Iterator[set[Taken]]:
    """Record every edge that the machine takes, also those in the middle of one event."""
    taken: set[Taken] = set()
    present: list[str] = []
    change: Callable[..., Channel] = state_machine._phase

    def phase(channel: Channel, to: Phase, now: datetime, reason: str) -> Channel:
        assert channel.rollout is not None
        if channel.rollout.phase != to:
            taken.add(Taken(channel.rollout.phase, to, present[-1]))
        return change(channel, to, now, reason)

    def named(kind: type, handler: Callable[[Channel, Any, datetime], Channel]) -> Any:
        def handle(channel: Channel, event: Any, now: datetime) -> Channel:
            present.append(kind.__name__)
            after = handler(channel, event, now)
            present.pop()
            if not channel.in_progress and after.in_progress:
                assert after.rollout is not None
                taken.add(Taken("idle", after.rollout.phase, kind.__name__))
            return after

        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_machine, "_phase", phase)
        for kind, handler in list(state_machine._HANDLERS.items()):
            patch.setitem(state_machine._HANDLERS, kind, named(kind, handler))
        yield taken


ALWAYS_DRIVEN = 1e6
"""A lease that lets hours pass in one step, with a driver there."""

PLANS: dict[str, RolloutPlan] = {
    # The last step cannot be proven before `max_duration_s`.
    "two servers": make_plan(
        replicas=2,
        lease_s=ALWAYS_DRIVEN,
        steps=(RolloutStep(weight=10, hold_s=60), RolloutStep(weight=50, hold_s=700)),
    ),
    "one server": make_plan(on_undecided="rollback", keep_warm_s=60.0),
    "single": make_plan(capacity="single", holdback_weight=0),
    "first": make_plan(kind="bootstrap", stable_replicas=0, lease_s=ALWAYS_DRIVEN),
    "rollback": make_plan(kind="rollback", bake_s=0.0, holdback_weight=0),
}


def starts() -> dict[str, Channel]:
    """Return channels on which a rollout of each plan may begin."""
    return {
        name: empty_channel() if plan.kind == "bootstrap" else used_channel()
        for name, plan in PLANS.items()
    }


def walk(channel: Channel, plan: RolloutPlan) -> int:
    """Go everywhere from `channel` with `plan`; return the number of situations."""
    seen: set[tuple[object, ...]] = set()
    left = deque([(channel, NOW)])
    while left:
        before, now = left.popleft()
        for event, after_s in _events(before, plan):
            then = now + timedelta(seconds=after_s)
            after = step(before, event, then)[0]
            if after == before:
                continue
            situation = _situation(after, then)
            if situation not in seen:
                seen.add(situation)
                left.append((after, then))
    return len(seen)


def _events(channel: Channel, plan: RolloutPlan) -> Iterator[tuple[Event, float]]:
    """Yield what may happen next, and seconds until then."""
    rollout = channel.rollout
    if rollout is None:
        yield RolloutRequested(1, NEW, plan, "run"), 0.0
        return
    for old in ("ready", "failed", ()):
        for new in ((), "starting", "ready", "failed", ("ready", "ready")):
            yield servers(old=old, new=new), 0.0
    yield servers(old="ready", new=("ready", "ready")), 61.0
    for index in range(2):
        server = f"{NEW}-{index}@{NOW.isoformat()}"
        yield WarmedUp(server, 3, 3), 0.0
        yield WarmedUp(server, 3, 0, 3), 0.0
        yield WarmedUp(server, 3, 2), 0.0
    if rollout.mark is None:
        yield _route(channel, 0), 0.0
    else:
        yield _route(channel, 200), 2.0
        yield _route(channel, 200), 62.0
        yield route({"old": 50, "new": 50}, {"old": 0, "new": 900}, errors={"new": 900}), 31.0
    yield route({"old": 1, "new": 99}), 31.0
    for outcome in ("HARM", "NON_INFERIOR", "UNDECIDED"):
        yield Looked(make_verdict(outcome), "look"), 61.0  # type: ignore[arg-type]
    yield Sighted("not seen", ""), 0.0
    yield Sighted("", ""), 0.0
    yield Sighted("", ""), 61.0
    yield FuseBlown("broken"), 0.0
    yield FuseBlown("the machine is broken", against_release=False), 0.0
    yield ControllerLost("nobody drives it"), 0.0
    yield AbortRequested("enough"), 0.0
    yield UndoRequested("back"), 0.0
    yield PauseRequested("odd"), 0.0
    yield PromotionForced("needed", "ann"), 0.0
    for seconds in (0.0, 61.0, 301.0, 601.0):
        yield TimePassed(), seconds
    yield TimePassed(), 20000.0


def _route(channel: Channel, arrivals: int) -> Event:
    """Return a route that follows the channel, with arrivals that agree."""
    names = {OLD: "old", NEW: "new"}
    shares = {
        names[track.release_id]: share
        for track, share in (
            (channel.stable, channel.weights.stable),
            (channel.candidate, channel.weights.candidate),
        )
        if track is not None
    }
    return route(shares, {name: arrivals * share // 100 for name, share in shares.items()})


def _situation(channel: Channel, now: datetime) -> tuple[object, ...]:
    """Return what makes a channel different from another one for the walk."""
    rollout = channel.rollout
    if rollout is None:
        return ()
    return (
        rollout.phase,
        rollout.ending,
        rollout.outcome,
        rollout.cleanup,
        rollout.step_index,
        rollout.held_since is not None,
        rollout.paused is not None,
        rollout.blind is not None,
        rollout.mark is not None,
        rollout.bake_watched,
        min(rollout.ready.stable, 1),
        rollout.ready.candidate,
        rollout.replicas,
        len(rollout.warmed),
    )
