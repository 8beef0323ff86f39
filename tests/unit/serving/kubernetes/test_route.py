"""What the guard changes of an HTTPRoute, against an emulated API server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster_world import (
    FOLLOWING,
    NAME,
    PLACE,
    accept,
    follow,
    put_route,
    service,
    weights_of,
)
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster
from tests.serving_world import ENVIRONMENT, MODEL, NEW, OLD, make_channel

from trainyard.errors import Conflict
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import HTTP_ROUTE
from trainyard.serving.guard import RouteDecision, Wish
from trainyard.serving.kubernetes.route import (
    BrokenRoute,
    acceptance,
    find_rule,
    is_channel_route,
    new_route,
    plan_patch,
    record_of,
    split_weights,
    wanted_route,
)

BOTH = {OLD, NEW}


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        yield fake


@pytest.fixture
def fake(shared: FakeCluster) -> FakeCluster:
    if shared.get(HTTP_ROUTE, NAME):
        shared.remove(HTTP_ROUTE, NAME)
    put_route(shared)
    return shared


def wish(weight: int = 10, **changes: Any) -> Wish:
    return Wish.of(make_channel(weight=weight, **changes))


def plan(
    route: Object, weight: int, *, pods: set[str] = BOTH, **changes: Any
) -> list[dict[str, Any]]:
    decision = RouteDecision({OLD: 100 - weight, NEW: weight}, "following", "")
    return plan_patch(route, wanted_route(wish(weight, **changes), decision, FOLLOWING, pods))


def stored(fake: FakeCluster) -> Object:
    route = fake.get(HTTP_ROUTE, NAME)
    assert route is not None
    return route


def patch(fake: FakeCluster, operations: list[dict[str, Any]]) -> None:
    fake.client().json_patch(HTTP_ROUTE, NAME, operations, namespace=NS)


# --- weights --------------------------------------------------------------------------------------


def test_a_new_route_is_ours_and_serves_nothing(fake: FakeCluster) -> None:
    assert is_channel_route(stored(fake))
    assert weights_of(fake) == {}
    assert split_weights(stored(fake)) == {}


def test_both_weights_and_the_memory_change_in_one_write(fake: FakeCluster) -> None:
    patch(fake, plan(stored(fake), 10))
    before = stored(fake)["metadata"]["generation"]
    patch(fake, plan(stored(fake), 50, generation=2))
    assert weights_of(fake) == {service(OLD): 50, service(NEW): 50}
    assert stored(fake)["metadata"]["generation"] == before + 1
    assert record_of(stored(fake)).weights == {OLD: 50, NEW: 50}
    assert split_weights(stored(fake)) == {OLD: 50, NEW: 50}


def test_a_route_that_is_right_needs_no_patch(fake: FakeCluster) -> None:
    patch(fake, plan(stored(fake), 10))
    assert plan(stored(fake), 10) == []


def test_a_change_of_weights_names_the_rule_and_the_backends_that_it_means(
    fake: FakeCluster,
) -> None:
    patch(fake, plan(stored(fake), 10))
    tests = [each["value"] for each in plan(stored(fake), 50) if each["op"] == "test"]
    assert {"split", service(OLD), service(NEW)} <= {t for t in tests if isinstance(t, str)}


def test_the_candidates_backend_comes_with_its_pods_and_goes_with_its_role(
    fake: FakeCluster,
) -> None:
    patch(fake, plan(stored(fake), 0, pods={OLD}))
    assert weights_of(fake) == {service(OLD): 100}
    assert weights_of(fake, "pinned-candidate") == {}
    patch(fake, plan(stored(fake), 0))
    assert weights_of(fake) == {service(OLD): 100, service(NEW): 0}
    assert weights_of(fake, "pinned-candidate") == {service(NEW): 1}
    assert weights_of(fake, "pinned-stable") == {service(OLD): 1}
    alone = Wish.of(make_channel(stable=NEW, candidate=None, weight=0))
    follow(fake, alone, {NEW: 100})
    assert weights_of(fake) == {service(NEW): 100}
    assert weights_of(fake, "pinned-candidate") == {}


def test_a_promotion_swaps_the_order_and_keeps_what_others_set_on_a_backend(
    fake: FakeCluster,
) -> None:
    patch(fake, plan(stored(fake), 10))
    mirror = [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "shadow"}}}]

    def add_filter(body: Object) -> None:
        find_rule(body, "split")[1]["backendRefs"][1]["filters"] = mirror

    fake.edit(HTTP_ROUTE, NAME, add_filter)
    follow(fake, Wish.of(make_channel(stable=NEW, candidate=OLD, weight=10)), {NEW: 90, OLD: 10})
    backends = find_rule(stored(fake), "split")[1]["backendRefs"]
    assert [(b["name"], b["weight"]) for b in backends] == [(service(NEW), 90), (service(OLD), 10)]
    assert backends[0]["filters"] == mirror


def test_if_nobody_may_get_traffic_there_is_no_backend(fake: FakeCluster) -> None:
    bootstrap = Wish.of(make_channel(stable=None, weight=100))
    follow(fake, bootstrap, {NEW: 100})
    assert weights_of(fake) == {service(NEW): 100}
    follow(fake, bootstrap, {})
    assert sum(weights_of(fake).values()) == 0


# --- others ---------------------------------------------------------------------------------------


def test_rules_and_edits_of_others_survive(fake: FakeCluster) -> None:
    patch(fake, plan(stored(fake), 10))
    own_rule = {"name": "docs", "backendRefs": [{"name": "docs", "port": 80, "weight": 7}]}

    def edit(body: Object) -> None:
        body["spec"]["rules"].insert(0, own_rule)
        body["spec"]["hostnames"] = ["llm.example.com"]
        body["metadata"]["annotations"]["team"] = "search"
        find_rule(body, "split")[1]["timeouts"] = {"request": "600s"}

    fake.edit(HTTP_ROUTE, NAME, edit)
    patch(fake, plan(stored(fake), 50))
    route = stored(fake)
    assert weights_of(fake) == {service(OLD): 50, service(NEW): 50}
    assert weights_of(fake, "docs") == {"docs": 7}
    assert route["spec"]["hostnames"] == ["llm.example.com"]
    assert route["metadata"]["annotations"]["team"] == "search"
    assert find_rule(route, "split")[1]["timeouts"] == {"request": "600s"}


@pytest.mark.parametrize("moved", ["rules", "backends", "memory"])
def test_a_patch_never_lands_on_a_route_that_has_become_another(
    fake: FakeCluster, moved: str
) -> None:
    patch(fake, plan(stored(fake), 10))
    operations = plan(stored(fake), 50, generation=2)

    def change(body: Object) -> None:
        if moved == "rules":
            body["spec"]["rules"].reverse()
        elif moved == "backends":
            find_rule(body, "split")[1]["backendRefs"].reverse()
        else:
            body["metadata"]["annotations"]["trainyard.dev/guard"] = "{}"

    fake.edit(HTTP_ROUTE, NAME, change)
    before = stored(fake)
    with pytest.raises(Conflict):
        patch(fake, operations)
    assert stored(fake) == before
    patch(fake, plan(stored(fake), 50, generation=2))
    assert weights_of(fake) == {service(OLD): 50, service(NEW): 50}


def test_weights_that_somebody_changed_are_set_again(fake: FakeCluster) -> None:
    patch(fake, plan(stored(fake), 10))

    def drift(body: Object) -> None:
        backends = find_rule(body, "split")[1]["backendRefs"]
        backends[0]["weight"], backends[1]["weight"] = 0, 100
        backends.append({"name": "foreign", "port": 80, "weight": 50})

    fake.edit(HTTP_ROUTE, NAME, drift)
    assert split_weights(stored(fake)) == {OLD: 0, NEW: 67, "foreign": 33}
    patch(fake, plan(stored(fake), 10))
    assert weights_of(fake) == {service(OLD): 90, service(NEW): 10}


def test_a_rule_that_is_gone_is_said_with_what_to_do(fake: FakeCluster) -> None:
    fake.edit(HTTP_ROUTE, NAME, lambda body: body["spec"]["rules"].pop())
    with pytest.raises(BrokenRoute, match="no rule 'split'") as raised:
        plan(stored(fake), 10)
    assert "channel init" in raised.value.hint


@pytest.mark.parametrize("memory", [None, "no json", '{"new": "field"}'])
def test_a_memory_that_is_lost_is_made_anew(fake: FakeCluster, memory: str | None) -> None:
    def forget(body: Object) -> None:
        if memory is None:
            del body["metadata"]["annotations"]
        else:
            body["metadata"]["annotations"]["trainyard.dev/guard"] = memory

    fake.edit(HTTP_ROUTE, NAME, forget)
    assert record_of(stored(fake)).wish is None
    patch(fake, plan(stored(fake), 10))
    assert record_of(stored(fake)).wish == wish(10)


# --- sticky sessions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sticky", "after"),
    [
        (
            {"type": "Cookie", "cookie": {"name": "llm"}},
            {"type": "Cookie", "cookie": {"name": "llm-1"}},
        ),
        (
            {"type": "Cookie", "cookie": {"name": "llm-9"}},
            {"type": "Cookie", "cookie": {"name": "llm-10"}},
        ),
        ({"sessionName": "llm"}, {"sessionName": "llm-1"}),
        ({"type": "Header", "header": {"name": "x-session"}}, None),
    ],
)
def test_sessions_end_when_a_release_loses_its_traffic(
    fake: FakeCluster, sticky: dict[str, Any], after: dict[str, Any] | None
) -> None:
    patch(fake, plan(stored(fake), 10))

    def stick(body: Object) -> None:
        find_rule(body, "split")[1]["sessionPersistence"] = sticky

    fake.edit(HTTP_ROUTE, NAME, stick)
    patch(fake, plan(stored(fake), 50))
    assert find_rule(stored(fake), "split")[1]["sessionPersistence"] == sticky
    patch(fake, plan(stored(fake), 0))
    assert find_rule(stored(fake), "split")[1].get("sessionPersistence") == after


# --- acceptance -----------------------------------------------------------------------------------


def test_a_route_is_in_effect_once_the_gateway_has_seen_its_last_change(
    fake: FakeCluster,
) -> None:
    patch(fake, plan(stored(fake), 10))
    assert acceptance(stored(fake), PLACE) == (
        False,
        "Gateway inference has not looked at it yet.",
    )
    accept(fake)
    assert acceptance(stored(fake), PLACE) == (True, "")
    patch(fake, plan(stored(fake), 50))
    assert "has not seen its last change" in acceptance(stored(fake), PLACE)[1]
    accept(fake, ResolvedRefs="False")
    assert acceptance(stored(fake), PLACE) == (
        False,
        "Gateway inference says ResolvedRefs is false: as told",
    )


def test_another_gateways_word_does_not_count(fake: FakeCluster) -> None:
    accept(fake)
    elsewhere = PLACE.model_copy(update={"gateway_namespace": "edge"})
    assert not acceptance(stored(fake), elsewhere)[0]


# --- making it ------------------------------------------------------------------------------------


def test_clients_paths_are_the_same_as_on_one_machine() -> None:
    rules = new_route(MODEL, ENVIRONMENT, PLACE)["spec"]["rules"]
    assert {rule["matches"][0]["path"]["value"] for rule in rules} == {"/staging/adder/v1"}
    assert all(rule["filters"][0]["type"] == "URLRewrite" for rule in rules)
    assert all(rule["timeouts"] == {"request": "0s"} for rule in rules)


def test_a_host_of_its_own_needs_no_rewriting() -> None:
    route = new_route(
        MODEL,
        ENVIRONMENT,
        PLACE.model_copy(update={"hostnames": ("llm.example.com",), "gateway_namespace": "edge"}),
        path="/v1",
        timeouts=False,
    )
    assert route["spec"]["hostnames"] == ["llm.example.com"]
    assert route["spec"]["parentRefs"] == [{"name": "inference", "namespace": "edge"}]
    assert not any({"filters", "timeouts"} & set(rule) for rule in route["spec"]["rules"])
