"""A small world for rollouts: servers, a router with the real guard, traffic, a clock that is told.

Nothing here waits. `World.advance` moves the time, and with it servers start, requests arrive and
the guard looks. What can go wrong in the world has a switch with a plain name.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tests.unit.yard import SPEC

from trainyard.canonical import digest
from trainyard.documents.base import FileEntry
from trainyard.documents.channel import Channel
from trainyard.documents.evidence import Block, JudgeSpec, Verdict
from trainyard.documents.look import DeviceCounters, Histogram, PodCounters
from trainyard.documents.release import Release
from trainyard.errors import Conflict, NotFound, Transient
from trainyard.rollout.channel_store import channel_keys
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import DriveResult
from trainyard.rollout.metrics import Moment
from trainyard.rollout.rollouts import Rollouts, Tick
from trainyard.rollout.warm_up import WarmUpReport
from trainyard.serving.guard import Fuse, ReleaseHealth, Wish, decide
from trainyard.serving.guard_events import GuardEvent
from trainyard.serving.protocol import (
    LeaseSight,
    ReleaseTraffic,
    RouteStatus,
    ServerState,
    ServerStatus,
    ServerTraffic,
)
from trainyard.spec.environments import Environment
from trainyard.spec.model import ModelSpec
from trainyard.store.documents import parse_document
from trainyard.store.layout import channel_key
from trainyard.store.protocol import Entry, Stored

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
MODEL = "adder"
ENVIRONMENT = "production"
EDGES = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

QUICK_ROLLOUT: dict[str, Any] = {
    "steps": [{"weight": 10, "hold_s": 30}, {"weight": 50, "hold_s": 60}],
    "bake_s": 40,
    "max_duration_s": 600,
    "max_hold_s": 300,
    "warm_up_requests": 4,
    "deploy_timeout_s": 300,
    "judge": {
        "block_s": 10,
        "min_requests_per_block": 10,
        "margins": {
            "ttft": {"harm": 0.5, "promote": 0.6},
            "tpot": {"harm": 0.5, "promote": 0.6},
        },
    },
}


def release_id(name: str) -> str:
    """Return a valid release id for a short name such as `a`."""
    return f"{MODEL}-{digest(name)[:12]}"


def make_release(name: str, *, target: str = "cpu", **rollout: Any) -> Release:
    """Return a release with settings for a quick rollout."""
    spec = ModelSpec.model_validate({**SPEC, "rollout": {**QUICK_ROLLOUT, **rollout}})
    return Release(
        release_id=release_id(name),
        model=MODEL,
        target=spec.targets[0].model_copy(update={"name": target}),
        lane="cpu",
        checkpoint_key=f"checkpoints/{MODEL}/{name}/manifest.json",
        checkpoint_digest=digest(name),
        revision=name,
        compile_key="key",
        bundle_digest="bundle",
        serving={},
        serving_digest="serving",
        served_model_name=MODEL,
        toolchain={},
        measurement_id="measurement",
        spec=spec,
    )


@lru_cache(maxsize=128)
def _channel(data: bytes) -> Channel:
    """Return the channel in a document; the world looks at it far more often than it changes."""
    return parse_document(data, "the channel", Channel)


class MemoryStore:
    """A store in memory; `before` and `after` are called around every change."""

    def __init__(self) -> None:
        self.keys: dict[str, Stored] = {}
        self._count = 0
        self.away = False

    @property
    def url(self) -> str:
        return "memory:"

    def _reach(self) -> None:
        if self.away:
            raise Transient("The store is away.")

    def read(self, key: str) -> Stored:
        self._reach()
        if key not in self.keys:
            raise NotFound(f"{key} does not exist.")
        return self.keys[key]

    def exists(self, key: str) -> bool:
        self._reach()
        return key in self.keys

    def create(self, key: str, data: bytes) -> str:
        self._reach()
        if key in self.keys:
            raise Conflict(f"{key} exists already.")
        return self._write(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> str:
        self._reach()
        if key not in self.keys or self.keys[key].version != version:
            raise Conflict(f"{key} was changed.")
        return self._write(key, data)

    def put(self, key: str, data: bytes) -> str:
        self._reach()
        return self._write(key, data)

    def delete(self, key: str, *, version: str | None = None) -> None:
        self._reach()
        if key in self.keys and version not in (None, self.keys[key].version):
            raise Conflict(f"{key} was changed.")
        self.keys.pop(key, None)

    def list(self, prefix: str) -> Iterator[Entry]:
        self._reach()
        folder = prefix.rstrip("/") + "/"
        for key in sorted(self.keys):
            if key.startswith(folder):
                yield Entry(key, len(self.keys[key].data))

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.read(key).data)

    def upload(self, key: str, source: BinaryIO, *, sha256: str | None = None) -> FileEntry:
        raise NotImplementedError("rollouts upload nothing")

    def local_path(self, key: str) -> Path | None:
        return None

    def _write(self, key: str, data: bytes) -> str:
        self._count += 1
        self.keys[key] = Stored(data, str(self._count))
        return str(self._count)


@dataclass
class Behaviour:
    """How the servers of a release serve."""

    start_s: float = 5.0
    ttft_s: float = 0.03
    spread: float = 0.3
    """Standard deviation of the log of the time to the first token."""
    tpot_s: float = 0.004
    error_share: float = 0.0
    cut_share: float = 0.02
    """Answers that are cut at their limit."""
    fails_to_start: bool = False
    refuses: bool = False
    """Warm-up requests are answered with errors."""
    mute: bool = False
    """Warm-up requests get no answer."""


@dataclass
class Server:
    """A running server and its counters."""

    name: str
    release_id: str
    started_at: datetime
    state: ServerState = "starting"
    restarts: int = 0
    count: int = 0
    total: float = 0.0
    tpot_total: float = 0.0
    cut: float = 0.0
    buckets: dict[float, int] = field(default_factory=lambda: dict.fromkeys(EDGES, 0))


class World:
    """Everything outside the rollout's code."""

    def __init__(self, *, seed: int = 1, rate: float = 40.0, store: Any = None) -> None:
        self.now = START
        self.store = store or MemoryStore()
        self.rate = rate
        self.slice_s = 0.5
        """Seconds between two looks of the guard."""
        self.behaviour: dict[str, Behaviour] = {}
        self.releases: dict[str, Release] = {}
        self.environments: dict[str, Environment] = {
            ENVIRONMENT: Environment(target="cpu", devices=2)
        }
        self.servers: dict[str, Server] = {}
        self.wishes: dict[str, int] = {}
        self.autoscaling = ""
        """`held`, or the release whose servers autoscalers work on."""
        self.lease_until: datetime | None = None
        self.lease_holder = ""
        self.arrivals: dict[str, int] = {}
        self.errors: dict[str, int] = {}
        self.ended: dict[str, dict[str, ServerTraffic]] = {}
        """What each server got, by release and name."""
        self.answers: dict[str, list[bool]] = {}
        self.epoch = 1
        self.guard: tuple[str, str] = ("following", "")
        self.guard_log: list[GuardEvent] = []
        self.effective: Mapping[str, int] = {}
        self.fuse: Fuse | None = None
        self.told: list[str] = []
        self.said: list[str] = []
        self.router_mute = False
        self.router_frozen = False
        """The router does not take new weights."""
        self.host_mute = False
        self.blind: set[str] = set()
        """Releases whose metrics cannot be read."""
        self.spoil: Callable[[PodCounters], PodCounters | None] = lambda pod: pod
        """What becomes of a server's counters on the way; None: they cannot be read."""
        self.devices: tuple[DeviceCounters, ...] = ()
        self.memory: tuple[Moment, ...] | None = ()
        """What the source of the metrics remembers; None: it does not say."""
        self.removed: list[str] = []
        self.judge: Callable[[Sequence[Block], JudgeSpec], Verdict] | None = None
        self.unguarded_arrivals = 0
        """Requests that a candidate got although nobody held the lease."""
        self._rng = np.random.default_rng(seed)

    # --- making things ------------------------------------------------------------------------

    def publish(self, name: str, *, behaviour: Behaviour | None = None, **rollout: Any) -> str:
        """Make a release and say how it behaves; return its id."""
        release = make_release(name, **rollout)
        self.releases[release.release_id] = release
        self.behaviour[release.release_id] = behaviour or Behaviour()
        return release.release_id

    def deps(self, **parts: Any) -> RolloutDeps:
        """Return fresh dependencies, as another process would have them."""
        from trainyard.rollout.judge import judge

        made = {
            "store": self.store,
            "host": FakeHost(self),
            "router": FakeRouter(self),
            "lease": FakeLease(self),
            "metrics": FakeMetrics(self),
            "warmer": FakeWarmer(self),
            "judge": self.judge or judge,
            "load_release": self.load_release,
            "guard_events": lambda *_: tuple(self.guard_log),
            "environments": self.environments,
            "drain_timeout_s": 20.0,
            "tell": self.told.append,
            "now": lambda: self.now,
            "sleep": self.advance,
        }
        return RolloutDeps(**{**made, **parts})

    def load_release(self, model: str, name: str) -> Release:
        """Return a release; NotFound if there is none."""
        if name not in self.releases:
            raise NotFound(f"There is no release {name}.")
        return self.releases[name]

    @property
    def channel(self) -> Channel:
        """The channel as it is stored."""
        try:
            return _channel(self.store.read(channel_key(MODEL, ENVIRONMENT)).data)
        except NotFound:
            return Channel(model=MODEL, environment=ENVIRONMENT)

    def servers_of(self, name: str) -> list[Server]:
        """Return the servers of a release."""
        return [server for server in self.servers.values() if server.release_id == name]

    # --- letting things happen ----------------------------------------------------------------

    def promote(self, name: str, *, run_id: str = "run", **request: Any) -> Tick:
        """Begin a promotion and return its tick."""
        return Rollouts(self.deps()).begin(
            kind="promote",
            model=MODEL,
            environment=ENVIRONMENT,
            release_id=name,
            run_id=run_id,
            **request,
        )

    def roll_back(self, name: str | None = None, *, run_id: str = "back", **request: Any) -> Tick:
        """Begin a rollback and return its tick."""
        return Rollouts(self.deps()).begin(
            kind="rollback",
            model=MODEL,
            environment=ENVIRONMENT,
            release_id=name,
            run_id=run_id,
            **request,
        )

    def run(
        self,
        tick: Tick,
        *,
        until: Callable[[Channel], bool] | None = None,
        limit_s: float = 7200.0,
    ) -> DriveResult:
        """Tick until the rollout is done, or until something is true of the channel."""
        end = self.now + timedelta(seconds=limit_s)
        while self.now < end:
            result = tick()
            self.said.extend(result.messages)
            if result.done or (until is not None and until(result.channel)):
                return result
            self.advance(max(result.next_in_s, 0.1))
        raise AssertionError(f"not done in {limit_s} s: {self.channel.rollout}")

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        left = seconds
        while left > 1e-9:
            slice_s = min(self.slice_s, left)
            left -= slice_s
            self.now += timedelta(seconds=slice_s)
            self._servers_go_on()
            self._guard_looks()
            self._requests_arrive(slice_s)

    def _servers_go_on(self) -> None:
        for release, wished in list(self.wishes.items()):
            for index in range(wished):
                name = f"{release}-{index}"
                self.servers.setdefault(name, Server(name, release, self.now))
        for server in list(self.servers.values()):
            if int(server.name.rpartition("-")[2]) >= self.wishes.get(server.release_id, 0):
                del self.servers[server.name]
                continue
            behaviour = self.behaviour[server.release_id]
            age = (self.now - server.started_at).total_seconds()
            if server.state == "starting" and age >= behaviour.start_s:
                server.state = "failed" if behaviour.fails_to_start else "ready"

    def crash(self, name: str) -> None:
        """Let a server end and start again, with new counters."""
        old = self.servers[name]
        self.servers[name] = Server(name, old.release_id, self.now, restarts=old.restarts + 1)

    def restart_router(self) -> None:
        """Let the router start again: its counters are gone, what the guard knows is not."""
        self.epoch += 1
        self.arrivals.clear()
        self.errors.clear()
        self.ended.clear()

    def lease_alive(self) -> bool:
        """Tell whether somebody holds the lease."""
        return self.lease_until is not None and self.lease_until > self.now

    def _guard_looks(self) -> None:
        if self.router_frozen:
            return
        keys = [key for key in channel_keys(self.store) if key.endswith(f"/{ENVIRONMENT}.json")]
        if not keys:
            self.effective, self.guard = {}, ("following", "")
            return
        channel = _channel(self.store.read(keys[0]).data)
        if channel.weights.candidate == 0:
            self.answers.clear()
        health = {}
        for name in self.behaviour:
            results = self.answers.get(name, [])
            health[name] = ReleaseHealth(
                ready_servers=sum(s.state == "ready" for s in self.servers_of(name)),
                answers=len(results),
                failures=sum(not good for good in results[:10]),
            )
        state = "alive" if self.lease_alive() else "expired"
        decision = decide(Wish.of(channel), state, health, self.fuse, self.now)
        self.fuse, self.effective = decision.fuse, dict(decision.weights)
        if decision.guard != self.guard[0] and channel.rollout is not None:
            self.guard_log.append(
                GuardEvent(
                    model=MODEL,
                    environment=ENVIRONMENT,
                    rollout=channel.rollout.number,
                    at=self.now,
                    event=decision.guard,
                    reason=decision.reason,
                    release_id=channel.candidate.release_id if channel.candidate else "",
                    weights=dict(decision.weights),
                )
            )
        self.guard = (decision.guard, decision.reason)

    def _requests_arrive(self, seconds: float) -> None:
        total = sum(self.effective.values())
        if total == 0:
            return
        arriving = int(self._rng.poisson(self.rate * seconds))
        for name, weight in self.effective.items():
            share = weight / total
            number = int(self._rng.binomial(arriving, share)) if share < 1 else arriving
            if share and self._is_unguarded(name):
                self.unguarded_arrivals += number
            self._serve(name, number)
            arriving -= number
            total -= weight
            if total <= 0:
                break

    def _is_unguarded(self, name: str) -> bool:
        channel = self.channel
        candidate = channel.candidate
        return (
            candidate is not None
            and candidate.release_id == name
            and channel.rollout is not None
            and channel.rollout.phase != "baking"
            and not self.lease_alive()
        )

    def _serve(self, name: str, number: int) -> None:
        self.arrivals[name] = self.arrivals.get(name, 0) + number
        behaviour = self.behaviour[name]
        servers = [server for server in self.servers_of(name) if server.state == "ready"]
        bad = number if not servers else int(self._rng.binomial(number, behaviour.error_share))
        self.errors[name] = self.errors.get(name, 0) + bad
        self.answers.setdefault(name, []).extend([False] * bad + [True] * (number - bad))
        for index, server in enumerate(servers):
            share = (number - bad) // len(servers) + (index < (number - bad) % len(servers))
            lost = bad // len(servers) + (index < bad % len(servers))
            before = self.ended.setdefault(name, {}).get(server.name, ServerTraffic(0, 0))
            self.ended[name][server.name] = ServerTraffic(
                before.ended + share + lost, before.errors + lost
            )
            mean = np.log(behaviour.ttft_s) - behaviour.spread**2 / 2
            times = self._rng.lognormal(mean, behaviour.spread, share)
            server.count += share
            server.total += float(times.sum())
            server.tpot_total += share * behaviour.tpot_s
            server.cut += share * behaviour.cut_share
            for edge in EDGES:
                server.buckets[edge] += int((times <= edge).sum())


