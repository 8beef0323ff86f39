"""The shell around the state machine: looks at the world, stores the channel, carries out wishes.

One tick (`drive`) reads the channel, observes, lets the state machine decide, stores the result by
compare-and-swap, and only then acts. Everything it does may be repeated, so it may be killed at any
line: the next tick, of whichever process, goes on from the channel. Nothing is kept between ticks
but caches of what never changes.

Several processes may try to drive a rollout. The channel names the run and the epoch that may; all
others get StaleDriver. Two with the same epoch do the same things twice, which is harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from trainyard.approvals import demand_approval
from trainyard.documents.channel import (
    EXPOSED_PHASES,
    WAITING_LIMIT,
    Channel,
    Outcome,
    RolloutDriver,
    RolloutPlan,
)
from trainyard.documents.measurement import Envelope, Measurement
from trainyard.documents.release import Release
from trainyard.errors import (
    Busy,
    Conflict,
    NotFound,
    Refused,
    StaleDriver,
    TrainyardError,
    Transient,
)
from trainyard.rollout.act import act, strays
from trainyard.rollout.adopted import known_release
from trainyard.rollout.channel_store import (
    change_channel,
    demand_written,
    read_channel,
    read_for_change,
    write_channel,
)
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.events import (
    AbortRequested,
    DriverClaimed,
    Event,
    OutcomeNoted,
    QueueJoined,
    QueueLeft,
    RequesterNoted,
    RolloutRequested,
    UndoRequested,
)
from trainyard.rollout.observe import observe, seconds_to_next_slot
from trainyard.rollout.plan_rollout import (
    NothingToDo,
    plan_rollback,
    plan_rollout,
    recorded_reason,
    rollback_target,
)
from trainyard.rollout.state_machine import commands_for, place_in_line, step
from trainyard.rollout.words import describe_entry
from trainyard.serving.protocol import ServerStatus
from trainyard.store.documents import read_document
from trainyard.store.factory import demand_content
from trainyard.store.layout import measurement_key, rollout_prefix

log = logging.getLogger(__name__)

AFTER_CONFLICT_S = 0.2
LONGEST_PAUSE_S = 2.0
SHORTEST_PAUSE_S = 0.1

OUTCOME_EVENTS: dict[str, Outcome] = {
    "promoted": "promoted",
    "returned": "promoted",
    "rolled_back": "rolled_back",
    "withdrawn": "withdrawn",
}
"""Outcomes by the event that ends a rollout in the history."""


@dataclass(frozen=True)
class DriveResult:
    """What a tick found."""

    done: bool
    """The rollout has an outcome, and everything about it is written down."""
    channel: Channel
    outcome: Outcome | None
    """How it ended, if it did."""
    summary: str
    """One sentence about where it stands."""
    messages: tuple[str, ...] = ()
    """What is new, a line each."""
    next_in_s: float = 0.0
    """Seconds until the next tick is worth while."""


@dataclass(frozen=True)
class Settled:
    """How the rollout of a run ended."""

    outcome: Outcome | None
    """None: the run has no rollout."""
    summary: str
    channel: Channel


# --- beginning ------------------------------------------------------------------------------------


def start_rollout(
    deps: RolloutDeps,
    model: str,
    environment: str,
    release_id: str,
    *,
    run_id: str,
    force: bool = False,
    reason: str = "",
    requested_by: str = "",
) -> Channel:
    """Take the channel for a rollout of `release_id`, or go on with the one that `run_id` has.

    Going on raises the epoch, so that whoever drove the rollout before stops. A run whose rollout
    is over, or was taken over by somebody else, gets the channel as it is, whatever rollouts have
    followed, until it has been settled; then it may try again.

    Where the environment lets requests wait, one that comes while the channel is in use, or while
    others wait that came before, is in `waiting` of the channel that is returned: call again until
    it is not.

    Returns:
        The channel. If `run_id` has no rollout in it (`own_rollout`), and does not wait, there was
        nothing to do.

    Raises:
        Busy, BadInput, NotFound, Refused: as `plan_rollout`.
        Refused: also if it has waited for `queue_timeout_s`, or if the environment takes only what
            was approved, and this was not.
        Conflict: others kept changing the channel.
        Transient: the store is away, or has nothing in it.
    """
    now = deps.now()
    rules = deps.environment(environment)
    demand_content(deps.store)

    def change(channel: Channel) -> Channel:
        own = own_rollout(channel, run_id, release_id)
        if own is not None:
            return _claimed_again(channel, run_id, own, now)
        busy = channel.in_progress or place_in_line(channel, run_id, now) > 0
        if busy and rules.concurrent_requests == "queue":
            _refuse_to_wait(channel, run_id, rules.queue_timeout_s, now)
            return step(channel, QueueJoined(run_id, release_id, requested_by), now)[0]
        channel = step(channel, QueueLeft(run_id), now)[0]
        plan = plan_for(deps, channel, release_id, force=force, reason=reason)[1]
        if isinstance(plan, NothingToDo):
            return channel
        if deps.environment(environment).approval is not None:
            demand_approval(deps.store, model, release_id, environment=environment, run_id=run_id)
        why = recorded_reason(deps.environment(environment), now, force=force, reason=reason)
        return _requested(deps, channel, release_id, plan, run_id, requested_by, why, now)

    try:
        return change_channel(deps.store, model, environment, change)
    except TrainyardError as error:
        if not error.retryable or isinstance(error, Busy):
            leave_queue(deps, model, environment, run_id)
        raise


def waits(channel: Channel, run_id: str) -> bool:
    """Tell whether a run waits for the channel."""
    return any(waiting.run_id == run_id for waiting in channel.waiting)


def leave_queue(deps: RolloutDeps, model: str, environment: str, run_id: str) -> Channel:
    """Let a run wait no longer. Idempotent."""
    now = deps.now()
    return change_channel(
        deps.store, model, environment, lambda channel: step(channel, QueueLeft(run_id), now)[0]
    )


def waiting_summary(channel: Channel, run_id: str, now: datetime) -> str:
    """Return what a run that waits is waiting for, in one sentence or two."""
    before = place_in_line(channel, run_id, now)
    line = f"{before} request{'s' * (before != 1)} before it. " if before else ""
    own = next((w for w in channel.waiting if w.run_id == run_id), None)
    name = own.release_id if own is not None else "The request"
    return f"{name} waits for the channel. {line}{summary_of(channel)}"


def _refuse_to_wait(channel: Channel, run_id: str, timeout_s: float, now: datetime) -> None:
    own = next((w for w in channel.waiting if w.run_id == run_id), None)
    if own is not None and (now - own.since).total_seconds() >= timeout_s:
        raise Refused(
            f"{own.release_id} has waited for {timeout_s:g} s. {summary_of(channel)}",
            hint="Ask again once the rollout under way is over, or end it.",
        )
    if own is None and len(channel.waiting) >= WAITING_LIMIT:
        raise Busy(
            f"{len(channel.waiting)} requests wait for {channel.environment} of {channel.model} "
            "already.",
            hint="Wait until some of them are over.",
        )


def own_rollout(channel: Channel, run_id: str, release_id: str | None = None) -> int | None:
    """Return the number of the rollout that `run_id` asked for and has not settled yet.

    It is the run's own whoever drives it now, and whatever rollouts have followed it.
    """
    rollout = channel.rollout
    if (
        rollout is not None
        and channel.owner == run_id
        and release_id in (None, rollout.release_id)
        and not rollout.settled
    ):
        return rollout.number
    for earlier in reversed(channel.unsettled):
        if earlier.run_id == run_id and release_id in (None, earlier.release_id):
            return earlier.rollout
    return None


def _claimed_again(channel: Channel, run_id: str, number: int, now: datetime) -> Channel:
    """Return the channel with `run_id` as its driver again, unless somebody else drives.

    Whoever has taken the rollout over did so to end it: the run that asked for it only watches.
    """
    if not drives(channel, run_id, number):
        return channel
    return step(channel, DriverClaimed(run_id), now)[0]


def plan_for(
    deps: RolloutDeps, channel: Channel, release_id: str, *, force: bool = False, reason: str = ""
) -> tuple[Release, RolloutPlan | NothingToDo]:
    """Return the release and what promoting it would do. Raises as `plan_rollout`."""
    environment = deps.environment(channel.environment)
    release = deps.release(channel.model, release_id)
    required = {
        name: read_channel(deps.store, channel.model, name) for name in environment.requires
    }

    def same_checkpoint(other: str) -> bool:
        if other == release_id:
            return True
        try:
            digest = deps.release(channel.model, other).checkpoint_digest
        except NotFound:
            # An adopted release has no manifest, so nobody knows what it is made of.
            return False
        return digest == release.checkpoint_digest

    plan = plan_rollout(
        channel,
        release,
        environment,
        now=deps.now(),
        drain_timeout_s=deps.drain_timeout_s,
        force=force,
        reason=reason,
        required=required,
        same_checkpoint=same_checkpoint,
        stable_servers=_stable_servers(deps, channel),
        proven=deps.proven,
    )
    if isinstance(plan, RolloutPlan):
        plan = plan.model_copy(update={"envelope": _envelope(deps, release)})
    return release, plan


def _envelope(deps: RolloutDeps, release: Release) -> Envelope | None:
    """Return the loads that a release was measured with; None if its measurement does not say."""
    try:
        key = measurement_key(release.measurement_id)
        return read_document(deps.store, key, Measurement).envelope
    except NotFound:
        return None


def _stable_servers(deps: RolloutDeps, channel: Channel) -> int:
    """Return how many servers the stable release has now; none if the host does not say."""
    if channel.stable is None:
        return 0
    try:
        servers = deps.host.servers(channel.environment, channel.model)
    except (TrainyardError, OSError) as error:
        log.warning("The host cannot be asked how many servers there are: %s", error)
        return 0
    stable = channel.stable.release_id
    return sum(s.release_id == stable and s.state != "stopping" for s in servers)


def request_rollback(
    deps: RolloutDeps,
    model: str,
    environment: str,
    *,
    run_id: str,
    release_id: str | None = None,
    reason: str = "",
    requested_by: str = "",
) -> Channel:
    """Move the channel back to a proven release: the named one, or the one before the present.

    A promotion that is under way is ended first, in the same change of the channel: `run_id`
    becomes its driver, and traffic goes to the release that was stable before it. Call again once
    that is over; if another release is wanted, the way there begins then.

    Returns:
        The channel. Unless `rollback_in_hand` finds something in it, there is nothing more to do.

    Raises:
        NotFound: there is no such earlier release.
        Refused: no release is named, and what happened last was no promotion.
        Busy: another rollback is under way.
        Conflict: others kept changing the channel.
        Transient: the store is away, or has nothing in it.
    """
    now = deps.now()
    demand_content(deps.store)

    def change(channel: Channel) -> Channel:
        rollout = channel.rollout
        in_hand = rollback_in_hand(channel, run_id)
        if in_hand is not None:
            return _claimed_again(channel, run_id, in_hand, now)
        driven = _driven(channel, run_id)
        if rollout is not None and rollout.number in driven and rollout.plan.kind != "rollback":
            # The promotion that this run has ended; it may have been over just before.
            return go_back(channel, release_id or rollout.reference_id)
        if driven and release_id is None:
            # It has undone what there was. What came since was asked for by somebody else.
            return channel
        target = rollback_goal(channel, release_id)
        if rollout is None or not channel.in_progress:
            return go_back(channel, target)
        if rollout.plan.kind == "rollback":
            raise Busy(
                f"A rollback to {rollout.release_id} is under way already, driven by "
                f"{rollout.driver.run_id}.",
                hint="Wait for its end.",
            )
        claimed = step(channel, DriverClaimed(run_id), now)[0]
        why = f"A rollback was requested. {reason}".strip()
        return step(claimed, UndoRequested(why, requested_by), now)[0]

    def go_back(channel: Channel, target: str) -> Channel:
        plan = plan_rollback(
            channel,
            known_release(deps, channel, target),
            deps.environment(environment),
            drain_timeout_s=deps.drain_timeout_s,
            stable_servers=_stable_servers(deps, channel),
        )
        if isinstance(plan, NothingToDo):
            return channel
        return _requested(deps, channel, target, plan, run_id, requested_by, reason, now)

    return change_channel(deps.store, model, environment, change)


def rollback_goal(channel: Channel, release_id: str | None) -> str:
    """Return where a rollback goes.

    Without a name it undoes the last promotion, and nothing else: whoever repeats the request, or
    was not told that the judge has rolled back already, must not lose a good release by it.

    Raises:
        NotFound: there is no such release.
        Busy: a rollback to another release is under way.
        Refused: no release is named, and what happened last was no promotion.
    """
    rollout = channel.rollout
    if rollout is None or not channel.in_progress:
        target = rollback_target(channel, release_id)
        undoes = rollout is None or (
            rollout.outcome == "promoted" and rollout.plan.kind != "rollback"
        )
        if release_id is None and not undoes:
            stable = channel.stable.release_id if channel.stable is not None else "no release"
            raise Refused(
                f"There is no promotion to undo: {summary_of(channel)} {stable} is stable.",
                hint=f"To leave it for the release before, name that one: --to {target} (in "
                f"Airflow: release).",
            )
        return target
    if rollout.plan.kind == "rollback":
        if release_id in (None, rollout.release_id):
            return rollout.release_id
        raise Busy(
            f"A rollback to {rollout.release_id} is under way already, driven by "
            f"{rollout.driver.run_id}.",
            hint="Wait for its end, or see it to its end by the same command without --to.",
        )
    wanted = release_id or rollout.reference_id
    known = {track.release_id for track in channel.previous} | {rollout.reference_id}
    if wanted and wanted in known:
        return wanted
    raise NotFound(
        f"{channel.environment} of {channel.model} has no earlier release"
        + (f" {release_id}." if release_id else " to go back to."),
        hint="To end the rollout that is under way, abort it.",
    )


def rollback_in_hand(channel: Channel, run_id: str) -> int | None:
    """Return the number of the rollout that a rollback has in hand; None if there is none.

    That is its own, or a promotion under way that it ends first.
    """
    own = own_rollout(channel, run_id)
    if own is not None:
        return own
    rollout = channel.rollout
    if rollout is not None and channel.in_progress and rollout.number in _driven(channel, run_id):
        return rollout.number
    return None


def _driven(channel: Channel, run_id: str) -> frozenset[int]:
    """Return the numbers of the rollouts that `run_id` has driven, whoever asked for them."""
    found = {
        entry.rollout
        for entry in channel.history
        if entry.event == "driver" and entry.detail.get("run_id") == run_id
    }
    if channel.rollout is not None and channel.rollout.driver.run_id == run_id:
        found.add(channel.rollout.number)
    return frozenset(number for number in found if number is not None)


def _requested(
    deps: RolloutDeps,
    channel: Channel,
    release_id: str,
    plan: RolloutPlan,
    run_id: str,
    requested_by: str,
    reason: str,
    now: datetime,
) -> Channel:
    request = RolloutRequested(
        number=_next_number(deps, channel),
        release_id=release_id,
        plan=plan,
        run_id=run_id,
        requested_by=requested_by,
        reason=reason,
    )
    return step(channel, request, now)[0]


def _next_number(deps: RolloutDeps, channel: Channel) -> int:
    """Return a number that no rollout of the channel had, also before the channel was reset."""
    if channel.rollout is not None:
        return channel.rollout.number + 1
    folder = rollout_prefix(channel.model, channel.environment, 0).rpartition("/")[0]
    used = {
        entry.key.removeprefix(f"{folder}/").partition("/")[0] for entry in deps.store.list(folder)
    }
    return max((int(number) for number in used if number.isdigit()), default=0) + 1


# --- driving --------------------------------------------------------------------------------------


def drive(deps: RolloutDeps, model: str, environment: str, driver: RolloutDriver) -> DriveResult:
    """Make one tick.

    Args:
        deps: the world.
        model: name of the model.
        environment: name of the environment.
        driver: who drives, as `start_rollout` left it in the channel.

    Raises:
        StaleDriver: somebody else drives the rollout, or there is another one by now.
        Transient: the store is away for the moment.
    """
    now = deps.now()
    channel, version = read_for_change(deps.store, model, environment)
    before = demand_written(deps.store, channel)
    _require_driver(channel, driver)
    servers: tuple[ServerStatus, ...] = ()
    messages: tuple[str, ...] = ()
    commands = commands_for(channel, now)
    if channel.in_progress:
        sight = observe(deps, channel, now)
        servers, messages = sight.servers, sight.messages
        channel = _fold(channel, sight.events, now)
        if channel != before:
            try:
                version = write_channel(deps.store, channel, version=version)
            except Conflict:
                return _result(before, (), next_in_s=AFTER_CONFLICT_S)
        commands = (*commands_for(channel, now), *strays(channel, servers, now))
    done = act(deps, channel, commands, servers)
    if done.events:
        later = _fold(channel, done.events, deps.now())
        try:
            write_channel(deps.store, later, version=version)
            channel = later
        except Conflict:
            # Whoever was first has not seen these events; the next tick makes them again.
            pass
    return _result(
        channel,
        (*_news(before, channel), *messages, *done.problems),
        done=not channel.in_progress and not done.try_again,
        next_in_s=_pause_s(channel, deps.now(), acted=bool(done.events)),
    )


def _require_driver(channel: Channel, driver: RolloutDriver) -> None:
    rollout = channel.rollout
    now = rollout.driver if rollout is not None else None
    if now is None or (now.run_id, now.epoch) != (driver.run_id, driver.epoch):
        raise StaleDriver(
            f"{channel.environment} of {channel.model} is driven by "
            f"{f'{now.run_id} (epoch {now.epoch})' if now else 'nobody'}, not by {driver.run_id} "
            f"(epoch {driver.epoch}).",
            hint="Stop driving it; its channel says how it goes on.",
        )


def _fold(channel: Channel, events: Sequence[Event], now: datetime) -> Channel:
    for event in events:
        channel, _ = step(channel, event, now)
    return channel


def _news(before: Channel, after: Channel) -> tuple[str, ...]:
    return tuple(
        describe_entry(entry) for entry in after.history if entry.generation > before.generation
    )


def _result(
    channel: Channel, messages: tuple[str, ...], *, done: bool = False, next_in_s: float
) -> DriveResult:
    return DriveResult(
        done=done,
        channel=channel,
        outcome=channel.rollout.outcome if channel.rollout else None,
        summary=summary_of(channel),
        messages=messages,
        next_in_s=next_in_s,
    )


def _pause_s(channel: Channel, now: datetime, *, acted: bool) -> float:
    """Return how long nothing is likely to happen."""
    rollout = channel.rollout
    if rollout is None or not channel.in_progress:
        return LONGEST_PAUSE_S
    if acted:
        return 0.0
    pause_s = LONGEST_PAUSE_S if rollout.phase in {"deploying", "scaling"} else 0.5
    if rollout.phase in EXPOSED_PHASES:
        pause_s = max(SHORTEST_PAUSE_S, min(pause_s, seconds_to_next_slot(rollout, now)))
    return pause_s


def summary_of(channel: Channel) -> str:
    """Return one sentence about where the channel's rollout stands."""
    rollout = channel.rollout
    if rollout is None:
        return f"{channel.environment} of {channel.model} has had no rollout yet."
    if rollout.outcome is None:
        pause = rollout.paused
        paused = f" (paused by {pause.who or 'somebody'}: {pause.reason})" if pause else ""
        return (
            f"{rollout.release_id} in {channel.environment}: {rollout.phase}{paused}; the channel "
            f"wishes {channel.weights.candidate} % of the traffic for the candidate. "
            f"{rollout.reason}"
        )
    how = rollout.outcome.replace("_", " ")
    return f"{rollout.release_id} was {how} in {channel.environment}: {rollout.reason}"


