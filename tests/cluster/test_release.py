"""A whole release through Airflow on a real cluster: pods compile, measure and serve.

One platform is started for all tests of this file, and one story is played on it:

1. A first release becomes stable: its steps were pods, its server is a Deployment.
2. Clients come, through the proxy that follows the HTTPRoute. A second release is promoted through
   its canary, and no pod of it is restarted by that.
3. A server dies while the store is away: another one starts from the node's cache.
4. A person rolls back.

Airflow runs on this machine, which must reach the pods, as Airflow does in a cluster.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.data_plane import KINDS, all_ready, deployed
from tests.cluster.place import Place, away, wait_for
from tests.platform_world import (
    ENVIRONMENT,
    MODEL,
    PATIENCE_S,
    PROMOTE,
    RELEASE,
    ROLLBACK,
    SERVE_PYTHON,
    Platform,
    note,
)

from trainyard.documents.plan import plan_id_of_run
from trainyard.errors import Transient
from trainyard.kubernetes.kinds import DEPLOYMENT, EVENT, HTTP_ROUTE, LEASE, POD
from trainyard.kubernetes.labels import MODEL as MODEL_LABEL
from trainyard.kubernetes.labels import RELEASE as RELEASE_LABEL
from trainyard.kubernetes.labels import owned, route_name, server_object_name
from trainyard.platform.control import up
from trainyard.serving.kubernetes.channel_init import init_channel
from trainyard.serving.kubernetes.guard import ELECTION
from trainyard.serving.kubernetes.route import split_weights
from trainyard.signing.keys import new_local_key
from trainyard.spec.environments import Environment
from trainyard.steps.status import read_status

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

REQUESTS_PER_S = 4.0
NAME = route_name(MODEL, ENVIRONMENT)
FIRST, BETTER = "cluster-first", "cluster-better"
MISTAKEN, NO_TASK = "mistaken", "adition"
"""A model whose spec names an accuracy task that the harness does not know."""


@dataclass
class ClusterPlatform(Platform):
    """A platform whose steps and servers are pods."""

    here: Place | None = None
    proxy_url: str = ""

    def start(self) -> None:
        """Start the platform with two revisions that were trained for a moment.

        They answer in the right form, and mostly wrong: how good a model is is not the subject.
        """
        self.models.mkdir(parents=True)
        for revision, steps in (("r1", 50), ("r2", 60)):
            command = ["-m", "trainyard.demo.training", "--out", str(self.models)]
            command += ["--revisions", revision, "--steps", str(steps)]
            subprocess.run([str(SERVE_PYTHON), *command], check=True, timeout=900)
        self.address = up(self.settings, note)
        for dag_id in (RELEASE, PROMOTE, ROLLBACK):
            self.api.wait_for_dag(dag_id)

    @property
    def url(self) -> str:
        return f"{self.proxy_url}/{ENVIRONMENT}/{MODEL}"

    def ended(self, dag_id: str, run_id: str, *, timeout_s: float = 2 * PATIENCE_S) -> str:
        """Wait for the end of a run; an API server that is too busy to answer is asked again."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return super().ended(dag_id, run_id, timeout_s=deadline - time.monotonic())
            except Transient as error:
                note(str(error))

    @property
    def weights(self) -> dict[str, int]:
        assert self.here is not None
        found = self.here.cluster.get(HTTP_ROUTE, NAME, self.here.namespace)
        assert found is not None
        return {name: weight for name, weight in split_weights(found).items() if weight}

    def servers(self, release_id: str) -> list[str]:
        """Uids of a release's pods."""
        assert self.here is not None
        pods = self.here.pods({MODEL_LABEL: MODEL, RELEASE_LABEL: release_id})
        return sorted(pod["metadata"]["uid"] for pod in pods)


