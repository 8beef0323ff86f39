"""The servers of a release as pods of a real cluster, with real vLLM on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.place import Place, away, wait_for
from tests.cluster.releases import MODEL, TARGET, Yard

from trainyard.documents.release import Release
from trainyard.errors import BadInput
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import DEPLOYMENT, DISRUPTION_BUDGET, POD, SERVICE, Kind
from trainyard.kubernetes.labels import MODEL as MODEL_LABEL
from trainyard.kubernetes.labels import RELEASE, server_object_name
from trainyard.serving.kubernetes.host import KubernetesHost
from trainyard.serving.protocol import ServerStatus
from trainyard.signing.keys import new_local_key
from trainyard.spec.environments import Environment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

ENVIRONMENT = "staging"
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
ASK = """
import json, sys, urllib.request
body = {"model": sys.argv[2], "prompt": "12+34=", "max_tokens": 6, "ignore_eos": True}
request = urllib.request.Request(
    sys.argv[1] + "/v1/completions",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@pytest.fixture(scope="module")
def yard(here: Place, shared: Path) -> Yard:
    """A home and a store; the cluster knows whose signatures count."""
    made = Yard.make(here, shared / "host")
    made.train("r1")
    new_local_key(made.settings)
    keys = made.settings.trusted_keys_file.read_text()
    here.cluster.apply(
        CONFIG_MAP,
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "trainyard-trusted-keys", "namespace": here.namespace},
            "data": {"trusted-keys.json": keys},
        },
    )
    return made


@pytest.fixture(scope="module")
def release(yard: Yard) -> Release:
    return yard.release("r1")


def environment(yard: Yard, **changes: object) -> Environment:
    """Return an environment whose pods fit on a small node."""
    place = {
        **yard.here.pod_settings,
        "node_cache": {"host_path": str(yard.settings.home / "node")},
        "server_cpu": 0.2,
        "server_memory_gib": 2,
        "stable_priority_class": None,
        **changes,
    }
    return Environment.model_validate(
        {"platform": "kubernetes", "target": TARGET, "kubernetes": place}
    )


def host_of(yard: Yard, **changes: object) -> KubernetesHost:
    return KubernetesHost(yard.settings, {ENVIRONMENT: environment(yard, **changes)})


@pytest.fixture
def host(yard: Yard, release: Release) -> Iterator[KubernetesHost]:
    made = host_of(yard)
    yield made
    made.remove(ENVIRONMENT, release.release_id)
    gone(yard, release)


def gone(yard: Yard, release: Release) -> None:
    """Wait until nothing of a release is left in the cluster."""
    place = yard.here
    name = server_object_name(ENVIRONMENT, release.release_id)

    def left() -> list[str]:
        found = [
            kind.name
            for kind in (DEPLOYMENT, SERVICE, DISRUPTION_BUDGET)
            if place.cluster.get(kind, name, place.namespace)
        ]
        pods, _ = place.cluster.list(POD, place.namespace, labels={RELEASE: release.release_id})
        return [*found, *(pod["metadata"]["name"] for pod in pods)]

    wait_for(lambda: not left(), f"{name} to go", explain=left)


def ready(host: KubernetesHost, count: int) -> list[ServerStatus]:
    """Wait until so many servers are ready, and there are no others."""

    def servers() -> list[ServerStatus]:
        found = list(host.servers(ENVIRONMENT, MODEL))
        all_ready = [server.state for server in found] == ["ready"] * count
        return found if all_ready else []

    return wait_for(
        servers,
        f"{count} ready servers",
        timeout_s=600,
        explain=lambda: host.servers(ENVIRONMENT, MODEL),
    )


def pods_of(yard: Yard) -> list[Object]:
    return yard.here.pods({MODEL_LABEL: MODEL})


