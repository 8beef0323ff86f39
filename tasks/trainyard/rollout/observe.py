"""What a tick sees, as events for the state machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from trainyard.documents.channel import EXPOSED_PHASES, Channel, Rollout
from trainyard.documents.evidence import Verdict
from trainyard.documents.look import (
    Comparison,
    Look,
    ReleaseCounters,
    RouteCounters,
    ServerCounters,
    Snapshot,
)
from trainyard.errors import Transient
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.device_errors import device_trouble
from trainyard.rollout.envelope import beyond_envelope
from trainyard.rollout.events import (
    ControllerLost,
    Event,
    FuseBlown,
    Looked,
    RouteSeen,
    ServerSeen,
    ServersSeen,
    Sighted,
    TimePassed,
    TrafficBeyond,
    TrafficSeen,
)
from trainyard.rollout.looks import look_key
from trainyard.rollout.probes.wishing import begin, go_on, rollout_name
from trainyard.rollout.questions import COUNTERS, CarefulReader
from trainyard.rollout.sight import unseen
from trainyard.rollout.slices import blocks_from_snapshots
from trainyard.rollout.state_machine import has_comparison
from trainyard.rollout.words import describe_look
from trainyard.serving.guard_events import GuardEvent
from trainyard.serving.protocol import RouteStatus, ServerStatus


@dataclass(frozen=True)
class Sight:
    """What one tick saw."""

    events: tuple[Event, ...]
    servers: tuple[ServerStatus, ...]
    """All servers of the model in the environment; empty if the host could not be asked."""
    messages: tuple[str, ...]
    """Lines for people that are in no event."""


@dataclass(frozen=True)
class _Looking:
    """What one look found."""

    events: tuple[Event, ...]
    messages: tuple[str, ...]


_JUDGE = "the judge"
_LOOKS = "the log of looks"
_HISTORY = "the record of stable's history"
_PROBER = "the prober"
_CLOCK_WENT_BACK = "the clock went back behind the last look"


def observe(deps: RolloutDeps, channel: Channel, now: datetime) -> Sight:
    """Look at everything that matters to the rollout under way.

    What cannot be asked gives no event; the state machine's limits take care of lasting silence.
    Alarms come first: they must not wait for what else there is to see.
    """
    rollout = channel.rollout
    assert rollout is not None
    servers = _servers(deps, channel)
    route = deps.questions.ask(
        "the router",
        lambda: deps.router.status(channel.environment, channel.model),
        otherwise=None,
    )
    events: list[Event] = list(_alarms(deps, channel, rollout, servers, route))
    if servers is not None:
        events.append(ServersSeen(tuple(server_seen(server) for server in servers)))
    if route is not None:
        events.append(route_seen(route))
    messages: tuple[str, ...] = ()
    if _is_before_its_looks(deps, channel, rollout, now):
        events.append(Sighted(_CLOCK_WENT_BACK, _CLOCK_WENT_BACK))
    elif _is_look_due(deps, channel, rollout, now):
        deps.questions.ask(
            _PROBER, lambda: begin(deps, channel, rollout, servers or ()), otherwise=None
        )
        looking = _look(deps, channel, rollout, servers or (), route, now)
        messages = looking.messages
        events.extend(looking.events)
    if rollout.plan.probes is not None:
        deps.questions.ask(
            _PROBER,
            lambda: go_on(
                deps,
                channel,
                rollout,
                servers or (),
                slot=slot_of(rollout, now),
                left_s=seconds_to_next_slot(rollout, now),
            ),
            otherwise=None,
        )
    events.append(TimePassed())
    return Sight(tuple(events), tuple(servers or ()), (*messages, *deps.questions.news()))


def server_seen(server: ServerStatus) -> ServerSeen:
    """Return a host's server in the state machine's words."""
    return ServerSeen(
        name=server.name,
        release_id=server.release_id,
        state=server.state,
        message=server.message,
        started_at=server.started_at,
    )


def route_seen(route: RouteStatus) -> RouteSeen:
    """Return a router's status in the state machine's words."""
    return RouteSeen(
        epoch=route.epoch,
        weights=dict(route.weights),
        traffic={
            release_id: TrafficSeen(one.arrivals, one.errors, one.in_flight)
            for release_id, one in route.traffic.items()
        },
    )


def slot_of(rollout: Rollout, now: datetime) -> int:
    """Return the number of the present slice of time."""
    return int((now - rollout.started_at).total_seconds() // rollout.plan.judge.block_s)


def seconds_to_next_slot(rollout: Rollout, now: datetime) -> float:
    """Return when the next slice of time begins."""
    block_s = rollout.plan.judge.block_s
    return block_s - (now - rollout.started_at).total_seconds() % block_s


def _servers(deps: RolloutDeps, channel: Channel) -> Sequence[ServerStatus] | None:
    nothing: Sequence[ServerStatus] | None = None
    return deps.questions.ask(
        "the host",
        lambda: deps.host.servers(channel.environment, channel.model),
        otherwise=nothing,
    )


def _alarms(
    deps: RolloutDeps,
    channel: Channel,
    rollout: Rollout,
    servers: Sequence[ServerStatus] | None,
    route: RouteStatus | None,
) -> list[Event]:
    """Return what the guard did by itself: as it says now, and as it wrote down.

    That a bake was left alone is no reason to go back to an old release without a ready server.
    """
    if rollout.phase not in EXPOSED_PHASES:
        return []
    unknown: Sequence[GuardEvent] = ()
    written = deps.questions.ask(
        "the record of the guard's events",
        lambda: deps.guard_events(channel.model, channel.environment, rollout.number),
        otherwise=unknown,
    )
    seen = [(event.event, event.reason) for event in written]
    if route is not None:
        seen.append((route.guard, route.guard_reason))
    fuses = [reason for event, reason in seen if event == "fuse"]
    lost = [reason for event, reason in seen if event == "lease_expired"]
    if fuses:
        return [FuseBlown(f"Fuse: {fuses[0]}")]
    if not lost or _has_no_way_back(channel, rollout, servers):
        return []
    return [ControllerLost(lost[0])]


def _has_no_way_back(
    channel: Channel, rollout: Rollout, servers: Sequence[ServerStatus] | None
) -> bool:
    """Tell whether nothing of the old release of a bake could answer."""
    if rollout.phase != "baking" or channel.candidate is None or servers is None:
        return False
    old = channel.candidate.release_id
    return not any(server.release_id == old and server.state == "ready" for server in servers)


def _is_look_due(deps: RolloutDeps, channel: Channel, rollout: Rollout, now: datetime) -> bool:
    if not has_comparison(rollout.plan) or rollout.ending is not None:
        return False
    key = look_key(channel.model, channel.environment, rollout.number, slot_of(rollout, now))
    return not deps.store.exists(key)


def _is_before_its_looks(
    deps: RolloutDeps, channel: Channel, rollout: Rollout, now: datetime
) -> bool:
    """Tell whether the clock has gone back behind a look: the slices of now are taken already."""
    compared = has_comparison(rollout.plan) and rollout.exposed_since is not None
    if not compared or rollout.ending is not None:
        return False
    newest = deps.questions.ask(
        _LOOKS,
        lambda: deps.looks.newest(channel.model, channel.environment, rollout.number),
        otherwise=None,
        unless=Transient,
    )
    return newest is not None and newest.snapshot.at > now


def _look(
    deps: RolloutDeps,
    channel: Channel,
    rollout: Rollout,
    servers: Sequence[ServerStatus],
    route: RouteStatus | None,
    now: datetime,
) -> _Looking:
    """Read all counters, ask the judge about everything so far, and store both as one look.

    Without counters, without a judge, or without what was seen before, neither release was seen:
    nobody can tell harm then.
    """
    model, environment = channel.model, channel.environment
    compared = {rollout.release_id, rollout.reference_id}
    ready = [s for s in servers if s.state == "ready" and s.release_id in compared]
    reader = CarefulReader(deps.metrics, deps.questions)
    pods = reader.read(environment, ready)
    snapshot = Snapshot(
        at=now,
        phase=rollout.phase,
        step_index=rollout.step_index,
        pods=pods,
        route=_route_counters(route, compared) if route is not None else None,
        devices=reader.devices(environment, pods),
        probes=deps.questions.ask(
            _PROBER, lambda: deps.prober.read(rollout_name(channel, rollout)), otherwise=None
        ),
    )
    past, before = _past(deps, channel, rollout, reader, ready, now)
    verdict = deps.questions.ask(
        _JUDGE, lambda: _verdict(deps, rollout, before, snapshot), otherwise=None
    )
    slot = slot_of(rollout, now)
    weight = snapshot.route.weights.get(rollout.release_id, 0) if snapshot.route else 0
    look = Look(
        rollout=rollout.number,
        slot=slot,
        snapshot=snapshot,
        verdict=verdict,
        comparison=_comparison(rollout) if verdict is not None else None,
        message=describe_look(slot, weight, verdict) if verdict is not None else "",
    )
    key, stored = deps.looks.write(model, environment, look)
    events: list[Event] = [_sighted(deps, rollout, past, stored.snapshot, ready)]
    trouble = device_trouble(
        [*past, stored.snapshot], candidate=rollout.release_id, stable=rollout.reference_id
    )
    if trouble is not None:
        events.append(FuseBlown(f"Fuse: {trouble.reason}", trouble.against_release))
    if rollout.plan.envelope is not None:
        found = beyond_envelope(rollout.plan.envelope, [*past, stored.snapshot])
        events.extend(TrafficBeyond(each.kind, each.why) for each in found)
    if stored.verdict is not None:
        events.append(Looked(stored.verdict, key))
    return _Looking(tuple(events), (stored.message,) if stored.message else ())


def _past(
    deps: RolloutDeps,
    channel: Channel,
    rollout: Rollout,
    reader: CarefulReader,
    ready: Sequence[ServerStatus],
    now: datetime,
) -> tuple[Sequence[Snapshot], Sequence[Snapshot] | None]:
    """Return what was seen in this rollout, and all that the judge is shown before this look.

    The latter is None if a document of it is damaged: a judge of a part would judge something else.
    """
    model, environment, number = channel.model, channel.environment, rollout.number
    nothing: Sequence[Look] | None = None
    looks = deps.questions.ask(
        _LOOKS,
        lambda: deps.looks.read(model, environment, number),
        otherwise=nothing,
        unless=Transient,
    )
    unknown: Sequence[Snapshot] | None = None
    history = deps.questions.ask(
        _HISTORY,
        lambda: deps.history.gather(model, environment, rollout, reader, ready, now),
        otherwise=unknown,
        unless=Transient,
    )
    past = [look.snapshot for look in looks or ()]
    known = looks is not None and history is not None
    return past, [*(history or ()), *past] if known else None


def _sighted(
    deps: RolloutDeps,
    rollout: Rollout,
    past: Sequence[Snapshot],
    now: Snapshot,
    ready: Sequence[ServerStatus],
) -> Sighted:
    for whom in (COUNTERS, _JUDGE, _LOOKS, _HISTORY):
        if failure := deps.questions.failure_of(whom):
            return Sighted(*(f"{whom} failed with {failure}",) * 2)
    reference = rollout.reference_id
    gone = rollout.phase == "baking" and all(s.release_id != reference for s in ready)
    return Sighted(
        candidate=unseen(past, now, rollout.release_id, ready),
        # In the bake the old release may be gone already; there is nothing to see, then.
        stable="" if gone else unseen(past, now, reference, ready),
    )


def _verdict(
    deps: RolloutDeps, rollout: Rollout, before: Sequence[Snapshot] | None, now: Snapshot
) -> Verdict | None:
    if rollout.exposed_since is None or before is None:
        return None
    blocks = blocks_from_snapshots(
        [*before, now],
        exposed_since=rollout.exposed_since,
        candidate=rollout.release_id,
        stable=rollout.reference_id,
    )
    seen = any(block.t > 0 for block in blocks)
    return deps.judge(blocks, rollout.plan.judge) if seen else None


def _comparison(rollout: Rollout) -> Comparison | None:
    if rollout.exposed_since is None:
        return None
    return Comparison(
        candidate=rollout.release_id,
        stable=rollout.reference_id,
        exposed_since=rollout.exposed_since,
        judge=rollout.plan.judge,
    )


def _route_counters(route: RouteStatus, releases: set[str]) -> RouteCounters:
    return RouteCounters(
        epoch=route.epoch,
        weights={name: share for name, share in route.weights.items() if name in releases},
        releases={
            name: ReleaseCounters(
                arrivals=one.arrivals,
                errors=one.errors,
                in_flight=one.in_flight,
                servers={
                    server: ServerCounters(**asdict(of_it)) for server, of_it in one.servers.items()
                },
            )
            for name, one in route.traffic.items()
            if name in releases
        },
    )
