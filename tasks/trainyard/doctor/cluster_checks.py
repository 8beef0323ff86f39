"""What an environment needs of its cluster: rights, gateway, devices, driver, image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainyard.doctor.report import Check, fail, ok, warn
from trainyard.errors import TrainyardError
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.free_devices import INSTANCE_LABEL, allocatable, is_usable
from trainyard.kubernetes.kinds import (
    AUTOSCALER,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    EVENT,
    GATEWAY,
    HTTP_ROUTE,
    LEASE,
    NAMESPACE,
    NODE,
    POD,
    SELF_REVIEW,
    SERVICE,
    Kind,
)
from trainyard.kubernetes.labels import PREFIX, route_name
from trainyard.lanes.neuron_common import chips_needed
from trainyard.lanes.neuron_support import driver_problem, parse_image
from trainyard.proofs import Proofs
from trainyard.serving.kubernetes.guard import ELECTION
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesServing
from trainyard.spec.model import Target

DRIVER_LABEL = f"{PREFIX}/neuron-driver"
"""Label of nodes with the version of their driver, where somebody sets it: no Neuron component
does."""
HEALTH = "NeuronHealth"
"""Condition that AWS's node problem detector sets; False: a device is broken."""


@dataclass(frozen=True)
class Need:
    """What an identity must be able to do with one kind of object."""

    kind: Kind
    verbs: tuple[str, ...]
    name: str = ""
    """Only to the object of this name; empty: to all."""


NEEDS: Mapping[str, tuple[Need, ...]] = {
    "rollout": (
        Need(DEPLOYMENT, ("get", "list", "create", "patch", "delete")),
        Need(SERVICE, ("get", "list", "create", "patch", "delete")),
        Need(DISRUPTION_BUDGET, ("create", "patch", "delete")),
        Need(AUTOSCALER, ("get", "list", "patch")),
        Need(POD, ("get", "list", "patch")),
        Need(EVENT, ("list",)),
        Need(HTTP_ROUTE, ("get", "list")),
        Need(LEASE, ("get", "create", "patch")),
    ),
    "guard": (
        Need(HTTP_ROUTE, ("get", "list", "watch", "patch")),
        Need(LEASE, ("get", "list", "watch", "create")),
        Need(LEASE, ("update",), ELECTION),
        Need(POD, ("get", "list", "watch")),
    ),
}
"""Rights by identity, no more than `k8s/` gives; guard and rollout are different identities on
purpose: only the guard moves traffic."""


@dataclass(frozen=True)
class Served:
    """A model that an environment serves."""

    model: str
    target: Target


def cluster_checks(
    cluster: Cluster,
    name: str,
    environment: Environment,
    place: KubernetesServing,
    served: Sequence[Served],
    proofs: Proofs,
    *,
    identity: str = "rollout",
) -> Iterator[Check]:
    """Yield all that is looked at in a cluster.

    Args:
        cluster: that can be asked.
        name: the environment's.
        environment: its rules.
        place: where it serves.
        served: the catalogue's models that have its target.
        proofs: what was proven on devices.
        identity: whose rights these should be, a key of the table of rights.
    """
    yield ok("cluster", f"Its API server answers; it is {cluster.version()}.")
    if cluster.get(NAMESPACE, place.namespace) is None:
        yield fail(
            "cluster: namespace",
            f"There is no namespace {place.namespace}.",
            "Apply `k8s/` first: it makes namespaces, roles and quotas.",
        )
        return
    yield from _one_by_one(
        ("cluster: rights", lambda: _rights(cluster, place, identity)),
        ("gateway", lambda: _gateway(cluster, place)),
        ("route", lambda: _routes(cluster, name, place, served)),
        ("nodes", lambda: _nodes(cluster, environment, served, proofs)),
        ("image", lambda: _images(place, served)),
    )


