"""What a pod's status says about its server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from trainyard.kubernetes.client import Object
from trainyard.serving.kubernetes.pod_status import not_begun, server_status
from trainyard.serving.protocol import ServerStatus

RELEASE = "adder-0123456789ab"
STARTED = "2026-11-27T10:00:00Z"


def pod(**status: Any) -> Object:
    """Return a pod that was scheduled, with some of its status."""
    conditions = [{"type": "PodScheduled", "status": "True"}, *status.pop("conditions", [])]
    return {
        "metadata": {"name": "adder-1", "namespace": "serving"},
        "status": {
            "phase": "Pending",
            "podIP": "10.0.0.7",
            "conditions": conditions,
            **status,
        },
    }


def server(state: Object, **more: Any) -> list[Object]:
    return [{"name": "server", "state": state, "restartCount": 0, **more}]


def restore(state: Object, **more: Any) -> list[Object]:
    return [
        {"name": "pod-folder", "state": {"running": {}}, "started": True, "restartCount": 0},
        {"name": "restore", "state": state, "restartCount": 0, **more},
    ]


DONE = restore({"terminated": {"exitCode": 0, "reason": "Completed"}})


def ended(code: int, message: str = "", reason: str = "Error") -> Object:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def look(found: Object) -> ServerStatus:
    status = server_status(found, RELEASE)
    assert status is not None
    return status


def test_a_ready_server_has_address_start_and_restarts() -> None:
    running = server({"running": {"startedAt": STARTED}}, started=True, restartCount=2)
    found = look(
        pod(
            phase="Running",
            conditions=[{"type": "Ready", "status": "True"}],
            initContainerStatuses=DONE,
            containerStatuses=running,
        )
    )
    assert found == ServerStatus(
        name="adder-1",
        release_id=RELEASE,
        state="ready",
        url="http://10.0.0.7:8000",
        started_at=datetime(2026, 11, 27, 10, tzinfo=UTC),
        restarts=2,
        message="It passes its health checks.",
    )


def test_addresses_of_ipv6_are_written_as_urls_want_them() -> None:
    assert look(pod(podIP="fd00::7")).url == "http://[fd00::7]:8000"
    assert look(pod(podIP=None)).url == ""


UNSCHEDULED = [
    {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient aws.amazon.com/neuron.",
    }
]
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        ({"conditions": UNSCHEDULED}, "starting", "3 Insufficient aws.amazon.com/neuron"),
        (
            {"initContainerStatuses": restore({"running": {"startedAt": STARTED}})},
            "starting",
            "being verified and copied",
        ),
        (
            {"initContainerStatuses": restore({"waiting": {"reason": "PodInitializing"}})},
            "starting",
            "container is being made",
        ),
        (
            {
                "initContainerStatuses": restore(
                    {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}
                )
            },
            "starting",
            "image cannot be pulled: ImagePullBackOff: no such tag",
        ),
        (
            {"initContainerStatuses": restore({"waiting": {"reason": "ErrImageNeverPull"}})},
            "failed",
            "image cannot be used",
        ),
        (
            {
                "initContainerStatuses": restore(
                    ended(10, "starting\nError: The signature is wrong.\nWhat to do: Sign it.\n")
                )
            },
            "failed",
            "restore ended with exit code 10: The signature is wrong.",
        ),
        (
            {
                "initContainerStatuses": restore(
                    BACK_OFF,
                    lastState=ended(30, "Error: The store is away."),
                    restartCount=2,
                )
            },
            "starting",
            "exit code 30: The store is away.",
        ),
        (
            {
                "initContainerStatuses": restore(
                    BACK_OFF,
                    lastState=ended(30, "Error: The store is away."),
                    restartCount=6,
                )
            },
            "failed",
            "The store is away.",
        ),
        (
            {
                "initContainerStatuses": [
                    {
                        "name": "pod-folder",
                        "state": BACK_OFF,
                        "restartCount": 1,
                        "lastState": ended(1, "PermissionError: [Errno 13] Permission denied"),
                    }
                ]
            },
            "starting",
            "pod-folder ended with exit code 1: PermissionError",
        ),
        (
            {
                "initContainerStatuses": DONE,
                "containerStatuses": server(
                    {"waiting": {"reason": "CreateContainerConfigError", "message": "no secret"}}
                ),
            },
            "starting",
            "CreateContainerConfigError: no secret",
        ),
        (
            {
                "initContainerStatuses": DONE,
                "containerStatuses": server({"running": {"startedAt": STARTED}}, started=False),
            },
            "starting",
            "It starts.",
        ),
        (
            {
                "initContainerStatuses": DONE,
                "containerStatuses": server(
                    {"running": {"startedAt": STARTED}},
                    started=False,
                    restartCount=1,
                    lastState=ended(137, "", "OOMKilled"),
                ),
            },
            "starting",
            "It ended before: The server ran out of memory",
        ),
        (
            {
                "initContainerStatuses": DONE,
                "containerStatuses": server({"running": {"startedAt": STARTED}}, started=True),
            },
            "unhealthy",
            "does not pass its health checks",
        ),
        (
            {
                "initContainerStatuses": DONE,
                "containerStatuses": server(ended(1, "ValueError: No such bucket list")),
            },
            "starting",
            "The server ended with exit code 1: ValueError: No such bucket list",
        ),
        (
            {
                "initContainerStatuses": DONE,
                "containerStatuses": server(
                    BACK_OFF, restartCount=3, lastState=ended(1, "RuntimeError: cache miss")
                ),
            },
            "failed",
            "RuntimeError: cache miss",
        ),
        (
            {
                "initContainerStatuses": DONE,
                "containerStatuses": server(
                    ended(128, "exec: python: not found", "StartError"), restartCount=0
                ),
            },
            "starting",
            "cannot start: exec: python: not found",
        ),
    ],
)
def test_a_server_that_is_not_ready_says_why(status: Object, state: str, words: str) -> None:
    if "conditions" in status:
        found = pod()
        found["status"]["conditions"] = status["conditions"]
    else:
        found = pod(**status)
    seen = look(found)
    assert (seen.state, words in seen.message) == (state, True), seen.message


def test_a_pod_that_no_scheduler_has_seen_says_so() -> None:
    found = pod()
    found["status"] = {"phase": "Pending"}
    assert look(found).message == "It waits for the scheduler."


def test_a_pod_on_its_way_out_is_stopping_whatever_else_it_says() -> None:
    found = pod(phase="Running", conditions=[{"type": "Ready", "status": "True"}])
    found["metadata"]["deletionTimestamp"] = STARTED
    assert look(found).state == "stopping"


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_an_evicted_pod_is_no_server(phase: str) -> None:
    assert server_status(pod(phase=phase, reason="Evicted"), RELEASE) is None


def test_other_containers_and_ports_can_serve() -> None:
    statuses = [{"name": "vllm", "state": {"running": {"startedAt": STARTED}}, "restartCount": 4}]
    found = server_status(pod(containerStatuses=statuses), RELEASE, container="vllm", port=80)
    assert found is not None
    assert (found.url, found.restarts) == ("http://10.0.0.7:80", 4)


def deployment(replicas: int, **status: Any) -> Object:
    return {
        "metadata": {"name": "adder-x"},
        "spec": {"replicas": replicas},
        "status": status,
    }


def test_servers_without_a_pod_are_named_with_the_cluster_s_reason() -> None:
    quota = {
        "type": "ReplicaFailure",
        "status": "True",
        "reason": "FailedCreate",
        "message": 'pods "x" is forbidden: exceeded quota: devices',
    }
    found = not_begun(deployment(3, conditions=[quota]), RELEASE, 1)
    assert [each.name for each in found] == ["adder-x-without-pod-1", "adder-x-without-pod-2"]
    assert {each.state for each in found} == {"starting"}
    assert "exceeded quota: devices" in found[0].message


def test_a_deployment_that_has_just_been_made_has_no_reason_yet() -> None:
    [only] = not_begun(deployment(1), RELEASE, 0)
    assert only.message == "The cluster has not begun with it yet."
    assert not_begun(deployment(1), RELEASE, 1) == []
    gone = deployment(1)
    gone["metadata"]["deletionTimestamp"] = STARTED
    assert not_begun(gone, RELEASE, 0) == []