def test_a_release_is_deployed_asked_scaled_and_removed(
    yard: Yard, release: Release, host: KubernetesHost
) -> None:
    host.deploy(ENVIRONMENT, release, 1)
    (server,) = ready(host, 1)
    assert server.release_id == release.release_id
    answer = json.loads(yard.here.run("ask", [yard.here.python, "-c", ASK, server.url, MODEL]))
    assert answer["model"] == MODEL
    assert answer["usage"]["completion_tokens"] == 6

    (pod,) = pods_of(yard)
    host.deploy(ENVIRONMENT, release, 1)
    assert [each["metadata"]["uid"] for each in pods_of(yard)] == [pod["metadata"]["uid"]]
    name = server_object_name(ENVIRONMENT, release.release_id)
    deployment = yard.here.cluster.get(DEPLOYMENT, name, yard.here.namespace)
    assert deployment is not None
    assert deployment["metadata"]["generation"] == 1

    host.deploy(ENVIRONMENT, release, 2)
    first, second = ready(host, 2)
    assert first.url != second.url
    assert pod["metadata"]["uid"] in [each["metadata"]["uid"] for each in pods_of(yard)]
    host.deploy(ENVIRONMENT, release, 1)
    ready(host, 1)

    folders = Path(yard.settings.home / "node" / "pods")
    (left,) = pods_of(yard)
    assert (folders / left["metadata"]["uid"]).is_dir()
    host.remove(ENVIRONMENT, release.release_id)
    gone(yard, release)
    assert list(folders.iterdir()) == []


def test_a_server_starts_again_with_the_store_down(
    yard: Yard, release: Release, host: KubernetesHost
) -> None:
    host.deploy(ENVIRONMENT, release, 1)
    ready(host, 1)
    (pod,) = pods_of(yard)
    with away(yard.settings.store_root):
        yard.here.cluster.delete(POD, pod["metadata"]["name"], yard.here.namespace)

        def another() -> bool:
            return [each["metadata"]["uid"] for each in pods_of(yard)] not in (
                [],
                [pod["metadata"]["uid"]],
            )

        wait_for(another, "another pod")
        ready(host, 1)


def test_a_server_that_gets_no_node_says_so(yard: Yard, release: Release) -> None:
    host = host_of(yard, node_selector={"trainyard.test/none": "true"})
    host.deploy(ENVIRONMENT, release, 1)
    try:
        reason = wait_for(lambda: why(host, "starting", "didn't match"), "the reason")
        assert "node" in reason
    finally:
        host.remove(ENVIRONMENT, release.release_id)
        gone(yard, release)


def test_an_image_that_the_node_does_not_have_is_named(yard: Yard, release: Release) -> None:
    host = host_of(yard, image="trainyard.test/nobody-has-this:1", image_pull_policy="Never")
    host.deploy(ENVIRONMENT, release, 1)
    try:
        wait_for(
            lambda: why(host, "failed", "nobody-has-this"),
            "the reason",
            explain=lambda: host.servers(ENVIRONMENT, MODEL),
        )
    finally:
        host.remove(ENVIRONMENT, release.release_id)
        gone(yard, release)


def test_a_release_whose_key_nobody_trusts_is_not_served(
    yard: Yard, release: Release, tmp_path: Path
) -> None:
    host = host_of(yard, trusted_keys="nobody-made-this")
    host.deploy(ENVIRONMENT, release, 1)
    try:
        wait_for(
            lambda: why(host, "failed", "trust"),
            "the reason",
            explain=lambda: host.servers(ENVIRONMENT, MODEL),
        )
    finally:
        host.remove(ENVIRONMENT, release.release_id)
        gone(yard, release)


def test_a_deployment_of_somebody_else_is_left_alone(yard: Yard, release: Release) -> None:
    place = yard.here
    name = server_object_name(ENVIRONMENT, release.release_id)
    labels = {"app": "theirs"}
    theirs = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": place.namespace},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "x", "image": "x"}]},
            },
        },
    }
    place.cluster.create(DEPLOYMENT, theirs)
    try:
        with pytest.raises(BadInput, match="is not Trainyard's"):
            host_of(yard).deploy(ENVIRONMENT, release, 1)
        with pytest.raises(BadInput, match="is not Trainyard's"):
            host_of(yard).remove(ENVIRONMENT, release.release_id)
        found = place.cluster.get(DEPLOYMENT, name, place.namespace)
        assert found is not None
        assert found["metadata"]["generation"] == 1
    finally:
        place.cluster.delete(DEPLOYMENT, name, place.namespace)
        gone(yard, release)


def why(host: KubernetesHost, state: str, part: str) -> str:
    """Return why the one server is in a state, once it says so."""
    for server in host.servers(ENVIRONMENT, MODEL):
        if server.state == state and part in server.message:
            return server.message
    return ""
