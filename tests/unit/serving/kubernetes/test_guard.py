"""The guard of a cluster against an emulated API server: routes, leases, stores that go away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.cluster_world import NAME, put_pod, put_route, service, weights_of
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster, Fault
from tests.serving_world import ENVIRONMENT, MODEL, NEW, OLD, eventually, make_channel, put_channel

from trainyard.errors import Transient
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import HTTP_ROUTE, POD
from trainyard.serving.guard import Wish
from trainyard.serving.guard_events import GuardEvent, guard_events
from trainyard.serving.kubernetes.arrivals import Counts, DataPlaneSight, traffic_of
from trainyard.serving.kubernetes.guard import ClusterGuard, newest_wish
from trainyard.serving.kubernetes.guard_feed import StoreFeed, Wishes
from trainyard.serving.kubernetes.guard_metrics import GuardMetrics, serve_pages
from trainyard.serving.kubernetes.lease import KubernetesLease
from trainyard.serving.kubernetes.route import find_rule, record_of
from trainyard.store.folder import FolderStore
from trainyard.store.layout import channel_key
from trainyard.store.protocol import Store


class FakeDataPlane:
    """Counts as told."""

    sight: DataPlaneSight | None = None

    def look(self, environment: str, model: str, route: Object) -> DataPlaneSight | None:
        return self.sight


@dataclass
class World:
    """A cluster with a route and a server of each release, a store, and guards."""

    fake: FakeCluster
    store: FolderStore
    away: bool = False
    """The store does not answer."""
    at: float = 1000.0
    """Monotonic seconds of all guards."""
    data_plane: FakeDataPlane = field(default_factory=FakeDataPlane)
    guards: list[ClusterGuard] = field(default_factory=list)
    feeds: dict[str, StoreFeed] = field(default_factory=dict)

    def open_store(self) -> Store:
        if self.away:
            raise Transient("The store is away.")
        return self.store

    def guard(self, name: str = "first") -> ClusterGuard:
        """Start a guard, but for its looks at the store and its ticks."""
        feed = StoreFeed(self.open_store, interval_s=60, monotonic=lambda: self.at)
        made = ClusterGuard(
            self.fake.client(),
            NS,
            {ENVIRONMENT: self.data_plane},
            feed,
            identity=name,
            metrics=GuardMetrics(),
            monotonic=lambda: self.at,
        )
        for mirror in made.mirrors:
            mirror.start()
        self.guards.append(made)
        self.feeds[name] = feed
        eventually(lambda: made.synced, why="the guard has seen everything")
        return made

    def look(self) -> None:
        """Let all guards look at the store."""
        self.at += 0.1
        if not self.away:
            for feed in self.feeds.values():
                feed.look()
        self.at += 0.1

    def wish(self, weight: int = 10, **changes: Any) -> None:
        put_channel(self.store, make_channel(weight=weight, **changes))
        self.look()

    def renew(self, holder: str = "run#1") -> None:
        KubernetesLease(self.fake.client(), NS).renew(
            ENVIRONMENT, MODEL, holder=holder, duration_s=120
        )

    def until(self, done: Callable[[], bool], *guards: ClusterGuard, why: str = "") -> None:
        """Tick until something is so; watches take a moment."""

        def tick() -> bool:
            # Clocks go on, or what failed once would never be tried again.
            self.at += 0.1
            for guard in guards or self.guards:
                guard.tick()
            return done()

        eventually(tick, why=why)

    def told(self, number: int) -> list[GuardEvent]:
        """Return the guard's events in the store once there are so many."""
        found: list[GuardEvent] = []

        def done() -> bool:
            self.look()
            found[:] = guard_events(self.store, MODEL, ENVIRONMENT, 1)
            return len(found) >= number

        self.until(done)
        self.settle()
        return found

    def settle(self, *guards: ClusterGuard) -> None:
        """Tick until nothing changes."""
        last = ""

        def resting() -> bool:
            nonlocal last
            before, last = last, self.route["metadata"]["resourceVersion"]
            return before == last

        self.until(resting, *guards)

    @property
    def route(self) -> Object:
        found = self.fake.get(HTTP_ROUTE, NAME)
        assert found is not None
        return found

    @property
    def weights(self) -> dict[str, int]:
        names = {service(OLD): OLD, service(NEW): NEW}
        return {names.get(name, name): weight for name, weight in weights_of(self.fake).items()}

    @property
    def state(self) -> str:
        return record_of(self.route).memory.guard

    def has(self, old: int, new: int) -> Callable[[], bool]:
        return lambda: self.weights == {OLD: old, NEW: new}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with FakeCluster.running() as fake:
        put_route(fake)
        for release_id in (OLD, NEW):
            put_pod(fake, release_id)
        made = World(fake, FolderStore(tmp_path / "store"))
        made.renew()
        yield made
        for guard in made.guards:
            guard.stop()


