"""Servers of releases in a cluster, over HTTP against an emulated API server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.fake_cluster import NAMESPACE_NAME, FakeCluster, Fault
from tests.unit.serving.kubernetes.serving_cases import ENVIRONMENT, SETTINGS, place, release

from trainyard.documents.release import Release
from trainyard.errors import BadInput, Conflict, NotFound, OutOfCapacity, Transient
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import (
    AUTOSCALER,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    POD,
    SCALED_OBJECT,
    SERVICE,
)
from trainyard.kubernetes.labels import ADOPTED, CONTAINER, PORT, RELEASE, server_object_name
from trainyard.kubernetes.labels import ENVIRONMENT as IN
from trainyard.kubernetes.labels import MODEL as OF
from trainyard.serving.kubernetes.autoscaling import PAUSED
from trainyard.serving.kubernetes.host import KubernetesHost
from trainyard.settings import Settings
from trainyard.spec.environments import Environment

pytestmark = pytest.mark.integration

ADDER = release("cpu")
NAME = server_object_name(ENVIRONMENT, ADDER.release_id)
KINDS = (DEPLOYMENT, SERVICE, DISRUPTION_BUDGET)


@pytest.fixture
def fake() -> Iterator[FakeCluster]:
    with FakeCluster.running() as running:
        yield running


def host_of(fake: FakeCluster, settings: Settings = SETTINGS, **changes: Any) -> KubernetesHost:
    environment = Environment(
        platform="kubernetes", target="cpu", kubernetes=place("cpu", **changes)
    )
    return KubernetesHost(settings, {ENVIRONMENT: environment}, connect=lambda *_: fake.client())


@pytest.fixture
def host(fake: FakeCluster) -> KubernetesHost:
    return host_of(fake)


def deployment(fake: FakeCluster, name: str = NAME) -> Object:
    found = fake.get(DEPLOYMENT, name)
    assert found is not None
    return found


def other_release() -> Release:
    return release("cpu", release_id="adder-ba9876543210", revision="v2")


def run_pods(fake: FakeCluster, name: str = NAME, *, ready: bool = True) -> list[Object]:
    """Play the Deployment's controller and the kubelet: have the pods that are wished for."""
    wanted = deployment(fake, name)
    pods = []
    for index in range(wanted["spec"]["replicas"]):
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{name}-{index}",
                "labels": wanted["spec"]["template"]["metadata"]["labels"],
            },
            "spec": {"containers": [{"name": "server"}]},
            "status": {
                "phase": "Running",
                "podIP": f"10.0.0.{index + 1}",
                "conditions": [
                    {"type": "PodScheduled", "status": "True"},
                    {"type": "Ready", "status": str(ready)},
                ],
                "containerStatuses": [
                    {
                        "name": "server",
                        "restartCount": 0,
                        "started": True,
                        "state": {"running": {"startedAt": "2026-11-27T10:00:00Z"}},
                    }
                ],
            },
        }
        pods.append(fake.put(POD, body))
    return pods


# --- deploying ------------------------------------------------------------------------------------


def test_a_release_gets_a_deployment_a_service_and_a_budget(
    fake: FakeCluster, host: KubernetesHost
) -> None:
    host.deploy(ENVIRONMENT, ADDER, 2)
    assert deployment(fake)["spec"]["replicas"] == 2
    for kind in (SERVICE, DISRUPTION_BUDGET):
        found = fake.get(kind, NAME)
        assert found is not None
        [owner] = found["metadata"]["ownerReferences"]
        assert owner["uid"] == deployment(fake)["metadata"]["uid"]


def test_applying_twice_changes_nothing(fake: FakeCluster, host: KubernetesHost) -> None:
    host.deploy(ENVIRONMENT, ADDER, 2)
    before = [fake.get(kind, NAME) for kind in KINDS]
    host.deploy(ENVIRONMENT, ADDER, 2)
    assert [fake.get(kind, NAME) for kind in KINDS] == before


