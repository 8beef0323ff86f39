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

from trainyard.documents.channel import Channel
from trainyard.documents.look import ReleaseCounters, RouteCounters
from trainyard.documents.watch import Reading, WatchState
from trainyard.errors import Conflict, TrainyardError
from trainyard.rollout.adopted import is_adopted
from trainyard.rollout.by_hand import see_through
from trainyard.rollout.channel_store import change_channel, channel_keys
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.events import Notify, ObjectiveMet, ObjectiveMissed
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
from trainyard.store.documents import create_document, read_document
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
        return _end_orphan(deps, channel)
    if channel.stable is None or channel.rollout is None:
        return ()
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


def _end_orphan(deps: RolloutDeps, channel: Channel) -> tuple[Finding, ...]:
    """End a rollout whose outcome is certain and whose driver has gone, such as a closed terminal.

    One that is not decided yet is left to its own run: Airflow brings its driver back.
    """
    rollout = channel.rollout
    assert rollout is not None
    if rollout.ending is None and rollout.plan.kind != "rollback":
        return ()
    if deps.lease.look(channel.environment, channel.model).state == "alive":
        return ()
    lines: list[str] = []
    ended = see_through(
        deps,
        channel.model,
        channel.environment,
        run_id=f"watch/{channel.model}/{channel.environment}/{rollout.number}",
        say=lines.append,
        timeout_s=ORPHAN_TIMEOUT_S,
    )
    outcome = ended.rollout.outcome if ended.rollout is not None else None
    message = f"Rollout {rollout.number} had no driver any more; it is ended: {outcome}."
    return (_finding(channel, "ended", message),)


def _finding(
    channel: Channel, kind: Literal["alarm", "recovered", "note", "ended", "trouble"], message: str
) -> Finding:
    return Finding(channel.model, channel.environment, kind, message)
