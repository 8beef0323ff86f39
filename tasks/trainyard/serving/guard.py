"""The guard's decision: what the route does now. Pure.

Its shells are `serving.guard_loop` on one machine and `serving.kubernetes.guard` in a cluster.

::

    condition                                                         route
    no rollout under way, or its lease is alive                       as the channel wishes
    rollout before its bake, candidate has weight, no living lease    all to stable (lease_expired)
    bake, candidate has weight, no living lease                       all to the old release if it
                                                                      is ready at full size, else to
                                                                      the new one (lease_expired)
    rollout before its bake, candidate has weight, and it has no
      ready server, or its first answers all failed, or many
      connections in a row failed                                     all to stable (fuse)
    one track has no ready server, the other has and may take it      all to the other (failover)

Which may take it: both while both have weight; and while a rollout ends, until the loser's requests
have ended, the loser too, unless it was rejected. What is known to do harm does not come back, even
if the other one cannot answer. While servers are exchanged on the way back, the loser keeps its
share, with or without a lease: the winner could not bear all of it yet.

A fuse stays blown until the channel itself takes the candidate's weight away, or another rollout
begins. The others end with their conditions. In the bake the tracks have changed roles: the
release of track `candidate` is the old one, which is proven, so it has no fuse. It takes over if
the new one has no ready server, with or without a lease, and if nobody drives the bake any more:
the new one has not shown yet that it is as good for longer. An old release with fewer ready servers
than it had when it was stable could not bear all the traffic; then the new one keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from trainyard.documents.base import Frozen
from trainyard.documents.channel import Channel, Rollout
from trainyard.serving.lease import LeaseState
from trainyard.serving.protocol import GuardState

FIRST_ANSWERS = 10
"""A candidate whose first so many requests all fail is broken, whatever the judge will say."""
CONNECTION_FAILURES = 5
"""A candidate to which so many connections in a row fail is gone."""


@dataclass(frozen=True)
class ReleaseHealth:
    """What the router knows about one release in the present rollout."""

    ready_servers: int = 0
    answers: int = 0
    """Requests that have ended, well or not."""
    failures: int = 0
    """Of the first `FIRST_ANSWERS` of them, those that failed."""
    connection_failures: int = 0
    """Failed connections since the last one that worked."""


class Wish(Frozen):
    """What a channel wishes of its route: all of it that the guard needs."""

    model: str
    environment: str
    generation: int
    """Of the channel."""
    stable: str | None
    """Release in track `stable`."""
    candidate: str | None
    """Release in track `candidate`."""
    weight: int
    """Percent of the traffic to the candidate."""
    rollout: int | None
    """Number of the rollout that is under way, or of the last one."""
    in_progress: bool
    """Is a rollout under way?"""
    baking: bool
    """Is it in its bake, where the candidate is the old release?"""
    full_size: int = 0
    """Servers that the release had which was stable when the rollout began; with so many it bears
    all traffic. 0: there was none, or an older version wrote the wish."""
    stands_in: bool = False
    """Track `candidate` is about to lose its traffic, or has, but not for harm, and its servers are
    still there: it may answer if the other track cannot. It is not under test any more."""

    @classmethod
    def of(cls, channel: Channel) -> Wish:
        """Return what `channel` wishes."""
        return cls(
            model=channel.model,
            environment=channel.environment,
            generation=channel.generation,
            stable=channel.stable.release_id if channel.stable else None,
            candidate=channel.candidate.release_id if channel.candidate else None,
            weight=channel.weights.candidate,
            rollout=channel.rollout.number if channel.rollout else None,
            in_progress=channel.in_progress,
            baking=channel.rollout is not None and channel.rollout.phase == "baking",
            full_size=channel.rollout.plan.stable_replicas if channel.rollout else 0,
            stands_in=channel.rollout is not None and _stands_in(channel.rollout),
        )


def _stands_in(rollout: Rollout) -> bool:
    """Tell whether the loser of a rollout that ends may answer where the winner cannot.

    With `single` its servers must go before the winner's can come.
    """
    return (
        rollout.cleanup in {"exchanging", "traffic", "draining"}
        and rollout.ending != "rolled_back"
        and rollout.plan.capacity != "single"
    )


def wish_to_follow(stored: Wish, followed: Wish | None, is_ready: Callable[[str], bool]) -> Wish:
    """Return the wish that holds: that of the store, unless it would take the model off the air.

    A channel's generation only ever grows. An older one comes from a store that was restored from a
    copy; the servers of what it calls stable may be long gone. As long as they are, what was
    followed before goes on to hold.

    Args:
        stored: what the store says now.
        followed: the newest wish that was ever followed.
        is_ready: tells whether a release has a ready server.
    """
    if followed is None or stored.generation >= followed.generation:
        return stored
    return stored if stored.stable is not None and is_ready(stored.stable) else followed


class Fuse(Frozen):
    """A blown fuse."""

    rollout: int
    release_id: str
    reason: str
    at: datetime


@dataclass(frozen=True)
class RouteDecision:
    """What the route does from now on."""

    weights: Mapping[str, int]
    """Percent by release id, for both tracks; empty if nothing may get traffic."""
    guard: GuardState
    reason: str
    """Why it does not follow the channel, in one sentence; else empty."""
    fuse: Fuse | None = field(default=None)
    """To be handed in at the next decision."""


def decide(
    wish: Wish,
    lease: LeaseState,
    health: Mapping[str, ReleaseHealth],
    fuse: Fuse | None,
    now: datetime,
) -> RouteDecision:
    """Return the route that a channel gets.

    Args:
        wish: what the channel wishes now.
        lease: the state of its rollout's lease.
        health: by release id; a release that is missing has no ready server.
        fuse: the one that blew earlier, if any.
        now: for the record.
    """
    stable, candidate, baking = wish.stable, wish.candidate, wish.baking
    exposed = candidate is not None and wish.weight > 0
    at_risk = exposed and wish.in_progress and not wish.stands_in
    before = fuse if fuse is not None and _is_of(fuse, wish) else None
    fuse = (before or _fuse(wish, health, now)) if at_risk and not baking else None

    wished = _shares(stable, candidate, wish.weight if exposed else 0)
    withdrawn = _shares(stable, candidate, 0)
    if fuse is not None:
        return RouteDecision(withdrawn, "fuse", fuse.reason, fuse)
    if at_risk and lease != "alive":
        to_old = baking and _at_full_size(wish, health)
        held = RouteDecision(
            _shares(stable, candidate, 100) if to_old else withdrawn,
            "lease_expired",
            f"The rollout's lease is {lease}: nobody drives it, so "
            f"{stable if to_old else candidate} gets no traffic.",
        )
        return _failover(held, stable, candidate, health) if baking else held
    following = RouteDecision(wished, "following", "")
    if wish.stands_in and before is not None:
        return replace(following, fuse=before)
    return (
        _failover(following, stable, candidate, health) if exposed or wish.stands_in else following
    )


def _at_full_size(wish: Wish, health: Mapping[str, ReleaseHealth]) -> bool:
    """Tell whether the old release of a bake has as many ready servers as when it was stable."""
    assert wish.candidate is not None
    ready = health.get(wish.candidate, ReleaseHealth()).ready_servers
    return 0 < wish.full_size <= ready


def _shares(stable: str | None, candidate: str | None, weight: int) -> dict[str, int]:
    """Return percentages by release id; without a stable release only a whole share counts."""
    if stable is None:
        return {candidate: 100} if candidate is not None and weight == 100 else {}
    shares = {stable: 100 - weight}
    if candidate is not None:
        shares[candidate] = shares.get(candidate, 0) + weight
    return shares


def _is_of(fuse: Fuse, wish: Wish) -> bool:
    return (fuse.rollout, fuse.release_id) == (wish.rollout, wish.candidate)


def _fuse(wish: Wish, health: Mapping[str, ReleaseHealth], now: datetime) -> Fuse | None:
    assert wish.candidate is not None
    assert wish.rollout is not None
    release_id, number = wish.candidate, wish.rollout
    seen = health.get(release_id, ReleaseHealth())
    if seen.ready_servers == 0:
        reason = f"{release_id} has no ready server."
    elif seen.answers >= FIRST_ANSWERS and seen.failures >= FIRST_ANSWERS:
        reason = f"The first {FIRST_ANSWERS} requests to {release_id} all failed."
    elif seen.connection_failures >= CONNECTION_FAILURES:
        reason = f"{seen.connection_failures} connections in a row to {release_id} failed."
    else:
        return None
    return Fuse(rollout=number, release_id=release_id, reason=reason, at=now)


def _failover(
    decision: RouteDecision,
    stable: str | None,
    candidate: str | None,
    health: Mapping[str, ReleaseHealth],
) -> RouteDecision:
    """Return `decision`, or all traffic for the track that has ready servers if the other has none.

    It is better answered by the release under test than not at all, as long as that release may
    have traffic in the first place.
    """
    if stable is None or candidate is None or stable == candidate:
        return decision
    ready = {name: health.get(name, ReleaseHealth()).ready_servers for name in (stable, candidate)}
    for down, up in ((stable, candidate), (candidate, stable)):
        if ready[down] == 0 and ready[up] > 0 and decision.weights.get(down, 0) > 0:
            return RouteDecision(
                {up: 100, down: 0},
                "failover",
                f"{down} has no ready server; {up} takes its traffic. {decision.reason}".strip(),
            )
    return decision