# --- following ------------------------------------------------------------------------------------


def test_the_route_follows_the_channel(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    world.wish(50, generation=2)
    world.until(world.has(50, 50))
    record = record_of(world.route)
    assert (record.wish, record.memory.guard) == (
        Wish.of(make_channel(weight=50, generation=2)),
        "following",
    )


def test_pods_of_an_adopted_deployment_are_servers(world: World) -> None:
    def adopted(body: Object) -> None:
        labels = body["metadata"]["labels"]
        ours = {key: labels[key] for key in labels if key.startswith("trainyard.dev/")}
        body["metadata"]["labels"] = {"app": "vllm", **ours}

    world.fake.edit(POD, f"{OLD}-0", adopted)
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    assert world.state == "following"


def test_a_store_restored_from_an_old_copy_takes_nothing_off_the_air(world: World) -> None:
    world.guard()
    world.wish(50, generation=9)
    world.until(world.has(50, 50))
    # What the copy calls stable has no pods any more.
    world.wish(0, generation=4, stable="adder-0123456789ab", candidate=None, phase=None)
    world.settle()
    assert world.weights == {OLD: 50, NEW: 50}
    # As soon as it names a release that serves, the store is the truth again.
    world.wish(0, generation=5, candidate=None, phase=None)
    world.until(lambda: world.weights.get(OLD) == 100)


def test_a_route_that_is_right_is_left_alone(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    world.settle()
    before = world.fake.log.count(("patch", "httproutes", NAME))
    for _ in range(5):
        world.guards[0].tick()
    assert world.fake.log.count(("patch", "httproutes", NAME)) == before


def test_weights_that_somebody_changes_are_set_again_and_their_rules_stay(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))

    def edit(body: Object) -> None:
        find_rule(body, "split")[1]["backendRefs"][1]["weight"] = 900
        body["spec"]["rules"].append({"name": "docs", "backendRefs": [{"name": "docs"}]})

    world.fake.edit(HTTP_ROUTE, NAME, edit)
    world.until(world.has(90, 10))
    assert weights_of(world.fake, "docs") == {"docs": 1}


def test_a_route_that_changes_at_the_same_moment_is_planned_again(world: World) -> None:
    world.guard()
    world.fake.faults.append(Fault("patch", "httproutes", 422, "Invalid", times=2))
    world.wish(10)
    world.until(world.has(90, 10))
    assert b'patches_total{outcome="conflict"} 2.0' in world.guards[0]._metrics.text()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("patch", "httproutes", 500, times=3),
        Fault("patch", "httproutes", 409, "Conflict", times=3),
        Fault("patch", "httproutes", 403, "Forbidden", "no right", times=2),
        Fault("get", "httproutes", 503, times=3),
        Fault("patch", "httproutes", cut="before", times=2),
        Fault("patch", "httproutes", cut="after", times=2),
        Fault("", "leases", 500, times=4),
        Fault("watch", "", 500, times=8),
    ],
)
def test_faults_of_the_api_only_delay(world: World, fault: Fault) -> None:
    world.guard()
    fault.times = fault.times or 1
    world.fake.faults.append(fault)
    world.wish(10)

    def later() -> bool:
        world.at += 1
        return world.has(90, 10)()

    world.until(later)