def check_that_it_serves_alone(world: World, winner: str, loser: str) -> None:
    """Check that a rollout is over and one release serves, and that nothing is left of the other.

    No request has failed, and none reached a candidate whose lease was over.
    """
    channel = world.channel
    assert channel.stable is not None
    assert channel.stable.release_id == winner
    assert channel.candidate is None
    assert not channel.in_progress
    world.advance(5)
    assert {name: share for name, share in world.effective.items() if share} == {winner: 100}
    assert [server.state for server in world.servers_of(winner)] == ["ready"]
    assert world.servers_of(loser) == []
    assert world.lease_until is None
    assert sum(world.errors.values()) == 0
    assert world.unguarded_arrivals == 0


@dataclass
class FakeHost:
    """Servers that start when time passes."""

    world: World

    def deploy(self, environment: str, release: Release, replicas: int) -> None:
        self.world.wishes[release.release_id] = replicas

    def scale(self, environment: str, release_id: str, replicas: int) -> None:
        self.world.wishes[release_id] = replicas

    def hold_autoscaling(self, environment: str, model: str) -> None:
        self.world.autoscaling = "held"

    def resume_autoscaling(self, environment: str, model: str, release_id: str) -> None:
        self.world.autoscaling = release_id

    def remove(self, environment: str, release_id: str) -> None:
        self.world.wishes[release_id] = 0
        self.world.removed.append(release_id)

    def servers(self, environment: str, model: str) -> Sequence[ServerStatus]:
        if self.world.host_mute:
            raise Transient("The host does not answer.")
        return tuple(
            ServerStatus(
                name=server.name,
                release_id=server.release_id,
                state=server.state,
                url=f"http://127.0.0.1/{server.name}",
                started_at=server.started_at,
                restarts=server.restarts,
                message="no memory" if server.state == "failed" else "",
            )
            for server in self.world.servers.values()
        )


