"""The rollout's state machine: pure, resumable, and unable to do anything by itself.

`step(channel, event, now)` returns the changed channel and the wishes that hold then. The shell
stores the channel by compare-and-swap before it carries the wishes out. Wishes follow from the
channel alone (`commands_for`), so a crash between the two lines is healed by the next tick.

Every edge, with the event that takes it. `starting` are deploying, warming and scaling (on the way
up), `compared` are shifting and holding, `exposed` are these two and baking.

============  ============  ========================================================================
from          to            event, and why
============  ============  ========================================================================
idle          deploying     RolloutRequested: a rollout begins
idle          scaling       RolloutRequested: the stable servers must stop first (`single`)
deploying     warming       ServersSeen: the candidate's servers are ready
warming       deploying     ServersSeen: one of them is not ready any more
warming       scaling       ServersSeen: they are warm, and more of them are needed
warming       shifting      ServersSeen: all are warm; the first weight is wished for
warming       baking        ServersSeen: all are warm and there is nothing to compare with (first
                            release, `single`); roles are swapped
warming       rolling_back  ServersSeen: all are warm, and this is a rollback; roles are swapped,
                            traffic first (promoted)
warming       rolling_back  WarmedUp: a server gave only errors (rejected), or some requests had no
                            good answer (withdrawn)
scaling       deploying     ServersSeen: the stable servers have stopped (`single`)
scaling       warming       ServersSeen: the wanted servers are there
starting      rolling_back  ServersSeen: a server of the candidate failed (withdrawn)
starting      rolling_back  TimePassed: `deploy_timeout_s`, or `max_pause_s` of pauses, passed
                            (withdrawn)
starting      rolling_back  AbortRequested: aborted (withdrawn)
starting      rolling_back  UndoRequested: a rollback was asked for (withdrawn); also after the
                            bake, as long as the old servers are there: roles are swapped back
shifting      holding       RouteSeen: the route has the weights, and arrivals agree
shifting      rolling_back  RouteSeen: weights or arrivals do not follow within `arrivals_timeout_s`
                            (withdrawn)
shifting      rolling_back  TimePassed: the router could not be asked for twice as long (withdrawn)
holding       shifting      Looked: no harm, `hold_s` passed, and there is a next step
holding       shifting      TimePassed: `max_duration_s` passed, undecided, at a step that was not
                            held long enough; one step back
holding       baking        Looked: NON_INFERIOR, and `hold_s` of the last step passed; roles are
                            swapped
holding       baking        PromotionForced: a person answers for the candidate; roles are swapped
shifting      baking        PromotionForced: a person answers for the candidate, which is all that
                            serves; roles are swapped
compared      rolling_back  TimePassed: undecided for `max_duration_s`, or for `max_hold_s` after it
                            (withdrawn)
exposed       rolling_back  Looked: HARM (rejected)
exposed       rolling_back  FuseBlown: a fuse blew (rejected; withdrawn if the machine is broken)
exposed       rolling_back  ServersSeen: a server of the release under test failed, or none is ready
                            (rejected)
exposed       rolling_back  ControllerLost: the lease ran out (withdrawn)
exposed       rolling_back  AbortRequested: aborted (withdrawn)
exposed       rolling_back  UndoRequested: a rollback was asked for (withdrawn)
exposed       rolling_back  TimePassed: blind for `blind_candidate_s` or `blind_s`, or paused for
                            `max_pause_s` (withdrawn)
baking        rolling_back  RouteSeen: too many requests failed, without a comparison (rejected)
baking        rolling_back  TimePassed: not over `deploy_timeout_s` after `bake_s` (withdrawn)
baking        scaling       ServersSeen: `bake_s` passed, a look after it saw no harm, all servers
                            are ready
scaling       idle          ServersSeen: the old servers are gone (promoted)
scaling       idle          RouteSeen: the old servers are idle, and are kept warm (promoted)
scaling       idle          TimePassed: the old servers do not go in `deploy_timeout_s` (promoted)
rolling_back  idle          ServersSeen: the servers are gone, and stable is ready at full size
rolling_back  idle          TimePassed: the servers do not go in `deploy_timeout_s`
============  ============  ========================================================================

The other events take no edge:

===============  ========================================================================
event            what it notes; the state stays
===============  ========================================================================
PauseRequested   weights and steps stay as they are; looks and all of the safety above go on
ResumeRequested  the pause is over
DriverClaimed    another process drives; its epoch is higher
Sighted          who could be seen; how long not, is what TimePassed acts on
TrafficBeyond    people are told, once of each kind
QueueJoined      a run waits for the channel, or still does
QueueLeft        it does not wait any more
RequesterNoted   who asked for the rollout
OutcomeNoted     what the last rollout left to be done is done
ObjectiveMissed  the watch after a rollout saw an alert begin
ObjectiveMet     the watch saw it end
Adopted          somebody else's servers become stable, where nothing is
===============  ========================================================================

In brackets is what becomes of the release: a rejected one needs force to come again, a withdrawn
one does not. An undecided rollout that is to hold (`on_undecided`) freezes its weights at the last
step that was held long enough, and people are told; looks go on. A way back goes from weights to
arrivals that stop, to requests that end, to servers that are gone.

A way back whose winner is not at full size exchanges servers first, if the loser did no harm: a
rollback, or a release that is withdrawn in its bake. Traffic is shared by ready servers, until the
winner has all of its own or `deploy_timeout_s` has passed. A rejected release loses everything at
once. A rollout is over only when the winner is at full size, or after `deploy_timeout_s`.

Apart from that the candidate has weight in the exposed states only. Whatever takes traffic away
does so in the same change of the channel in which it is decided.

While a look did not see both releases, nothing goes forward: no step, no promotion, no end of the
bake. Nobody calls silence peace.

While the release that would have all traffic has no ready server, and the other one has, no limit
of time and no blindness ends anything, and a way back takes no servers: the guard lets the other
one answer meanwhile. People are told. Only harm, a fuse and broken servers still reject: a release
that is known to do harm gets no traffic, not even then. `single` has no room for this.

A bake ends well only on evidence: a look that saw both releases when `bake_s` was over, or, where
there is nothing to compare with, counters of the router that span `bake_s`. If nobody drove it for
longer than the lease, it begins anew.

During the bake the roles are swapped: track `stable` is the new release, track `candidate` the old
one with the holdback weight. A release that has nothing to be compared with (the first one of a
channel, or `single`) skips the steps: it must answer every warm-up request, gets all traffic at
once, and bakes under an absolute limit on errors.

While a rollout is paused its servers still start and warm up, but get no traffic; no step, no hold
and no bake ends well. The time of pauses does not count against `deploy_timeout_s`,
`max_duration_s`, `max_hold_s` and the end of the bake; `max_pause_s` bounds it. Rollbacks, and
rollouts for which the stable servers have stopped, cannot be paused: that would only keep clients
waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from math import ceil, sqrt
from typing import Any

from trainyard.documents.channel import (
    EXPOSED_PHASES,
    HISTORY_LIMIT,
    PAUSE_LIMIT,
    UNSETTLED_LIMIT,
    WAITING_LIMIT,
    Alone,
    ArrivalsMark,
    Beyond,
    Blindness,
    ByHand,
    Channel,
    HistoryEntry,
    Outcome,
    Pause,
    Phase,
    Rejection,
    Replicas,
    Rollout,
    RolloutDriver,
    RolloutPlan,
    Track,
    Unsettled,
    Waiting,
    Weights,
)
from trainyard.rollout.events import (
    AbortRequested,
    Adopted,
    Attest,
    Command,
    ControllerLost,
    DeployServers,
    DriverClaimed,
    Event,
    FuseBlown,
    HoldAutoscaling,
    Looked,
    Notify,
    ObjectiveMet,
    ObjectiveMissed,
    OutcomeNoted,
    PauseRequested,
    PromotionForced,
    QueueJoined,
    QueueLeft,
    ReleaseLease,
    RemoveServers,
    RenewLease,
    RequesterNoted,
    ResumeAutoscaling,
    ResumeRequested,
    RolloutRequested,
    RouteSeen,
    ServersSeen,
    Sighted,
    TimePassed,
    TrafficBeyond,
    TrafficSeen,
    UndoRequested,
    WarmedUp,
    WarmUp,
)
from trainyard.rollout.floors import EVIDENCE_THRESHOLD, excess_evidence

PREVIOUS_LIMIT = 10
"""Earlier stable releases that a channel remembers."""

FEWEST_REFUSALS = 3
"""Warm-up requests that a server must have answered with errors alone to count as broken."""

FEWEST_EXPECTED = 5
"""Arrivals that the smaller side must be due before arrivals can contradict the weights."""

ONE_SIDED_CHANCE = 0.001
"""Chance below which it is no accident that one side got nothing at all."""

QUIET_S = 1.0
"""Seconds without a new arrival after which a release's traffic has stopped."""