# --- ending ---------------------------------------------------------------------------------------


def abort(
    deps: RolloutDeps, model: str, environment: str, *, reason: str, who: str = ""
) -> Channel:
    """End the rollout under way: traffic goes back at once, its driver does the rest.

    Raises:
        NotFound: no rollout is under way.
        Refused: its release is promoted already, and only the old servers are going.
    """
    now = deps.now()

    def change(channel: Channel) -> Channel:
        rollout = channel.rollout
        if rollout is None or not channel.in_progress:
            raise NotFound(
                f"No rollout of {model} is under way in {environment}.",
                hint="To leave a release that is stable already, roll back.",
            )
        if rollout.ending == "promoted":
            raise Refused(
                f"It is too late to abort rollout {rollout.number}: {rollout.release_id} has all "
                f"traffic in {environment}, and the old servers are going.",
                hint=f"To leave it, roll back: `trainyard rollback {model} {environment}`, or "
                f"neuron_rollback__{environment} in Airflow.",
            )
        return step(channel, AbortRequested(reason, who), now)[0]

    return change_channel(deps.store, model, environment, change)


def note_requester(
    deps: RolloutDeps, model: str, environment: str, *, run_id: str, who: str
) -> Channel:
    """Write down who asked for the rollout of `run_id`, if it began without that. Idempotent.

    A rollout of another run is left as it is.
    """

    def change(channel: Channel) -> Channel:
        if channel.rollout is None or channel.owner != run_id:
            return channel
        return step(channel, RequesterNoted(who), deps.now())[0]

    return change_channel(deps.store, model, environment, change)


