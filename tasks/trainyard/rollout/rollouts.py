"""Rollouts as a run of a DAG (or a person at a terminal) sees them: begin, tick, settle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from trainyard.documents.channel import Channel
from trainyard.errors import BadInput, StaleDriver
from trainyard.rollout import by_hand
from trainyard.rollout.channel_store import demand_written, read_channel
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import (
    DriveResult,
    Settled,
    abort,
    drive,
    drives,
    ending_of,
    note_requester,
    own_rollout,
    plan_for,
    request_rollback,
    rollback_in_hand,
    settle,
    start_rollout,
    summary_of,
    summary_of_rollout,
    waiting_summary,
    waits,
)
from trainyard.rollout.plan_rollout import NothingToDo, describe_plan

Kind = Literal["promote", "rollback"]
Tick = Callable[[], DriveResult]

WAIT_PAUSE_S = 2.0
"""Seconds between two looks at whether a request may begin that waits."""

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
        own = own_rollout(channel, run_id, release_id)
        if own is not None:
            return summary_of_rollout(channel, own)
        waiting = ""
        if self._lets_wait(channel):
            # What else there is to be refused need not wait.
            waiting = f"It waits for its turn: {summary_of(channel)} Then, as it looks now: "
            channel = _as_if_over(channel)
        release, plan = plan_for(self.deps, channel, release_id, force=force, reason=reason)
        if isinstance(plan, NothingToDo):
            return f"{waiting}{plan.message}"
        return f"{waiting}{describe_plan(release, plan)}"

    def _lets_wait(self, channel: Channel) -> bool:
        rules = self.deps.environment(channel.environment)
        return channel.in_progress and rules.concurrent_requests == "queue"

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
        and report its end. It raises Transient while the store is away.

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

        deps = self.deps

        def request() -> Channel:
            nonlocal deps
            # It may have waited for hours, and a freeze may have been declared meanwhile.
            deps = deps.with_newest_rules()
            return start_rollout(
                deps,
                model,
                environment,
                release_id,
                run_id=run_id,
                force=force,
                reason=reason,
                requested_by=requested_by,
            )

        return self._in_its_turn(request(), request, run_id)

    def _in_its_turn(self, channel: Channel, request: Callable[[], Channel], run_id: str) -> Tick:
        """Return the tick of a promotion, which asks again while it has to wait."""
        if not waits(channel, run_id):
            own = own_rollout(channel, run_id)
            if own is None:
                return lambda: _nothing_to_do(channel)
            return self._tick(channel, own, run_id)
        begun: Tick | None = None
        said = ""

        def tick() -> DriveResult:
            nonlocal begun, said
            if begun is not None:
                return begun()
            current = request()
            if not waits(current, run_id):
                begun = self._in_its_turn(current, request, run_id)
                return begun()
            summary = waiting_summary(current, run_id, self.deps.now())
            messages = (summary,) if summary != said else ()
            said = summary
            return DriveResult(False, current, None, summary, messages, WAIT_PAUSE_S)

        return tick

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
        number = rollback_in_hand(current, run_id)
        tick = self._tick(current, number, run_id) if number is not None else None

        def go_on() -> DriveResult:
            nonlocal current, number, tick
            if tick is None:
                return _nothing_to_do(current)
            result = tick()
            if not result.done or own_rollout(result.channel, run_id) == number:
                return result
            # The promotion that was under way has ended; go on from there if need be.
            current = request()
            number = rollback_in_hand(current, run_id)
            if number is None:
                return replace(_nothing_to_do(current), messages=result.messages)
            tick = self._tick(current, number, run_id)
            return replace(result, done=False, outcome=None, channel=current, next_in_s=0.0)

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
        """End the rollout under way. Raises NotFound if there is none, Refused if it is late."""
        return abort(self.deps, model, environment, reason=reason, who=who)

    def pause(self, *, model: str, environment: str, reason: str, who: str = "") -> Channel:
        """Freeze the weights of the rollout under way. Raises BadInput, Refused."""
        return by_hand.pause(self.deps, model, environment, reason=reason, who=who)

    def what_a_pause_holds(self, channel: Channel) -> tuple[str, ...]:
        """Return what the traffic of a paused rollout does, and whether it stays so."""
        return by_hand.what_a_pause_holds(self.deps, channel)

    def resume(self, *, model: str, environment: str, reason: str = "", who: str = "") -> Channel:
        """Let a paused rollout go on. Raises Refused."""
        return by_hand.resume(self.deps, model, environment, reason=reason, who=who)

    def promote_now(self, *, model: str, environment: str, reason: str, who: str = "") -> Channel:
        """Take the candidate to the bake; `who` answers for it. Raises BadInput, Refused."""
        return by_hand.promote_now(self.deps, model, environment, reason=reason, who=who)

    def _tick(self, channel: Channel, number: int, run_id: str) -> Tick:
        """Return what drives rollout `number`, or watches it if that is somebody else's work."""
        model, environment, rollout = channel.model, channel.environment, channel.rollout
        driver = rollout.driver if rollout and drives(channel, run_id, number) else None

        def tick() -> DriveResult:
            nonlocal driver
            if driver is None:
                return self._watch(model, environment, number)
            try:
                return drive(self.deps, model, environment, driver)
            except StaleDriver as stale:
                driver = None
                return replace(self._watch(model, environment, number), messages=(str(stale),))

        return tick

    def _watch(self, model: str, environment: str, number: int) -> DriveResult:
        """Report where a rollout stands that somebody else drives."""
        store = self.deps.store
        channel = demand_written(store, read_channel(store, model, environment))
        ended = ending_of(channel, number)
        rollout = channel.rollout
        if ended is not None:
            outcome, summary = ended
            return DriveResult(True, channel, outcome, summary)
        if rollout is not None and rollout.number == number:
            return DriveResult(False, channel, None, summary_of(channel), (), WATCH_PAUSE_S)
        summary = f"Rollout {number} is in no channel any more; the channel was reset."
        return DriveResult(True, channel, "withdrawn", summary)


def _as_if_over(channel: Channel) -> Channel:
    """Return the channel as if the rollout under way had ended without a change."""
    rollout = channel.rollout
    assert rollout is not None
    over = rollout.model_copy(update={"outcome": rollout.ending or "withdrawn"})
    return channel.model_copy(update={"rollout": over, "candidate": None})


def _nothing_to_do(channel: Channel) -> DriveResult:
    """Return the result of a request that the channel fulfils already."""
    stable = channel.stable.release_id if channel.stable else "no release"
    summary = f"{stable} has all traffic in {channel.environment}; there is nothing to do."
    return DriveResult(True, channel, "promoted", summary)