def test_another_number_of_servers_changes_no_template(
    fake: FakeCluster, host: KubernetesHost
) -> None:
    host.deploy(ENVIRONMENT, ADDER, 1)
    before = deployment(fake)["spec"]["template"]
    host.deploy(ENVIRONMENT, ADDER, 3)
    assert deployment(fake)["spec"]["replicas"] == 3
    assert deployment(fake)["spec"]["template"] == before


def test_what_others_added_survives(fake: FakeCluster, host: KubernetesHost) -> None:
    host.deploy(ENVIRONMENT, ADDER, 1)

    def inject(body: Object) -> None:
        body["metadata"].setdefault("annotations", {})["team/contact"] = "yard"
        body["spec"]["template"]["spec"]["containers"].append({"name": "mesh", "image": "mesh:1"})

    fake.edit(DEPLOYMENT, NAME, inject)
    host.deploy(ENVIRONMENT, ADDER, 2)
    found = deployment(fake)
    assert found["metadata"]["annotations"]["team/contact"] == "yard"
    names = [each["name"] for each in found["spec"]["template"]["spec"]["containers"]]
    assert names == ["server", "mesh"]


def test_what_somebody_changed_of_ours_is_put_right(
    fake: FakeCluster, host: KubernetesHost
) -> None:
    host.deploy(ENVIRONMENT, ADDER, 1)

    def tamper(body: Object) -> None:
        body["spec"]["template"]["spec"]["containers"][0]["image"] = "something:else"

    fake.edit(DEPLOYMENT, NAME, tamper)
    host.deploy(ENVIRONMENT, ADDER, 1)
    container = deployment(fake)["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "trainyard-cpu:test"


def test_other_settings_restart_nothing_that_serves(
    fake: FakeCluster, host: KubernetesHost
) -> None:
    host.deploy(ENVIRONMENT, ADDER, 1)
    before = deployment(fake)["spec"]["template"]
    newer = host_of(fake, node_selector={"pool": "new"})
    newer.deploy(ENVIRONMENT, ADDER, 2)
    assert deployment(fake)["spec"]["template"] == before
    assert deployment(fake)["spec"]["replicas"] == 2

    newer.deploy(ENVIRONMENT, ADDER, 0)
    newer.deploy(ENVIRONMENT, ADDER, 1)
    assert deployment(fake)["spec"]["template"]["spec"]["nodeSelector"] == {"pool": "new"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plural)
def test_an_object_of_the_same_name_that_is_not_ours_is_not_touched(
    fake: FakeCluster, host: KubernetesHost, kind: Any
) -> None:
    theirs = fake.put(
        kind,
        {
            "apiVersion": kind.api_version,
            "kind": kind.name,
            "metadata": {"name": NAME, "labels": {"app": "theirs"}},
            "spec": {"replicas": 7},
        },
    )
    with pytest.raises(BadInput, match=f"{kind.name} {NAME} in namespace serving is not"):
        host.deploy(ENVIRONMENT, ADDER, 1)
    assert fake.get(kind, NAME) == theirs
    if kind == DEPLOYMENT:
        with pytest.raises(BadInput, match="Nothing was changed"):
            host.remove(ENVIRONMENT, ADDER.release_id)
        assert fake.get(kind, NAME) == theirs
    assert not [each for each in KINDS if each != kind and fake.get(each, NAME)]


def test_a_killed_deploy_is_completed_by_the_next_one(
    fake: FakeCluster, host: KubernetesHost
) -> None:
    fake.faults.append(Fault("patch", "services", cut="before", times=1))
    with pytest.raises(Transient):
        host.deploy(ENVIRONMENT, ADDER, 1)
    assert fake.get(SERVICE, NAME) is None
    host.deploy(ENVIRONMENT, ADDER, 1)
    assert all(fake.get(kind, NAME) for kind in KINDS)


def test_a_storm_of_errors_ends_in_what_was_wished(fake: FakeCluster, host: KubernetesHost) -> None:
    fake.faults += [
        Fault(status=500, times=2),
        Fault("get", "deployments", status=503, times=1),
        Fault("patch", status=429, reason="TooManyRequests", times=2),
        Fault("patch", "deployments", cut="after", times=1),
        Fault("list", status=504, times=1),
    ]
    tries = 0
    while True:
        tries += 1
        try:
            host.deploy(ENVIRONMENT, ADDER, 2)
            break
        except Transient:
            assert tries < 20
    assert tries > 3
    assert deployment(fake)["spec"]["replicas"] == 2
    assert all(fake.get(kind, NAME) for kind in KINDS)


def test_conflicts_and_quotas_are_what_they_are(fake: FakeCluster, host: KubernetesHost) -> None:
    fake.faults.append(Fault("patch", "deployments", 409, "Conflict", "somebody", times=1))
    with pytest.raises(Conflict):
        host.deploy(ENVIRONMENT, ADDER, 1)
    quota = Fault.quota("deployments", times=1)
    quota.verb = "patch"
    fake.faults.append(quota)
    with pytest.raises(OutOfCapacity, match="exceeded quota"):
        host.deploy(ENVIRONMENT, ADDER, 1)


def test_a_missing_right_is_named(fake: FakeCluster, host: KubernetesHost) -> None:
    fake.denied.add(("patch", "deployments"))
    with pytest.raises(BadInput, match='cannot patch resource "deployments"'):
        host.deploy(ENVIRONMENT, ADDER, 1)


def test_names_and_numbers_are_checked(host: KubernetesHost) -> None:
    with pytest.raises(BadInput, match="make no sense"):
        host.deploy(ENVIRONMENT, ADDER, -1)
    with pytest.raises(BadInput, match="not a release id"):
        host.deploy(ENVIRONMENT, ADDER.model_copy(update={"release_id": "../x"}), 1)
    with pytest.raises(BadInput, match="does not say where in a cluster"):
        host.deploy("nowhere", ADDER, 1)


def test_servers_begin_with_the_class_of_their_beginning_and_keep_it(fake: FakeCluster) -> None:
    host = host_of(fake, stable_priority_class="high", candidate_priority_class="low")
    second = other_release()
    host.deploy(ENVIRONMENT, ADDER, 1)
    host.deploy(ENVIRONMENT, second, 1)
    names = (NAME, server_object_name(ENVIRONMENT, second.release_id))

    def classes() -> list[str]:
        return [deployment(fake, n)["spec"]["template"]["spec"]["priorityClassName"] for n in names]

    assert classes() == ["high", "low"]
    host.remove(ENVIRONMENT, ADDER.release_id)
    host.deploy(ENVIRONMENT, second, 2)
    assert deployment(fake, names[1])["spec"]["template"]["spec"]["priorityClassName"] == "low"


# --- seeing and removing --------------------------------------------------------------------------


def test_servers_are_seen_as_they_come_and_go(fake: FakeCluster, host: KubernetesHost) -> None:
    assert host.servers(ENVIRONMENT, "adder") == []
    host.deploy(ENVIRONMENT, ADDER, 2)
    waiting = host.servers(ENVIRONMENT, "adder")
    assert [(each.state, each.release_id) for each in waiting] == [
        ("starting", ADDER.release_id)
    ] * 2

    pods = run_pods(fake)
    found = host.servers(ENVIRONMENT, "adder")
    assert [(each.name, each.state, each.url) for each in found] == [
        (f"{NAME}-0", "ready", "http://10.0.0.1:8000"),
        (f"{NAME}-1", "ready", "http://10.0.0.2:8000"),
    ]

    host.remove(ENVIRONMENT, ADDER.release_id)
    for each in pods:
        fake.edit(
            POD,
            each["metadata"]["name"],
            # A real pod stays for its grace period; here a finalizer keeps it.
            lambda body: body["metadata"].update(
                deletionTimestamp="2026-11-27T11:00:00Z", finalizers=["tests/drain"]
            ),
        )
    assert {each.state for each in host.servers(ENVIRONMENT, "adder")} == {"stopping"}
    for each in pods:
        fake.remove(POD, each["metadata"]["name"])
    assert host.servers(ENVIRONMENT, "adder") == []


def test_only_servers_of_the_model_and_environment_are_seen(
    fake: FakeCluster, host: KubernetesHost
) -> None:
    host.deploy(ENVIRONMENT, ADDER, 1)
    [pod] = run_pods(fake)
    for name, label, value in (("a", IN, "staging"), ("b", OF, "other")):
        labels = {**pod["metadata"]["labels"], label: value}
        fake.put(POD, {**pod, "metadata": {"name": name, "labels": labels}})
    assert [each.name for each in host.servers(ENVIRONMENT, "adder")] == [f"{NAME}-0"]


def test_a_refused_quota_is_seen_at_the_servers_that_have_no_pod(
    fake: FakeCluster, host: KubernetesHost
) -> None:
    host.deploy(ENVIRONMENT, ADDER, 1)

    def refuse(body: Object) -> None:
        message = 'pods "adder-x" is forbidden: exceeded quota: devices'
        body["status"] = {
            "conditions": [
                {
                    "type": "ReplicaFailure",
                    "status": "True",
                    "reason": "FailedCreate",
                    "message": message,
                }
            ]
        }

    fake.edit(DEPLOYMENT, NAME, refuse)
    [server] = host.servers(ENVIRONMENT, "adder")
    assert (server.state, server.url) == ("starting", "")
    assert "exceeded quota: devices" in server.message


def test_removing_twice_is_the_same_as_once(fake: FakeCluster, host: KubernetesHost) -> None:
    host.deploy(ENVIRONMENT, ADDER, 1)
    host.remove(ENVIRONMENT, ADDER.release_id)
    host.remove(ENVIRONMENT, ADDER.release_id)
    assert fake.get(DEPLOYMENT, NAME) is None
    host.remove(ENVIRONMENT, "adder-000000000000")


def test_a_release_can_be_wished_for_again(fake: FakeCluster, host: KubernetesHost) -> None:
    host.deploy(ENVIRONMENT, ADDER, 1)
    host.remove(ENVIRONMENT, ADDER.release_id)
    host.deploy(ENVIRONMENT, ADDER, 2)
    service = fake.get(SERVICE, NAME)
    assert service is not None
    owners = [each["uid"] for each in service["metadata"]["ownerReferences"]]
    assert owners == [deployment(fake)["metadata"]["uid"]]


# --- autoscalers ----------------------------------------------------------------------------------


def autoscaler(kind: Any, **spec: Any) -> Object:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": {"name": "adder", "labels": {OF: "adder", IN: ENVIRONMENT}},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": NAME}, **spec},
    }