def settle(
    deps: RolloutDeps,
    model: str,
    environment: str,
    *,
    run_id: str,
    release_id: str | None = None,
    timeout_s: float | None = None,
) -> Settled:
    """End whatever `run_id` has left unfinished, and tell how its rollout ended. Idempotent.

    All traffic goes to the release that was stable before, in one change of the channel that also
    makes any other driver of this run stop. Then the servers of the loser are taken away, as far as
    that is possible in `timeout_s`.

    Args:
        deps: the world.
        model: name of the model.
        environment: name of the environment.
        run_id: the run whose rollout it is.
        release_id: what the run was to promote: a run that found it stable has promoted it.
        timeout_s: seconds to wait for servers to go; by default what the plan's limits add up to.

    Raises:
        Transient: the store is away, or has nothing in it.
    """
    now = deps.now()
    demand_content(deps.store)
    before = read_channel(deps.store, model, environment)
    number = number_of_run(before, run_id)

    def change(channel: Channel) -> Channel:
        channel = step(channel, QueueLeft(run_id), now)[0]
        if not drives(channel, run_id, number) or not channel.in_progress:
            return channel
        claimed = step(channel, DriverClaimed(run_id), now)[0]
        why = "Its run ended before the rollout did."
        return step(claimed, AbortRequested(why, run_id), now)[0]

    channel = change_channel(deps.store, model, environment, change)
    if number is None:
        return _without_rollout(channel, run_id, release_id)
    if drives(channel, run_id, number):
        channel = _finish(deps, channel, timeout_s)
    elif channel.rollout is not None and channel.rollout.number == number:
        _finish_up_silent(deps, channel)
    settled = _settled(channel, number, run_id)
    if settled.outcome == "promoted" and own_rollout(before, run_id) is None:
        settled = _still_stable(settled, run_id, release_id)
    channel = change_channel(
        deps.store, model, environment, lambda c: step(c, OutcomeNoted(run_id), deps.now())[0]
    )
    return replace(settled, channel=channel)


