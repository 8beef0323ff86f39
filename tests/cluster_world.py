"""What tests of serving in a cluster start from: routes, pods and a gateway in a fake cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster
from tests.serving_world import ENVIRONMENT, MODEL

from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import GATEWAY, HTTP_ROUTE, POD
from trainyard.kubernetes.labels import RELEASE, owned, route_name, server_object_name
from trainyard.serving.guard import RouteDecision, Wish
from trainyard.serving.guard_events import GuardMemory
from trainyard.serving.kubernetes.route import (
    find_rule,
    new_route,
    plan_patch,
    wanted_route,
)
from trainyard.spec.kubernetes import KubernetesServing

NAME = route_name(MODEL, ENVIRONMENT)
PLACE = KubernetesServing(namespace=NS, gateway_class="eg")
FOLLOWING = GuardMemory()


def place(**changes: Any) -> KubernetesServing:
    """Return where servers run."""
    return PLACE.model_copy(update=changes)


def service(release_id: str) -> str:
    """Return the Service of a release."""
    return server_object_name(ENVIRONMENT, release_id)


def put_gateway(fake: FakeCluster) -> None:
    """Make a Gateway that works."""
    fake.put(
        GATEWAY,
        {
            "metadata": {"name": PLACE.gateway},
            "spec": {"gatewayClassName": "eg"},
            "status": {"conditions": [{"type": "Programmed", "status": "True"}]},
        },
    )


def put_route(fake: FakeCluster, **changes: Any) -> Object:
    """Make the channel's route."""
    return fake.put(HTTP_ROUTE, new_route(MODEL, ENVIRONMENT, PLACE, **changes))


def follow(fake: FakeCluster, wish: Wish, weights: Mapping[str, int]) -> Object:
    """Give the route these weights, as the guard does."""
    route = fake.get(HTTP_ROUTE, NAME)
    assert route is not None
    decision = RouteDecision(weights, "following", "")
    pods = {name for name in (wish.stable, wish.candidate) if name}
    operations = plan_patch(route, wanted_route(wish, decision, FOLLOWING, pods))
    return fake.client().json_patch(HTTP_ROUTE, NAME, operations, namespace=NS)


def accept(fake: FakeCluster, *, generation: int | None = None, **conditions: str) -> None:
    """Say that the gateway has taken the route, as its controller does."""

    def change(body: Object) -> None:
        seen = body["metadata"]["generation"] if generation is None else generation
        told = {"Accepted": "True", "ResolvedRefs": "True", **conditions}
        body["status"] = {
            "parents": [
                {
                    "parentRef": {"name": PLACE.gateway, "namespace": NS},
                    "conditions": [
                        {
                            "type": type_,
                            "status": status,
                            "observedGeneration": seen,
                            "message": "as told",
                        }
                        for type_, status in told.items()
                    ],
                }
            ]
        }

    fake.edit(HTTP_ROUTE, NAME, change, manager="envoy-gateway")


def put_pod(
    fake: FakeCluster,
    release_id: str,
    index: int = 0,
    *,
    ready: bool = True,
    ip: str = "127.0.0.1",
    port: int = 8000,
    environment: str = ENVIRONMENT,
) -> Object:
    """Make a server's pod as its Deployment and kubelet do."""
    status = "True" if ready else "False"
    return fake.put(
        POD,
        {
            "metadata": {
                "name": f"{release_id}-{index}",
                "labels": {
                    **owned("server", model=MODEL, environment=environment),
                    RELEASE: release_id,
                },
            },
            "spec": {
                "containers": [
                    {"name": "server", "ports": [{"name": "http", "containerPort": port}]}
                ]
            },
            "status": {"podIP": ip, "conditions": [{"type": "Ready", "status": status}]},
        },
    )


def weights_of(fake: FakeCluster, rule: str = "split") -> dict[str, int]:
    """Return the weights of a rule by Service, as stored."""
    route = fake.get(HTTP_ROUTE, NAME)
    assert route is not None
    _, found = find_rule(route, rule)
    return {backend["name"]: backend["weight"] for backend in found.get("backendRefs") or []}