BEHAVIOR = {"scaleUp": {"selectPolicy": "Max", "stabilizationWindowSeconds": 0}}


@pytest.fixture
def scaled(fake: FakeCluster, host: KubernetesHost) -> FakeCluster:
    """A cluster with a server and both kinds of autoscalers for it."""
    host.deploy(ENVIRONMENT, ADDER, 2)
    fake.put(AUTOSCALER, autoscaler(AUTOSCALER, minReplicas=2, maxReplicas=6, behavior=BEHAVIOR))
    fake.put(SCALED_OBJECT, autoscaler(SCALED_OBJECT, minReplicaCount=2))
    return fake


def both(fake: FakeCluster) -> list[Object]:
    found = [fake.get(kind, "adder") for kind in (AUTOSCALER, SCALED_OBJECT)]
    return [
        {key: value for key, value in each.items() if key == "spec"}
        | {"annotations": each["metadata"].get("annotations") or {}}
        for each in found
        if each
    ]


def test_autoscalers_are_held_and_let_go_as_they_were(
    scaled: FakeCluster, host: KubernetesHost
) -> None:
    before = both(scaled)
    host.hold_autoscaling(ENVIRONMENT, "adder")
    horizontal, keda = both(scaled)
    assert horizontal["spec"]["minReplicas"] == 1
    assert horizontal["spec"]["behavior"]["scaleUp"]["selectPolicy"] == "Disabled"
    assert horizontal["spec"]["behavior"]["scaleDown"]["selectPolicy"] == "Disabled"
    assert keda["annotations"]["autoscaling.keda.sh/paused"] == "true"

    host.resume_autoscaling(ENVIRONMENT, "adder", ADDER.release_id)
    assert both(scaled) == before