def _finish_up_silent(deps: RolloutDeps, channel: Channel) -> None:
    """Do what somebody else has left of a rollout; what cannot be done now, the watch does."""
    try:
        if deps.lease.look(channel.environment, channel.model).state == "expired":
            finish_up(deps, channel.model, channel.environment)
    except (TrainyardError, OSError) as error:
        log.warning("%s/%s: %s", channel.model, channel.environment, error)


def _finish(deps: RolloutDeps, channel: Channel, timeout_s: float | None) -> Channel:
    """Drive a rollout that is ending until it has ended, or time is up."""
    assert channel.rollout is not None
    plan, driver = channel.rollout.plan, channel.rollout.driver
    if timeout_s is None:
        timeout_s = plan.arrivals_timeout_s + 2 * plan.drain_timeout_s + 60.0
    started = deps.now()
    while True:
        try:
            result = drive(deps, channel.model, channel.environment, driver)
        except StaleDriver:
            return read_channel(deps.store, channel.model, channel.environment)
        if result.done or (deps.now() - started).total_seconds() >= timeout_s:
            return result.channel
        deps.sleep(result.next_in_s)


def finish_up(deps: RolloutDeps, model: str, environment: str) -> bool:
    """Do what is left of a rollout that is over, if whoever drove it did not come to that.

    The lease tells: a driver releases it when everything is done. All of it may be done again, also
    at the same time by a driver that lives after all.

    Returns:
        Was there something to be done?

    Raises:
        Transient: some of it could not be done yet; call again.
    """
    channel = read_channel(deps.store, model, environment)
    if channel.rollout is None or channel.in_progress:
        return False
    lease = deps.lease.look(environment, model)
    if lease.state == "absent":
        return False
    servers = deps.host.servers(environment, model)
    done = act(deps, channel, commands_for(channel, deps.now()), servers)
    if done.try_again:
        problems = " ".join(done.problems) or "The channel has changed meanwhile."
        raise Transient(f"Rollout {channel.rollout.number} is over, but work is left. {problems}")
    # It may be in the name of a driver that was replaced before the new one had renewed it.
    deps.lease.release(environment, model, holder=lease.holder)
    return True


