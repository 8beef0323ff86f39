"""Our proxy's routes, as HTTPRoutes and pods say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cluster_world import NAME, follow, put_pod, put_route
from tests.fake_cluster import FakeCluster
from tests.serving_world import ENVIRONMENT, MODEL, NEW, OLD, make_channel

from trainyard.kubernetes.kinds import HTTP_ROUTE, POD
from trainyard.serving.guard import Wish
from trainyard.serving.kubernetes.route import find_rule
from trainyard.serving.kubernetes.route_follower import RouteFollower
from trainyard.serving.route import Route

CHANNEL = (ENVIRONMENT, MODEL)


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        yield fake


@pytest.fixture
def fake(shared: FakeCluster) -> FakeCluster:
    for kind in (HTTP_ROUTE, POD):
        for found in shared.objects(kind):
            shared.remove(kind, found["metadata"]["name"])
    put_route(shared)
    put_pod(shared, OLD, port=20001)
    put_pod(shared, NEW, port=20002)
    return shared


def look(follower: RouteFollower, fake: FakeCluster) -> None:
    routes = {body["metadata"]["name"]: body for body in fake.objects(HTTP_ROUTE)}
    pods = {body["metadata"]["name"]: body for body in fake.objects(POD)}
    follower.apply(routes, pods)


@pytest.fixture
def follower(fake: FakeCluster) -> RouteFollower:
    follow(fake, Wish.of(make_channel(weight=10)), {OLD: 90, NEW: 10})
    made = RouteFollower(frozenset({ENVIRONMENT}))
    look(made, fake)
    return made


def route_of(follower: RouteFollower) -> Route:
    return follower.routes[CHANNEL]


def test_weights_come_from_the_route_and_servers_from_ready_pods(
    follower: RouteFollower, fake: FakeCluster
) -> None:
    route = route_of(follower)
    assert route.decision.weights == {OLD: 90, NEW: 10}
    assert [up.host for up in route.upstreams[NEW]] == ["127.0.0.1:20002"]
    # By the pod's name the rollout knows whose counts these are.
    assert [up.endpoint.name for up in route.upstreams[NEW]] == [f"{NEW}-0"]
    put_pod(fake, NEW, ready=False)
    put_pod(fake, NEW, 1, ip="fd00::1", port=20003)
    look(follower, fake)
    assert [up.host for up in route.upstreams[NEW]] == ["[fd00::1]:20003"]
    assert [up.host for up in follower.retired] == ["127.0.0.1:20002"]


def test_weights_of_somebody_elses_hand_are_followed_too(
    follower: RouteFollower, fake: FakeCluster
) -> None:
    def edit(body: dict) -> None:  # type: ignore[type-arg]
        backends = find_rule(body, "split")[1]["backendRefs"]
        backends[0]["weight"], backends[1]["weight"] = 100, 0

    fake.edit(HTTP_ROUTE, NAME, edit)
    look(follower, fake)
    assert route_of(follower).decision.weights == {OLD: 100, NEW: 0}


def test_a_route_without_its_rule_stays_as_it_was(
    follower: RouteFollower, fake: FakeCluster
) -> None:
    fake.edit(HTTP_ROUTE, NAME, lambda body: body["spec"]["rules"].pop())
    look(follower, fake)
    assert route_of(follower).decision.weights == {OLD: 90, NEW: 10}


def test_a_route_that_is_removed_is_served_no_more(
    follower: RouteFollower, fake: FakeCluster
) -> None:
    fake.remove(HTTP_ROUTE, NAME)
    look(follower, fake)
    assert follower.routes == {}
    assert len(follower.retired) == 2


def test_routes_without_a_channel_and_of_other_environments_are_not_served(
    fake: FakeCluster,
) -> None:
    follower = RouteFollower(frozenset({ENVIRONMENT}))
    look(follower, fake)
    assert follower.routes == {}
    follow(fake, Wish.of(make_channel(weight=10)), {OLD: 90, NEW: 10})
    other = RouteFollower(frozenset({"production"}))
    look(other, fake)
    assert other.routes == {}