PATIENCE = 4
"""So many times `arrivals_timeout_s` may pass before servers go whose requests do not stop."""

BLIND_NOTICE_S = 60.0
"""Seconds of blindness after which people are told."""

ALONE_NOTICE_S = 30.0
"""Seconds without a ready server of the release that stays after which people are told."""

ERROR_LIMIT = 0.005
"""Share of failed requests that a release without comparison may have, if its plan names none."""

HIGHEST_ERROR_LIMIT = 0.9
"""No release may fail more of its requests, whatever stable did."""

STILL_WAITS_S = 30.0
"""Seconds after which a run that waits writes again that it does."""

FORGOTTEN_S = 180.0
"""Seconds after which a run that has not done so is passed over; its place is kept."""

GIVEN_UP_S = 86400.0
"""Seconds after which its place is given up."""

NOTABLE = frozenset(
    {
        "rollout_started",
        "driver",
        "weights",
        "held",
        "paused",
        "resumed",
        "queued",
        "slo_missed",
        "slo_met",
        "promoted_by_hand",
        "blind",
        "sighted",
        "stable_down",
        "stable_back",
        "beyond_envelope",
        "bake_anew",
        "proven",
        "holdback",
        "ending",
        "unverified",
        "promoted",
        "returned",
        "rolled_back",
        "withdrawn",
    }
)
"""History events that people are told about."""


def step(channel: Channel, event: Event, now: datetime) -> tuple[Channel, tuple[Command, ...]]:
    """Return the channel after `event` and the wishes that hold then.

    An event that means nothing in the present phase changes nothing. The generation counts up by
    one if anything changed.
    """
    handler: Callable[[Channel, Any, datetime], Channel] = _HANDLERS[type(event)]
    changed = handler(_bake_anew(channel, event, now), event, now)
    if changed != channel:
        changed = changed.model_copy(
            update={
                "generation": channel.generation + 1,
                "history": changed.history[-HISTORY_LIMIT:],
            }
        )
        _check(changed)
    return changed, commands_for(changed, now)


def commands_for(channel: Channel, now: datetime) -> tuple[Command, ...]:
    """Return every wish that follows from the channel. All of them may be repeated at any time."""
    rollout = channel.rollout
    if rollout is None:
        return ()
    commands: list[Command] = []
    if channel.in_progress:
        commands.append(RenewLease(rollout.plan.lease_s))
        commands.append(HoldAutoscaling())
    if channel.stable is not None:
        stable = channel.stable.release_id
        if rollout.replicas.stable > 0:
            commands.append(DeployServers(stable, rollout.replicas.stable))
        elif channel.in_progress:
            commands.append(RemoveServers(stable))
    if channel.candidate is not None:
        candidate = channel.candidate.release_id
        if rollout.cleanup == "removing" or rollout.replicas.candidate == 0:
            commands.append(RemoveServers(candidate))
        else:
            commands.append(DeployServers(candidate, rollout.replicas.candidate))
            if rollout.phase == "warming":
                commands.append(WarmUp(candidate, rollout.plan.warm_up_requests, rollout.warmed))
    commands.extend(RemoveServers(release_id) for release_id in _unwanted(channel, now))
    notices = [
        Notify(rollout.number, entry)
        for entry in channel.history
        if entry.rollout == rollout.number and entry.event in NOTABLE
    ]
    if channel.in_progress:
        return (*commands, *notices)
    # The lease goes last: while there is one, something may be left to be done.
    return (*commands, *_afterwards(channel, rollout), *notices, ReleaseLease())


def _afterwards(channel: Channel, rollout: Rollout) -> Iterator[Command]:
    """Yield what is left to do about a rollout that is over."""
    if channel.stable is not None:
        yield ResumeAutoscaling(channel.stable.release_id)
    yield from _attestations(channel, rollout)


def has_comparison(plan: RolloutPlan) -> bool:
    """Tell whether both releases serve at the same time, so that they can be compared."""
    return plan.kind == "canary" and plan.capacity != "single"


def candidate_target(plan: RolloutPlan, step_index: int) -> int:
    """Return how many servers the candidate needs at a step of the plan."""
    if plan.capacity != "replace" or plan.kind == "bootstrap":
        return plan.replicas
    if plan.kind == "rollback":
        return 1
    return max(1, ceil(plan.replicas * plan.steps[step_index].weight / 100))


# --- requests -------------------------------------------------------------------------------------


def _requested(channel: Channel, event: RolloutRequested, now: datetime) -> Channel:
    if channel.in_progress:
        return channel
    plan = event.plan
    makes_room = plan.capacity == "single" and channel.stable is not None
    starts_with = candidate_target(plan, 0) if plan.kind != "canary" else 1
    before = channel.rollout
    rollout = Rollout(
        number=event.number,
        release_id=event.release_id,
        reference_id=channel.stable.release_id if channel.stable else "",
        phase="scaling" if makes_room else "deploying",
        plan=plan,
        owner=event.run_id,
        driver=RolloutDriver(
            run_id=event.run_id, attempt=1, epoch=before.driver.epoch + 1 if before else 1
        ),
        requested_by=event.requested_by,
        started_at=now,
        phase_since=now,
        replicas=Replicas()
        if makes_room
        else Replicas(stable=plan.stable_replicas, candidate=starts_with),
        reason="Waiting for servers.",
    )
    known = {track.release_id: track for track in channel.previous}
    verified = known[event.release_id].verified if event.release_id in known else True
    changed = channel.model_copy(
        update={
            "candidate": Track(release_id=event.release_id, since=now, verified=verified),
            "weights": Weights(),
            "rollout": rollout,
            "waiting": tuple(w for w in channel.waiting if w.run_id != event.run_id),
            "unsettled": _unsettled(channel),
        }
    )
    return _noted(
        changed,
        now,
        "rollout_started",
        release_id=event.release_id,
        who=event.requested_by,
        run_id=event.run_id,
        kind=plan.kind,
        reason=event.reason,
    )


def _unsettled(channel: Channel) -> tuple[Unsettled, ...]:
    """Return what there is to be told to runs whose rollouts a new one follows."""
    before = channel.rollout
    if before is None or before.settled or before.outcome is None:
        return channel.unsettled
    new = Unsettled(
        run_id=channel.owner,
        rollout=before.number,
        release_id=before.release_id,
        outcome=before.outcome,
        reason=before.reason,
    )
    return (*channel.unsettled, new)[-UNSETTLED_LIMIT:]