@dataclass
class FakeRouter:
    """Tells what the world's guard decided and who arrived."""

    world: World

    def status(self, environment: str, model: str) -> RouteStatus | None:
        world = self.world
        if world.router_mute:
            return None
        names = {*world.effective, *world.arrivals}
        return RouteStatus(
            epoch=str(world.epoch),
            weights=dict(world.effective),
            traffic={
                name: ReleaseTraffic(
                    world.arrivals.get(name, 0),
                    world.errors.get(name, 0),
                    0,
                    dict(world.ended.get(name, {})),
                )
                for name in names
            },
            guard=world.guard[0],  # type: ignore[arg-type]
            guard_reason=world.guard[1],
            channel_generation=world.channel.generation,
        )


@dataclass
class FakeLease:
    """A lease on the world's clock."""

    world: World

    def look(self, environment: str, model: str) -> LeaseSight:
        until = self.world.lease_until
        if until is None:
            return LeaseSight("absent")
        state = "alive" if self.world.lease_alive() else "expired"
        left_s = (until - self.world.now).total_seconds()
        return LeaseSight(state, self.world.lease_holder, until.isoformat(), left_s=left_s)

    def renew(self, environment: str, model: str, *, holder: str, duration_s: float) -> None:
        self.world.lease_until = self.world.now + timedelta(seconds=duration_s)
        self.world.lease_holder = holder

    def release(self, environment: str, model: str, *, holder: str) -> None:
        if self.world.lease_holder == holder:
            self.world.lease_until = None


