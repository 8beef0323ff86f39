"""What people do to a rollout from a terminal or a page, whether or not Airflow runs.

Each is a wish that goes into the channel by compare-and-swap; the guard, which follows the channel,
moves the traffic. What is left (requests that end, servers that go) is the driver's work. While a
driver lives it does that; a command that finds none, or one that has fallen silent, takes the
rollout over with the same code and sees it to its end.

A driver lives while it renews its lease. Taking over one that does live after all harms nobody: the
channel's epoch tells it to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from trainyard.documents.channel import Channel, RolloutDriver
from trainyard.errors import (
    BadInput,
    NotFound,
    Refused,
    StaleDriver,
    TrainyardError,
    Transient,
)
from trainyard.rollout.channel_store import change_channel, demand_written, read_channel
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import (
    abort,
    drive,
    ending_of,
    finish_up,
    request_rollback,
    rollback_goal,
    summary_of,
)
from trainyard.rollout.events import (
    AbortRequested,
    DriverClaimed,
    PauseRequested,
    PromotionForced,
    ResumeRequested,
)
from trainyard.rollout.route_sight import RouteSight, shares_in_words
from trainyard.rollout.state_machine import (
    pause_refusal,
    promotion_refusal,
    resume_refusal,
    step,
)
from trainyard.rollout.words import describe_entry
from trainyard.serving.protocol import LeaseSight

DRIVER_SILENT_S = 15.0
"""Seconds without a renewal after which a driver does not count as living. It renews with every
tick, of which there is one every two seconds, unless it has servers to warm up."""

PULSE_PAUSE_S = 0.5
"""Seconds between two looks for a renewal."""

WATCH_PAUSE_S = 1.0
"""Seconds between two looks at a rollout that somebody else drives."""

AFTER_TROUBLE_S = 2.0

LONGEST_REASON = 500
"""Characters of a reason; forms in Airflow take as many."""

Say = Callable[[str], None]


# --- wishes ---------------------------------------------------------------------------------------


def pause(
    deps: RolloutDeps,
    model: str,
    environment: str,
    *,
    reason: str,
    who: str = "",
    again: bool = False,
) -> Channel:
    """Freeze the weights where they are; looks go on, and whatever is harmful still rolls back.

    Args:
        deps: the world.
        model: name of the model.
        environment: name of the environment.
        reason: why.
        who: asks for it.
        again: a rollout that is paused already stays as it is.

    Raises:
        BadInput: there is no reason.
        NotFound: no rollout is under way.
        Refused: it cannot be paused; the message says why.
    """
    reason = _reason(reason, "A pause")
    now = deps.now()

    def change(channel: Channel) -> Channel:
        _require_rollout(channel)
        if again and not resume_refusal(channel):
            return channel
        why = pause_refusal(channel, now)
        if why:
            raise Refused(why, hint=f"`trainyard status {model} {environment}` shows it.")
        return step(channel, PauseRequested(reason, who), now)[0]

    return change_channel(deps.store, model, environment, change)


def resume(
    deps: RolloutDeps, model: str, environment: str, *, reason: str = "", who: str = ""
) -> Channel:
    """Let a paused rollout go on.

    Raises:
        NotFound: no rollout is under way.
        Refused: it is not paused.
    """
    reason = _short_enough(reason)
    now = deps.now()

    def change(channel: Channel) -> Channel:
        _require_rollout(channel)
        why = resume_refusal(channel)
        if why:
            raise Refused(why, hint=f"`trainyard status {model} {environment}` shows it.")
        return step(channel, ResumeRequested(reason, who), now)[0]

    return change_channel(deps.store, model, environment, change)


def promote_now(
    deps: RolloutDeps, model: str, environment: str, *, reason: str, who: str = ""
) -> Channel:
    """Take the candidate to the bake without the judge's proof; `who` answers for it.

    The judge and all fuses go on during the bake.

    Raises:
        BadInput: there is no reason.
        NotFound: no rollout is under way.
        Refused: the judge says HARM, the guard holds the traffic (a fuse blew) or cannot be asked,
            nobody drives, or the rollout is not where that can be done.
    """
    reason = _reason(reason, "A promotion by hand")

    def change(channel: Channel) -> Channel:
        _require_rollout(channel)
        why = promotion_refusal(channel)
        if why:
            raise Refused(why, hint="It stays with the judge, or `trainyard abort` ends it.")
        return step(channel, PromotionForced(reason, who), deps.now())[0]

    before = read_channel(deps.store, model, environment)
    change(before)
    _refuse_if_guarded(deps, before)
    _refuse_if_unwatched(deps, before)
    # To see a driver takes a moment.
    _refuse_if_guarded(deps, before)
    return change_channel(deps.store, model, environment, change)


def _require_rollout(channel: Channel) -> None:
    if not channel.in_progress:
        raise NotFound(
            f"No rollout of {channel.model} is under way in {channel.environment}.",
            hint="`trainyard status` shows where all channels stand.",
        )


def _reason(reason: str, what: str) -> str:
    if not reason.strip():
        raise BadInput(f"{what} needs a reason.", hint="Say why; it is kept in the history.")
    return _short_enough(reason)


def _short_enough(reason: str) -> str:
    reason = reason.strip()
    if len(reason) > LONGEST_REASON:
        raise BadInput(
            f"The reason has {len(reason)} characters; {LONGEST_REASON} are the most.",
            hint="The channel keeps it in many places: be short, and say where more is written.",
        )
    return reason


def _refuse_if_guarded(deps: RolloutDeps, channel: Channel) -> None:
    """Refuse a promotion that the guard has its own mind about, or may have."""
    model, environment, rollout = channel.model, channel.environment, channel.rollout
    assert rollout is not None
    blown = [
        event.reason
        for event in deps.guard_events(model, environment, rollout.number)
        if event.event == "fuse"
    ]
    if blown:
        raise Refused(f"A fuse blew: {blown[0]}", hint="The release is rolled back.")
    route = deps.router.status(environment, model)
    if route is None:
        raise Refused(
            "The router cannot be asked, so nobody knows what the traffic does.",
            hint="Find out why first; `trainyard abort` ends the rollout.",
        )
    # Before the bake, a failover means that stable is down: a promotion is the way out of that.
    if route.guard not in {"following", "failover"}:
        raise Refused(
            f"The guard does not follow the channel ({route.guard.replace('_', ' ')}): "
            f"{route.guard_reason}",
            hint="Find out why first; `trainyard abort` ends the rollout.",
        )


def _refuse_if_unwatched(deps: RolloutDeps, channel: Channel) -> None:
    """Refuse a promotion that nobody would watch for late harm."""
    pulse = driver_pulse(deps, channel)
    if pulse.beats:
        return
    silent = (
        f"Its driver has not been seen for {DRIVER_SILENT_S:g} s"
        if pulse.sight.state == "alive"
        else "Nobody drives this rollout"
    )
    raise Refused(
        f"{silent}, so nobody would watch the release that you answer for.",
        hint="Start Airflow, or end the rollout with `trainyard abort`.",
    )


# --- what a pause holds ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pulse:
    """Whether the driver of a channel was seen at work."""

    beats: bool
    """It has renewed the lease while we looked."""
    sight: LeaseSight
    """The lease as it was seen last."""


def driver_pulse(deps: RolloutDeps, channel: Channel) -> Pulse:
    """Look at the lease until it is renewed or over, for `DRIVER_SILENT_S` at most.

    A lease says that its driver lived minutes ago. Who leaves something to the driver must see it.

    Raises:
        TrainyardError: the lease cannot be read.
    """
    place = channel.environment, channel.model
    first = sight = deps.lease.look(*place)
    for _ in range(math.ceil(DRIVER_SILENT_S / PULSE_PAUSE_S)):
        if sight.state != "alive" or sight.mark != first.mark:
            break
        deps.sleep(PULSE_PAUSE_S)
        sight = deps.lease.look(*place)
    return Pulse(sight.state == "alive" and sight.mark != first.mark, sight)


def what_a_pause_holds(deps: RolloutDeps, channel: Channel) -> tuple[str, ...]:
    """Return what the traffic of a paused rollout does, and whether it stays so; a line each.

    A pause renews no lease: without a driver nobody judges the release under test, and the guard
    does not leave it any traffic.
    """
    if not channel.in_progress:
        return ()
    return (_route_words(deps, channel), *_driver_words(channel, _pulse_or_error(deps, channel)))


def _pulse_or_error(deps: RolloutDeps, channel: Channel) -> Pulse | Exception:
    try:
        return driver_pulse(deps, channel)
    except (TrainyardError, OSError) as error:
        return error


def _route_words(deps: RolloutDeps, channel: Channel) -> str:
    try:
        route = deps.router.status(channel.environment, channel.model)
    except (TrainyardError, OSError):
        route = None
    if route is None:
        return "The router cannot be asked what the traffic does now."
    held = "" if route.guard == "following" else f" {route.guard_reason}"
    return f"The route gives {shares_in_words(route.weights) or 'nobody any traffic'}.{held}"


def _driver_words(channel: Channel, pulse: Pulse | Exception) -> tuple[str, ...]:
    """Say what follows from it if no driver was seen."""
    if isinstance(pulse, Exception):
        return (f"Nobody can tell whether somebody drives this rollout. {pulse}",)
    if pulse.beats:
        return ()
    command = f"`trainyard abort {channel.model} {channel.environment}` ends it."
    if channel.weights.candidate == 0:
        return (
            "Nobody drives this rollout. There is no share of a canary that could be frozen; the "
            f"pause holds once a driver is back. {command}",
        )
    if pulse.sight.state != "alive":
        return (
            "Nobody drives this rollout, so this pause freezes no weights: the guard has them. "
            f"A driver that comes back ends the rollout, or goes on with its bake. {command}",
        )
    left_s = pulse.sight.left_s
    when = f"in {max(left_s, 0.0):.0f} s" if left_s is not None else "when its lease ends"
    return (
        f"Its driver has not been seen for {DRIVER_SILENT_S:g} s. Unless it comes back, the guard "
        f"takes the traffic from the release under test {when}, paused or not: nobody judges it. "
        f"The same command with --wait drives it from here. {command}",
    )


def pause_and_stay(
    deps: RolloutDeps,
    model: str,
    environment: str,
    *,
    reason: str,
    who: str,
    run_id: str,
    say: Say,
    timeout_s: float,
) -> Channel:
    """Pause the rollout, or find it paused, and stay until it is over.

    If its driver has fallen silent while its lease still holds, this process drives it: looks and
    fuses go on, so the weights may stay.

    Raises:
        BadInput, NotFound, Refused: as `pause`.
        Transient: as `see_through`.
    """
    channel = pause(deps, model, environment, reason=reason, who=who, again=True)
    say(summary_of(channel))
    say(_route_words(deps, channel))
    pulse = _pulse_or_error(deps, channel)
    silent = isinstance(pulse, Pulse) and not pulse.beats and pulse.sight.state == "alive"
    take_over = silent and channel.weights.candidate > 0
    for line in () if take_over else _driver_words(channel, pulse):
        say(line)
    return see_through(
        deps,
        model,
        environment,
        run_id=run_id,
        say=say,
        timeout_s=timeout_s,
        take_over=take_over,
    )


# --- ending, with or without a driver -------------------------------------------------------------


class Patience:
    """Tells by its renewals whether the driver of a channel lives, the longer the surer."""

    def __init__(self, deps: RolloutDeps, channel: Channel) -> None:
        """Begin to watch."""
        self._deps = deps
        self._model, self._environment = channel.model, channel.environment
        self._mark = ""
        self._since = deps.now()
        self.may_drive = True
        """May this user drive it, as far as its lease has told?"""

    def driver_lives(self) -> bool:
        """Tell it now. Raises TrainyardError if the lease cannot be read."""
        seen = self._deps.lease.look(self._environment, self._model)
        self.may_drive = seen.may_renew
        if seen.state != "alive":
            return False
        now = self._deps.now()
        if seen.mark != self._mark:
            self._mark, self._since = seen.mark, now
        return now - self._since < timedelta(seconds=DRIVER_SILENT_S)


def driver_sight(deps: RolloutDeps, channel: Channel) -> LeaseSight | None:
    """Return the lease of a channel; None if it cannot be read."""
    try:
        return deps.lease.look(channel.environment, channel.model)
    except (TrainyardError, OSError):
        return None


def see_through(
    deps: RolloutDeps,
    model: str,
    environment: str,
    *,
    run_id: str,
    say: Say,
    timeout_s: float,
    wait: bool = True,
    take_over: bool = True,
) -> Channel:
    """See the rollout under way to its end: watch while somebody drives it, else drive it.

    Of a rollout that is over it does what its driver has left, if there is anything.

    Args:
        deps: the world.
        model: name of the model.
        environment: name of the environment.
        run_id: under which it is driven, if need be.
        say: takes what happens, a line each.
        timeout_s: seconds that it may take.
        wait: False returns at once while a driver lives; without one somebody must stay.
        take_over: False only watches. A rollout that is not decided yet is its own driver's, which
            may be busy for a while; whoever took it over would have to stay for all of it.

    Returns:
        The channel as it is then.

    Raises:
        Transient: it takes longer, or the store is away. Whoever calls again goes on.
    """
    channel = demand_written(deps.store, read_channel(deps.store, model, environment))
    if channel.rollout is None:
        return channel
    end = deps.now() + timedelta(seconds=timeout_s)
    return _SeeingThrough(deps, channel, run_id, say, wait=wait, take_over=take_over).until(end)


class _SeeingThrough:
    """One rollout that somebody wants to see to its end."""

    def __init__(
        self,
        deps: RolloutDeps,
        channel: Channel,
        run_id: str,
        say: Say,
        *,
        wait: bool = True,
        take_over: bool = True,
        driver: RolloutDriver | None = None,
    ) -> None:
        """Begin with a channel; `driver` is ours, if we drive it already."""
        assert channel.rollout is not None
        self._deps = deps
        self._channel = channel
        self._number = channel.rollout.number
        self._run_id = run_id
        self._say = say
        self._wait = wait
        self._take_over = take_over
        self._driver = driver
        self._patience = Patience(deps, channel)
        self._route = RouteSight(deps, say)

    def until(self, end: datetime) -> Channel:
        """Go on until it is over; raises Transient if that is not before `end`."""
        trouble = ""
        while True:
            try:
                pause_s = self._look()
            except TrainyardError as error:
                if not error.retryable:
                    raise
                if str(error) != trouble:
                    trouble = str(error)
                    self._say(f"{error.message} Trying again.")
                pause_s = AFTER_TROUBLE_S
            self._route.look(self._channel)
            if pause_s is None:
                return self._channel
            if self._deps.now() >= end:
                said = f"{summary_of(self._channel)} {self._route.trouble}".rstrip()
                raise Transient(
                    f"It is not over yet. {said}",
                    hint="The same command again goes on with it.",
                )
            self._deps.sleep(pause_s)

    def _look(self) -> float | None:
        """Do what is to be done now; return the seconds until the next look, None at the end."""
        if self._driver is not None:
            return self._drive(self._driver)
        channel = read_channel(self._deps.store, self._channel.model, self._channel.environment)
        demand_written(self._deps.store, channel)
        self._tell(channel)
        self._channel = channel
        if self._is_over(channel):
            return self._finish_up(channel)
        if not self._take_over or self._is_in_other_hands():
            return WATCH_PAUSE_S if self._wait else None
        self._say("Nobody drives this rollout: this command does, and stays until it is over.")
        claimed = change_channel(
            self._deps.store, channel.model, channel.environment, self._claimed
        )
        if claimed.rollout is not None and not self._is_over(claimed):
            self._driver = claimed.rollout.driver
        return 0.0

    def _finish_up(self, channel: Channel) -> float | None:
        """Do what a driver has left that died when the rollout was over; one that lives does it."""
        if not self._take_over or channel.in_progress:
            return None
        if self._is_in_other_hands():
            return WATCH_PAUSE_S if self._wait else None
        if finish_up(self._deps, channel.model, channel.environment):
            self._say("What its driver had left to be done is done.")
        return None

    def _is_in_other_hands(self) -> bool:
        """Tell whether a driver lives, or nobody knows: what this user may not touch, others end.

        By then the channel says what is wished for, and the guard has moved the traffic.
        """
        try:
            if self._patience.driver_lives():
                return True
        except TrainyardError as error:
            if error.retryable:
                raise
            self._say(f"Nobody can tell whether somebody drives this rollout. {error}")
            self._say("This command only watches.")
            self._take_over = False
            return True
        if self._patience.may_drive:
            return False
        if self._channel.in_progress:
            raise _no_hands("Nobody drives this rollout to its end, and this user may not either.")
        # What is left of a rollout that is over, if anything is, the watch does.
        self._take_over = False
        return True

    def _claimed(self, channel: Channel) -> Channel:
        demand_written(self._deps.store, channel)
        if self._is_over(channel):
            return channel
        return step(channel, DriverClaimed(self._run_id), self._deps.now())[0]

    def _drive(self, driver: RolloutDriver) -> float | None:
        try:
            result = drive(self._deps, self._channel.model, self._channel.environment, driver)
        except StaleDriver as stale:
            self._say(f"{stale.message} This command only watches now.")
            self._driver, self._wait = None, True
            self._patience = Patience(self._deps, self._channel)
            return WATCH_PAUSE_S
        for line in result.messages:
            self._say(line)
        self._channel = result.channel
        return None if result.done else result.next_in_s

    def _is_over(self, channel: Channel) -> bool:
        rollout = channel.rollout
        return rollout is None or rollout.number != self._number or not channel.in_progress

    def _tell(self, channel: Channel) -> None:
        for entry in channel.history:
            if entry.generation > self._channel.generation:
                self._say(describe_entry(entry))


def _no_hands(why: str) -> BadInput:
    return BadInput(
        why,
        hint="Give the same command as the user who runs the agent and the proxy.",
    )


def abort_rollout(
    deps: RolloutDeps,
    model: str,
    environment: str,
    *,
    reason: str,
    who: str,
    run_id: str,
    say: Say,
    timeout_s: float,
    wait: bool = True,
) -> Channel:
    """Withdraw the release under way and see the rollout to its end. May be called again.

    Raises:
        BadInput: there is no reason; or, once the traffic has moved: nobody drives, and this user
            may not.
        NotFound: no rollout is under way.
        Refused: the release was promoted before.
        Transient: as `see_through`.
    """
    reason = _reason(reason, "An abort")
    left = _finish_last(deps, model, environment, run_id, say, timeout_s)
    if left is not None:
        return left
    before = abort(deps, model, environment, reason=reason, who=who)
    assert before.rollout is not None
    say(f"The channel gives all traffic to {_stable(before)}.")
    channel = see_through(
        deps, model, environment, run_id=run_id, say=say, timeout_s=timeout_s, wait=wait
    )
    ended = ending_of(channel, before.rollout.number)
    outcome = ended[0] if ended is not None else before.rollout.ending
    if outcome == "promoted":
        raise Refused(
            f"It was too late: {summary_of(channel)}",
            hint="To leave the release that is stable now, roll back.",
        )
    return channel


def _finish_last(
    deps: RolloutDeps, model: str, environment: str, run_id: str, say: Say, timeout_s: float
) -> Channel | None:
    """Finish what a command that was cut off at the very end has left; None: it left nothing."""
    channel = read_channel(deps.store, model, environment)
    if channel.in_progress or channel.rollout is None:
        return None
    sight = driver_sight(deps, channel)
    if sight is None or sight.state == "absent":
        return None
    channel = see_through(deps, model, environment, run_id=run_id, say=say, timeout_s=timeout_s)
    assert channel.rollout is not None
    return channel if channel.rollout.outcome == "withdrawn" else None


def _finish_last_in_passing(deps: RolloutDeps, model: str, environment: str, say: Say) -> None:
    """Try once to finish what the last rollout has left; a rollback does not wait for that."""
    try:
        if finish_up(deps, model, environment):
            say("What the last rollout had left to be done is done.")
    except (TrainyardError, OSError) as error:
        say(f"What the last rollout has left to be done is not done: {error}")


def roll_back(
    deps: RolloutDeps,
    model: str,
    environment: str,
    *,
    release_id: str | None,
    reason: str,
    who: str,
    run_id: str,
    say: Say,
    timeout_s: float,
    wait: bool = True,
) -> Channel:
    """Bring all traffic back to a proven release: the named one, or the one before.

    A promotion under way is ended first. May be called again: a rollback under way is gone on with.

    Returns:
        The channel; unless `wait` is False, that release is stable in it.

    Raises:
        BadInput: there is no reason; or nobody drives, and this user may not.
        NotFound: there is no such earlier release.
        Busy: a rollback to another release is under way.
        Refused: it could not be done; the message says why.
        Transient: as `see_through`.
    """
    reason = _reason(reason, "A rollback")
    _finish_last_in_passing(deps, model, environment, say)
    target = rollback_goal(read_channel(deps.store, model, environment), release_id)

    channel = _end_promotion(deps, model, environment, target, reason, who)
    if channel.in_progress:
        say(summary_of(channel))
        channel = see_through(
            deps,
            model,
            environment,
            run_id=run_id,
            say=say,
            timeout_s=timeout_s,
            # If another release is wanted, the way there begins when this one is over.
            wait=wait or _stable(channel) != target,
        )
        if channel.in_progress:
            return channel
    if _stable(channel) != target:
        _refuse_without_hands(deps, model, environment, target)
        channel = request_rollback(
            deps,
            model,
            environment,
            run_id=run_id,
            release_id=target,
            reason=reason,
            requested_by=who,
        )
        say(summary_of(channel))
        channel = _drive_own(deps, channel, run_id, say, timeout_s)
    if _stable(channel) != target:
        raise Refused(
            f"{target} is not stable in {environment}. {summary_of(channel)}",
            hint="See its servers' logs; another release can be named with --to.",
        )
    return channel


def _refuse_without_hands(deps: RolloutDeps, model: str, environment: str, target: str) -> None:
    """Refuse to begin what this user could not drive; a lease that is away for now is no reason."""
    try:
        may_drive = deps.lease.look(environment, model).may_renew
    except (Transient, OSError):
        return
    if not may_drive:
        raise _no_hands(f"No rollback to {target} has begun: this user may not drive it.")


def _drive_own(
    deps: RolloutDeps, channel: Channel, run_id: str, say: Say, timeout_s: float
) -> Channel:
    """Drive the rollback that this run has just begun."""
    rollout = channel.rollout
    if rollout is None or not channel.in_progress:
        return channel
    driver = rollout.driver if rollout.driver.run_id == run_id else None
    seeing = _SeeingThrough(deps, channel, run_id, say, driver=driver)
    return seeing.until(deps.now() + timedelta(seconds=timeout_s))


def _end_promotion(
    deps: RolloutDeps, model: str, environment: str, target: str, reason: str, who: str
) -> Channel:
    """End the promotion under way, if there is one; a rollback goes on."""
    now = deps.now()

    def change(channel: Channel) -> Channel:
        rollout = channel.rollout
        if rollout is None or not channel.in_progress or rollout.plan.kind == "rollback":
            return channel
        why = f"A rollback to {target} was requested. {reason}"
        return step(channel, AbortRequested(why, who), now)[0]

    return change_channel(deps.store, model, environment, change)


def _stable(channel: Channel) -> str:
    return channel.stable.release_id if channel.stable is not None else "no release"