def _one_by_one(*looks: tuple[str, Any]) -> Iterator[Check]:
    """Yield what each look finds; one that fails does not keep the others from looking."""
    for name, look in looks:
        try:
            yield from look()
        except TrainyardError as error:
            yield Check(name, "fail", error.message, error.hint, retryable=error.retryable)


def _rights(cluster: Cluster, place: KubernetesServing, identity: str) -> Iterator[Check]:
    lacking = []
    for need in NEEDS[identity]:
        refused = [
            verb
            for verb in need.verbs
            if not _may(cluster, place.namespace, need.kind, verb, need.name)
        ]
        if refused:
            lacking.append(f"{'/'.join(refused)} {need.kind.plural}")
    if lacking:
        yield fail(
            "cluster: rights",
            f"As {identity}, this identity may not {', '.join(lacking)} in {place.namespace}.",
            "Bind its role: `k8s/` has one for each identity.",
        )
    else:
        yield ok("cluster: rights", f"This identity may do in {place.namespace} what {identity} "
                                    "needs.")  # fmt: skip
    if identity != "guard" and _may(cluster, place.namespace, HTTP_ROUTE, "patch"):
        yield warn(
            "cluster: rights",
            "This identity may patch httproutes, which only the guard needs.",
            "Take the right away, so that nothing but the guard can move traffic.",
        )


def _may(cluster: Cluster, namespace: str, kind: Kind, verb: str, name: str = "") -> bool:
    attributes = {
        "namespace": namespace,
        "verb": verb,
        "group": kind.group,
        "resource": kind.plural,
        "name": name,
    }
    answer = cluster.create(
        SELF_REVIEW,
        {
            "apiVersion": SELF_REVIEW.api_version,
            "kind": SELF_REVIEW.name,
            "metadata": {},
            "spec": {"resourceAttributes": attributes},
        },
    )
    return bool((answer.get("status") or {}).get("allowed"))


def _gateway(cluster: Cluster, place: KubernetesServing) -> Iterator[Check]:
    if place.data_plane == "proxy":
        yield ok("gateway", "Not needed: Trainyard's own proxy follows the routes.")
        return
    namespace = place.gateway_namespace or place.namespace
    gateway = cluster.get(GATEWAY, place.gateway, namespace)
    if gateway is None:
        yield fail(
            "gateway",
            f"There is no Gateway {place.gateway} in {namespace}.",
            "Apply `k8s/`, or name the cluster's own under `kubernetes.gateway`.",
        )
        return
    found = str((gateway.get("spec") or {}).get("gatewayClassName", ""))
    if found != place.gateway_class:
        yield fail(
            "gateway",
            f"Gateway {place.gateway} is of class {found}, not {place.gateway_class}.",
            "Correct `kubernetes.gateway_class`: what a gateway can do follows from its class.",
        )
        return
    states = {
        condition.get("type"): condition
        for condition in (gateway.get("status") or {}).get("conditions") or []
    }
    programmed = states.get("Programmed") or {}
    if programmed.get("status") != "True":
        yield fail(
            "gateway",
            f"Gateway {place.gateway} is not programmed: "
            f"{programmed.get('message') or 'its controller says nothing'}.",
            "Look at the controller of its class; without it no route is in effect.",
        )
        return
    yield ok("gateway", f"Gateway {place.gateway} is programmed.")


def _routes(
    cluster: Cluster, name: str, place: KubernetesServing, served: Sequence[Served]
) -> Iterator[Check]:
    if not served:
        yield warn("route", f"No model of the catalogue has the target that {name} serves.",
                   "Correct the environment's `target`, or add the target to a model.")  # fmt: skip
    for each in served:
        wanted = route_name(each.model, name)
        if cluster.get(HTTP_ROUTE, wanted, place.namespace) is None:
            yield warn(
                "route",
                f"There is no HTTPRoute {wanted} yet.",
                f"Make it: `trainyard channel init {each.model} {name}`.",
            )
        else:
            yield ok("route", f"HTTPRoute {wanted} is there.")


