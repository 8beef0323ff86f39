"""The shell around the watch: reads servers and router, keeps its state, acts.

It does first what follows from a look and writes the look down afterwards. Whoever is killed in
between does the same things again, and each of them once is the same as twice: a rollback has one
run for each rollout, and an alarm is in the channel's history until it has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainyard.canonical import digest, short
from trainyard.documents.channel import Channel, Outcome, Rollout
from trainyard.documents.look import ReleaseCounters, RouteCounters
from trainyard.documents.watch import Reading, Unattended, WatchState
from trainyard.errors import Conflict, TrainyardError
from trainyard.rollout.adopted import is_adopted
from trainyard.rollout.by_hand import see_through
from trainyard.rollout.channel_store import change_channel, channel_keys
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import ending_of, finish_up
from trainyard.rollout.events import AbortRequested, Notify, ObjectiveMet, ObjectiveMissed
from trainyard.rollout.questions import CarefulReader
from trainyard.rollout.state_machine import open_alerts, step
from trainyard.rollout.watch import (
    Alert,
    go_on,
    judge_watch,
    rollback_run_id,
    rollback_target,
)
from trainyard.serving.protocol import RouteStatus, ServerStatus
from trainyard.spec.model import ServingSlo
from trainyard.store.documents import create_document, first_document, read_document
from trainyard.store.layout import rollout_prefix

log = logging.getLogger(__name__)

SLOT_S = 60.0
"""A channel is looked at once in so many seconds, however often somebody asks for it."""

KEPT_SLOTS = 3
"""States that are kept: each is whole, so one would do."""

LOOK_BACK = 5
"""Rollouts that came to nothing, past which the state of the release's watch is still found."""

ORPHAN_TIMEOUT_S = 240.0
"""Seconds that the end of a rollout may take which its driver has left."""

UNATTENDED_TOLD_S = 300.0
"""Seconds without a driver after which people are told of an undecided rollout. A triggerer that is
moved or updated is back before that."""

WATCH_RUN = "watch/"
"""How the runs begin under which the watch ends rollouts."""

WATCH_EVENTS = frozenset({"slo_missed", "slo_met"})


@dataclass(frozen=True)
class Finding:
    """Something that a look at a channel found, for people."""

    model: str
    environment: str
    kind: Literal["rollback", "alarm", "recovered", "note", "ended", "trouble"]
    message: str
    release_id: str = ""
    """Of a rollback: where it goes."""
    run_id: str = ""
    """Of a rollback: the run that does it."""

    @property
    def is_news(self) -> bool:
        """Must people hear of it now?"""
        return self.kind in ("rollback", "alarm", "trouble")


RollBack = Callable[[Finding], None]
"""Starts the rollback that a finding names, once, or finds it started."""


def watch_all(deps: RolloutDeps, roll_back: RollBack) -> tuple[Finding, ...]:
    """Look at every channel; trouble with one keeps nobody from looking at the others.

    Raises:
        Transient: the store cannot be read.
    """
    found: list[Finding] = []
    for key in channel_keys(deps.store):
        model, environment = key.removesuffix(".json").split("/")[1:]
        try:
            channel = read_document(deps.store, key, Channel)
            found.extend(watch_channel(deps, channel, roll_back))
        except (TrainyardError, OSError) as error:
            log.warning("%s/%s: %s", model, environment, error)
            message = f"It could not be watched: {error}"
            found.append(Finding(model, environment, "trouble", message))
    return tuple(found)


def watch_channel(deps: RolloutDeps, channel: Channel, roll_back: RollBack) -> tuple[Finding, ...]:
    """Look at one channel, and do what follows."""
    if channel.in_progress:
        return _look_after(deps, channel)
    finished = _finish_up(deps, channel)
    if channel.stable is None or channel.rollout is None:
        return finished
    return (*finished, *_watch_objectives(deps, channel, roll_back))