@pytest.fixture(scope="module")
def platform(here: Place, shared: Path) -> Iterator[ClusterPlatform]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINYARD_KUBECONFIG", str(here.kubeconfig))
        made = ClusterPlatform.make(shared / "p", hold_s=(6, 10), bake_s=5)
        made.here = here
        place = configure(here, made)
        new_local_key(made.settings)
        objects = deployed(
            here,
            {
                "TRAINYARD_STORE": made.settings.store_name,
                "TRAINYARD_ENVIRONMENTS": str(made.settings.environments),
                "TRAINYARD_S3_REGION": "",
            },
        )
        try:
            for each in objects:
                here.cluster.apply(KINDS[each["kind"]], each)
            assert place.kubernetes is not None
            init_channel(here.cluster, MODEL, ENVIRONMENT, place.kubernetes)
            made.start()
            ask_image(here, made)
            for component in ("guard", "proxy"):
                all_ready(here, component)
            made.proxy_url = here.url_of_traffic
            yield made
        finally:
            made.stop()
            made.remove()
            here.cluster.delete(HTTP_ROUTE, NAME, here.namespace)
            for name in (NAME, ELECTION):
                here.cluster.delete(LEASE, name, here.namespace)
            for each in objects:
                here.cluster.delete(KINDS[each["kind"]], each["metadata"]["name"], here.namespace)
            left, _ = here.cluster.list(DEPLOYMENT, here.namespace, labels={MODEL_LABEL: MODEL})
            for each in left:
                here.cluster.delete(DEPLOYMENT, each["metadata"]["name"], here.namespace)


def ask_image(here: Place, platform: Platform) -> None:
    """Record the toolchain of the pods' image, as docs/steps-on-kubernetes.md tells to."""
    settings = platform.settings
    inside = {
        "TRAINYARD_HOME": "/tmp/trainyard",
        "TRAINYARD_STORE": settings.store_name,
        "TRAINYARD_SERVE_PYTHON": here.serve_python,
    }
    command = [here.python, "-m", "trainyard", "toolchain", "--lane", "cpu", "--image", here.image]
    replace(here, env={**here.env, **inside}).run("toolchain", command)


