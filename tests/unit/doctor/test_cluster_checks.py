"""What an environment needs of its cluster, against an emulated API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster
from tests.unit.lanes.neuron_targets import CPU, NATIVE, changed
from tests.unit.proof_files import IMAGE, proof

from trainyard.deploy.manifests import AIRFLOW_NAMESPACE, load_overlay
from trainyard.deploy.rbac import rights
from trainyard.doctor.cluster_checks import (
    DRIVER_LABEL,
    HEALTH,
    NEEDS,
    Served,
    cluster_checks,
)
from trainyard.doctor.report import Check
from trainyard.kubernetes.free_devices import INSTANCE_LABEL
from trainyard.kubernetes.kinds import GATEWAY, HTTP_ROUTE, NODE
from trainyard.kubernetes.step_pod import NEURON
from trainyard.proofs import Proofs
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesServing

TARGET = changed(NATIVE, {"neuron.image": IMAGE})


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        yield fake


@pytest.fixture
def fake(shared: FakeCluster) -> Iterator[FakeCluster]:
    yield shared
    shared.denied.clear()
    for kind in (GATEWAY, HTTP_ROUTE, NODE):
        for found in shared.objects(kind):
            namespace = "" if kind is NODE else NS
            shared.remove(kind, found["metadata"]["name"], namespace)


def examined(
    fake: FakeCluster,
    *,
    target: Any = TARGET,
    proofs: Proofs | None = None,
    identity: str = "rollout",
    **place: Any,
) -> dict[str, Check]:
    """Return the checks by name; of several with one name the worst."""
    found: dict[str, Check] = {}
    order = ("ok", "warn", "fail")
    for check in cluster_checks(
        fake.client(),
        "production",
        Environment(target="trn2", platform="kubernetes"),
        KubernetesServing(namespace=NS, **place),
        [Served("adder", target)],
        proofs or Proofs(()),
        identity=identity,
    ):
        worse = found.get(check.name)
        if worse is None or order.index(check.state) > order.index(worse.state):
            found[check.name] = check
    return found


def gateway(fake: FakeCluster, *, programmed: str = "True", of_class: str = "eg") -> None:
    condition = {"type": "Programmed", "status": programmed, "message": "no address"}
    fake.put(
        GATEWAY,
        {
            "apiVersion": GATEWAY.api_version,
            "kind": "Gateway",
            "metadata": {"name": "inference", "namespace": NS},
            "spec": {"gatewayClassName": of_class, "listeners": []},
            "status": {"conditions": [condition]},
        },
    )


def node(fake: FakeCluster, name: str, *, devices: int = 16, **more: Any) -> None:
    labels = {INSTANCE_LABEL: "trn2.48xlarge", **more.get("labels", {})}
    conditions = [{"type": "Ready", "status": "True"}, *more.get("conditions", [])]
    fake.put(
        NODE,
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels},
            "spec": more.get("spec", {}),
            "status": {"allocatable": {NEURON: str(devices)}, "conditions": conditions},
        },
    )


def test_a_cluster_that_has_all_is_fine(fake: FakeCluster) -> None:
    gateway(fake)
    node(fake, "one", labels={DRIVER_LABEL: "2.31.7.0"})
    fake.denied.add(("patch", "httproutes"))
    found = examined(fake)
    assert {name: check.state for name, check in found.items()} == {
        "cluster": "ok",
        "cluster: rights": "ok",
        "gateway": "ok",
        "route": "warn",
        "devices": "ok",
        "driver": "ok",
        "image": "warn",
    }
    assert "trainyard channel init adder production" in found["route"].remedy
    assert "room for 8 servers of 2" in found["devices"].found
    assert "SDK 2.32.0, lane neuron-native" in found["image"].found


def test_rights_that_are_missing_are_named(fake: FakeCluster) -> None:
    fake.denied |= {("create", "deployments"), ("delete", "deployments")}
    found = examined(fake)["cluster: rights"]
    assert found.state == "fail"
    assert "create/delete deployments" in found.found


@pytest.mark.parametrize(
    ("identity", "account"),
    [
        ("rollout", f"{AIRFLOW_NAMESPACE}/trainyard-airflow-triggerer"),
        ("guard", "{serving}/trainyard-guard"),
    ],
)
def test_nothing_is_asked_for_that_the_roles_do_not_give(identity: str, account: str) -> None:
    overlay = load_overlay(Path(__file__).parents[3] / "k8s", "production")
    account = account.format(serving=overlay.parameter("namespace"))
    given = {
        (right.resource, right.verb, right.name)
        for right in rights(overlay.objects)
        if right.account == account
    }
    asked = {
        (f"{need.kind.plural}.{need.kind.group}".rstrip("."), verb, need.name)
        for need in NEEDS[identity]
        for verb in need.verbs
    }
    assert asked
    assert asked <= given


def test_only_the_guard_should_be_able_to_move_traffic(fake: FakeCluster) -> None:
    assert "only the guard needs" in examined(fake)["cluster: rights"].found
    assert examined(fake, identity="guard")["cluster: rights"].state == "ok"
    fake.denied.add(("patch", "httproutes"))
    refused = examined(fake, identity="guard")["cluster: rights"]
    assert (refused.state, "patch httproutes" in refused.found) == ("fail", True)


def test_a_namespace_that_is_not_there_ends_the_examination(fake: FakeCluster) -> None:
    found = [
        *cluster_checks(
            fake.client(),
            "production",
            Environment(target="trn2"),
            KubernetesServing(namespace="nowhere"),
            [],
            Proofs(()),
        )
    ]
    assert [check.state for check in found] == ["ok", "fail"]


def test_a_gateway_must_be_there_of_its_class_and_programmed(fake: FakeCluster) -> None:
    assert "no Gateway inference" in examined(fake)["gateway"].found
    gateway(fake, of_class="alb")
    assert "is of class alb" in examined(fake)["gateway"].found
    gateway(fake, programmed="False")
    assert "not programmed: no address" in examined(fake)["gateway"].found
    assert examined(fake, data_plane="proxy")["gateway"].state == "ok"


def test_devices_are_counted_on_nodes_that_can_be_used(fake: FakeCluster) -> None:
    assert examined(fake)["devices"].state == "warn"
    node(fake, "one", devices=2)
    node(fake, "cordoned", spec={"unschedulable": True})
    short = examined(fake)["devices"]
    assert (short.state, "room for 1 servers" in short.found) == ("fail", True)
    node(fake, "two", devices=2)
    assert examined(fake)["devices"].state == "ok"


def test_a_broken_device_is_named_with_its_reason(fake: FakeCluster) -> None:
    broken = {"type": HEALTH, "status": "False", "reason": "NeuronHasError_HBM_UNCORRECTABLE_ERROR"}
    node(fake, "one", conditions=[broken])
    found = examined(fake)["devices"]
    assert (found.state, "HBM_UNCORRECTABLE" in found.found) == ("fail", True)


def test_a_driver_is_told_by_a_label_or_a_proof(fake: FakeCluster) -> None:
    node(fake, "one")
    assert examined(fake)["driver"].state == "warn"
    assert examined(fake, proofs=Proofs((proof(),)))["driver"].state == "ok"
    node(fake, "one", labels={DRIVER_LABEL: "2.26.10"})
    old = examined(fake)["driver"]
    assert (old.state, "do not run on driver 2.26.10" in old.found) == ("fail", True)


def test_lane_cpu_needs_no_device(fake: FakeCluster) -> None:
    found = examined(fake, target=changed(CPU, {}))
    assert found["devices"].state == "ok"
    assert found["image"].state == "fail"
    pinned = "registry.example/serve@sha256:" + "a" * 64
    assert examined(fake, target=changed(CPU, {}), image=pinned)["image"].state == "ok"
