"""The route of one channel in the proxy's memory: who gets the next request, and what came of it.

Everything here runs in the proxy's event loop and never waits, so a change of weights, servers and
guard state is one step that no request sees half of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

import httpx

from trainyard.serving.choice import WeightedChoice
from trainyard.serving.guard import FIRST_ANSWERS, ReleaseHealth, RouteDecision, Wish
from trainyard.serving.protocol import ReleaseTraffic, RouteStatus, ServerTraffic
from trainyard.serving.records import LOOPBACK, ObservedServer

Track = Literal["stable", "candidate"]
Outcome = Literal["ok", "refused", "busy", "error", "unreachable", "unanswered", "cancelled"]
"""`refused`: a 4xx. `busy`: 408 or 429. `unreachable`: no connection. `unanswered`: the client went
away before the first byte of an answer. `cancelled`: it went away in the middle of one."""

SHUN_S = 1.0
"""Seconds for which a server that refused a connection is the last choice."""

GONE_KEPT_S = 1800.0
"""Seconds for which the counts of a server that has left the route are kept, so that whoever looks
now and then still sees how its last requests ended. Servers come and go without end."""

IDLE_CONNECTION_S = 2.0
"""Servers (uvicorn, so vLLM) close idle connections after 5 s. Ours must go first, or a request
could meet a connection that is just being closed."""


@dataclass(frozen=True)
class Endpoint:
    """Where one start of a ready server listens."""

    release_id: str
    key: Hashable
    """Tells this start of this server from all others."""
    host: str
    port: int
    name: str = ""
    """Of the server, where its keeper gives it one."""

    @classmethod
    def of_server(cls, server: ObservedServer) -> Endpoint:
        """Return the endpoint of a process on this machine that has a port."""
        assert server.port is not None
        key = (server.name, server.pid, server.process_started, server.port)
        return cls(server.release_id, key, LOOPBACK, server.port, server.name)


@dataclass(eq=False)
class Upstream:
    """One start of one server, with the connections to it."""

    endpoint: Endpoint
    transport: httpx.AsyncBaseTransport
    in_flight: int = 0
    last_used: int = 0
    shunned_until: float = 0.0
    """time.monotonic() until which others are preferred."""

    @classmethod
    def of(cls, endpoint: Endpoint) -> Upstream:
        """Return the upstream of a server."""
        # Plain HTTP only: without certificates to verify, making a transport costs no file reads.
        transport = httpx.AsyncHTTPTransport(
            verify=False,
            trust_env=False,
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=256,
                keepalive_expiry=IDLE_CONNECTION_S,
            ),
        )
        return cls(endpoint, transport)

    @property
    def host(self) -> str:
        """Host and port, as in a `Host` header."""
        host = self.endpoint.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def port(self) -> int:
        """Its port."""
        return self.endpoint.port


def take_idle(upstreams: list[Upstream]) -> list[Upstream]:
    """Take those out of a list that have no requests, and return them."""
    idle = [upstream for upstream in upstreams if upstream.in_flight == 0]
    upstreams[:] = [upstream for upstream in upstreams if upstream.in_flight > 0]
    return idle


@dataclass
class Served:
    """Counts of one server by name, over all its starts since the proxy's."""

    arrivals: int = 0
    ended: int = 0
    errors: int = 0
    unanswered: int = 0
    refused: int = 0
    gone_at: float | None = None
    """time.monotonic() when it was first missing in the route; None: it is there."""


@dataclass
class Traffic:
    """Counts of one release: since the proxy's start, and of the present rollout."""

    arrivals: int = 0
    errors: int = 0
    in_flight: int = 0
    answers: int = 0
    failures: int = 0
    connection_failures: int = 0
    servers: dict[str, Served] = field(default_factory=dict)
    """By name. What no server got, and what one got that has long gone, is in the sums only."""

    def forget_rollout(self) -> None:
        """Begin to count for a new rollout."""
        self.answers = self.failures = self.connection_failures = 0

    def forget_servers(self, present: Set[str], now: float) -> None:
        """Drop the counts of servers that left the route `GONE_KEPT_S` ago."""
        for name, served in list(self.servers.items()):
            if name in present:
                served.gone_at = None
            elif served.gone_at is None:
                served.gone_at = now
            elif now - served.gone_at > GONE_KEPT_S:
                del self.servers[name]

    def sent_to(self, server: str) -> None:
        """Count that a request goes to a server."""
        self.servers.setdefault(server, Served()).arrivals += 1

    def note(self, outcome: Outcome, server: str = "") -> None:
        """Count how a request ended.

        Args:
            outcome: of the request.
            server: name of the one that it was sent to first; empty: there was none.
        """
        failed = outcome in ("error", "unreachable")
        if server:
            served = self.servers.setdefault(server, Served())
            served.ended += 1
            served.errors += failed
            served.unanswered += outcome in ("unanswered", "busy")
            served.refused += outcome == "refused"
        if outcome in ("cancelled", "unanswered"):
            # Clients may leave for reasons of their own, many at once. What that says about a
            # release shows only beside the other one, so it is for the judge and not for the fuse.
            return
        self.errors += failed
        self.failures += failed and self.answers < FIRST_ANSWERS
        self.answers += 1
        self.connection_failures = self.connection_failures + 1 if outcome == "unreachable" else 0


