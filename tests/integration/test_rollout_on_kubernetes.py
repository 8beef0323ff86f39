"""Whole rollouts over HTTPRoutes: real driver, state machine, judge, guard, router and lease.

The cluster is emulated over HTTP; servers, requests, Envoy's counts and time are simulated, as in
`rollout_world`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster
from tests.rollout_world import (
    ENVIRONMENT,
    MODEL,
    START,
    Behaviour,
    FakeLease,
    World,
    release_id,
)

from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import HTTP_ROUTE, POD
from trainyard.kubernetes.labels import RELEASE, owned, route_name, server_object_name
from trainyard.rollout import by_hand
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.looks import LookLog
from trainyard.rollout.slices import blocks_from_snapshots
from trainyard.serving.guard_events import guard_events
from trainyard.serving.kubernetes.arrivals import DataPlaneSight, gateway_sight, rule_cluster
from trainyard.serving.kubernetes.guard import ELECTION, ClusterGuard
from trainyard.serving.kubernetes.guard_feed import StoreFeed
from trainyard.serving.kubernetes.guard_metrics import GuardMetrics
from trainyard.serving.kubernetes.lease import KubernetesLease
from trainyard.serving.kubernetes.route import find_rule, new_route, split_weights
from trainyard.serving.kubernetes.route_status import KubernetesRouter
from trainyard.serving.protocol import LeaseSight
from trainyard.spec.kubernetes import KubernetesServing

pytestmark = pytest.mark.integration

PLACE = KubernetesServing(namespace=NS)
NAME = route_name(MODEL, ENVIRONMENT)


class TwoLeases(FakeLease):
    """The cluster's lease, and the world's own, by which it counts unguarded requests."""

    def renew(self, environment: str, model: str, *, holder: str, duration_s: float) -> None:
        super().renew(environment, model, holder=holder, duration_s=duration_s)
        self._real.renew(environment, model, holder=holder, duration_s=duration_s)

    def release(self, environment: str, model: str, *, holder: str) -> None:
        super().release(environment, model, holder=holder)
        self._real.release(environment, model, holder=holder)

    def look(self, environment: str, model: str) -> LeaseSight:
        return self._real.look(environment, model)

    @property
    def _real(self) -> KubernetesLease:
        assert isinstance(self.world, ClusterWorld)
        return KubernetesLease(self.world.fake.client(), NS, now=lambda: self.world.now)


class ClusterWorld(World):
    """A world whose traffic goes where an HTTPRoute says, and whose guard is the cluster's."""

    def __init__(self, fake: FakeCluster, **options: Any) -> None:
        super().__init__(**options)
        self.fake = fake
        self.counts: dict[str, list[int]] = {}
        """Envoy's requests and errors, by server."""
        self._known = 0
        self.ignores_weights = False
        """The gateway has the route, and does what it likes."""
        fake.put(HTTP_ROUTE, new_route(MODEL, ENVIRONMENT, PLACE))
        feed = StoreFeed(lambda: self.store, interval_s=60, monotonic=self.seconds)
        self.feed = feed
        self.cluster_guard = ClusterGuard(
            fake.client(),
            NS,
            {ENVIRONMENT: self},
            feed,
            identity="guard",
            metrics=GuardMetrics(),
            now=lambda: self.now,
            monotonic=self.seconds,
        )

    def seconds(self) -> float:
        return (self.now - START).total_seconds()

    def deps(self, **parts: Any) -> RolloutDeps:
        cluster = {
            "router": KubernetesRouter(self.fake.client(), PLACE, self),
            "lease": TwoLeases(self),
            "guard_events": partial(guard_events, self.store),
        }
        return super().deps(**{**cluster, **parts})

    @property
    def route(self) -> Object:
        found = self.fake.get(HTTP_ROUTE, NAME)
        assert found is not None
        return found

    # --- the cluster's side -----------------------------------------------------------------------

    def _servers_go_on(self) -> None:
        super()._servers_go_on()
        pods = {body["metadata"]["name"]: body for body in self.fake.objects(POD)}
        for name in set(pods) - set(self.servers):
            self.fake.remove(POD, name)
        for name, server in self.servers.items():
            ready = "True" if server.state == "ready" else "False"
            known = pods.get(name)
            if known is None or known["status"]["conditions"][0]["status"] != ready:
                labels = owned("server", model=MODEL, environment=ENVIRONMENT)
                self.fake.put(
                    POD,
                    {
                        "metadata": {
                            "name": name,
                            "labels": {**labels, RELEASE: server.release_id},
                        },
                        "status": {
                            "podIP": self._ip(name),
                            "conditions": [{"type": "Ready", "status": ready}],
                        },
                    },
                )

    def _ip(self, server: str) -> str:
        return f"10.0.{int(server[-4:-2], 16)}.{server[-1]}"

    def _guard_looks(self) -> None:
        if self.router_frozen:
            return
        self.feed.look()
        if self._news():
            for mirror in self.cluster_guard.mirrors:
                mirror._list()
        self.cluster_guard.tick()
        self.cluster_guard.traffic.look()
        if self._news(keep=True):
            if not self.ignores_weights:
                self.effective = split_weights(self.route)
            self._gateway_takes_the_route()
        for name in list(self.counts):
            if name not in self.servers or not self.effective.get(self.servers[name].release_id):
                # Envoy forgets an endpoint that has no traffic.
                del self.counts[name]

    def _news(self, *, keep: bool = False) -> bool:
        """Tell whether anything but the guards' own lease has changed since this was asked."""
        new = self.fake._events[self._known :]
        if not keep:
            self._known = len(self.fake._events)
        return any(event.body["metadata"]["name"] != ELECTION for event in new)

    def _gateway_takes_the_route(self) -> None:
        generation = self.route["metadata"]["generation"]
        told = [
            {"type": type_, "status": "True", "observedGeneration": generation}
            for type_ in ("Accepted", "ResolvedRefs")
        ]
        parents = [{"parentRef": {"name": PLACE.gateway}, "conditions": told}]
        if self.route.get("status") != {"parents": parents}:
            self.fake.edit(HTTP_ROUTE, NAME, lambda body: body.update(status={"parents": parents}))

    def _serve(self, name: str, number: int) -> None:
        errors = self.errors.get(name, 0)
        super()._serve(name, number)
        for server in self.servers_of(name)[:1]:
            counts = self.counts.setdefault(server.name, [0, 0])
            counts[0] += number
            counts[1] += self.errors[name] - errors

    def look(self, environment: str, model: str, route: Object) -> DataPlaneSight | None:
        """Return what Envoy's page says."""
        cluster, lines = rule_cluster(route), []
        for server, (total, errors) in self.counts.items():
            at = (
                f'{{envoy_cluster_name="{cluster}",'
                f'envoy_endpoint_address="{self._ip(server)}:8000"}}'
            )
            figures = {"rq_total": total, "rq_error": errors, "rq_success": total - errors}
            lines += [f"envoy_cluster_endpoint_{n}{at} {value}" for n, value in figures.items()]
        page = "\n".join(lines)
        return gateway_sight({"envoy": page}, self.fake.objects(POD), cluster)


