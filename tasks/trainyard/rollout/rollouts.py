"""Rollouts as a run of a DAG (or a person at a terminal) sees them: begin, tick, settle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from trainyard.documents.channel import Channel
from trainyard.errors import BadInput, StaleDriver
from trainyard.rollout.channel_store import read_channel
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import (
    DriveResult,
    Settled,
    abort,
    drive,
    ending_of,
    goes_on,
    note_requester,
    plan_for,
    request_rollback,
    settle,
    start_rollout,
    summary_of,
)
from trainyard.rollout.plan_rollout import NothingToDo, describe_plan

Kind = Literal["promote", "rollback"]
Tick = Callable[[], DriveResult]

WATCH_PAUSE_S = 2.0
"""Seconds between two looks at a rollout that somebody else drives."""


@dataclass(frozen=True)
class Rollouts:
    """All rollouts of an installation."""

    deps: RolloutDeps

    def check(
        self,
        *,
        model: str,
        environment: str,
        release_id: str,
        force: bool = False,
        reason: str = "",
        run_id: str = "",
    ) -> str:
        """Return what a promotion would do, in one sentence, without touching anything.

        Raises:
            Busy, BadInput, NotFound, Refused: it would be refused.
        """
        channel = read_channel(self.deps.store, model, environment)
        if goes_on(channel, run_id, release_id):
            return summary_of(channel)
        release, plan = plan_for(self.deps, channel, release_id, force=force, reason=reason)
        if isinstance(plan, NothingToDo):
            return plan.message
        return describe_plan(release, plan)

    def begin(
        self,
        *,
        kind: Kind,
        model: str,
        environment: str,
        release_id: str | None,
        run_id: str,
        force: bool = False,
        reason: str = "",
        requested_by: str = "",
    ) -> Tick:
        """Take the channel, or take it again, and return the function that makes one tick.

        A tick never raises StaleDriver: once somebody else drives the rollout, ticks only watch it
        and report its end.

        Raises:
            Busy, BadInput, NotFound, Refused: the request is refused.
        """
        if kind == "rollback":
            return self._begin_rollback(
                model, environment, release_id, run_id, reason, requested_by
            )
        if not release_id:
            raise BadInput(
                f"No release of {model} was named.", hint="Say which release is to be promoted."
            )
        channel = start_rollout(
            self.deps,
            model,
            environment,
            release_id,
            run_id=run_id,
            force=force,
            reason=reason,
            requested_by=requested_by,
        )
        if not goes_on(channel, run_id):
            return lambda: _nothing_to_do(channel)
        return self._tick(channel)

    def _begin_rollback(
        self,
        model: str,
        environment: str,
        release_id: str | None,
        run_id: str,
        reason: str,
        requested_by: str,
    ) -> Tick:
        def request() -> Channel:
            return request_rollback(
                self.deps,
                model,
                environment,
                run_id=run_id,
                release_id=release_id,
                reason=reason,
                requested_by=requested_by,
            )

        current = request()
        tick = self._tick(current) if goes_on(current, run_id) else None

        def go_on() -> DriveResult:
            nonlocal current, tick
            if tick is None:
                return _nothing_to_do(current)
            result = tick()
            if not result.done or _is_rollback(result.channel):
                return result
            if not goes_on(result.channel, run_id):
                return result
            # The promotion that was under way has ended; go on from there if need be.
            current = request()
            if current.in_progress and goes_on(current, run_id):
                tick = self._tick(current)
                return replace(result, done=False, outcome=None, channel=current, next_in_s=0.0)
            return replace(_nothing_to_do(current), messages=result.messages)

        return go_on

    def settle(
        self, *, model: str, environment: str, run_id: str, release_id: str | None = None
    ) -> Settled:
        """End whatever `run_id` has left unfinished, and tell how its rollout ended."""
        return settle(self.deps, model, environment, run_id=run_id, release_id=release_id)

    def note_requester(self, *, model: str, environment: str, run_id: str, who: str) -> Channel:
        """Write down who asked for the rollout of `run_id`, if it began without that."""
        return note_requester(self.deps, model, environment, run_id=run_id, who=who)

    def abort(self, *, model: str, environment: str, reason: str, who: str = "") -> Channel:
        """End the rollout under way. Raises NotFound if there is none."""
        return abort(self.deps, model, environment, reason=reason, who=who)

    def _tick(self, channel: Channel) -> Tick:
        assert channel.rollout is not None
        driver, number = channel.rollout.driver, channel.rollout.number
        model, environment = channel.model, channel.environment
        lost = False

        def tick() -> DriveResult:
            nonlocal lost
            if not lost:
                try:
                    return drive(self.deps, model, environment, driver)
                except StaleDriver as stale:
                    lost = True
                    return replace(self._watch(model, environment, number), messages=(str(stale),))
            return self._watch(model, environment, number)

        return tick

    def _watch(self, model: str, environment: str, number: int) -> DriveResult:
        """Report where a rollout stands that somebody else drives."""
        channel = read_channel(self.deps.store, model, environment)
        ended = ending_of(channel, number)
        rollout = channel.rollout
        if ended is not None:
            outcome, summary = ended
            return DriveResult(True, channel, outcome, summary)
        if rollout is not None and rollout.number == number:
            return DriveResult(False, channel, None, summary_of(channel), (), WATCH_PAUSE_S)
        summary = f"Rollout {number} is in no channel any more; the channel was reset."
        return DriveResult(True, channel, "withdrawn", summary)


def _is_rollback(channel: Channel) -> bool:
    return channel.rollout is not None and channel.rollout.plan.kind == "rollback"


def _nothing_to_do(channel: Channel) -> DriveResult:
    """Return the result of a request that the channel fulfils already."""
    stable = channel.stable.release_id if channel.stable else "no release"
    summary = f"{stable} has all traffic in {channel.environment}; there is nothing to do."
    return DriveResult(True, channel, "promoted", summary)