def test_watches_that_are_cut_lose_nothing(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    world.fake.cut_watches()
    world.fake.forget_history()
    world.fake.remove(POD, f"{NEW}-0")
    world.until(lambda: world.weights == {OLD: 100}, why="the fuse blows")


def test_routes_of_other_environments_and_of_others_are_left_alone(world: World) -> None:
    world.guard()
    other = world.route
    other["metadata"]["name"] = "adder.elsewhere"
    other["metadata"]["labels"]["trainyard.dev/environment"] = "elsewhere"
    world.fake.put(HTTP_ROUTE, other)
    put_channel(world.store, make_channel(environment="elsewhere"))
    world.wish(10)
    world.until(world.has(90, 10))
    found = world.fake.get(HTTP_ROUTE, "adder.elsewhere")
    assert found is not None
    assert record_of(found).wish is None


def test_a_rule_that_is_gone_is_waited_for(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.guard()
    split = world.route["spec"]["rules"][-1]
    world.fake.edit(HTTP_ROUTE, NAME, lambda body: body["spec"]["rules"].pop())
    world.wish(10)
    world.until(lambda: "no rule 'split'" in caplog.text)
    world.fake.edit(HTTP_ROUTE, NAME, lambda body: body["spec"]["rules"].append(split))
    world.until(world.has(90, 10))


def test_a_channel_that_is_gone_from_the_store_keeps_its_route(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    world.store.delete(channel_key(MODEL, ENVIRONMENT))
    world.look()
    world.settle()
    assert world.weights == {OLD: 90, NEW: 10}


# --- withdrawing ----------------------------------------------------------------------------------


def test_without_a_driver_traffic_goes_back_and_comes_when_there_is_one_again(
    world: World,
) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    world.at += 121
    world.until(world.has(100, 0))
    assert world.state == "lease_expired"
    world.renew("run#2")
    world.until(world.has(90, 10))
    assert [event.event for event in world.told(2)] == ["lease_expired", "following"]


@pytest.mark.parametrize(("stable_replicas", "to_old"), [(1, 100), (2, 0)])
def test_a_bake_without_a_driver_goes_to_the_old_release_if_all_its_pods_are_ready(
    world: World, stable_replicas: int, to_old: int
) -> None:
    world.guard()
    world.wish(10, stable=NEW, candidate=OLD, phase="baking", stable_replicas=stable_replicas)
    world.until(world.has(10, 90))
    world.at += 121
    world.until(world.has(to_old, 100 - to_old))
    assert world.state == "lease_expired"


def test_a_lease_that_is_given_up_counts_at_once(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    KubernetesLease(world.fake.client(), NS).release(ENVIRONMENT, MODEL, holder="run#1")
    world.until(world.has(100, 0))


def test_a_watch_that_stands_still_does_not_end_a_rollout(world: World) -> None:
    guard = world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    world.fake.faults.append(Fault("list", "leases", 500))
    world.fake.faults.append(Fault("watch", "leases", 500))
    world.fake.cut_watches()
    for _ in range(5):
        world.at += 100
        world.renew()
        guard.tick()
        assert world.weights == {OLD: 90, NEW: 10}
    # The last renewal may be seen only now, and counts from then.
    for _ in range(2):
        world.at += 121
        guard.tick()
    world.until(world.has(100, 0))


def test_traffic_goes_back_with_the_store_away_and_the_event_follows(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    world.away = True
    world.at += 121
    world.until(world.has(100, 0))
    assert guard_events(world.store, MODEL, ENVIRONMENT, 1) == []
    (event,) = record_of(world.route).memory.unwritten
    world.away = False
    assert world.told(1) == [event]
    assert not record_of(world.route).memory.unwritten


def test_a_guard_that_never_saw_the_store_goes_on_from_the_route(world: World) -> None:
    first = world.guard("first")
    world.wish(10)
    world.until(world.has(90, 10))
    first.stop()
    world.guards.remove(first)
    world.away = True
    second = world.guard("second")
    world.settle(second)
    assert world.weights == {OLD: 90, NEW: 10}
    world.at += 121
    world.until(world.has(100, 0), second)


def test_a_candidate_without_a_ready_server_loses_its_traffic_for_good(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    put_pod(world.fake, NEW, ready=False)
    world.until(world.has(100, 0))
    put_pod(world.fake, NEW)
    world.settle()
    assert (world.state, world.weights) == ("fuse", {OLD: 100, NEW: 0})
    world.guards[0].stop()
    world.guards.clear()
    world.at += 20
    world.settle(world.guard("second"))
    assert world.state == "fuse"


def test_first_answers_that_all_fail_blow_the_fuse(world: World) -> None:
    guard = world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    for errors in (0, 12):
        counts = {NEW: Counts(total=errors, error=errors)}
        traffic = {NEW: traffic_of({f"{NEW}-0": counts[NEW]})}
        world.data_plane.sight = DataPlaneSight("e", traffic, counts=counts)
        guard.traffic.look()
        guard.tick()
    world.until(world.has(100, 0))
    assert "all failed" in record_of(world.route).reason


def test_servers_of_another_environment_are_no_servers_of_this_one(world: World) -> None:
    world.guard()
    world.fake.remove(POD, f"{NEW}-0")
    put_pod(world.fake, NEW, environment="production")
    world.wish(10)
    world.until(lambda: world.state == "fuse")
    assert world.weights == {OLD: 100}


def test_the_backend_stays_while_its_pods_drain(world: World) -> None:
    world.guard()
    world.wish(10)
    world.until(world.has(90, 10))

    def drain(body: Object) -> None:
        body["metadata"]["deletionTimestamp"] = "2026-11-27T12:00:00Z"
        body["metadata"]["finalizers"] = ["kubelet"]

    world.wish(0, phase="rolling_back", generation=2)
    world.until(world.has(100, 0))
    world.fake.edit(POD, f"{NEW}-0", drain)
    world.settle()
    assert world.weights == {OLD: 100, NEW: 0}
    world.fake.remove(POD, f"{NEW}-0")
    world.until(lambda: world.weights == {OLD: 100})


# --- several guards -------------------------------------------------------------------------------


def test_only_the_leader_writes(world: World) -> None:
    first, second = world.guard("first"), world.guard("second")
    first.tick()
    world.wish(10)
    for _ in range(3):
        second.tick()
    assert weights_of(world.fake) == {}
    assert (first.election.leads, second.election.leads) == (True, False)
    world.until(world.has(90, 10))


def test_a_leader_that_is_killed_is_followed_by_one_that_knows_the_lease(world: World) -> None:
    first, second = world.guard("first"), world.guard("second")
    world.wish(10)
    world.until(world.has(90, 10))
    world.away = True
    # Nobody renews from here on, and the first guard is gone just before the lease ends.
    for _ in range(118):
        world.at += 1
        first.tick()
        second.tick()
    assert world.weights == {OLD: 90, NEW: 10}
    killed_at = world.at
    while world.weights != {OLD: 100, NEW: 0}:
        world.at += 0.5
        second.tick()
        assert world.at - killed_at < 17
    assert not first.election.leads


def test_a_new_leader_does_not_bring_back_what_it_had_read_before(world: World) -> None:
    first = world.guard("first")
    second = world.guard("second")
    world.wish(50)
    world.until(world.has(50, 50))
    # Only the first guard sees that the channel has taken the weight away.
    put_channel(world.store, make_channel(weight=0, generation=2))
    world.feeds["first"].look()
    world.until(world.has(100, 0))
    world.settle()
    first.stop()
    world.away = True
    world.at += 15
    world.settle(second)
    assert second.election.leads
    assert world.weights == {OLD: 100, NEW: 0}


# --- whose wish holds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "asked_at", "holds"),
    [(4, 100.0, 5), (5, 100.0, 5), (6, 100.0, 6), (1, 300.0, 1), (None, 300.0, 5)],
)
def test_the_store_holds_unless_the_route_is_newer_than_what_was_read(
    stored: int | None, asked_at: float, holds: int
) -> None:
    recorded = Wish.of(make_channel(generation=5))
    known = {} if stored is None else {("s", "m"): Wish.of(make_channel(generation=stored))}
    wish = newest_wish(recorded, 200.0, Wishes(known, asked_at), ("s", "m"))
    assert wish is not None
    assert wish.generation == holds


# --- pages ----------------------------------------------------------------------------------------


def test_health_and_figures(world: World) -> None:
    guard = world.guard()
    world.wish(10)
    world.until(world.has(90, 10))
    healthy = True
    pages = serve_pages("127.0.0.1", 0, guard._metrics, {"/healthz": lambda: healthy})
    try:
        url = f"http://127.0.0.1:{pages.server_address[1]}"
        assert httpx.get(f"{url}/healthz").status_code == 200
        healthy = False
        assert httpx.get(f"{url}/healthz").status_code == 503
        assert httpx.get(f"{url}/other").status_code == 404
        text = httpx.get(f"{url}/metrics").text
    finally:
        pages.shutdown()
        pages.server_close()
    labels = f'environment="{ENVIRONMENT}",model="{MODEL}"'
    assert f'trainyard_guard_weight_percent{{{labels},release="{NEW}"}} 10.0' in text
    assert f'trainyard_guard_state{{{labels},state="following"}} 1.0' in text
    assert "trainyard_guard_leads 1.0" in text