def test_holding_twice_does_not_forget_what_was_there(
    scaled: FakeCluster, host: KubernetesHost
) -> None:
    before = both(scaled)
    host.hold_autoscaling(ENVIRONMENT, "adder")
    host.hold_autoscaling(ENVIRONMENT, "adder")
    host.resume_autoscaling(ENVIRONMENT, "adder", ADDER.release_id)
    host.resume_autoscaling(ENVIRONMENT, "adder", ADDER.release_id)
    assert both(scaled) == before


def test_afterwards_they_work_on_the_stable_release(
    scaled: FakeCluster, host: KubernetesHost
) -> None:
    promoted = other_release()
    host.hold_autoscaling(ENVIRONMENT, "adder")
    host.resume_autoscaling(ENVIRONMENT, "adder", promoted.release_id)
    targets = {each["spec"]["scaleTargetRef"]["name"] for each in both(scaled)}
    assert targets == {server_object_name(ENVIRONMENT, promoted.release_id)}


def test_a_paused_scaled_object_stays_paused(fake: FakeCluster, host: KubernetesHost) -> None:
    body = autoscaler(SCALED_OBJECT)
    body["metadata"]["annotations"] = {"autoscaling.keda.sh/paused": "true"}
    fake.put(SCALED_OBJECT, body)
    host.hold_autoscaling(ENVIRONMENT, "adder")
    host.resume_autoscaling(ENVIRONMENT, "adder", ADDER.release_id)
    found = fake.get(SCALED_OBJECT, "adder")
    assert found is not None
    assert found["metadata"]["annotations"] == {"autoscaling.keda.sh/paused": "true"}