def _watch_objectives(
    deps: RolloutDeps, channel: Channel, roll_back: RollBack
) -> tuple[Finding, ...]:
    """Look at a channel whose rollout is over, by the objectives of its stable release."""
    assert channel.stable is not None
    assert channel.rollout is not None
    slo = _objectives(deps, channel)
    if slo is None:
        unwatched = f"{channel.stable.release_id} is not watched: it has no rollout.slo."
        return (_finding(channel, "note", unwatched),)
    now = deps.now()
    slot = int(now.timestamp() // SLOT_S)
    keys = _keys(deps, channel, channel.rollout.number)
    before = _last_state(deps, channel, keys)
    if before is not None and before.slot >= slot:
        return ()
    state = go_on(before, channel, _reading(deps, channel), slot, slo)
    judged = judge_watch(state, slo)
    found = [
        *_act(deps, channel, judged.alerts, roll_back),
        *(_finding(channel, "note", note) for note in judged.notes),
    ]
    try:
        create_document(deps.store, _key(channel, slot), state)
    except Conflict:
        # Another process looked in the same slot; both have done the same.
        log.info("%s/%s: slot %d is written already", channel.model, channel.environment, slot)
    for key in keys[: max(0, len(keys) + 1 - KEPT_SLOTS)]:
        deps.store.delete(key)
    return tuple(found)


def _objectives(deps: RolloutDeps, channel: Channel) -> ServingSlo | None:
    """Return the objectives of the stable release, which are its own; None: there are none."""
    if channel.stable is None or is_adopted(channel, channel.stable.release_id):
        return None
    return deps.release(channel.model, channel.stable.release_id).spec.rollout.slo


def _key(channel: Channel, slot: int) -> str:
    assert channel.rollout is not None
    folder = rollout_prefix(channel.model, channel.environment, channel.rollout.number)
    return f"{folder}/watch/{slot:010d}.json"


def _keys(deps: RolloutDeps, channel: Channel, number: int) -> list[str]:
    """Return the keys of the states that were written after rollout `number`, oldest first."""
    folder = f"{rollout_prefix(channel.model, channel.environment, number)}/watch"
    return [entry.key for entry in deps.store.list(folder)]


def _last_state(deps: RolloutDeps, channel: Channel, keys: list[str]) -> WatchState | None:
    """Return the last state; after a rollout that came to nothing, the one from before it."""
    assert channel.rollout is not None
    number = channel.rollout.number
    for earlier in range(number - 1, max(0, number - LOOK_BACK), -1):
        if keys:
            break
        keys = _keys(deps, channel, earlier)
    return read_document(deps.store, keys[-1], WatchState) if keys else None


def _reading(deps: RolloutDeps, channel: Channel) -> Reading:
    """Read the counters of the stable release; what cannot be read is missing."""
    assert channel.stable is not None
    stable = channel.stable.release_id
    now = deps.now()
    own: list[ServerStatus] = []
    route: RouteStatus | None = None
    try:
        servers = deps.host.servers(channel.environment, channel.model)
        own = [s for s in servers if s.release_id == stable and s.state == "ready"]
        route = deps.router.status(channel.environment, channel.model)
    except (TrainyardError, OSError) as error:
        log.warning("%s/%s: %s", channel.model, channel.environment, error)
    counters = None
    if route is not None:
        traffic = route.traffic.get(stable)
        counters = RouteCounters(
            epoch=route.epoch,
            weights={name: share for name, share in route.weights.items() if name == stable},
            releases={}
            if traffic is None
            else {
                stable: ReleaseCounters(
                    arrivals=traffic.arrivals, errors=traffic.errors, in_flight=traffic.in_flight
                )
            },
        )
    reader = CarefulReader(deps.metrics, deps.questions)
    return Reading(at=now, pods=reader.read(channel.environment, own), route=counters)


def _act(
    deps: RolloutDeps, channel: Channel, alerts: tuple[Alert, ...], roll_back: RollBack
) -> list[Finding]:
    """Write alarms down, tell of them, and roll back if that is worth it and possible."""
    target = rollback_target(channel, deps.now())
    known = open_alerts(channel)
    found: list[Finding] = []
    for alert in alerts:
        back = target is not None and alert.rolls_back
        remedy = f"It is rolled back to {target}." if back else "Nothing is done by itself."
        if alert.name not in known:
            found.append(_finding(channel, "alarm", f"{alert.message} {remedy}"))
        _note(deps, channel, ObjectiveMissed(alert.name, f"{alert.message} {remedy}"))
    for name in known - {alert.name for alert in alerts}:
        found.append(_finding(channel, "recovered", f"{name} is over."))
        _note(deps, channel, ObjectiveMet(name))
    _tell(deps, channel)
    worth = next((alert for alert in alerts if alert.rolls_back), None)
    if worth is not None and target is not None:
        finding = Finding(
            channel.model,
            channel.environment,
            "rollback",
            worth.message,
            release_id=target,
            run_id=rollback_run_id(channel),
        )
        roll_back(finding)
        found.append(finding)
    return found


def _note(deps: RolloutDeps, channel: Channel, event: ObjectiveMissed | ObjectiveMet) -> None:
    now = deps.now()

    def change(newest: Channel) -> Channel:
        if newest.stable != channel.stable:
            return newest
        return step(newest, event, now)[0]

    change_channel(deps.store, channel.model, channel.environment, change)


def _tell(deps: RolloutDeps, channel: Channel) -> None:
    """Deliver what the watch noted, also what a process that was killed could not deliver."""
    assert channel.rollout is not None
    number = channel.rollout.number
    newest = change_channel(deps.store, channel.model, channel.environment, lambda same: same)
    for entry in newest.history:
        if entry.event in WATCH_EVENTS and entry.rollout == number:
            deps.outbox.deliver(channel.model, channel.environment, Notify(number, entry))


# --- rollouts without a driver --------------------------------------------------------------------


def _finish_up(deps: RolloutDeps, channel: Channel) -> tuple[Finding, ...]:
    """Do what is left of a rollout that is over, if its driver has died before it was done.

    Whatever fails is tried at the next look, and keeps nobody from watching what serves.
    """
    if channel.rollout is None:
        return ()
    try:
        lease = deps.lease.look(channel.environment, channel.model)
        # One that lives has a driver, who does it.
        if lease.state != "expired" or not finish_up(deps, channel.model, channel.environment):
            return ()
    except (TrainyardError, OSError) as error:
        log.warning("%s/%s: %s", channel.model, channel.environment, error)
        return (_finding(channel, "note", f"What its last rollout has left has to wait: {error}"),)
    message = f"Rollout {channel.rollout.number} was over, but work was left; it is done."
    return (_finding(channel, "ended", message),)


def _look_after(deps: RolloutDeps, channel: Channel) -> tuple[Finding, ...]:
    """End a rollout whose driver has gone, such as a closed terminal or a run that was deleted.

    What is decided is ended at once. Anything else is left to its own run for a while, as Airflow
    brings its driver back.
    """
    rollout = channel.rollout
    assert rollout is not None
    lease = deps.lease.look(channel.environment, channel.model)
    if lease.state == "alive":
        return ()
    decided = rollout.ending is not None or rollout.plan.kind == "rollback"
    if decided or rollout.driver.run_id.startswith(WATCH_RUN):
        outcome = _end(deps, channel, rollout)
        message = f"Rollout {rollout.number} had no driver any more; it is ended: {outcome}."
        return (_finding(channel, "ended", message),)
    return _look_after_undecided(deps, channel, rollout, lease.mark)


def _end(deps: RolloutDeps, channel: Channel, rollout: Rollout) -> Outcome | None:
    """Drive a rollout to its end; return what came of it."""
    ended = see_through(
        deps,
        channel.model,
        channel.environment,
        run_id=f"{WATCH_RUN}{channel.model}/{channel.environment}/{rollout.number}",
        say=log.info,
        timeout_s=ORPHAN_TIMEOUT_S,
    )
    found = ending_of(ended, rollout.number)
    return found[0] if found is not None else None


def _look_after_undecided(
    deps: RolloutDeps, channel: Channel, rollout: Rollout, mark: str
) -> tuple[Finding, ...]:
    """Tell of a rollout that nobody drives, and end it if that lasts as long as a start may take.

    Time counts from when the watch saw it first, not from the end of the lease: after an hour
    without Airflow the run's own triggerer must have time to come back, too.
    """
    folder = rollout_prefix(channel.model, channel.environment, rollout.number)
    key = f"{folder}/unattended/{rollout.driver.epoch:06d}-{short(digest(mark))}"
    seen = first_document(deps.store, f"{key}.json", Unattended(since=deps.now()))
    silent_s = (deps.now() - seen.since).total_seconds()
    ends_s = max(UNATTENDED_TOLD_S, rollout.plan.deploy_timeout_s)
    if silent_s < UNATTENDED_TOLD_S:
        return ()
    where = f"Rollout {rollout.number} of {rollout.release_id} ({rollout.phase})"
    silence = f"has had no driver for {silent_s:.0f} s: {rollout.driver.run_id} does not go on"
    if silent_s >= ends_s:
        if _has_way_back(deps, channel, rollout):
            _withdraw(deps, channel, f"Nobody drove it for {silent_s:.0f} s.")
        outcome = _end(deps, channel, rollout)
        return (_finding(channel, "trouble", f"{where} {silence}. It is ended: {outcome}."),)
    remedy = (
        f"In {ends_s - silent_s:.0f} s it is ended. Start Airflow's triggerer, or end it now: "
        f"`trainyard abort {channel.model} {channel.environment}`."
    )
    is_new = create_document(deps.store, f"{key}-told.json", seen)
    kind: Literal["trouble", "note"] = "trouble" if is_new else "note"
    return (_finding(channel, kind, f"{where} {silence}. {remedy}"),)


def _has_way_back(deps: RolloutDeps, channel: Channel, rollout: Rollout) -> bool:
    """Tell whether withdrawing would leave a release that answers.

    A bake without an old release, or whose old servers are gone, would be left with nothing; it is
    driven on instead, as its own run would do it.
    """
    if rollout.phase != "baking":
        return True
    if channel.candidate is None:
        return False
    old = channel.candidate.release_id
    servers = deps.host.servers(channel.environment, channel.model)
    return any(server.release_id == old and server.state == "ready" for server in servers)


def _withdraw(deps: RolloutDeps, channel: Channel, why: str) -> None:
    """Abort the rollout, unless somebody has taken it over since `channel` was read."""
    assert channel.rollout is not None
    driver = channel.rollout.driver

    def change(newest: Channel) -> Channel:
        if newest.rollout is None or newest.rollout.driver != driver:
            return newest
        return step(newest, AbortRequested(why, "neuron_watch"), deps.now())[0]

    change_channel(deps.store, channel.model, channel.environment, change)


def _finding(
    channel: Channel,
    kind: Literal["alarm", "recovered", "note", "ended", "trouble"],
    message: str,
) -> Finding:
    return Finding(channel.model, channel.environment, kind, message)