def configure(here: Place, platform: Platform) -> Environment:
    """Say in the environments file where pods run; return the environment."""
    spec_file = platform.settings.catalogue / f"{MODEL}.yaml"
    spec = yaml.safe_load(spec_file.read_text())
    spec["gates"]["accuracy"]["tasks"][0] |= {"min": 0, "max_drop": 1}
    spec_file.write_text(yaml.safe_dump(spec, sort_keys=False))
    spec["model"] = MISTAKEN
    spec["gates"]["accuracy"]["tasks"] = [{"name": NO_TASK, "min": 0}]
    spec_file.with_name(f"{MISTAKEN}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    file = platform.settings.environments
    written = yaml.safe_load(file.read_text())
    small = {**here.pod_settings, "node_selector": {}}
    keys = {"TRAINYARD_TRUSTED_KEYS": str(platform.settings.trusted_keys_file)}
    environment = {
        **written["environments"][ENVIRONMENT],
        "platform": "kubernetes",
        "kubernetes": {
            **small,
            "env": {**small["env"], **keys},
            "trusted_keys": None,
            "data_plane": here.data_plane,
            "gateway": here.gateway,
            "gateway_namespace": here.gateway_namespace,
            "gateway_class": here.gateway_class,
            "node_cache": {"host_path": str(platform.settings.home / "node")},
            "server_cpu": 0.2,
            "server_memory_gib": 2,
            "stable_priority_class": None,
        },
    }
    written["environments"][ENVIRONMENT] = environment
    written["steps"] = {
        **small,
        "work_gib": 2,
        "measure_priority_class": None,
        "compile_priority_class": None,
    }
    # As JSON, which is YAML without anchors: the file may have none.
    file.write_text(json.dumps(written))
    return Environment.model_validate(environment)


# --- the story ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(platform: ClusterPlatform) -> str:
    """Chapter 1: the release that became the first stable one."""
    assert platform.release(FIRST, "r1", ENVIRONMENT)
    assert platform.ended(RELEASE, FIRST) == "success", platform.describe(RELEASE, FIRST)
    return platform.release_of(FIRST)


@dataclass(frozen=True)
class Canary:
    """What was seen of the rollout of the second release."""

    release_id: str
    pods: list[str]
    """Uids of its pods while it was the candidate."""
    shared_weights: dict[str, int]
    """Of both releases, as once seen in between."""


@pytest.fixture(scope="module")
def better(platform: ClusterPlatform, first: str) -> Canary:
    """Chapter 2: the release that was promoted through a canary."""
    assert platform.release(BETTER, "r2", ENVIRONMENT)
    platform.published(BETTER)
    release_id = platform.release_of(BETTER)
    platform.start_traffic(REQUESTS_PER_S)

    def split() -> dict[str, int]:
        weights = platform.weights
        return weights if set(weights) == {first, release_id} else {}

    weights = wait_for(
        split, "the canary", timeout_s=900, explain=lambda: platform.describe(RELEASE, BETTER)
    )
    pods = platform.servers(release_id)
    assert platform.ended(RELEASE, BETTER) == "success", platform.describe(RELEASE, BETTER)
    return Canary(release_id, pods, weights)


def test_the_steps_of_the_first_release_were_pods(
    platform: ClusterPlatform, here: Place, first: str
) -> None:
    assert platform.stable == first
    events, _ = here.cluster.list(EVENT, here.namespace)
    pods = {
        each["involvedObject"]["name"]
        for each in events
        if each["involvedObject"]["kind"] == "Pod" and each.get("reason") == "Started"
    }
    for step in ("compile", "measure"):
        assert any(name.startswith(step) for name in pods), pods
    left = here.pods(owned("step"))
    assert [pod["metadata"]["name"] for pod in left] == []
    # Its only task is a file, about which no image need be asked.
    assert platform.tasks(RELEASE, FIRST)["target_cpu.check_tasks"] == "skipped"


def test_an_unknown_accuracy_task_ends_a_release_before_a_device_is_taken(
    platform: ClusterPlatform, first: str
) -> None:
    run_id = "cluster-mistaken"
    assert platform.trigger(RELEASE, run_id, model=MISTAKEN, revision="r1")
    assert platform.ended(RELEASE, run_id) == "failed", platform.describe(RELEASE, run_id)
    tasks = platform.tasks(RELEASE, run_id)
    assert tasks["target_cpu.check_tasks"] == "failed"
    assert tasks["target_cpu.compile"] == "upstream_failed"
    plan_id = plan_id_of_run(MISTAKEN, RELEASE, run_id)
    status = read_status(platform.store, plan_id, "tasks", "cpu")
    assert status is not None
    assert f"Accuracy task {NO_TASK}: lm-evaluation-harness knows no such task." in status.reason


def test_the_first_release_serves_through_the_route(platform: ClusterPlatform, first: str) -> None:
    assert platform.weights == {first: 100}
    assert platform.ask()[1] == first
    assert len(platform.servers(first)) == 1


def test_a_promotion_moves_traffic_and_restarts_no_pod(
    platform: ClusterPlatform, first: str, better: Canary
) -> None:
    assert set(better.shared_weights) == {first, better.release_id}
    assert platform.stable == better.release_id
    assert platform.weights == {better.release_id: 100}
    assert platform.ask()[1] == better.release_id
    assert platform.servers(better.release_id) == better.pods
    assert len(better.pods) == 1
    wait_for(lambda: not platform.servers(first), "the servers of the first release to go")


def test_clients_saw_no_failure_of_it(platform: ClusterPlatform, better: Canary) -> None:
    seen = platform.stop_traffic()
    note(f"clients: {seen}")
    assert seen.errors == 0


def test_a_server_starts_again_with_the_store_away(
    platform: ClusterPlatform, here: Place, better: Canary
) -> None:
    before = platform.servers(better.release_id)
    with away(platform.settings.store_root):
        for pod in here.pods({RELEASE_LABEL: better.release_id}):
            here.cluster.delete(POD, pod["metadata"]["name"], here.namespace)
        wait_for(lambda: platform.servers(better.release_id) not in ([], before), "another server")
        wait_for(lambda: answers(platform) == better.release_id, "an answer", timeout_s=600)


def test_a_person_rolls_back(platform: ClusterPlatform, first: str, better: Canary) -> None:
    assert platform.trigger(ROLLBACK, "cluster-back", model=MODEL, reason="a test")
    assert platform.ended(ROLLBACK, "cluster-back") == "success", platform.describe(
        ROLLBACK, "cluster-back"
    )
    assert platform.stable == first
    assert platform.weights == {first: 100}
    assert platform.ask()[1] == first
    name = server_object_name(ENVIRONMENT, first)
    assert platform.here is not None
    assert platform.here.cluster.get(DEPLOYMENT, name, platform.here.namespace)


def answers(platform: ClusterPlatform) -> Any:
    """Return which release answers; empty if none does."""
    import httpx

    try:
        return platform.ask()[1]
    except httpx.HTTPError:
        return ""