@pytest.fixture
def world() -> Iterator[ClusterWorld]:
    """A world whose channel has the stable release `a`."""
    with FakeCluster.running() as fake:
        made = ClusterWorld(fake)
        made.publish("a")
        assert made.run(made.promote(release_id("a"), run_id="first")).outcome == "promoted"
        yield made


def events_of(world: ClusterWorld) -> list[str]:
    return [entry.event for entry in world.channel.history]


def test_a_good_release_is_promoted_without_a_change_of_its_pods(world: ClusterWorld) -> None:
    world.publish("b")

    def baking(channel: Any) -> bool:
        return channel.rollout is not None and channel.rollout.phase == "baking"

    tick = world.promote(release_id("b"))
    world.run(tick, until=baking)
    uids = {body["metadata"]["uid"] for body in world.fake.objects(POD)}
    assert world.run(tick).outcome == "promoted"
    world.advance(2)
    left = world.fake.objects(POD)
    assert {body["metadata"]["uid"] for body in left} <= uids
    _, rule = find_rule(world.route, "split")
    service = server_object_name(ENVIRONMENT, release_id("b"))
    assert [(b["name"], b["weight"]) for b in rule["backendRefs"]] == [(service, 100)]
    assert world.unguarded_arrivals == 0
    assert "unverified" not in events_of(world)


