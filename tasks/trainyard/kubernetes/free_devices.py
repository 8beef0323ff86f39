"""How many devices the nodes of a cluster have free for the servers of one release.

Only nodes that would take such a server count: they have its labels, are ready, may be scheduled
on, and have no taint that it does not tolerate. A node gives what it can allocate, less what its
pods that have not ended asked for. Servers take devices of one node only, so what is free in
pieces on several nodes may be room for none. Nodes that do not exist yet are not seen: an
autoscaler may add some once pods wait for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import NODE, POD
from trainyard.kubernetes.labels import ENVIRONMENT, MODEL, RELEASE
from trainyard.kubernetes.step_pod import NEURON
from trainyard.lanes.neuron_common import chips_needed
from trainyard.spec.kubernetes import KubernetesServing, Toleration
from trainyard.spec.model import Target

INSTANCE_LABEL = "node.kubernetes.io/instance-type"
_ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True)
class FreeDevices:
    """The devices on the nodes that are there now."""

    nodes: int
    """That would take a server."""
    silent_nodes: int
    """Of them, how many do not say that they have such devices: no device plugin runs there."""
    total: int
    """Devices that these nodes can allocate."""
    free: int
    """Of them, how many no pod has asked for."""
    room: int
    """Servers that fit into what is free, each on one node."""
    stable_servers: int
    """Servers of the channel's stable release that have devices of these nodes."""


def free_devices(
    cluster: Cluster,
    place: KubernetesServing,
    target: Target,
    *,
    model: str,
    environment: str,
    stable: str = "",
) -> FreeDevices:
    """Ask a cluster what it has free for servers of `target`, which is on a Neuron lane.

    Args:
        cluster: where they would run.
        place: how they would run there.
        target: that they serve.
        model: of the channel.
        environment: of the channel.
        stable: id of its stable release; empty: it has none.

    Raises:
        TrainyardError: it does not answer, or this identity may not list nodes or pods.
    """
    nodes, _ = cluster.list(NODE)
    # Of all namespaces: whoever holds a device, it is taken.
    pods, _ = cluster.list(POD)
    own = {RELEASE: stable, MODEL: model, ENVIRONMENT: environment} if stable else {}
    return count_free(
        [node for node in nodes if takes_servers(node, place, target.instance)],
        pods,
        chips=chips_needed(target),
        own=own,
        namespace=place.namespace,
    )


def count_free(
    nodes: Sequence[Object],
    pods: Sequence[Object],
    *,
    chips: int,
    own: Mapping[str, str],
    namespace: str,
) -> FreeDevices:
    """Return what is free on `nodes` beside `pods`.

    Args:
        nodes: that take servers.
        pods: of all nodes and namespaces.
        chips: devices that one server takes.
        own: labels of the stable release's servers; empty: there are none.
        namespace: of those servers.
    """
    taken: Counter[str] = Counter()
    names = {node["metadata"]["name"] for node in nodes}
    stable_servers = 0
    for pod in pods:
        where = str((pod.get("spec") or {}).get("nodeName", ""))
        count = requested(pod)
        if where not in names or not count or (pod.get("status") or {}).get("phase") in _ENDED:
            continue
        taken[where] += count
        metadata = pod["metadata"]
        labels = metadata.get("labels") or {}
        stable_servers += bool(
            own and metadata.get("namespace") == namespace and own.items() <= labels.items()
        )
    # A node whose device failed can allocate less than its pods have: nothing is free then.
    free = [
        max(0, allocatable(node) - taken[node["metadata"]["name"]]) for node in nodes
    ]  # fmt: skip
    return FreeDevices(
        nodes=len(nodes),
        silent_nodes=sum(NEURON not in _allocatable(node) for node in nodes),
        total=sum(map(allocatable, nodes)),
        free=sum(free),
        room=sum(count // chips for count in free),
        stable_servers=stable_servers,
    )


def takes_servers(node: Object, place: KubernetesServing, instance: str) -> bool:
    """Tell whether the scheduler may put servers for an instance type on a node."""
    labels = (node.get("metadata") or {}).get("labels") or {}
    wanted = {**place.node_selector, INSTANCE_LABEL: instance}
    tolerated = (Toleration(key=NEURON), *place.tolerations)
    taints = (node.get("spec") or {}).get("taints") or []
    return (
        is_usable(node)
        and wanted.items() <= labels.items()
        and all(
            taint.get("effect") == "PreferNoSchedule"
            or any(_tolerates(each, taint) for each in tolerated)
            for taint in taints
        )
    )


def is_usable(node: Object) -> bool:
    """Tell whether a node is ready and takes new pods."""
    ready = any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in (node.get("status") or {}).get("conditions") or []
    )
    return ready and not (node.get("spec") or {}).get("unschedulable")


def allocatable(node: Object) -> int:
    """Return the devices that a node has for pods, as its device plugin counts them."""
    return int(_allocatable(node).get(NEURON, 0))


def requested(pod: Object) -> int:
    """Return the devices that a pod keeps from others.

    Init containers run one after the other and before the rest, so the largest of them counts;
    those that go on (sidecars) count as the others do.
    """
    spec = pod.get("spec") or {}
    beside = sum(map(_of_container, spec.get("containers") or []))
    first = 0
    for container in spec.get("initContainers") or []:
        count = _of_container(container)
        if container.get("restartPolicy") == "Always":
            beside += count
        else:
            first = max(first, count)
    return max(beside, first)


def _of_container(container: Object) -> int:
    # For devices, request and limit are always the same, and the API fills in the request.
    return int(((container.get("resources") or {}).get("requests") or {}).get(NEURON, 0))


def _allocatable(node: Object) -> Object:
    found: Object = (node.get("status") or {}).get("allocatable") or {}
    return found


def _tolerates(toleration: Toleration, taint: Object) -> bool:
    return (
        toleration.key == taint.get("key")
        and toleration.effect in (None, taint.get("effect"))
        and (toleration.operator == "Exists" or toleration.value == (taint.get("value") or ""))
    )
