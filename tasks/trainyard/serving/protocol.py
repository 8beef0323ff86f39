"""Hosts and routers as the rollout sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from trainyard.documents.release import Release

ServerState = Literal["starting", "ready", "unhealthy", "failed", "stopping"]
GuardState = Literal["following", "lease_expired", "fuse", "failover"]
"""`following`: the route does what the channel wishes. `lease_expired`, `fuse`: all traffic is held
on stable, in a bake without a lease on the old release. `failover`: one track has no ready server,
so the other one takes all; ends by itself."""


@dataclass(frozen=True)
class ServerStatus:
    """One replica as its host sees it now."""

    name: str
    """Unique, such as `adder-0123456789ab-0`; the `pod` of metrics."""
    release_id: str
    state: ServerState
    url: str
    """`http://127.0.0.1:port`, empty until known."""
    started_at: datetime | None
    restarts: int
    message: str
    """Why it is not ready, in one sentence, or how it started."""


class Host(Protocol):
    """Runs the servers of one environment's releases. All calls are idempotent wishes."""

    def deploy(self, environment: str, release: Release, replicas: int) -> None:
        """Wish for `replicas` servers of `release`; also scales an existing deployment."""

    def scale(self, environment: str, release_id: str, replicas: int) -> None:
        """Wish for `replicas` servers of a release that was not deployed here: an adopted one.

        Raises NotFound if there is none of that name.
        """

    def remove(self, environment: str, release_id: str) -> None:
        """Wish for no servers of the release: drain, then stop."""

    def hold_autoscaling(self, environment: str, model: str) -> None:
        """Let nothing but us change the number of the model's servers."""

    def resume_autoscaling(self, environment: str, model: str, release_id: str) -> None:
        """Let autoscalers work again, on the servers of `release_id`."""

    def servers(self, environment: str, model: str) -> Sequence[ServerStatus]:
        """Return every server of the model in the environment, of whatever release."""


@dataclass(frozen=True)
class ServerTraffic:
    """Cumulative counts of one server at the router since the router's start."""

    ended: int
    """Requests that were sent to it and have ended, in whatever way."""
    errors: int
    """Those of them that failed."""
    arrivals: int | None = None
    """Requests that were sent to it, ended or not. This and what follows is None where the router
    does not count it."""
    unanswered: int | None = None
    """Requests that ended without an answer and are no error: the client went away before the first
    byte of one, or the server said that it was too busy (408, 429)."""
    refused: int | None = None
    """Requests that it answered with another 4xx."""


@dataclass(frozen=True)
class ReleaseTraffic:
    """Cumulative counts of one release at the router since the router's start."""

    arrivals: int
    """Requests sent to it."""
    errors: int
    """Requests that failed: no connection, 5xx, or a stream cut before its end."""
    in_flight: int
    servers: Mapping[str, ServerTraffic] = field(default_factory=dict)
    """By `ServerStatus.name`; empty where the router tells nothing but sums. What is in the sums
    and here in no server reached none, or was at a server that has long gone."""


@dataclass(frozen=True)
class RouteStatus:
    """What the router does now."""

    epoch: str
    """Changes whenever the counters start anew."""
    weights: Mapping[str, int]
    """Percent by release id, as in effect."""
    traffic: Mapping[str, ReleaseTraffic]
    """By release id."""
    guard: GuardState
    guard_reason: str
    channel_generation: int
    """Generation of the channel that the route reflects."""


class Router(Protocol):
    """Reads the route; nobody but the guard behind it writes weights (wishes go to the channel)."""

    def status(self, environment: str, model: str) -> RouteStatus | None:
        """Return what the router does now; None if it cannot be asked (it may be restarting)."""


LeaseState = Literal["alive", "expired", "absent"]


@dataclass(frozen=True)
class LeaseSight:
    """A lease as somebody finds it who does not hold it."""

    state: LeaseState
    holder: str = ""
    """Run and epoch of the driver, as `run#epoch`; empty: nobody."""
    mark: str = ""
    """Changes with each renewal."""
    may_renew: bool = True
    """False: who looks may not drive the rollout, as far as is known."""
    left_s: float | None = field(default=None, compare=False)
    """Seconds until it ends unless it is renewed, by the clock of who looks; None: not known. Two
    looks at one renewal are equal whatever time has passed between them."""


class Lease(Protocol):
    """The sign of life of a rollout's driver."""

    def look(self, environment: str, model: str) -> LeaseSight:
        """Return whether somebody drives the rollout, as far as its lease tells."""

    def renew(self, environment: str, model: str, *, holder: str, duration_s: float) -> None:
        """Say that `holder` drives the rollout for another `duration_s`."""

    def release(self, environment: str, model: str, *, holder: str) -> None:
        """End the lease, if `holder` has it."""