def test_a_release_that_fails_is_rolled_back_and_its_arrivals_stop(world: ClusterWorld) -> None:
    world.publish("b", behaviour=Behaviour(error_share=0.3))
    assert world.run(world.promote(release_id("b"))).outcome == "rolled_back"
    arrived = world.arrivals[release_id("b")]
    world.advance(5)
    assert world.arrivals[release_id("b")] == arrived
    _errors_are_those_of_pods(world)
    assert split_weights(world.route) == {release_id("a"): 100}
    assert "unverified" not in events_of(world)


def _errors_are_those_of_pods(world: ClusterWorld) -> None:
    """The gateway knows addresses; rows name pods, as those of latencies do."""
    assert world.channel.rollout is not None
    number, since = world.channel.rollout.number, world.channel.rollout.exposed_since
    assert since is not None
    looks = LookLog(world.store).read(MODEL, ENVIRONMENT, number)
    rows = blocks_from_snapshots(
        [look.snapshot for look in looks],
        exposed_since=since,
        candidate=release_id("b"),
        stable=release_id("a"),
    )
    pods = {pod.pod for look in looks for pod in look.snapshot.pods}
    with_requests = {row.pod for row in rows if row.metric == "errors" and row.requests}
    assert with_requests
    assert with_requests <= pods


def test_a_release_whose_first_answers_all_fail_blows_the_fuse(world: ClusterWorld) -> None:
    world.publish("b", behaviour=Behaviour(error_share=1.0))
    result = world.run(world.promote(release_id("b")))
    assert result.outcome == "rolled_back"
    assert "all failed" in result.summary


def test_a_driver_that_dies_loses_the_traffic_and_the_next_one_hears_of_it(
    world: ClusterWorld,
) -> None:
    world.publish("b")

    def holding(channel: Any) -> bool:
        return channel.rollout is not None and channel.rollout.phase == "holding"

    world.run(world.promote(release_id("b")), until=holding)
    assert split_weights(world.route)[release_id("b")] == 10
    world.advance(125)
    assert split_weights(world.route) == {release_id("a"): 100, release_id("b"): 0}
    # The lease's end is seen with the next look, half a second later at most.
    assert world.unguarded_arrivals <= 2 * world.rate * 0.5
    result = world.run(world.promote(release_id("b")))
    assert result.outcome == "withdrawn"
    assert "nobody drives it" in result.summary


def test_a_persons_command_does_the_work_of_a_driver_that_is_gone(world: ClusterWorld) -> None:
    world.publish("b")

    def holding(channel: Any) -> bool:
        return channel.rollout is not None and channel.rollout.phase == "holding"

    world.run(world.promote(release_id("b")), until=holding)
    deps = world.deps(sleep=lambda seconds: world.advance(max(seconds, 0.1)))
    began = world.now
    channel = by_hand.abort_rollout(
        deps,
        MODEL,
        ENVIRONMENT,
        reason="It is odd.",
        who="ann",
        run_id="cli/ann",
        say=world.said.append,
        timeout_s=300.0,
    )
    assert channel.rollout is not None
    assert (channel.rollout.outcome, channel.rollout.driver.run_id) == ("withdrawn", "cli/ann")
    assert (world.now - began).total_seconds() < 90
    world.advance(2)
    assert split_weights(world.route) == {release_id("a"): 100}
    assert world.servers_of(release_id("b")) == []
    assert world.unguarded_arrivals == 0
    assert deps.lease.look(ENVIRONMENT, MODEL).state == "absent"


def test_a_gateway_that_ignores_the_weights_ends_the_rollout(world: ClusterWorld) -> None:
    world.publish("b")

    def shifting(channel: Any) -> bool:
        return channel.rollout is not None and channel.rollout.phase == "shifting"

    tick = world.promote(release_id("b"))
    world.run(tick, until=shifting)
    world.ignores_weights = True
    world.effective = {release_id("a"): 0, release_id("b"): 100}
    result = world.run(tick, until=lambda channel: channel.rollout.ending is not None)
    assert result.channel.rollout is not None
    assert result.channel.rollout.ending == "withdrawn"
    assert "Arrivals do not follow the weights" in result.summary