def drives(channel: Channel, run_id: str, number: int | None) -> bool:
    """Tell whether rollout `number` is the channel's, with `run_id` as its driver."""
    rollout = channel.rollout
    return rollout is not None and (rollout.number, rollout.driver.run_id) == (number, run_id)


def number_of_run(channel: Channel, run_id: str) -> int | None:
    """Return the number of the last rollout that `run_id` started or drives, if there is one."""
    rollout = channel.rollout
    if rollout is not None and run_id in (channel.owner, rollout.driver.run_id):
        return rollout.number
    own = own_rollout(channel, run_id)
    if own is not None:
        return own
    started = [
        entry.rollout
        for entry in channel.history
        if entry.event == "rollout_started" and entry.detail.get("run_id") == run_id
    ]
    return started[-1] if started else None


def ending_of(channel: Channel, number: int) -> tuple[Outcome, str] | None:
    """Return outcome and reason of a rollout by its number; None while it has none."""
    rollout = channel.rollout
    if rollout is not None and rollout.number == number:
        return (rollout.outcome, rollout.reason) if rollout.outcome is not None else None
    for earlier in channel.unsettled:
        if earlier.rollout == number:
            return earlier.outcome, earlier.reason
    for entry in reversed(channel.history):
        if entry.rollout == number and entry.event in OUTCOME_EVENTS:
            return OUTCOME_EVENTS[entry.event], str(entry.detail.get("why", ""))
    return None


