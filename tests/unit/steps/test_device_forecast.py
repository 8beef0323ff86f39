"""What a plan tells of a cluster's devices, against an emulated API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster
from tests.rollout_world import MODEL
from tests.unit.kubernetes.node_world import node, pod
from tests.unit.lanes.neuron_targets import CPU, NATIVE, changed
from tests.unit.rollout.machine import OLD, used_channel
from tests.unit.yard import Silent

from trainyard.documents.forecast import DevicesForecast
from trainyard.kubernetes import labels
from trainyard.kubernetes.kinds import NODE, POD
from trainyard.settings import Settings
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesServing
from trainyard.spec.model import Target
from trainyard.steps.context import StepContext
from trainyard.steps.device_forecast import devices_forecast
from trainyard.store.documents import create_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import channel_key

NAME = "production"
NEURON_TARGET = changed(NATIVE, {})


@pytest.fixture
def fake() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        yield fake


@pytest.fixture
def context(fake: FakeCluster, tmp_path: Path) -> StepContext:
    config = tmp_path / "kubeconfig"
    config.write_text(fake.kubeconfig())
    settings = Settings(home=tmp_path, kubeconfig=config, kube_timeout_s=120.0)
    store = FolderStore(tmp_path / "store")
    create_document(store, channel_key(MODEL, NAME), used_channel())
    return StepContext(settings, store, Silent(), tmp_path)


def asked(context: StepContext, target: Target = NEURON_TARGET) -> DevicesForecast | None:
    environment = Environment(
        target=target.name, platform="kubernetes", kubernetes=KubernetesServing(namespace=NS)
    )
    return devices_forecast(context, MODEL, NAME, environment, [target])


def test_the_cluster_is_asked_what_it_has_free(fake: FakeCluster, context: StepContext) -> None:
    for name in ("one", "two"):
        fake.put(NODE, node(name))
    own = {labels.RELEASE: OLD, labels.MODEL: MODEL, labels.ENVIRONMENT: NAME}
    fake.put(POD, pod("stable", "one", 2, namespace=NS, labels=own))
    fake.put(POD, pod("theirs", "two", 15, namespace="default"))
    assert asked(context) == DevicesForecast(
        instance="trn2.48xlarge",
        per_server=2,
        nodes=2,
        total=32,
        free=15,
        room=7,
        stable_servers=1,
    )


def test_no_node_yet_is_known_to_be_none(context: StepContext) -> None:
    found = asked(context)
    assert found is not None
    assert (found.unknown, found.nodes, found.free) == ("", 0, 0)


@pytest.mark.parametrize("plural", ["nodes", "pods"])
def test_a_right_that_is_missing_is_named_and_stops_nothing(
    fake: FakeCluster, context: StepContext, plural: str
) -> None:
    fake.denied.add(("list", plural))
    found = asked(context)
    assert found is not None
    assert plural in found.unknown


def test_a_cluster_that_does_not_answer_stops_nothing(
    fake: FakeCluster, context: StepContext
) -> None:
    fake.down = True
    found = asked(context)
    assert found is not None
    assert "does not answer" in found.unknown


def test_nodes_without_a_device_plugin_are_not_known_to_be_full(
    fake: FakeCluster, context: StepContext
) -> None:
    fake.put(NODE, node("one", devices=None))
    found = asked(context)
    assert found is not None
    assert "none of the 1 nodes of trn2.48xlarge says how many" in found.unknown


def test_nobody_is_asked_for_servers_without_devices_or_cluster(
    fake: FakeCluster, context: StepContext
) -> None:
    assert asked(context, Target.model_validate(CPU)) is None
    here = Environment(target=NEURON_TARGET.name)
    assert devices_forecast(context, MODEL, NAME, here, [NEURON_TARGET]) is None
    assert not fake.log
