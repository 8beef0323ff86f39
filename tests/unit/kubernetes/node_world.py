"""Nodes with Neuron devices, and pods that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainyard.kubernetes.client import Object
from trainyard.kubernetes.free_devices import INSTANCE_LABEL
from trainyard.kubernetes.step_pod import NEURON

TAINT = {"key": NEURON, "effect": "NoSchedule"}
"""That nodes with devices have."""


def node(
    name: str,
    *,
    devices: int | None = 16,
    labels: Mapping[str, str] | None = None,
    taints: Sequence[Mapping[str, str]] = (TAINT,),
    ready: str = "True",
    cordoned: bool = False,
) -> Object:
    """Return a node; without `devices` no device plugin runs there."""
    spec: dict[str, Any] = {"taints": [dict(each) for each in taints]}
    if cordoned:
        spec["unschedulable"] = True
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {INSTANCE_LABEL: "trn2.48xlarge", **(labels or {})}},
        "spec": spec,
        "status": {
            "allocatable": {"cpu": "4"} | ({} if devices is None else {NEURON: str(devices)}),
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


def container(devices: int, **more: str) -> Object:
    """Return a container that takes devices."""
    count = {NEURON: str(devices)} if devices else {}
    return {"name": "c", "resources": {"requests": {"cpu": "1", **count}, "limits": count}, **more}


def pod(
    name: str,
    where: str,
    devices: int,
    *,
    namespace: str = "others",
    labels: Mapping[str, str] | None = None,
    phase: str = "Running",
    first: Sequence[Object] = (),
) -> Object:
    """Return a pod; with an empty `where` it waits for a node."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels or {})},
        "spec": {
            "containers": [container(devices), container(0)],
            "initContainers": list(first),
            **({"nodeName": where} if where else {}),
        },
        "status": {"phase": phase},
    }
