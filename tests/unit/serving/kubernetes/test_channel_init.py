"""Making a channel's route, against an emulated API server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster_world import (
    NAME,
    PLACE,
    follow,
    place,
    put_gateway,
    put_route,
    service,
    weights_of,
)
from tests.fake_cluster import FakeCluster, Fault
from tests.serving_world import ENVIRONMENT, MODEL, NEW, OLD, make_channel

from trainyard.errors import BadInput, OutOfCapacity, Refused
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import GATEWAY, HTTP_ROUTE
from trainyard.serving.guard import Wish
from trainyard.serving.kubernetes.channel_init import InitDone, init_channel, weights_managed_by
from trainyard.serving.kubernetes.route import find_rule


@pytest.fixture
def fake() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        put_gateway(fake)
        yield fake


@pytest.fixture
def edge(fake: FakeCluster) -> None:
    fake.put(GATEWAY, {"metadata": {"name": "edge"}, "spec": {"gatewayClassName": "eg"}})


def init(fake: FakeCluster, **options: Any) -> InitDone:
    where = options.pop("place", PLACE)
    return init_channel(fake.client(), MODEL, ENVIRONMENT, where, **options)


def follow_ten(fake: FakeCluster) -> None:
    follow(fake, Wish.of(make_channel(weight=10)), {OLD: 90, NEW: 10})


def test_makes_the_route_once(fake: FakeCluster) -> None:
    assert "is made" in init(fake).did
    assert "is there already" in init(fake).did
    assert fake.log.count(("create", "httproutes", "")) == 1


def test_running_it_again_during_a_canary_changes_no_weight(fake: FakeCluster) -> None:
    init(fake)
    follow_ten(fake)
    before = fake.get(HTTP_ROUTE, NAME)
    init(fake)
    assert fake.get(HTTP_ROUTE, NAME) == before


@pytest.mark.usefixtures("edge")
def test_mends_what_is_missing_and_changes_no_weight(fake: FakeCluster) -> None:
    init(fake, path="/chat/v1")
    follow_ten(fake)
    fake.edit(HTTP_ROUTE, NAME, lambda body: body["spec"]["rules"].pop(0))
    done = init(fake, place=place(gateway="edge", hostnames=("llm.example.com",)))
    assert "is mended" in done.did
    spec = done.route["spec"]
    assert spec["parentRefs"][0]["name"] == "edge"
    assert spec["hostnames"] == ["llm.example.com"]
    path = find_rule(done.route, "pinned-stable")[1]["matches"][0]["path"]["value"]
    assert path == "/chat/v1"
    assert weights_of(fake) == {service(OLD): 90, service(NEW): 10}


@pytest.mark.usefixtures("edge")
def test_a_gateway_that_does_not_work_yet_is_a_warning(fake: FakeCluster) -> None:
    (warning,) = init(fake, place=place(gateway="edge")).warnings
    assert "not programmed" in warning


def test_a_gateway_of_another_class_is_a_warning(fake: FakeCluster) -> None:
    (warning,) = init(fake, place=place(gateway_class="alb")).warnings
    assert "arrivals are counted only" in warning


@pytest.mark.parametrize("kind", [HTTP_ROUTE, GATEWAY])
def test_missing_crds_are_named(fake: FakeCluster, kind: Any) -> None:
    fake.uninstall(kind)
    with pytest.raises(BadInput) as raised:
        init(fake)
    assert "CRDs" in raised.value.hint


def test_a_missing_gateway_is_named(fake: FakeCluster) -> None:
    fake.remove(GATEWAY, PLACE.gateway)
    with pytest.raises(BadInput, match="no Gateway inference in namespace serving"):
        init(fake)


def test_our_own_proxy_needs_no_gateway(fake: FakeCluster) -> None:
    fake.uninstall(GATEWAY)
    assert "is made" in init(fake, place=place(data_plane="proxy")).did
    with pytest.raises(BadInput, match="serves this channel at /staging/adder/v1"):
        init(fake, place=place(data_plane="proxy"), path="/v1")


def test_a_missing_namespace_is_named(fake: FakeCluster) -> None:
    with pytest.raises(BadInput, match="Namespace nowhere is missing"):
        init(fake, place=place(namespace="nowhere"))


@pytest.mark.parametrize("path", ["v1", "/chat", "/chat/v1/"])
def test_a_path_must_lead_to_v1(fake: FakeCluster, path: str) -> None:
    with pytest.raises(BadInput, match="does not lead"):
        init(fake, path=path)


def test_a_used_up_quota_and_a_missing_right_are_told_apart(fake: FakeCluster) -> None:
    fake.faults.append(Fault.quota("httproutes", times=1))
    with pytest.raises(OutOfCapacity, match="exceeded quota"):
        init(fake)
    fake.denied.add(("create", "httproutes"))
    with pytest.raises(BadInput, match="cannot create"):
        init(fake)


# --- others' routes -------------------------------------------------------------------------------


def test_a_foreign_route_of_that_name_is_refused(fake: FakeCluster) -> None:
    fake.put(HTTP_ROUTE, {"metadata": {"name": NAME}, "spec": {"rules": []}}, manager="kubectl")
    with pytest.raises(Refused, match="not a route of Trainyard's"):
        init(fake)


@pytest.mark.parametrize(
    ("manager", "exception"),
    [
        ("argocd-controller", "ignoreDifferences"),
        ("kustomize-controller", "kustomize.toolkit.fluxcd.io/ssa: IfNotPresent"),
        ("helm-controller", "driftDetection"),
        ("fleetagent", "Take the route out"),
    ],
)
def test_a_tool_that_manages_the_weights_is_refused_with_the_exception_to_add(
    fake: FakeCluster, manager: str, exception: str
) -> None:
    init(fake)
    fake.edit(
        HTTP_ROUTE,
        NAME,
        lambda body: body["spec"]["rules"].append({"name": "more"}),
        manager=manager,
    )
    with pytest.raises(Refused, match=f"{manager} manages the weights") as raised:
        init(fake)
    assert exception in raised.value.hint
    assert "--exception-added" in raised.value.hint
    assert "is there already" in init(fake, exception_added=True).did


def test_a_tool_that_manages_something_else_is_welcome(fake: FakeCluster) -> None:
    init(fake)

    def label(body: Object) -> None:
        body["metadata"]["labels"]["team"] = "search"

    fake.edit(HTTP_ROUTE, NAME, label, manager="kustomize-controller")
    assert "is there already" in init(fake).did


@pytest.mark.parametrize(
    ("mark", "tool"),
    [
        ("argocd.argoproj.io/tracking-id", "Argo CD"),
        ("kubectl.kubernetes.io/last-applied-configuration", "kubectl apply"),
        ("meta.helm.sh/release-name", "Helm"),
    ],
)
def test_what_comes_from_a_repository_is_known_by_its_marks(
    fake: FakeCluster, mark: str, tool: str
) -> None:
    put_route(fake)

    def annotate(body: Object) -> None:
        body["metadata"]["annotations"][mark] = "x"

    route = fake.edit(HTTP_ROUTE, NAME, annotate)
    assert weights_managed_by(route) == tool
    with pytest.raises(Refused, match=tool):
        init(fake)