def test_what_somebody_removed_while_it_was_held_does_not_keep_it_held(
    fake: FakeCluster, host: KubernetesHost
) -> None:
    fake.put(AUTOSCALER, autoscaler(AUTOSCALER, maxReplicas=6))
    fake.put(SCALED_OBJECT, autoscaler(SCALED_OBJECT))
    before = both(fake)
    host.hold_autoscaling(ENVIRONMENT, "adder")
    fake.edit(AUTOSCALER, "adder", lambda body: body["spec"].pop("behavior"))
    fake.edit(SCALED_OBJECT, "adder", lambda body: body["metadata"]["annotations"].pop(PAUSED))
    host.resume_autoscaling(ENVIRONMENT, "adder", ADDER.release_id)
    assert both(fake) == before


def test_a_cluster_without_keda_has_autoscalers_all_the_same(
    scaled: FakeCluster, host: KubernetesHost
) -> None:
    scaled.uninstall(SCALED_OBJECT)
    host.hold_autoscaling(ENVIRONMENT, "adder")
    found = scaled.get(AUTOSCALER, "adder")
    assert found is not None
    assert found["spec"]["minReplicas"] == 1


def test_what_keda_made_is_kedas(fake: FakeCluster, host: KubernetesHost) -> None:
    body = autoscaler(AUTOSCALER, minReplicas=2, maxReplicas=6)
    body["metadata"]["ownerReferences"] = [
        {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "name": "adder", "uid": "u"}
    ]
    before = fake.put(AUTOSCALER, body)
    host.hold_autoscaling(ENVIRONMENT, "adder")
    assert fake.get(AUTOSCALER, "adder") == before


def test_a_change_in_between_is_seen(scaled: FakeCluster, host: KubernetesHost) -> None:
    scaled.faults.append(Fault("patch", "horizontalpodautoscalers", 409, "Conflict", times=1))
    with pytest.raises(Conflict):
        host.hold_autoscaling(ENVIRONMENT, "adder")
    host.hold_autoscaling(ENVIRONMENT, "adder")
    assert both(scaled)[0]["spec"]["minReplicas"] == 1