@dataclass(eq=False)
class Route:
    """Weights, servers and counts of one channel."""

    environment: str
    model: str
    clock: Callable[[], float] = time.monotonic
    wish: Wish | None = None
    decision: RouteDecision = field(default_factory=lambda: RouteDecision({}, "following", ""))
    upstreams: dict[str, list[Upstream]] = field(default_factory=dict)
    """Ready servers by release id."""
    traffic: dict[str, Traffic] = field(default_factory=dict)
    lease_age_s: float | None = None
    """Seconds since the rollout's driver renewed its lease, as last seen; None: no lease."""
    _choice: WeightedChoice = field(default_factory=WeightedChoice)
    _turn: int = 0

    def update(self, wish: Wish, endpoints: Sequence[Endpoint]) -> list[Upstream]:
        """Take over the channel's wish and the ready servers, apart from the guard's decision.

        Returns:
            Upstreams that get no more requests.
        """
        before = self.wish.rollout if self.wish else None
        if before != wish.rollout or wish.weight == 0:
            # The guard's counts begin with the candidate's exposure.
            for traffic in self.traffic.values():
                traffic.forget_rollout()
        self.wish = wish
        known = {up.endpoint: up for ups in self.upstreams.values() for up in ups}
        fresh: dict[str, list[Upstream]] = {}
        for endpoint in endpoints:
            upstream = known.pop(endpoint, None) or Upstream.of(endpoint)
            fresh.setdefault(endpoint.release_id, []).append(upstream)
        self.upstreams = fresh
        for release_id, traffic in self.traffic.items():
            names = {up.endpoint.name for up in fresh.get(release_id, ())}
            traffic.forget_servers(names, self.clock())
        return list(known.values())

    def health(self) -> dict[str, ReleaseHealth]:
        """Return what the guard wants to know, by release id."""
        names = set(self.upstreams) | set(self.traffic)
        found = {}
        for name in names:
            traffic = self.traffic.get(name, Traffic())
            found[name] = ReleaseHealth(
                ready_servers=len(self.upstreams.get(name, ())),
                answers=traffic.answers,
                failures=traffic.failures,
                connection_failures=traffic.connection_failures,
            )
        return found

    def next_release(self) -> str | None:
        """Return the release that gets the next request; None if none may get any."""
        return self._choice.choose(self.decision.weights)

    def release_on(self, track: Track) -> str | None:
        """Return the release in a role, whatever its weight."""
        assert self.wish is not None
        return self.wish.stable if track == "stable" else self.wish.candidate

    def server_of(self, release_id: str, *, other_than: Upstream | None = None) -> Upstream | None:
        """Return the release's server with the fewest requests; None if it has none."""
        choices = [up for up in self.upstreams.get(release_id, ()) if up is not other_than]
        if not choices:
            return None
        now = self.clock()
        best = min(choices, key=lambda up: (up.shunned_until > now, up.in_flight, up.last_used))
        self._turn += 1
        best.last_used = self._turn
        return best

    def stand_in(self, release_id: str, failed: Upstream) -> Upstream | None:
        """Return another server for a request that found nobody at `failed`.

        A server of the same release comes first, then one of another release that gets traffic.
        """
        failed.shunned_until = self.clock() + SHUN_S
        others = [name for name, weight in self.decision.weights.items() if weight > 0]
        for name in (release_id, *others):
            upstream = self.server_of(name, other_than=failed)
            if upstream is not None:
                return upstream
        return None

    def release_of(self, upstream: Upstream, default: str) -> str:
        """Return the release that an upstream serves; `default` if it is no longer known."""
        for name, upstreams in self.upstreams.items():
            if upstream in upstreams:
                return name
        return default

    def traffic_of(self, release_id: str) -> Traffic:
        """Return the counts of a release."""
        return self.traffic.setdefault(release_id, Traffic())

    def targets(self) -> list[dict[str, object]]:
        """Return its ready servers for Prometheus, one group each, labelled as in a cluster."""
        return [
            {
                "targets": [upstream.host],
                "labels": {
                    "environment": self.environment,
                    "model": self.model,
                    "release": release,
                    "pod": upstream.endpoint.name,
                },
            }
            for release, upstreams in sorted(self.upstreams.items())
            for upstream in upstreams
        ]

    def status(self, epoch: str) -> RouteStatus:
        """Return what `Router.status` tells."""
        names: Mapping[str, object] = {**self.decision.weights, **self.traffic}
        return RouteStatus(
            epoch=epoch,
            weights=dict(self.decision.weights),
            traffic={
                name: ReleaseTraffic(
                    t.arrivals,
                    t.errors,
                    t.in_flight,
                    {
                        server: ServerTraffic(
                            s.ended, s.errors, s.arrivals, s.unanswered, s.refused
                        )
                        for server, s in t.servers.items()
                    },
                )
                for name in names
                for t in (self.traffic.get(name, Traffic()),)
            },
            guard=self.decision.guard,
            guard_reason=self.decision.reason,
            channel_generation=self.wish.generation if self.wish else 0,
        )