def _without_rollout(channel: Channel, run_id: str, release_id: str | None) -> Settled:
    stable = channel.stable
    if stable is not None and stable.release_id == release_id and not channel.in_progress:
        summary = f"{release_id} is the stable release of {channel.environment} already."
        return Settled("promoted", summary, channel)
    return Settled(None, f"{run_id} has no rollout in {channel.environment}.", channel)


def _settled(channel: Channel, number: int, run_id: str) -> Settled:
    """Tell how a rollout ended, or will end, whoever drove it and whatever followed."""
    rollout = channel.rollout
    ended = ending_of(channel, number)
    if rollout is None or rollout.number != number:
        outcome = ended[0] if ended is not None else "withdrawn"
        return Settled(outcome, summary_of_rollout(channel, number), channel)
    if ended is None and rollout.driver.run_id != run_id:
        taken = f"Rollout {number} of {run_id} was taken over by {rollout.driver.run_id}."
        return Settled(rollout.ending or "withdrawn", f"{taken} {rollout.reason}", channel)
    return Settled(rollout.outcome or rollout.ending, summary_of(channel), channel)


def _still_stable(settled: Settled, run_id: str, release_id: str | None) -> Settled:
    """Tell about a run that was settled before, and comes again: what it promoted then may be gone.

    It was cleared, and refused before it could begin anew. That its rollout went well long ago does
    not mean that it did now what it was asked for.
    """
    stable = settled.channel.stable
    if release_id is None or (stable is not None and stable.release_id == release_id):
        return settled
    now = stable.release_id if stable is not None else "no release"
    summary = (
        f"{run_id} has begun no rollout this time. It promoted {release_id} before, but {now} is "
        f"stable in {settled.channel.environment} now."
    )
    return Settled(None, summary, settled.channel)


def summary_of_rollout(channel: Channel, number: int) -> str:
    """Return one sentence about where a rollout stands, also one that others have followed."""
    if channel.rollout is not None and channel.rollout.number == number:
        return summary_of(channel)
    ended = ending_of(channel, number)
    if ended is None:
        return f"Rollout {number} is over; the channel does not know any more how it ended."
    return f"Rollout {number}: {ended[0].replace('_', ' ')}. {ended[1]}"


def tidy(deps: RolloutDeps, model: str, environment: str) -> tuple[str, ...]:
    """Remove servers that no rollout, role or rollback window wants any more.

    Returns:
        The releases whose servers were removed; nothing while a rollout is under way.
    """
    channel = read_channel(deps.store, model, environment)
    if channel.in_progress:
        return ()
    servers = deps.host.servers(environment, model)
    commands = strays(channel, servers, deps.now())
    act(deps, channel, commands, servers)
    return tuple(command.release_id for command in commands)
