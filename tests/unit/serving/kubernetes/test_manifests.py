"""What is applied for a release: golden files, Kubernetes' schemas, and what must never be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.unit.serving.kubernetes.serving_cases import (
    ENVIRONMENT,
    SETTINGS,
    TARGETS,
    place,
    release,
)

from trainyard.errors import BadInput
from trainyard.kubernetes.client import Object
from trainyard.serving.kubernetes.manifests import (
    RESTORE,
    SERVER,
    ServerManifests,
    server_manifests,
    template_digest,
)
from trainyard.settings import Settings

GOLDEN = Path(__file__).parent / "golden"
MINORS = ("1.35", "1.36", "1.37")
LANES = tuple(TARGETS)


def rendered(lane: str, replicas: int = 2, **changes: Any) -> ServerManifests:
    where = place(lane, **changes)
    return server_manifests(
        release(lane),
        ENVIRONMENT,
        where,
        replicas,
        SETTINGS,
        capacity="surge" if lane == "cpu" else "replace",
        priority_class=where.stable_priority_class,
    )


def pod(lane: str, **changes: Any) -> Object:
    spec: Object = rendered(lane, **changes).deployment["spec"]["template"]["spec"]
    return spec


def container(spec: Object, name: str) -> Object:
    every = [*spec["initContainers"], *spec["containers"]]
    return next(each for each in every if each["name"] == name)


@pytest.mark.parametrize("lane", LANES)
def test_the_objects_are_those_of_the_golden_file(lane: str) -> None:
    golden = list(yaml.safe_load_all((GOLDEN / f"{lane}.yaml").read_text()))
    assert json.loads(json.dumps(rendered(lane).objects)) == golden


@pytest.mark.parametrize("minor", MINORS)
@pytest.mark.parametrize("lane", LANES)
def test_three_minor_versions_of_kubernetes_take_them(lane: str, minor: str) -> None:
    for each in rendered(lane).objects:
        kubernetes_validate.validate(each, minor, strict=True)


@pytest.mark.parametrize("lane", LANES)
def test_only_the_number_of_servers_differs_between_sizes(lane: str) -> None:
    one, two = rendered(lane, 1).deployment, rendered(lane, 2).deployment
    assert (one["spec"].pop("replicas"), two["spec"].pop("replicas")) == (1, 2)
    assert one == two


@pytest.mark.parametrize("lane", LANES)
def test_no_part_says_which_role_a_release_has(lane: str) -> None:
    said = json.dumps(rendered(lane, stable_priority_class="important").objects)
    assert "stable" not in said
    assert "candidate" not in said


@pytest.mark.parametrize("lane", LANES)
def test_the_server_has_neither_secrets_nor_credentials(lane: str) -> None:
    secrets = [{"name": "login"}, {"name": "more", "optional": True}]
    template = rendered(lane, env_from_secrets=secrets).deployment["spec"]["template"]
    restore = container(template["spec"], RESTORE)
    assert [each["secretRef"]["name"] for each in restore["envFrom"]] == ["login", "more"]
    assert "envFrom" not in container(template["spec"], SERVER)
    skipped = template["metadata"]["annotations"]["eks.amazonaws.com/skip-containers"]
    assert SERVER in skipped.split(",")
    assert template["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("lane", LANES)
def test_settings_that_are_secret_are_in_no_object(lane: str) -> None:
    settings = Settings(
        store="s3://b/p",
        signing_key="c2lnbmluZw==",  # type: ignore[arg-type]
        registry_password="hunter2",  # type: ignore[arg-type]
        hub_token="hf_token",  # type: ignore[arg-type]
    )
    said = json.dumps(
        server_manifests(release(lane), ENVIRONMENT, place(lane), 1, settings).objects
    )
    assert not [word for word in ("c2lnbmluZw", "hunter2", "hf_token") if word in said]


@pytest.mark.parametrize("lane", LANES)
def test_the_pod_outlives_its_drain(lane: str) -> None:
    spec = pod(lane)
    hook = container(spec, SERVER)["lifecycle"]["preStop"]["exec"]["command"]
    waits = dict(word.removeprefix("--").split("=") for word in hook if word.startswith("--"))
    least_s = float(waits["settle-s"]) + float(waits["timeout-s"])
    assert spec["terminationGracePeriodSeconds"] > least_s >= SETTINGS.drain_timeout_s


def test_a_start_may_take_as_long_as_its_lane_says() -> None:
    def window(lane: str) -> int:
        probe = container(pod(lane), SERVER)["startupProbe"]
        return int(probe["periodSeconds"]) * int(probe["failureThreshold"])

    assert window("neuron-native") == 900
    assert window("cpu") == 600


def test_another_scheduler_takes_only_pods_that_take_a_part_of_a_node() -> None:
    assert pod("neuron-native", scheduler_name="mine")["schedulerName"] == "mine"
    assert "schedulerName" not in pod("neuron-nxdi", scheduler_name="mine")
    assert "schedulerName" not in pod("cpu", scheduler_name="mine")


def test_a_server_of_the_cpu_lane_asks_for_no_device_and_no_node() -> None:
    spec = pod("cpu")
    assert "nodeSelector" not in spec
    assert "tolerations" not in spec
    assert "limits" not in container(spec, SERVER)["resources"]


def test_an_environment_can_say_how_much_a_server_asks_for() -> None:
    spec = pod("neuron-native", server_cpu=2.5, server_memory_gib=100)
    requests = container(spec, SERVER)["resources"]["requests"]
    assert (requests["cpu"], requests["memory"]) == ("2.5", "100Gi")


def test_with_a_node_cache_weights_are_read_only_and_the_rest_of_the_node_out_of_sight() -> None:
    mounts = container(pod("neuron-native"), SERVER)["volumeMounts"]
    own = [each for each in mounts if each["name"] == "node"]
    assert all(each["subPathExpr"].startswith("pods/$(POD_UID)") for each in own)
    assert [each["mountPath"] for each in own if each.get("readOnly")] == ["/release/model"]


def test_a_user_other_than_root_gets_the_folder_of_the_node() -> None:
    spec = pod("neuron-native", run_as_user=1000)
    assert spec["securityContext"]["runAsNonRoot"] is True
    own = container(spec, "own-folder")
    assert own["command"] == ["chown", "1000:1000", "/node"]
    assert own["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert spec["initContainers"][0] == own


@pytest.mark.parametrize("lane", LANES)
def test_no_container_may_gain_rights(lane: str) -> None:
    spec = pod(lane)
    for each in (*spec["initContainers"], *spec["containers"]):
        assert each["securityContext"]["allowPrivilegeEscalation"] is False
        assert each["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_the_only_server_of_a_release_is_not_evicted() -> None:
    assert rendered("cpu", 1).disruption_budget["spec"]["maxUnavailable"] == 0
    assert rendered("cpu", 3).disruption_budget["spec"]["maxUnavailable"] == 1


def test_what_looks_like_a_variable_of_kubernetes_is_left_alone() -> None:
    spec = pod("cpu", env={"GREETING": "$(POD_UID)"})
    values = {each["name"]: each.get("value") for each in container(spec, SERVER)["env"]}
    assert values["GREETING"] == "$$(POD_UID)"


def test_the_lane_has_the_last_word_about_its_own_variables() -> None:
    spec = pod("neuron-native", env={"VLLM_CACHE_ROOT": "/elsewhere", "MORE": "1"})
    values = {each["name"]: each.get("value") for each in container(spec, SERVER)["env"]}
    assert (values["VLLM_CACHE_ROOT"], values["MORE"]) == ("/release/cache", "1")


def test_without_an_image_nothing_is_rendered() -> None:
    with pytest.raises(BadInput, match="no image for servers of target cpu"):
        rendered("cpu", image="")


def test_a_store_that_no_pod_sees_is_refused(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with pytest.raises(BadInput, match="is a folder that no server's pod sees"):
        server_manifests(release("neuron-nxdi"), ENVIRONMENT, place("neuron-nxdi"), 1, settings)


def test_an_instance_without_known_devices_is_refused() -> None:
    made = release("neuron-native")
    target = made.target.model_copy(update={"instance": "trn9.large"})
    with pytest.raises(BadInput, match="not in Trainyard's table"):
        server_manifests(
            made.model_copy(update={"target": target}),
            ENVIRONMENT,
            place("neuron-native"),
            1,
            SETTINGS,
        )


def test_a_template_s_digest_is_no_number_in_yaml() -> None:
    found = template_digest({"a": 1})
    assert yaml.safe_load(f"digest: {found}") == {"digest": found}
    assert found != template_digest({"a": 2})