def test_outside_of_a_rollout_the_autoscaler_decides(
    scaled: FakeCluster, host: KubernetesHost
) -> None:
    scaled.edit(DEPLOYMENT, NAME, lambda body: body["spec"].update(replicas=5))
    host.deploy(ENVIRONMENT, ADDER, 2)
    assert deployment(scaled)["spec"]["replicas"] == 5

    host.hold_autoscaling(ENVIRONMENT, "adder")
    host.deploy(ENVIRONMENT, ADDER, 3)
    assert deployment(scaled)["spec"]["replicas"] == 3


# --- adopted --------------------------------------------------------------------------------------

THEIRS = "adder-adadadadadad"


@pytest.fixture
def adopted(fake: FakeCluster) -> FakeCluster:
    """A cluster with a Deployment that somebody else made and Trainyard adopted."""
    fake.put(
        DEPLOYMENT,
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": "vllm",
                "labels": {OF: "adder", IN: ENVIRONMENT, RELEASE: THEIRS, ADOPTED: "true"},
                "annotations": {CONTAINER: "vllm", PORT: "80"},
            },
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": {"app": "vllm"}},
                "template": {"metadata": {"labels": {"app": "vllm"}}, "spec": {"containers": []}},
            },
        },
    )
    fake.put(
        POD,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "vllm-1", "labels": {"app": "vllm"}},
            "status": {
                "podIP": "10.0.0.9",
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        },
    )
    return fake


def test_an_adopted_deployment_s_pods_are_servers(
    adopted: FakeCluster, host: KubernetesHost
) -> None:
    [server] = host.servers(ENVIRONMENT, "adder")
    assert (server.release_id, server.state, server.url) == (
        THEIRS,
        "ready",
        "http://10.0.0.9:80",
    )


def test_an_adopted_deployment_is_scaled_and_never_deleted(
    adopted: FakeCluster, host: KubernetesHost
) -> None:
    template = deployment(adopted, "vllm")["spec"]["template"]
    host.scale(ENVIRONMENT, THEIRS, 3)
    [pod] = adopted.objects(POD)
    assert pod["metadata"]["labels"] == {
        "app": "vllm",
        OF: "adder",
        IN: ENVIRONMENT,
        RELEASE: THEIRS,
    }
    assert pod["metadata"]["annotations"] == {PORT: "80"}
    servers = [each.name for each in host.servers(ENVIRONMENT, "adder")]
    assert servers == ["vllm-1", "vllm-without-pod-1", "vllm-without-pod-2"]
    assert deployment(adopted, "vllm")["spec"]["replicas"] == 3
    host.remove(ENVIRONMENT, THEIRS)
    host.remove(ENVIRONMENT, THEIRS)
    found = deployment(adopted, "vllm")
    assert (found["spec"]["replicas"], found["spec"]["template"]) == (0, template)


def test_an_adopted_deployment_that_was_stopped_is_woken_whatever_scales_it(
    adopted: FakeCluster, host: KubernetesHost
) -> None:
    body = autoscaler(AUTOSCALER, minReplicas=1, maxReplicas=6)
    body["spec"]["scaleTargetRef"]["name"] = "vllm"
    adopted.put(AUTOSCALER, body)
    host.scale(ENVIRONMENT, THEIRS, 3)
    assert deployment(adopted, "vllm")["spec"]["replicas"] == 1
    host.remove(ENVIRONMENT, THEIRS)
    host.scale(ENVIRONMENT, THEIRS, 2)
    assert deployment(adopted, "vllm")["spec"]["replicas"] == 2


def test_without_the_right_to_mark_pods_an_adopted_deployment_is_scaled_all_the_same(
    adopted: FakeCluster, host: KubernetesHost, caplog: pytest.LogCaptureFixture
) -> None:
    adopted.denied.add(("patch", "pods"))
    host.scale(ENVIRONMENT, THEIRS, 2)
    assert deployment(adopted, "vllm")["spec"]["replicas"] == 2
    assert "cannot be marked" in caplog.text


def test_a_release_that_nobody_adopted_cannot_be_scaled(host: KubernetesHost) -> None:
    with pytest.raises(NotFound, match=f"No Deployment in namespace {NAMESPACE_NAME}"):
        host.scale(ENVIRONMENT, THEIRS, 1)
