"""Carries out the state machine's wishes. Each may be carried out again at any time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from trainyard.documents.channel import Channel
from trainyard.errors import TrainyardError
from trainyard.releases import record_attestation
from trainyard.rollout.adopted import is_adopted, known_release
from trainyard.rollout.channel_store import read_channel
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.events import (
    Attest,
    Command,
    DeployServers,
    Event,
    HoldAutoscaling,
    Notify,
    ReleaseLease,
    RemoveServers,
    RenewLease,
    ResumeAutoscaling,
    WarmedUp,
    WarmUp,
)
from trainyard.rollout.observe import server_seen
from trainyard.serving.protocol import ServerStatus
from trainyard.store.collection import demand_not_collected
from trainyard.store.layout import release_key

log = logging.getLogger(__name__)

_SERVERS = (DeployServers, RemoveServers, HoldAutoscaling, ResumeAutoscaling, WarmUp)

WARM_UP_SHARE = 0.25
"""Share of the lease that the warm-up of one server may take."""


@dataclass(frozen=True)
class Done:
    """What came of some wishes."""

    events: tuple[Event, ...] = ()
    problems: tuple[str, ...] = ()
    """Wishes that could not be carried out, a line each."""
    try_again: bool = False
    """Some of those may work later."""


def act(
    deps: RolloutDeps,
    channel: Channel,
    commands: Sequence[Command],
    servers: Sequence[ServerStatus],
) -> Done:
    """Carry out all wishes that can be; one that fails does not keep the others from happening.

    But the lease is kept while one of them may work later: by it others see that work is left.

    Servers are touched only while the channel is the one that the wishes follow from. A driver that
    slept between its reading and its doing must not undo what a later rollout has done.
    """
    events: list[Event] = []
    problems: list[str] = []
    try_again = False
    for command in commands:
        try:
            if isinstance(command, _SERVERS) and not _is_current(deps, channel):
                return Done(tuple(events), tuple(problems), try_again=True)
            if isinstance(command, ReleaseLease) and try_again:
                continue
            events.extend(_carry_out(deps, channel, command, servers))
        except (TrainyardError, OSError) as error:
            log.debug("%s failed", command, exc_info=True)
            problems.append(f"{type(command).__name__} has to wait: {error}")
            try_again = try_again or not isinstance(error, TrainyardError) or error.retryable
    return Done(tuple(events), tuple(problems), try_again)


def strays(
    channel: Channel, servers: Sequence[ServerStatus], now: datetime
) -> tuple[RemoveServers, ...]:
    """Return wishes to remove servers that no role and no rollback window wants."""
    wanted = {track.release_id for track in (channel.stable, channel.candidate) if track}
    if not channel.in_progress:
        wanted |= {
            track.release_id
            for track in channel.previous
            if track.warm_until is not None and track.warm_until > now
        }
    found = {server.release_id for server in servers} - wanted
    return tuple(RemoveServers(release_id) for release_id in sorted(found))


def _carry_out(
    deps: RolloutDeps, channel: Channel, command: Command, servers: Sequence[ServerStatus]
) -> list[Event]:
    model, environment = channel.model, channel.environment
    match command:
        case RenewLease(duration_s=duration_s):
            deps.lease.renew(
                environment, model, holder=lease_holder(channel), duration_s=duration_s
            )
        case ReleaseLease():
            deps.lease.release(environment, model, holder=lease_holder(channel))
        case DeployServers(release_id=release_id, replicas=replicas):
            _deploy(deps, channel, release_id, replicas)
        case RemoveServers(release_id=release_id):
            deps.host.remove(environment, release_id)
        case HoldAutoscaling():
            deps.host.hold_autoscaling(environment, model)
        case ResumeAutoscaling(release_id=release_id):
            deps.host.resume_autoscaling(environment, model, release_id)
        case WarmUp():
            return _warm_up(deps, channel, command, servers)
        case Attest(kind=kind, release_id=release_id, subject=subject):
            record_attestation(
                deps.store, model, release_id, kind, subject, provenance=deps.provenance
            )
        case Notify():
            deps.outbox.deliver(model, environment, command)
    return []


def _deploy(deps: RolloutDeps, channel: Channel, release_id: str, replicas: int) -> None:
    model, environment = channel.model, channel.environment
    if is_adopted(channel, release_id):
        deps.host.scale(environment, release_id, replicas)
        return
    # The channel names the release by now; who collects it has seen that, or is seen here.
    demand_not_collected(deps.store, release_key(model, release_id))
    deps.host.deploy(environment, deps.release(model, release_id), replicas)


def lease_holder(channel: Channel) -> str:
    """Return the name under which the channel's driver holds the lease."""
    assert channel.rollout is not None
    driver = channel.rollout.driver
    return f"{driver.run_id}#{driver.epoch}"


def _is_current(deps: RolloutDeps, channel: Channel) -> bool:
    newest = read_channel(deps.store, channel.model, channel.environment)
    return newest.generation == channel.generation


def _warm_up(
    deps: RolloutDeps, channel: Channel, command: WarmUp, servers: Sequence[ServerStatus]
) -> list[Event]:
    assert channel.rollout is not None
    release = known_release(deps, channel, command.release_id)
    lease_s = channel.rollout.plan.lease_s
    events: list[Event] = []
    for server in servers:
        seen = server_seen(server)
        if server.release_id != command.release_id or server.state != "ready":
            continue
        if seen.incarnation in command.warmed:
            continue
        report = deps.warmer.warm_up(
            server, release, requests=command.requests, budget_s=lease_s * WARM_UP_SHARE
        )
        deps.lease.renew(
            channel.environment,
            channel.model,
            holder=lease_holder(channel),
            duration_s=lease_s,
        )
        events.append(
            WarmedUp(
                server=seen.incarnation,
                asked=report.asked,
                answered=report.answered,
                refused=report.refused,
                message=report.message,
            )
        )
    return events
