"""A team that serves already joins: `trainyard adopt`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fake_cluster import NAMESPACE_NAME, FakeCluster, Fault
from tests.rollout_world import START
from tests.unit.serving.kubernetes.serving_cases import ENVIRONMENT, SETTINGS, place

from trainyard.documents.channel import Channel
from trainyard.errors import BadInput, NotFound, Transient
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import DEPLOYMENT, POD, SERVICE
from trainyard.kubernetes.labels import server_object_name
from trainyard.rollout.channel_store import read_channel
from trainyard.serving.kubernetes.adopt import Adoption, adopt, examine
from trainyard.serving.kubernetes.host import KubernetesHost
from trainyard.spec.environments import Environment
from trainyard.store.folder import FolderStore

pytestmark = pytest.mark.integration


@pytest.fixture
def fake() -> Iterator[FakeCluster]:
    with FakeCluster.running() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def theirs(**changes: Any) -> Object:
    """Return a Deployment as a team may have it."""
    container = {
        "name": "vllm",
        "image": "vllm:1",
        "args": ["serve", "m", "--served-model-name", "adder", "sums", "--port=80"],
        "ports": [{"containerPort": 80}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "vllm", "uid": "u-1", "labels": {"app": "vllm"}},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": {"app": "vllm"}},
            "template": {
                "metadata": {"labels": {"app": "vllm"}},
                "spec": {"containers": [container]},
            },
        },
        "status": {"readyReplicas": 2},
        **changes,
    }


def do(fake: FakeCluster, store: FolderStore, **changes: Any) -> tuple[Adoption, Channel]:
    values = {
        "namespace": NAMESPACE_NAME,
        "model": "adder",
        "environment": ENVIRONMENT,
        "deployment": "vllm",
        "served_name": "adder",
        "who": "crew",
        "now": START,
        **changes,
    }
    return adopt(fake.client(), store, **values)


def test_what_runs_becomes_the_stable_release_and_is_not_restarted(
    fake: FakeCluster, store: FolderStore
) -> None:
    before = fake.put(DEPLOYMENT, theirs())
    pod = {"metadata": {"name": "vllm-1", "labels": {"app": "vllm"}}, "status": {"podIP": "10.1"}}
    fake.put(POD, {"apiVersion": "v1", "kind": "Pod", **pod})

    adoption, channel = do(fake, store)

    assert channel.stable is not None
    assert (channel.stable.release_id, channel.stable.verified) == (adoption.release_id, False)
    assert [(entry.event, entry.who) for entry in channel.history] == [("adopted", "crew")]
    after = fake.get(DEPLOYMENT, "vllm")
    assert after is not None
    assert after["spec"] == before["spec"]
    assert after["metadata"]["labels"]["app"] == "vllm"
    service = fake.get(SERVICE, server_object_name(ENVIRONMENT, adoption.release_id))
    assert service is not None
    assert service["spec"]["selector"] == {"app": "vllm"}
    assert service["spec"]["ports"][0]["targetPort"] == 80

    environment = Environment(platform="kubernetes", target="cpu", kubernetes=place("cpu"))
    host = KubernetesHost(SETTINGS, {ENVIRONMENT: environment}, connect=lambda *_: fake.client())
    servers = host.servers(ENVIRONMENT, "adder")
    assert {each.release_id for each in servers} == {adoption.release_id}
    assert servers[0].url == "http://10.1:80"


def test_adopting_twice_is_the_same_as_once(fake: FakeCluster, store: FolderStore) -> None:
    fake.put(DEPLOYMENT, theirs())
    first = do(fake, store)
    assert do(fake, store) == first


def test_an_adoption_that_was_cut_is_completed_and_marks_nothing_before_the_channel_wants_it(
    fake: FakeCluster, store: FolderStore
) -> None:
    fake.put(DEPLOYMENT, theirs())
    fake.faults.append(Fault("patch", "deployments", cut="before", times=1))
    with pytest.raises(Transient):
        do(fake, store)
    assert read_channel(store, "adder", ENVIRONMENT).stable is not None
    adoption, channel = do(fake, store)
    found = fake.get(DEPLOYMENT, "vllm")
    assert found is not None
    assert found["metadata"]["labels"]["trainyard.dev/release"] == adoption.release_id
    assert channel.generation == 1


def test_a_channel_that_serves_adopts_nothing(fake: FakeCluster, store: FolderStore) -> None:
    fake.put(DEPLOYMENT, theirs())
    do(fake, store)
    other = theirs(metadata={"name": "other", "uid": "u-2"})
    fake.put(DEPLOYMENT, other)
    with pytest.raises(BadInput, match="has the stable release"):
        do(fake, store, deployment="other")
    found = fake.get(DEPLOYMENT, "other")
    assert found is not None
    assert "labels" not in found["metadata"]


def test_both_sides_must_answer_to_the_same_name(fake: FakeCluster, store: FolderStore) -> None:
    fake.put(DEPLOYMENT, theirs())
    with pytest.raises(BadInput, match="serves adder, sums, and clients of adder ask for lama"):
        do(fake, store, served_name="lama")
    do(fake, store, served_name="sums")


def test_a_deployment_that_is_not_there_is_not_adopted(
    fake: FakeCluster, store: FolderStore
) -> None:
    with pytest.raises(NotFound, match="no Deployment vllm in namespace serving"):
        do(fake, store)


def containers(*names: str, ports: tuple[int, ...] = (80,)) -> dict[str, Any]:
    listed = [{"name": n, "ports": [{"containerPort": p} for p in ports]} for n in names]
    return {
        "selector": {"matchLabels": {"app": "vllm"}},
        "template": {"spec": {"containers": listed}},
    }


def labelled(**labels: str) -> dict[str, Any]:
    return {"name": "vllm", "uid": "u", "labels": labels}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": labelled(**{"app.kubernetes.io/managed-by": "trainyard"})}, "own already"),
        ({"metadata": labelled(**{"trainyard.dev/model": "other"})}, "was adopted for other"),
        ({"status": {}}, "no ready pod"),
        ({"spec": {"selector": {"matchExpressions": [{}]}}}, "by expressions"),
        ({"spec": containers("a", "b")}, "has 2 containers"),
        ({"spec": containers("a", ports=(80, 81))}, "has 2 ports"),
    ],
)
def test_what_is_not_clear_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        examine(theirs(**changes), "adder", ENVIRONMENT)


def test_container_and_port_can_be_named() -> None:
    spec = containers("a", "b", ports=(80, 81))
    found = examine(theirs(spec=spec), "adder", ENVIRONMENT, container="b", port=81)
    assert (found.container, found.port, found.served_names) == ("b", 81, ())
    with pytest.raises(BadInput, match="has no container c"):
        examine(theirs(spec=spec), "adder", ENVIRONMENT, container="c")


def test_a_container_without_a_port_listens_where_vllm_does() -> None:
    found = examine(theirs(spec=containers("a", ports=())), "adder", ENVIRONMENT)
    assert found.port == 8000