def _nodes(
    cluster: Cluster, environment: Environment, served: Sequence[Served], proofs: Proofs
) -> Iterator[Check]:
    nodes, _ = cluster.list(NODE)
    for node in nodes:
        yield from _health(node)
    for target in {each.target.instance: each.target for each in served}.values():
        if target.neuron is None:
            yield ok("devices", f"Lane {target.lane} needs none.")
            continue
        of_kind = [node for node in nodes if _label(node, INSTANCE_LABEL) == target.instance]
        yield _devices(environment, target, of_kind)
        yield _driver(target, of_kind, proofs)


def _health(node: Object) -> Iterator[Check]:
    for condition in (node.get("status") or {}).get("conditions") or []:
        if condition.get("type") == HEALTH and condition.get("status") == "False":
            yield fail(
                "devices",
                f"A device of node {node['metadata']['name']} is broken: "
                f"{condition.get('reason') or condition.get('message') or 'no reason is given'}.",
                "Cordon the node and replace it; nothing that runs there can be judged.",
            )


def _devices(environment: Environment, target: Target, nodes: Sequence[Object]) -> Check:
    chips = chips_needed(target)
    room = sum(_allocatable(node) // chips for node in nodes)
    total = sum(_allocatable(node) for node in nodes)
    words = (
        f"{len(nodes)} nodes of {target.instance} have {total} devices, room for {room} servers of "
        f"{chips}; the environment may run {environment.devices}"
    )
    if room >= environment.devices:
        return ok("devices", f"{words}.")
    if not nodes:
        return warn(
            "devices",
            f"{words}.",
            "Nodes may come once pods wait for them (Karpenter, a Capacity Block); if not, add a "
            "node pool of that instance type.",
        )
    return fail(
        "devices",
        f"{words}.",
        "Add nodes, lower `devices`, or look why the device plugin counts fewer.",
    )


def _driver(target: Target, nodes: Sequence[Object], proofs: Proofs) -> Check:
    sdk = target.neuron.sdk if target.neuron else ""
    known = {
        node["metadata"]["name"]: version
        for node in nodes
        if (version := _label(node, DRIVER_LABEL))
    }
    for node, version in sorted(known.items()):
        problem = driver_problem(sdk, version)
        if problem:
            return fail("driver", f"Node {node}: {problem}", "")
    if nodes and len(known) == len(nodes):
        versions = ", ".join(sorted(set(known.values())))
        return ok("driver", f"Nothing is known against driver {versions} with SDK {sdk}.")
    proof = proofs.of(target)
    if proof is not None:
        return ok("driver", f"Proven with driver {proof.driver}; not all nodes say theirs.")
    return warn(
        "driver",
        f"Nobody says which driver the nodes of {target.instance} have.",
        f"Label them {DRIVER_LABEL} (the content of /sys/module/neuron/version), or run "
        "`trainyard doctor neuron` on one.",
    )


def _images(place: KubernetesServing, served: Sequence[Served]) -> Iterator[Check]:
    targets = {each.target.name: each.target for each in served}
    images = {
        (target.neuron.image if target.neuron and target.neuron.image else place.image): target
        for target in targets.values()
    }
    for image, target in images.items():
        if not image:
            yield fail(
                "image",
                f"Neither target {target.name} nor the environment names an image.",
                "Give `neuron.image` in the target, or `kubernetes.image` in the environment.",
            )
        elif "@sha256:" in image:
            yield ok("image", f"{image} is pinned.")
        else:
            tag = parse_image(image)
            words = f" (SDK {tag.sdk}, lane {tag.lane})" if tag else ""
            yield warn(
                "image",
                f"{image}{words} is named by a tag, which can be moved.",
                "Name it by digest (`@sha256:…`): a proof is about one image.",
            )


def _label(node: Object, name: str) -> str:
    metadata = node.get("metadata") or {}
    return str((metadata.get("labels") or {}).get(name, ""))


def _allocatable(node: Object) -> int:
    return allocatable(node) if is_usable(node) else 0