@dataclass
class FakeMetrics:
    """Reads the counters of the world's servers."""

    world: World

    def read(self, environment: str, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        read = tuple(
            counters_of(self.world.servers[server.name])
            for server in servers
            if server.name in self.world.servers and server.release_id not in self.world.blind
        )
        return tuple(pod for one in read if (pod := self.world.spoil(one)) is not None)

    def devices(self, environment: str, pods: Sequence[PodCounters]) -> tuple[DeviceCounters, ...]:
        return self.world.devices

    def history(
        self, environment: str, servers: Sequence[ServerStatus], *, until: datetime
    ) -> tuple[Moment, ...] | None:
        return self.world.memory


def counters_of(server: Server) -> PodCounters:
    """Return a server's counters as they would be scraped."""
    buckets = {str(edge): value for edge, value in server.buckets.items()}
    return PodCounters(
        pod=server.name,
        release_id=server.release_id,
        started_at=server.started_at,
        ttft=Histogram(
            count=server.count, total=server.total, buckets={**buckets, "+Inf": server.count}
        ),
        tpot=Histogram(count=server.count, total=server.tpot_total),
        ended={"stop": server.count - int(server.cut), "length": int(server.cut), "abort": 0},
    )


@dataclass
class FakeWarmer:
    """Servers answer warm-up requests as their release behaves."""

    world: World

    def warm_up(
        self, server: ServerStatus, release: Release, *, requests: int, budget_s: float
    ) -> WarmUpReport:
        behaviour = self.world.behaviour[server.release_id]
        self.world.advance(0.1)
        if behaviour.refuses:
            return WarmUpReport(requests, 0, requests, "status 500: broken")
        if behaviour.mute:
            return WarmUpReport(requests, requests - 1, 0, "ReadTimeout: timed out")
        return WarmUpReport(requests, requests, 0, "")


def driven(world: World, tick: Tick) -> RolloutDeps:
    """Return the world of a person, while a driver elsewhere goes on."""

    def sleep(seconds: float) -> None:
        tick()
        world.advance(max(seconds, 0.1))

    return world.deps(sleep=sleep)


class Killed(BaseException):
    """The process was killed."""


@dataclass
class Mortal:
    """A part of the world that is reached by a process that dies at some call.

    `countdown[0]` is the number of changes that still happen. At zero the process dies, before or
    after the change, as `after` says.
    """

    part: Any
    countdown: list[int]
    after: bool
    changes: frozenset[str] = frozenset(
        {"create", "replace", "put", "delete", "deploy", "remove", "renew", "release", "warm_up"}
    )

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.part, name)
        if name not in self.changes:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.countdown[0] -= 1
            if self.countdown[0] < 0:
                raise Killed
            if self.countdown[0] == 0:
                if self.after:
                    found(*args, **kwargs)
                raise Killed
            return found(*args, **kwargs)

        return call


def mortal(deps: RolloutDeps, calls: int, *, after: bool) -> RolloutDeps:
    """Return dependencies of a process that dies at its change number `calls`."""
    countdown = [calls]
    parts = {
        name: Mortal(getattr(deps, name), countdown, after)
        for name in ("store", "host", "lease", "warmer")
    }
    return replace(deps, **parts)
