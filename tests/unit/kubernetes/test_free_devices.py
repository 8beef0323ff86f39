"""Which devices of a cluster are free for the servers of a release."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.kubernetes.node_world import TAINT, container, node, pod

from trainyard.kubernetes.free_devices import count_free, requested, takes_servers
from trainyard.spec.kubernetes import KubernetesServing, Toleration

INSTANCE = "trn2.48xlarge"
PLACE = KubernetesServing(
    namespace="serving",
    node_selector={"pool": "serving"},
    tolerations=(Toleration(key="team", operator="Equal", value="a", effect="NoSchedule"),),
)
POOL = {"pool": "serving"}
OWN = {"trainyard.dev/release": "r1"}


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, True),
        ({"labels": {}}, False),
        ({"labels": {**POOL, "node.kubernetes.io/instance-type": "inf2.xlarge"}}, False),
        ({"ready": "False"}, False),
        ({"ready": "Unknown"}, False),
        ({"cordoned": True}, False),
        ({"taints": ()}, True),
        ({"taints": (TAINT, {"key": "other", "effect": "NoSchedule"})}, False),
        ({"taints": (TAINT, {"key": "other", "effect": "PreferNoSchedule"})}, True),
        ({"taints": ({"key": "team", "value": "a", "effect": "NoSchedule"},)}, True),
        ({"taints": ({"key": "team", "value": "b", "effect": "NoSchedule"},)}, False),
        ({"taints": ({"key": "team", "value": "a", "effect": "NoExecute"},)}, False),
    ],
)
def test_only_nodes_that_would_take_a_server_count(changes: dict[str, Any], takes: bool) -> None:
    found = node("one", **{"labels": POOL, **changes})
    assert takes_servers(found, PLACE, INSTANCE) == takes


def test_a_pod_keeps_what_its_largest_moment_takes() -> None:
    assert requested(pod("a", "one", 4)) == 4
    assert requested(pod("a", "one", 4, first=[container(3), container(6)])) == 6
    assert requested(pod("a", "one", 4, first=[container(2, restartPolicy="Always")])) == 6
    assert requested({"metadata": {"name": "a"}}) == 0


def test_pods_that_have_not_ended_keep_their_devices_whoever_they_belong_to() -> None:
    found = count_free(
        [node("one"), node("two"), node("three")],
        [
            pod("stable", "one", 8, namespace="serving", labels=OWN),
            pod("copy", "one", 2, namespace="elsewhere", labels=OWN),
            pod("starting", "two", 12, phase="Pending"),
            pod("done", "two", 16, phase="Succeeded"),
            pod("failed", "three", 16, phase="Failed"),
            pod("waiting", "", 16, phase="Pending"),
            pod("far", "four", 16),
        ],
        chips=8,
        own=OWN,
        namespace="serving",
    )
    assert (found.nodes, found.total, found.free) == (3, 48, 6 + 4 + 16)
    assert found.room == 2, "pieces on several nodes are no room"
    assert found.stable_servers == 1


def test_a_node_that_lost_devices_has_none_free_and_takes_none_of_another() -> None:
    found = count_free(
        [node("one", devices=4), node("two")],
        [pod("a", "one", 16)],
        chips=16,
        own={},
        namespace="serving",
    )
    assert (found.total, found.free, found.room, found.stable_servers) == (20, 16, 1, 0)


def test_nodes_without_a_device_plugin_are_told_apart() -> None:
    found = count_free(
        [node("one", devices=None), node("two", devices=0)],
        [],
        chips=16,
        own={},
        namespace="serving",
    )
    assert (found.nodes, found.silent_nodes, found.free) == (2, 1, 0)