def _claimed(channel: Channel, event: DriverClaimed, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress:
        return channel
    old = rollout.driver
    driver = RolloutDriver(
        run_id=event.run_id,
        attempt=old.attempt + 1 if old.run_id == event.run_id else 1,
        epoch=old.epoch + 1,
    )
    changed = _with(channel, driver=driver)
    return _noted(changed, now, "driver", run_id=event.run_id, epoch=driver.epoch)


def _abort(channel: Channel, event: AbortRequested, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.ending is not None:
        return channel
    return _ended(channel, "withdrawn", event.reason, now, who=event.who)


def _undo(channel: Channel, event: UndoRequested, now: datetime) -> Channel:
    """Go back to the release that was stable before, as long as its servers are there."""
    rollout = channel.rollout
    if rollout is None or not channel.in_progress:
        return channel
    promoted = rollout.ending == "promoted" and rollout.plan.kind == "canary"
    there = rollout.cleanup in _SERVERS_STAY and rollout.ready.candidate > 0
    if rollout.ending is not None and not (promoted and there):
        return channel
    return _ended(channel, "withdrawn", event.reason, now, who=event.who)


# --- requests that wait ---------------------------------------------------------------------------


def place_in_line(channel: Channel, run_id: str, now: datetime) -> int:
    """Return how many requests that are still alive come before that of `run_id`.

    A run that does not wait yet comes last.
    """
    place = 0
    for waiting in channel.waiting:
        if waiting.run_id == run_id:
            break
        place += _seconds(waiting.seen_at, now) < FORGOTTEN_S
    return place


def _queue_joined(channel: Channel, event: QueueJoined, now: datetime) -> Channel:
    known = next((w for w in channel.waiting if w.run_id == event.run_id), None)
    if known is not None:
        if _seconds(known.seen_at, now) < STILL_WAITS_S:
            return channel
        seen = known.model_copy(update={"seen_at": now})
        waiting = tuple(seen if w is known else w for w in channel.waiting)
        return channel.model_copy(update={"waiting": waiting})
    alive = tuple(w for w in channel.waiting if _seconds(w.seen_at, now) < GIVEN_UP_S)
    if len(alive) >= WAITING_LIMIT:
        return channel
    channel = channel.model_copy(update={"waiting": alive})
    place = place_in_line(channel, event.run_id, now) + 1
    new = Waiting(
        run_id=event.run_id,
        release_id=event.release_id,
        since=now,
        seen_at=now,
        requested_by=event.requested_by,
    )
    channel = channel.model_copy(update={"waiting": (*channel.waiting, new)})
    return _noted(
        channel,
        now,
        "queued",
        release_id=event.release_id,
        who=event.requested_by,
        run_id=event.run_id,
        place=place,
    )


def _queue_left(channel: Channel, event: QueueLeft, now: datetime) -> Channel:
    known = next((w for w in channel.waiting if w.run_id == event.run_id), None)
    if known is None:
        return channel
    waiting = tuple(w for w in channel.waiting if w is not known)
    channel = channel.model_copy(update={"waiting": waiting})
    return _noted(channel, now, "unqueued", release_id=known.release_id, run_id=event.run_id)


# --- the watch after a rollout --------------------------------------------------------------------


def open_alerts(channel: Channel) -> frozenset[str]:
    """Return the names of the alerts that the watch has noted of the stable release and not ended.

    They are found in the history. One that has fallen out of it is noted again.
    """
    found: set[str] = set()
    if channel.stable is None:
        return frozenset()
    for entry in channel.history:
        if entry.at < channel.stable.since or entry.release_id != channel.stable.release_id:
            continue
        if entry.event == "slo_missed":
            found.add(str(entry.detail.get("alert", "")))
        elif entry.event == "slo_met":
            found.discard(str(entry.detail.get("alert", "")))
    return frozenset(found)


def _objective_missed(channel: Channel, event: ObjectiveMissed, now: datetime) -> Channel:
    if channel.in_progress or channel.stable is None or event.alert in open_alerts(channel):
        return channel
    release_id = channel.stable.release_id
    return _noted(
        channel, now, "slo_missed", release_id=release_id, alert=event.alert, why=event.why
    )


def _objective_met(channel: Channel, event: ObjectiveMet, now: datetime) -> Channel:
    if channel.in_progress or channel.stable is None or event.alert not in open_alerts(channel):
        return channel
    return _noted(channel, now, "slo_met", release_id=channel.stable.release_id, alert=event.alert)


# --- by hand --------------------------------------------------------------------------------------


def pause_refusal(channel: Channel, now: datetime) -> str:
    """Return why the rollout cannot be paused, in one sentence; empty if it can."""
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.ending is not None:
        return "No rollout is under way that could be paused."
    plan = rollout.plan
    if plan.kind == "rollback":
        return "A rollback is not paused: it brings clients back to a proven release."
    if rollout.exposed_since is None and plan.capacity == "single" and channel.stable is not None:
        return "The stable servers have stopped; a pause would only make the downtime longer."
    if rollout.paused is not None:
        return f"It is paused already, by {rollout.paused.who or 'somebody'}."
    if len(rollout.pauses) >= PAUSE_LIMIT:
        return f"It was paused {PAUSE_LIMIT} times already; that is the limit."
    if rollout.paused_s(now) >= plan.max_pause_s:
        return f"It was paused for {plan.max_pause_s:g} s in all; that is the limit."
    return ""


def resume_refusal(channel: Channel) -> str:
    """Return why there is nothing to resume, in one sentence; empty if there is."""
    if channel.in_progress and channel.rollout is not None and channel.rollout.paused is not None:
        return ""
    return "No rollout is paused."


def promotion_refusal(channel: Channel) -> str:
    """Return why a person cannot answer for the candidate now; empty if that is possible."""
    rollout = channel.rollout
    if rollout is None or not channel.in_progress:
        return "No rollout is under way."
    if rollout.ending is not None:
        return f"The rollout is ending already. {rollout.reason}"
    if not has_comparison(rollout.plan):
        return "It is not compared with another release; it needs nobody's word to go on."
    if rollout.phase == "baking":
        return f"{rollout.release_id} has taken over already; it bakes."
    if rollout.phase != "holding" and not (rollout.phase == "shifting" and rollout.alone):
        return f"It is {rollout.phase}: the candidate's share of the requests is not sure yet."
    if rollout.verdict is not None and rollout.verdict.outcome == "HARM":
        return f"The judge says HARM: {rollout.verdict.reason}"
    needed = rollout.plan.replicas if rollout.plan.capacity == "surge" else 1
    if rollout.ready.candidate < needed:
        return f"{rollout.ready.candidate} of {needed} servers of the candidate are ready."
    return ""


def _pause(channel: Channel, event: PauseRequested, now: datetime) -> Channel:
    if pause_refusal(channel, now):
        return channel
    rollout = _rollout(channel)
    pause = Pause(since=now, who=event.who, reason=event.reason)
    channel = _with(channel, pauses=(*rollout.pauses, pause))
    return _noted(
        channel,
        now,
        "paused",
        release_id=rollout.release_id,
        who=event.who,
        weight=channel.weights.candidate,
        until_s=round(rollout.plan.max_pause_s - rollout.paused_s(now), 1),
        why=event.reason,
    )


def _resume(channel: Channel, event: ResumeRequested, now: datetime) -> Channel:
    if resume_refusal(channel):
        return channel
    rollout = _rollout(channel)
    assert rollout.paused is not None
    return _noted(
        _with(channel, pauses=_over(rollout, now)),
        now,
        "resumed",
        release_id=rollout.release_id,
        who=event.who,
        after_s=round(_seconds(rollout.paused.since, now), 1),
        why=event.reason,
    )


def _over(rollout: Rollout, now: datetime) -> tuple[Pause, ...]:
    """Return the pauses with the last one over."""
    if rollout.paused is None:
        return rollout.pauses
    return (*rollout.pauses[:-1], rollout.paused.model_copy(update={"until": now}))


def _promotion_forced(channel: Channel, event: PromotionForced, now: datetime) -> Channel:
    if promotion_refusal(channel) or not event.reason.strip():
        return channel
    rollout = _rollout(channel)
    by_hand = ByHand(
        at=now,
        who=event.who,
        reason=event.reason,
        verdict=rollout.verdict.outcome if rollout.verdict is not None else "",
    )
    channel = _with(channel, promoted_by_hand=by_hand, pauses=_over(rollout, now))
    channel, holdback = _take_over(channel, now)
    return _noted(
        channel,
        now,
        "promoted_by_hand",
        release_id=rollout.release_id,
        who=event.who,
        holdback=holdback,
        verdict=by_hand.verdict or "no look yet",
        why=event.reason,
    )


def _outcome_noted(channel: Channel, event: OutcomeNoted, now: datetime) -> Channel:
    others = tuple(each for each in channel.unsettled if each.run_id != event.run_id)
    channel = channel.model_copy(update={"unsettled": others})
    if channel.rollout is None or channel.in_progress or event.run_id not in ("", channel.owner):
        return channel
    return _with(channel, settled=True)


def _requester_noted(channel: Channel, event: RequesterNoted, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or rollout.requested_by or not event.who:
        return channel
    changed = _with(channel, requested_by=event.who)
    return _noted(changed, now, "requester", release_id=rollout.release_id, who=event.who)


def _adopted(channel: Channel, event: Adopted, now: datetime) -> Channel:
    if channel.stable is not None or channel.in_progress:
        return channel
    track = Track(release_id=event.release_id, since=now, verified=False)
    changed = channel.model_copy(update={"stable": track, "weights": Weights()})
    return _noted(
        changed,
        now,
        "adopted",
        release_id=event.release_id,
        who=event.who,
        deployment=event.deployment,
    )


# --- servers --------------------------------------------------------------------------------------


def _servers_seen(channel: Channel, event: ServersSeen, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress:
        return channel
    seen = _Seen(event)
    channel = _with(
        channel,
        ready=Replicas(stable=seen.ready(channel.stable), candidate=seen.ready(channel.candidate)),
    )
    channel = _alone_seen(channel, now)
    if rollout.cleanup is not None:
        return _cleaning_servers(channel, seen, now)
    return _BY_PHASE.get(rollout.phase, _unchanged)(channel, seen, now)


class _Seen:
    """Servers by release."""

    def __init__(self, event: ServersSeen) -> None:
        self._servers = event.servers

    def of(self, track: Track | None) -> list[Any]:
        """Return the servers of a track's release."""
        if track is None:
            return []
        return [server for server in self._servers if server.release_id == track.release_id]

    def ready(self, track: Track | None) -> int:
        """Return how many of them are ready."""
        return sum(server.state == "ready" for server in self.of(track))

    def failed(self, track: Track | None) -> str | None:
        """Return why one of them failed, or None."""
        for server in self.of(track):
            if server.state == "failed":
                return f"{server.name} failed: {server.message or 'its host does not say why'}"
        return None

    def waiting(self, track: Track | None, wanted: int) -> str:
        """Return what is being waited for, in one sentence."""
        assert track is not None
        messages = [s.message for s in self.of(track) if s.state != "ready" and s.message]
        why = f": {messages[0]}" if messages else ""
        return f"{self.ready(track)} of {wanted} servers of {track.release_id} are ready{why}"


def _unchanged(channel: Channel, seen: _Seen, now: datetime) -> Channel:
    return channel


def _deploying(channel: Channel, seen: _Seen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    failed = seen.failed(channel.candidate)
    if failed is not None:
        return _ended(channel, "withdrawn", failed, now)
    if rollout.ready.candidate < rollout.replicas.candidate:
        waiting = seen.waiting(channel.candidate, rollout.replicas.candidate)
        return _with(channel, reason=waiting)
    channel = _noted(
        channel, now, "deployed", release_id=rollout.release_id, servers=rollout.ready.candidate
    )
    channel = _phase(channel, "warming", now, "Waiting for answers to the warm-up requests.")
    return _warming(channel, seen, now)


def _warming(channel: Channel, seen: _Seen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    failed = seen.failed(channel.candidate)
    if failed is not None:
        return _ended(channel, "withdrawn", failed, now)
    if rollout.ready.candidate < rollout.replicas.candidate:
        waiting = seen.waiting(channel.candidate, rollout.replicas.candidate)
        return _phase(channel, "deploying", now, waiting)
    for server in seen.of(channel.candidate):
        already = _served_before(server, rollout) or rollout.plan.warm_up_requests == 0
        if server.state == "ready" and server.incarnation not in rollout.warmed and not already:
            return channel
    target = candidate_target(rollout.plan, rollout.step_index)
    if rollout.replicas.candidate < target:
        return _scaling(_phase(channel, "scaling", now, "Waiting for more servers."), seen, now)
    if rollout.paused is not None:
        return _with(channel, reason="Ready for traffic, which it gets when it is resumed.")
    return _take_traffic(channel, now)


def _served_before(server: Any, rollout: Rollout) -> bool:
    """Tell whether a rollback finds a server that is still warm."""
    return (
        rollout.plan.kind == "rollback"
        and server.started_at is not None
        and server.started_at < rollout.started_at
    )


def _scaling(channel: Channel, seen: _Seen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    plan = rollout.plan
    if plan.capacity == "single" and rollout.replicas.candidate == 0:
        if seen.of(channel.stable):
            return _with(channel, reason="Waiting for the stable servers to stop.")
        channel = _with(channel, replicas=Replicas(stable=0, candidate=plan.replicas))
        return _phase(channel, "deploying", now, "Waiting for servers.")
    failed = seen.failed(channel.candidate)
    if failed is not None:
        return _ended(channel, "withdrawn", failed, now)
    target = candidate_target(plan, rollout.step_index)
    channel = _with(channel, replicas=_sizes(rollout, target))
    if rollout.ready.candidate < target:
        return _with(channel, reason=seen.waiting(channel.candidate, target))
    return _phase(channel, "warming", now, "Waiting for answers to the warm-up requests.")


def _sizes(rollout: Rollout, target: int) -> Replicas:
    """Return the wanted servers on the way to `target` servers of the candidate.

    `replace` has room for one more server than the stable release has: each ready server of the
    candidate lets one of stable's go.
    """
    plan = rollout.plan
    if plan.capacity != "replace":
        return Replicas(stable=rollout.replicas.stable, candidate=target)
    candidate = min(target, rollout.ready.candidate + 1)
    return Replicas(stable=max(1, plan.stable_replicas + 1 - candidate), candidate=candidate)


def _holding(channel: Channel, seen: _Seen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    broken = _broken(channel.candidate, rollout.ready.candidate, seen)
    if broken is not None:
        return _rejected(channel, broken, now)
    following = min(rollout.step_index + 1, len(rollout.plan.steps) - 1)
    frozen = rollout.held_since is not None or rollout.paused is not None
    if rollout.plan.capacity == "replace" and not frozen:
        target = candidate_target(rollout.plan, following)
        return _with(channel, replicas=_sizes(rollout, target))
    return channel


def _shifting(channel: Channel, seen: _Seen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    broken = _broken(channel.candidate, rollout.ready.candidate, seen)
    return channel if broken is None else _rejected(channel, broken, now)


def _baking(channel: Channel, seen: _Seen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    plan = rollout.plan
    failed = seen.failed(channel.stable)
    if failed is not None:
        return _rejected(channel, failed, now)
    if has_comparison(plan):
        broken = _broken(channel.stable, rollout.ready.stable, seen)
        if broken is not None:
            return _rejected(channel, broken, now)
        channel = _bake_sizes(channel, now)
    if rollout.paused is not None or _seconds(rollout.phase_since, now) < plan.bake_s:
        return channel
    if rollout.blind is not None:
        return _with(channel, reason=f"The bake cannot end blind: {rollout.blind.why}.")
    if not rollout.bake_watched:
        return _with(channel, reason="The time of the bake is over; a last look is to come.")
    if rollout.ready.stable < plan.replicas:
        return _with(channel, reason=seen.waiting(channel.stable, plan.replicas))
    return _baked(channel, now)


def _bake_anew(channel: Channel, event: Event, now: datetime) -> Channel:
    """Begin a bake anew that nobody has driven for longer than the lease: nobody has watched it.

    What the router counted meanwhile still counts.
    """
    rollout = channel.rollout
    if rollout is None or rollout.phase != "baking" or not isinstance(event, _OF_EVERY_TICK):
        return channel
    away_s = _seconds(rollout.driven_at or rollout.phase_since, now)
    if away_s <= rollout.plan.lease_s:
        return channel
    channel = _with(channel, phase_since=now, driven_at=now, bake_watched=False)
    return _noted(channel, now, "bake_anew", release_id=rollout.release_id, away_s=round(away_s, 1))


def _bake_driven(channel: Channel, now: datetime) -> Channel:
    """Note that somebody drives, a few times in each lease."""
    rollout = _rollout(channel)
    silent_s = _seconds(rollout.driven_at or rollout.phase_since, now)
    return _with(channel, driven_at=now) if silent_s >= rollout.plan.lease_s / 4 else channel


def _bake_watched(channel: Channel, since: datetime, now: datetime) -> Channel:
    """Note that no harm was seen, if the bake and what is looked at are old enough."""
    rollout = _rollout(channel)
    watched_s = _seconds(max(since, rollout.phase_since), now)
    return _with(channel, bake_watched=True) if watched_s >= rollout.plan.bake_s else channel


def _broken(track: Track | None, ready: int, seen: _Seen) -> str | None:
    """Return why a release that has traffic cannot serve it, or None."""
    assert track is not None
    failed = seen.failed(track)
    if failed is not None or ready > 0:
        return failed
    return f"{track.release_id} has traffic but no ready server"


def _bake_sizes(channel: Channel, now: datetime) -> Channel:
    """Let the new release grow and keep the holdback where it can be served."""
    rollout = _rollout(channel)
    plan = rollout.plan
    replicas = rollout.replicas
    if rollout.paused is not None and rollout.ready.candidate > 0:
        return channel
    if plan.capacity == "replace" and rollout.paused is None:
        new = min(plan.replicas, rollout.ready.stable + 1)
        old = max(1, plan.stable_replicas + 1 - new)
        replicas = Replicas(stable=new, candidate=old)
        channel = _with(channel, replicas=replicas)
    weight = _holdback_weight(plan, rollout.ready.stable, replicas.candidate)
    if rollout.ready.candidate == 0:
        weight = 0
    if weight == channel.weights.candidate:
        return channel
    channel = _weigh(channel, weight)
    return _noted(channel, now, "holdback", weight=weight)


def _holdback_weight(plan: RolloutPlan, new: int, old: int) -> int:
    """Return the old release's percent during the bake: more while the new one still grows."""
    if plan.capacity != "replace" or new >= plan.replicas:
        return plan.holdback_weight
    return max(plan.holdback_weight, min(99, ceil(100 * old / (new + old))))


# --- a release that serves alone ------------------------------------------------------------------


def _alone_seen(channel: Channel, now: datetime) -> Channel:
    """Note whether all that answers is the release that may lose its traffic.

    When that begins, its servers are not taken any more. When it ends, the limits that rested begin
    anew: what the route showed meanwhile was the guard's doing.
    """
    rollout = _rollout(channel)
    ready = rollout.ready
    alone = _may_serve_alone(channel) and ready.stable == 0 < ready.candidate
    if alone == (rollout.alone is not None):
        return channel
    if alone:
        stage = "traffic" if rollout.cleanup == "draining" else rollout.cleanup
        return _with(channel, alone=Alone(since=now), cleanup=stage, mark=None)
    assert rollout.alone is not None
    told = rollout.alone.told
    channel = _with(channel, alone=None, mark=None, blind=_blind_anew(rollout.blind, now))
    if rollout.cleanup is not None:
        channel = _with(channel, cleanup_since=now)
    elif rollout.phase == "shifting":
        channel = _with(channel, phase_since=now)
    return _noted(channel, now, "stable_back", release_id=_stable_id(channel)) if told else channel


def _may_serve_alone(channel: Channel) -> bool:
    """Tell whether the release that may lose its traffic can still have all of it.

    With `single` its servers must go before the others can come. A rejected release is known to do
    harm: it stays out, whatever the other one can do. A first release has no other one to wait for.
    """
    rollout = _rollout(channel)
    if channel.stable is None:
        return False
    if rollout.plan.capacity == "single" or rollout.ending == "rolled_back":
        return False
    return rollout.phase in {"shifting", "holding"} or rollout.cleanup in _SERVERS_STAY


def _blind_anew(blind: Blindness | None, now: datetime) -> Blindness | None:
    if blind is None:
        return None
    only = now if blind.candidate_only_since is not None else None
    return blind.model_copy(update={"since": now, "candidate_only_since": only})


def _alone_time(channel: Channel, now: datetime) -> Channel:
    """Tell people, once. No limit ends what would leave nobody to answer."""
    rollout = _rollout(channel)
    assert rollout.alone is not None
    if rollout.alone.told or _seconds(rollout.alone.since, now) < ALONE_NOTICE_S:
        return channel
    channel = _with(channel, alone=rollout.alone.model_copy(update={"told": True}))
    assert channel.candidate is not None
    return _noted(
        channel,
        now,
        "stable_down",
        release_id=_stable_id(channel),
        alone=channel.candidate.release_id,
    )


def _stable_id(channel: Channel) -> str:
    return channel.stable.release_id if channel.stable is not None else ""


# --- the route ------------------------------------------------------------------------------------


def _route_seen(channel: Channel, event: RouteSeen, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.alone is not None:
        return channel
    if rollout.cleanup is not None:
        return _cleaning_route(channel, event, now)
    if rollout.phase == "shifting":
        return _shift_seen(channel, event, now)
    if rollout.phase == "baking" and _bakes_alone(channel):
        return _floor_seen(channel, event, now)
    return channel


def _bakes_alone(channel: Channel) -> bool:
    """Tell whether only absolute limits can show harm in this bake.

    That is so as well if the old release could be compared with, but keeps no traffic. Where it
    cannot answer, there is nothing to go back to.
    """
    rollout = _rollout(channel)
    if not has_comparison(rollout.plan):
        return True
    return channel.weights.candidate == 0 and rollout.ready.candidate > 0


def _shift_seen(channel: Channel, event: RouteSeen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    assert channel.stable is not None
    assert channel.candidate is not None
    stable, candidate = channel.stable.release_id, channel.candidate.release_id
    weight = channel.weights.candidate
    timeout_s = rollout.plan.arrivals_timeout_s
    if event.weights.get(candidate, 0) != weight or event.weights.get(stable, 0) != 100 - weight:
        late = _seconds(rollout.phase_since, now) >= timeout_s
        if late and rollout.ready.stable > 0:
            told = ", ".join(f"{name} {share} %" for name, share in event.weights.items())
            return _ended(
                channel,
                "withdrawn",
                f"The route did not take the weights (candidate {weight} %) within "
                f"{timeout_s:g} s; it has {told or 'none'}",
                now,
            )
        return channel
    mark = rollout.mark
    if mark is None or mark.epoch != event.epoch:
        return _with(channel, mark=_mark(event, (stable, candidate), now))
    to_candidate = _arrivals(event, candidate) - mark.arrivals[candidate]
    total = to_candidate + _arrivals(event, stable) - mark.arrivals[stable]
    agrees = _agrees(to_candidate, total, weight / 100)
    late = _seconds(mark.at, now) >= timeout_s
    if agrees is None and not late:
        return channel
    if agrees is False:
        if not late:
            return channel
        return _ended(
            channel,
            "withdrawn",
            f"Arrivals do not follow the weights: {to_candidate} of {total} requests went to the "
            f"candidate, which has {weight} %",
            now,
        )
    return _phase(channel, "holding", now, f"At {weight} %, waiting for looks.")


def _agrees(candidate: int, total: int, share: float) -> bool | None:
    """Tell whether arrivals agree with a share; None if there are too few to tell."""
    if total * min(share, 1 - share) < FEWEST_EXPECTED:
        return None
    if candidate in (0, total):
        # Within the tolerance, but it may be a router that ignores weights.
        chance = share**total if candidate else (1 - share) ** total
        return False if chance < ONE_SIDED_CHANCE else None
    return abs(candidate - total * share) <= 4 * sqrt(total * share * (1 - share)) + 2


def _floor_seen(channel: Channel, event: RouteSeen, now: datetime) -> Channel:
    """Judge a release without comparison by its share of failed requests."""
    rollout = _rollout(channel)
    assert channel.stable is not None
    release_id = channel.stable.release_id
    mark = rollout.mark
    if mark is None or mark.epoch != event.epoch:
        return _with(channel, mark=_mark(event, (release_id,), now))
    errors = event.traffic.get(release_id, TrafficSeen()).errors - mark.errors[release_id]
    # Requests that had arrived before the mark may fail after it.
    requests = max(errors, _arrivals(event, release_id) - mark.arrivals[release_id])
    if errors < 0:
        return _with(channel, mark=_mark(event, (release_id,), now))
    limit = _error_limit(rollout)
    if excess_evidence(errors, requests, limit) < EVIDENCE_THRESHOLD:
        return channel if has_comparison(rollout.plan) else _bake_watched(channel, mark.at, now)
    return _rejected(
        channel,
        f"{errors} of {requests} requests failed, {errors / requests:.1%}; allowed are {limit:.1%}",
        now,
    )


def _error_limit(rollout: Rollout) -> float:
    """Return the share of requests that may fail; where stable's is known, what margins make of it.

    A service that always fails some requests must not have its good releases rejected.
    """
    floors = [one.harm_floor for one in rollout.plan.judge.metrics if one.name == "errors"]
    limit = floors[0] if floors and floors[0] > 0 else ERROR_LIMIT
    for seen in rollout.verdict.metrics if rollout.verdict is not None else ():
        if seen.metric == "errors" and seen.stable_value is not None:
            limit = max(limit, seen.harm_margin * seen.stable_value)
    return min(limit, HIGHEST_ERROR_LIMIT)


def _mark(event: RouteSeen, releases: tuple[str, ...], now: datetime) -> ArrivalsMark:
    return ArrivalsMark(
        at=now,
        epoch=event.epoch,
        arrivals={name: _arrivals(event, name) for name in releases},
        errors={name: event.traffic.get(name, TrafficSeen()).errors for name in releases},
    )


def _arrivals(event: RouteSeen, release_id: str) -> int:
    return event.traffic.get(release_id, TrafficSeen()).arrivals


# --- warm-up, looks, alarms -----------------------------------------------------------------------


def _warmed_up(channel: Channel, event: WarmedUp, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.phase != "warming":
        return channel
    if rollout.cleanup is not None or event.server in rollout.warmed:
        return channel
    name = event.server.partition("@")[0]
    if event.answered < event.asked:
        reason = (
            f"Warm-up of {name}: {event.answered} of {event.asked} requests were answered "
            f"({event.message})"
        )
        if event.answered == 0 and event.refused == event.asked >= FEWEST_REFUSALS:
            return _rejected(channel, reason, now)
        return _ended(channel, "withdrawn", reason, now)
    channel = _with(channel, warmed=(*rollout.warmed, event.server))
    return _noted(
        channel, now, "warmed", release_id=rollout.release_id, server=name, requests=event.asked
    )


def _looked(channel: Channel, event: Looked, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.phase not in EXPOSED_PHASES:
        return channel
    verdict = event.verdict
    channel = _with(channel, verdict=verdict, evidence_key=event.evidence_key)
    if verdict.outcome == "HARM":
        return _rejected(channel, verdict.reason, now)
    if rollout.phase != "holding" or rollout.blind is not None:
        return channel
    rollout = _rollout(channel)
    plan = rollout.plan
    rested = _seconds(rollout.phase_since, now) >= plan.steps[rollout.step_index].hold_s
    last = rollout.step_index == len(plan.steps) - 1
    if rollout.paused is not None:
        return _with(channel, reason=verdict.reason)
    if last and rested and verdict.outcome == "NON_INFERIOR":
        return _proven(channel, now)
    channel = _with(channel, reason=verdict.reason)
    # In a hold only proof goes on, from a step taken back to the last one, where it must last.
    frozen = rollout.held_since is not None and verdict.outcome != "NON_INFERIOR"
    if last or not rested or frozen or verdict.exposed_requests == 0:
        return channel
    if rollout.ready.candidate < candidate_target(plan, rollout.step_index + 1):
        return _with(channel, reason="Waiting for the servers that the next step needs.")
    return _shift(channel, rollout.step_index + 1, now)


def _fuse(channel: Channel, event: FuseBlown, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.phase not in EXPOSED_PHASES:
        return channel
    if not event.against_release:
        return _ended(channel, "withdrawn", event.reason, now)
    return _rejected(channel, event.reason, now)


def _sighted(channel: Channel, event: Sighted, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.phase not in EXPOSED_PHASES:
        return channel
    before = rollout.blind
    if not event.candidate and not event.stable:
        if rollout.phase == "baking" and has_comparison(rollout.plan):
            channel = _bake_watched(channel, rollout.phase_since, now)
        if before is None or not before.told:
            return _with(channel, blind=None)
        channel = _with(channel, blind=None)
        return _noted(channel, now, "sighted", release_id=rollout.release_id)
    only = before.candidate_only_since if before is not None else None
    blind = Blindness(
        since=before.since if before is not None else now,
        candidate_only_since=None if event.stable else only or now,
        why=event.candidate or event.stable,
        told=before is not None and before.told,
    )
    if blind.told or rollout.alone is not None or _seconds(blind.since, now) < BLIND_NOTICE_S:
        return _with(channel, blind=blind)
    channel = _with(channel, blind=blind.model_copy(update={"told": True}))
    return _noted(
        channel,
        now,
        "blind",
        release_id=rollout.release_id,
        why=blind.why,
        until_s=rollout.plan.blind_s,
    )


def _traffic_beyond(channel: Channel, event: TrafficBeyond, now: datetime) -> Channel:
    """Keep what was last seen of each kind, and tell of each kind once. It decides nothing."""
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.ending is not None:
        return channel
    known = next((each for each in rollout.beyond if each.kind == event.kind), None)
    seen = Beyond(kind=event.kind, since=known.since if known else now, why=event.why)
    others = (each for each in rollout.beyond if each.kind != event.kind)
    beyond = tuple(sorted((*others, seen), key=lambda each: (each.since, each.kind)))
    channel = _with(channel, beyond=beyond)
    if known is not None:
        return channel
    return _noted(
        channel,
        now,
        "beyond_envelope",
        release_id=rollout.release_id,
        kind=event.kind,
        why=event.why,
    )


def _controller_lost(channel: Channel, event: ControllerLost, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress or rollout.ending is not None:
        return channel
    if channel.weights.candidate == 0:
        return channel
    return _ended(channel, "withdrawn", f"The controller was lost: {event.reason}", now)


# --- time -----------------------------------------------------------------------------------------


def _time_passed(channel: Channel, event: TimePassed, now: datetime) -> Channel:
    rollout = channel.rollout
    if rollout is None or not channel.in_progress:
        return channel
    if rollout.alone is not None:
        return _alone_time(channel, now)
    if rollout.cleanup is not None:
        return _cleaning_time(channel, now)
    plan = rollout.plan
    if rollout.paused is not None and rollout.paused_s(now) >= plan.max_pause_s:
        reason = f"It was paused for {plan.max_pause_s:g} s in all, and nobody resumed it."
        return _ended(channel, "withdrawn", reason, now)
    too_long = _blind_too_long(rollout, now)
    if too_long:
        return _ended(channel, "withdrawn", too_long, now)
    if rollout.phase == "baking":
        if rollout.running_s(rollout.phase_since, now) < plan.bake_s + plan.deploy_timeout_s:
            return _bake_driven(channel, now)
        reason = f"The bake could not be finished. {rollout.reason}"
        return _ended(channel, "withdrawn", reason, now)
    if rollout.phase in EXPOSED_PHASES:
        return _canary_time(channel, now)
    if rollout.running_s(rollout.started_at, now) < plan.deploy_timeout_s:
        return channel
    reason = f"Not ready for traffic within {plan.deploy_timeout_s:g} s. {rollout.reason}"
    return _ended(channel, "withdrawn", reason, now)


def _blind_too_long(rollout: Rollout, now: datetime) -> str:
    """Return why nobody may go on without seeing; empty while it is not too long."""
    blind, plan = rollout.blind, rollout.plan
    if blind is None or rollout.phase not in EXPOSED_PHASES:
        return ""
    only = blind.candidate_only_since
    if only is not None and _seconds(only, now) >= plan.blind_candidate_s:
        return f"The candidate was not seen for {_seconds(only, now):.0f} s: {blind.why}."
    if _seconds(blind.since, now) >= plan.blind_s:
        return (
            f"The releases were not both seen for {_seconds(blind.since, now):.0f} s: {blind.why}."
        )
    return ""


def _canary_time(channel: Channel, now: datetime) -> Channel:
    """Look at the limits of a candidate that is being compared."""
    rollout = _rollout(channel)
    plan = rollout.plan
    assert rollout.exposed_since is not None
    if rollout.paused is None:
        if rollout.held_since is not None:
            if rollout.running_s(rollout.held_since, now) >= plan.max_hold_s:
                return _undecided_end(channel, now)
        elif rollout.running_s(rollout.exposed_since, now) >= plan.max_duration_s:
            return _undecided(channel, now)
    in_phase_s = _seconds(rollout.phase_since, now)
    if rollout.phase != "shifting" or rollout.mark is not None or rollout.ready.stable == 0:
        return channel
    if in_phase_s < 2 * plan.arrivals_timeout_s:
        return channel
    reason = f"The router could not be asked for {in_phase_s:.0f} s about the weights it has"
    return _ended(channel, "withdrawn", reason, now)


def _undecided(channel: Channel, now: datetime) -> Channel:
    rollout = _rollout(channel)
    if rollout.plan.on_undecided == "rollback":
        return _undecided_end(channel, now)
    channel = _with(channel, held_since=now)
    channel = _noted(
        channel,
        now,
        "held",
        release_id=rollout.release_id,
        after_s=rollout.plan.max_duration_s,
        until_s=rollout.plan.max_hold_s,
        why=_last_word(rollout),
    )
    hold_s = rollout.plan.steps[rollout.step_index].hold_s
    proven = rollout.phase == "holding" and _seconds(rollout.phase_since, now) >= hold_s
    if proven or rollout.step_index == 0:
        return channel
    return _shift(channel, rollout.step_index - 1, now)


def _undecided_end(channel: Channel, now: datetime) -> Channel:
    rollout = _rollout(channel)
    assert rollout.exposed_since is not None
    exposed_s = _seconds(rollout.exposed_since, now)
    return _ended(
        channel,
        "withdrawn",
        f"The judge could not decide in {exposed_s:.0f} s of exposure. {_last_word(rollout)}",
        now,
    )


def _last_word(rollout: Rollout) -> str:
    return rollout.verdict.reason if rollout.verdict else "There was no evidence at all."


# --- changes of traffic ---------------------------------------------------------------------------


def _take_traffic(channel: Channel, now: datetime) -> Channel:
    """Give a warm candidate its first traffic."""
    plan = _rollout(channel).plan
    if has_comparison(plan):
        return _shift(channel, _rollout(channel).step_index, now)
    channel = _swapped(channel, now)
    channel = _with(channel, exposed_since=now)
    release_id = _rollout(channel).release_id
    if plan.kind == "rollback":
        channel = _phase(channel, "rolling_back", now, "Traffic goes back.")
        channel = _with(channel, ending="promoted", cleanup="traffic", cleanup_since=now)
        channel = _by_exchange(channel)
        weight = channel.weights.stable
        return _noted(channel, now, "weights", release_id=release_id, weight=weight)
    channel = _noted(channel, now, "weights", release_id=release_id, weight=100)
    return _phase(channel, "baking", now, "Watching failed requests.")


def _shift(channel: Channel, step_index: int, now: datetime) -> Channel:
    rollout = _rollout(channel)
    weight = rollout.plan.steps[step_index].weight
    channel = _weigh(channel, weight)
    channel = _with(channel, step_index=step_index, exposed_since=rollout.exposed_since or now)
    channel = _phase(channel, "shifting", now, f"Waiting until {weight} % of the requests arrive.")
    return _noted(
        channel, now, "weights", release_id=rollout.release_id, weight=weight, step=step_index + 1
    )


def _take_over(channel: Channel, now: datetime) -> tuple[Channel, int]:
    """Swap the roles: the candidate is stable now, the old release keeps a share for the bake.

    Returns:
        The channel and that share.
    """
    rollout = _rollout(channel)
    plan = rollout.plan
    holdback = 0
    if rollout.ready.stable > 0:
        holdback = _holdback_weight(plan, rollout.ready.candidate, rollout.replicas.stable)
    channel = _weigh(_swapped(channel, now), holdback)
    channel = _with(channel, held_since=None)
    return _phase(channel, "baking", now, "Watching for late harm."), holdback


def _proven(channel: Channel, now: datetime) -> Channel:
    """Let the candidate take over because the judge says that it is good enough."""
    rollout = _rollout(channel)
    channel, holdback = _take_over(channel, now)
    return _noted(
        channel,
        now,
        "proven",
        release_id=rollout.release_id,
        holdback=holdback,
        why=_last_word(rollout),
    )


def _swapped(channel: Channel, now: datetime) -> Channel:
    """Return the channel with the candidate as stable and the old stable release as candidate."""
    rollout = _rollout(channel)
    assert channel.candidate is not None
    channel = channel.model_copy(
        update={
            "stable": channel.candidate.model_copy(update={"since": now}),
            "candidate": channel.stable,
            "weights": Weights(),
        }
    )
    return _with(channel, replicas=_other_way(rollout.replicas), ready=_other_way(rollout.ready))


def _other_way(replicas: Replicas) -> Replicas:
    return Replicas(stable=replicas.candidate, candidate=replicas.stable)


def _baked(channel: Channel, now: datetime) -> Channel:
    """Give the new release everything; the old one's servers go."""
    channel = channel.model_copy(update={"weights": Weights()})
    channel = _phase(channel, "scaling", now, "The bake is over; the old servers go.")
    stage = "traffic" if channel.candidate is not None else "removing"
    return _with(channel, ending="promoted", cleanup=stage, cleanup_since=now)


def _rejected(channel: Channel, reason: str, now: datetime) -> Channel:
    """Take the traffic back and remember that the release must not come again."""
    rollout = _rollout(channel)
    rejection = Rejection(
        release_id=rollout.release_id,
        at=now,
        rollout=rollout.number,
        reason=reason,
        evidence_key=rollout.evidence_key,
    )
    others = tuple(r for r in channel.rejected if r.release_id != rollout.release_id)
    channel = channel.model_copy(update={"rejected": (*others, rejection)})
    return _ended(channel, "rolled_back", reason, now)


def _ended(
    channel: Channel, ending: Outcome, reason: str, now: datetime, *, who: str = ""
) -> Channel:
    """Send all traffic to the release that was stable before, and begin to clean up."""
    rollout = _rollout(channel)
    had_traffic = rollout.exposed_since is not None
    swapped = rollout.phase == "baking" or rollout.ending == "promoted"
    if swapped:
        channel = channel.model_copy(
            update={"stable": channel.candidate, "candidate": channel.stable}
        )
        channel = _with(
            channel, replicas=_other_way(rollout.replicas), ready=_other_way(rollout.ready)
        )
    channel = channel.model_copy(update={"weights": Weights()})
    channel = _phase(channel, "rolling_back", now, reason)
    channel = _with(
        channel,
        ending=ending,
        cleanup="traffic" if had_traffic else "removing",
        cleanup_since=now,
        held_since=None,
        pauses=_over(rollout, now),
        blind=None,
    )
    if swapped and ending != "rolled_back" and has_comparison(rollout.plan):
        channel = _by_exchange(channel)
    channel = _alone_seen(channel, now)
    return _noted(
        channel, now, "ending", release_id=rollout.release_id, who=who, outcome=ending, why=reason
    )


# --- cleaning up: arrivals stop, requests end, servers go -----------------------------------------


def _by_exchange(channel: Channel) -> Channel:
    """Let a winner that is not at full size grow before the loser, which did no harm, goes.

    Traffic is shared by ready servers meanwhile. With `replace` each ready server of the winner
    lets one of the loser's go.
    """
    rollout = _rollout(channel)
    plan, ready = rollout.plan, rollout.ready
    full = _full_size(rollout)
    if ready.stable >= full or ready.candidate == 0:
        return channel
    wanted = rollout.replicas
    if plan.capacity == "replace":
        room = max(plan.replicas, plan.stable_replicas) + 1
        growing = min(full, ready.stable + 1)
        going = max(1, min(wanted.candidate, room - growing))
        wanted = Replicas(stable=growing, candidate=going)
    going = min(ready.candidate, wanted.candidate)
    share = min(99, ceil(100 * going / (ready.stable + going)))
    return _with(_weigh(channel, share), cleanup="exchanging", replicas=wanted)


def _exchanged(channel: Channel, now: datetime) -> Channel:
    """Take the rest of the traffic from the loser."""
    channel = channel.model_copy(update={"weights": Weights()})
    return _with(channel, cleanup="traffic", cleanup_since=now, mark=None)


def _cleaning_route(channel: Channel, event: RouteSeen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    if channel.candidate is None:
        return channel
    loser = channel.candidate.release_id
    seen = event.traffic.get(loser, TrafficSeen())
    if rollout.cleanup == "draining":
        return _removing(channel, now) if seen.in_flight == 0 else channel
    if rollout.cleanup != "traffic" or event.weights.get(loser, 0) != 0:
        return channel
    mark = rollout.mark
    if mark is None or mark.epoch != event.epoch or mark.arrivals.get(loser) != seen.arrivals:
        return _with(channel, mark=_mark(event, (loser,), now))
    if _seconds(mark.at, now) < QUIET_S:
        return channel
    return _draining(channel, now)


def _cleaning_time(channel: Channel, now: datetime) -> Channel:
    rollout = _rollout(channel)
    plan = rollout.plan
    assert rollout.cleanup_since is not None
    stage_s = _seconds(rollout.cleanup_since, now)
    if rollout.cleanup == "exchanging" and stage_s >= plan.deploy_timeout_s:
        return _exchanged(channel, now)
    # While the router answers, it is believed for longer: it may be the driver that was away.
    patience_s = plan.arrivals_timeout_s * (1 if rollout.mark is None else PATIENCE)
    if rollout.cleanup == "traffic" and stage_s >= patience_s:
        loser = channel.candidate.release_id if channel.candidate else ""
        channel = _noted(channel, now, "unverified", release_id=loser, waited_s=round(stage_s, 1))
        return _draining(channel, now)
    if rollout.cleanup == "draining" and stage_s >= plan.drain_timeout_s:
        return _removing(channel, now)
    if rollout.cleanup == "removing" and stage_s >= plan.deploy_timeout_s:
        return _finished(channel, now)
    return channel


def _draining(channel: Channel, now: datetime) -> Channel:
    if _keeps_warm(channel):
        return _finished(channel, now)
    return _with(channel, cleanup="draining", cleanup_since=now)


def _removing(channel: Channel, now: datetime) -> Channel:
    return _with(channel, cleanup="removing", cleanup_since=now)


def _keeps_warm(channel: Channel) -> bool:
    """Tell whether the old release keeps its servers after a promotion."""
    rollout = _rollout(channel)
    return (
        rollout.ending == "promoted"
        and rollout.plan.kind != "rollback"
        and rollout.plan.keep_warm_s > 0
    )


def _cleaning_servers(channel: Channel, seen: _Seen, now: datetime) -> Channel:
    rollout = _rollout(channel)
    if rollout.cleanup == "exchanging":
        return _exchange_goes_on(channel, now)
    if rollout.cleanup != "removing" or seen.of(channel.candidate):
        return channel
    channel = _with(channel, replicas=Replicas(stable=_full_size(rollout)))
    if channel.stable is not None and rollout.ready.stable < _full_size(rollout):
        return channel
    return _finished(channel, now)


def _exchange_goes_on(channel: Channel, now: datetime) -> Channel:
    before = channel.weights
    rollout = _rollout(channel)
    over = rollout.ready.stable >= _full_size(rollout) or rollout.ready.candidate == 0
    channel = _exchanged(channel, now) if over else _by_exchange(channel)
    if channel.weights == before:
        return channel
    weight = channel.weights.stable
    return _noted(channel, now, "weights", release_id=_stable_id(channel), weight=weight)


def _full_size(rollout: Rollout) -> int:
    if rollout.ending == "promoted":
        return rollout.plan.replicas
    return rollout.plan.stable_replicas


def _finished(channel: Channel, now: datetime) -> Channel:
    rollout = _rollout(channel)
    assert rollout.ending is not None
    plan = rollout.plan
    previous = channel.previous
    if rollout.ending == "promoted":
        others = [t for t in previous if t.release_id != rollout.release_id]
        old = channel.candidate
        if old is not None and plan.kind == "canary":
            until = now + timedelta(seconds=plan.keep_warm_s) if _keeps_warm(channel) else None
            others.insert(0, old.model_copy(update={"warm_until": until}))
        previous = tuple(others[:PREVIOUS_LIMIT])
        # Proven after all: it was forced, and it held.
        kept = tuple(r for r in channel.rejected if r.release_id != rollout.release_id)
        channel = channel.model_copy(update={"rejected": kept})
    reason = rollout.reason
    if rollout.ending == "promoted":
        reason = (
            f"{rollout.release_id} has all traffic again."
            if plan.kind == "rollback"
            else f"{rollout.release_id} is stable. {_grounds(rollout)}"
        )
    channel = channel.model_copy(update={"candidate": None, "previous": previous})
    reason = f"{reason} {_missing(channel)}".strip()
    channel = _with(
        channel,
        outcome=rollout.ending,
        replicas=Replicas(stable=_full_size(rollout)),
        cleanup=None,
        cleanup_since=None,
    )
    channel = _phase(channel, "idle", now, reason)
    event = "returned" if plan.kind == "rollback" and rollout.ending == "promoted" else None
    return _noted(channel, now, event or rollout.ending, release_id=rollout.release_id, why=reason)


def _missing(channel: Channel) -> str:
    """Return what the release that serves now lacks of its servers, in one sentence, or nothing."""
    rollout = _rollout(channel)
    ready, full = rollout.ready.stable, _full_size(rollout)
    if channel.stable is None or ready >= full:
        return ""
    return f"Only {ready} of {full} servers of {channel.stable.release_id} are ready."


def _grounds(rollout: Rollout) -> str:
    by_hand = rollout.promoted_by_hand
    if by_hand is not None:
        return f"{by_hand.who or 'Somebody'} promoted it by hand: {by_hand.reason}"
    if rollout.verdict is not None:
        return rollout.verdict.reason
    return "It had nothing to be compared with; it kept the absolute limits."


# --- small helpers --------------------------------------------------------------------------------


def _rollout(channel: Channel) -> Rollout:
    assert channel.rollout is not None
    return channel.rollout


def _with(channel: Channel, **changes: Any) -> Channel:
    """Return the channel with changes of its rollout."""
    rollout = _rollout(channel).model_copy(update=changes)
    return channel.model_copy(update={"rollout": rollout})


def _phase(channel: Channel, phase: Phase, now: datetime, reason: str) -> Channel:
    return _with(
        channel,
        phase=phase,
        phase_since=now,
        mark=None,
        alone=None,
        driven_at=None,
        bake_watched=False,
        reason=reason,
    )


def _weigh(channel: Channel, candidate: int) -> Channel:
    weights = Weights(stable=100 - candidate, candidate=candidate)
    return channel.model_copy(update={"weights": weights})


def _noted(
    channel: Channel,
    now: datetime,
    event: str,
    *,
    release_id: str = "",
    who: str = "",
    **detail: Any,
) -> Channel:
    entry = HistoryEntry(
        at=now,
        generation=channel.generation + 1,
        event=event,
        release_id=release_id,
        rollout=channel.rollout.number if channel.rollout is not None else None,
        who=who,
        detail={name: value for name, value in detail.items() if value not in ("", None)},
    )
    return channel.model_copy(update={"history": (*channel.history, entry)})


def _seconds(since: datetime, now: datetime) -> float:
    return (now - since).total_seconds()


def _unwanted(channel: Channel, now: datetime) -> list[str]:
    """Return releases of the past whose servers nobody wants any more."""
    roles = {track.release_id for track in (channel.stable, channel.candidate) if track}
    rollout = _rollout(channel)
    warm = {
        track.release_id
        for track in channel.previous
        if track.warm_until is not None and track.warm_until > now and not channel.in_progress
    }
    past = [rollout.release_id, rollout.reference_id, *(t.release_id for t in channel.previous)]
    return sorted({name for name in past if name} - roles - warm)


def _attestations(channel: Channel, rollout: Rollout) -> list[Command]:
    """Return what is to be written beside the release about a rollout that is over."""
    rejection = next((r for r in channel.rejected if r.rollout == rollout.number), None)
    where = {"environment": channel.environment, "rollout": rollout.number}
    if rejection is not None:
        subject = {
            **where,
            "reason": rejection.reason,
            "evidence": rejection.evidence_key,
            "at": rejection.at.isoformat(),
        }
        return [Attest("rejection", rejection.release_id, rollout.number, subject)]
    if rollout.outcome == "promoted" and rollout.plan.kind != "rollback":
        subject = {
            **where,
            "reason": rollout.reason,
            "evidence": rollout.evidence_key,
            "at": rollout.phase_since.isoformat(),
        }
        if rollout.promoted_by_hand is not None:
            subject["by_hand"] = rollout.promoted_by_hand.model_dump(mode="json")
        return [Attest("promotion", rollout.release_id, rollout.number, subject)]
    return []


def _check(channel: Channel) -> None:
    """Refuse what must never be stored; a failure here is a defect of this module."""
    rollout = channel.rollout
    weight = channel.weights.candidate
    may_have = (
        rollout is not None
        and channel.in_progress
        and channel.candidate is not None
        and (
            (rollout.phase in EXPOSED_PHASES and rollout.ending is None)
            or rollout.cleanup == "exchanging"
        )
    )
    if channel.weights.stable + weight != 100 or (weight and not may_have):
        phase = rollout.phase if rollout is not None else "idle"
        raise ValueError(f"weights {channel.weights} in phase {phase} are not allowed")


_SERVERS_STAY = frozenset({"exchanging", "traffic", "draining"})
"""Stages of a clean-up in which the loser still has its servers."""

_OF_EVERY_TICK = (ServersSeen, RouteSeen, Sighted, TimePassed)
"""Events that happen only because somebody drives."""

_BY_PHASE: dict[Phase, Callable[[Channel, _Seen, datetime], Channel]] = {
    "deploying": _deploying,
    "warming": _warming,
    "scaling": _scaling,
    "shifting": _shifting,
    "holding": _holding,
    "baking": _baking,
}

_HANDLERS: dict[type, Callable[[Channel, Any, datetime], Channel]] = {
    RolloutRequested: _requested,
    DriverClaimed: _claimed,
    ServersSeen: _servers_seen,
    RouteSeen: _route_seen,
    WarmedUp: _warmed_up,
    Looked: _looked,
    Sighted: _sighted,
    TrafficBeyond: _traffic_beyond,
    FuseBlown: _fuse,
    ControllerLost: _controller_lost,
    AbortRequested: _abort,
    UndoRequested: _undo,
    PauseRequested: _pause,
    ResumeRequested: _resume,
    PromotionForced: _promotion_forced,
    QueueJoined: _queue_joined,
    QueueLeft: _queue_left,
    ObjectiveMissed: _objective_missed,
    ObjectiveMet: _objective_met,
    OutcomeNoted: _outcome_noted,
    RequesterNoted: _requester_noted,
    Adopted: _adopted,
    TimePassed: _time_passed,
}
