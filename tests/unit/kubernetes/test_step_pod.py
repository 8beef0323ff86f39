"""The pod of a step: its manifest line by line, and what is refused before there is one."""

from __future__ import annotations

import copy
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.unit.kubernetes.step_work import (
    BYTES_OF_8B,
    NOW,
    PODS,
    environment,
    place,
    rendered,
    target,
    work,
)

from trainyard.errors import BadInput
from trainyard.kubernetes.step_env import check_signing, step_environment
from trainyard.kubernetes.step_pod import (
    Object,
    claim_template,
    place_warnings,
    secret_name,
    secret_object,
    step_pod,
)
from trainyard.kubernetes.step_size import CLASSES, class_of, size_of
from trainyard.settings import Settings

MINORS = ("1.34", "1.35", "1.36")
GOLDEN = Path(__file__).parent / "pods"


def pod(place_: Any = None, **how: Any) -> Object:
    """Return the pod of a compile on the native lane with something changed."""
    step, lane = how.pop("step", "compile"), how.pop("lane", "neuron-native")
    now, secret = how.pop("now", NOW), how.pop("secret", "")
    return step_pod(
        work(step, lane, **how),
        place_ or place(),
        env=environment(step),
        secret=secret,
        now=now,
    )


def container(manifest: Object) -> Any:
    return manifest["spec"]["containers"][0]


def variables(manifest: Object) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(manifest)["env"]}


@pytest.mark.parametrize("name", PODS)
def test_the_pod_is_the_golden_one(name: str) -> None:
    step, lane, changes = PODS[name]
    golden = yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())
    assert rendered(step, lane, **changes) == golden


def test_there_is_no_golden_file_of_nothing() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == {*PODS, "claim-of-8-devices"}


@pytest.mark.parametrize("minor", MINORS)
@pytest.mark.parametrize("name", PODS)
def test_the_schemas_of_three_minors_take_it(name: str, minor: str) -> None:
    step, lane, changes = PODS[name]
    kubernetes_validate.validate(rendered(step, lane, **changes), minor, strict=True)


@pytest.mark.parametrize("minor", MINORS)
def test_the_schemas_would_notice_a_mistake(minor: str) -> None:
    broken = copy.deepcopy(rendered("download"))
    broken["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, minor, strict=True)


class TestDevices:
    def test_a_whole_node_needs_no_scheduler_of_its_own(self) -> None:
        whole = pod(target=target("neuron-native", tensor_parallel_size=64))
        assert "schedulerName" not in whole["spec"]
        assert container(whole)["resources"]["limits"] == {"aws.amazon.com/neuron": "16"}

    def test_a_part_of_a_node_without_a_scheduler_is_warned_about(self) -> None:
        alone = place(scheduler_name=None)
        assert "schedulerName" not in pod(alone)["spec"]
        (warning,) = place_warnings(work("compile", "neuron-native"), alone)
        assert "2 of the 16 devices" in warning
        assert "scheduler_name" in warning

    @pytest.mark.parametrize("size", [4, 64])
    def test_one_device_and_all_of_them_need_no_warning(self, size: int) -> None:
        one = work("compile", target=target("neuron-native", tensor_parallel_size=size))
        assert list(place_warnings(one, place(scheduler_name=None))) == []

    def test_a_claim_takes_the_place_of_the_resource(self) -> None:
        eight = target("neuron-native", tensor_parallel_size=32)
        claimed = pod(place(devices="dra"), target=eight)
        resources = container(claimed)["resources"]
        assert resources["claims"] == [{"name": "neurons"}]
        assert "limits" not in resources
        assert claimed["spec"]["resourceClaims"] == [
            {
                "name": "neurons",
                "resourceClaimTemplateName": "trainyard-trn2-48xlarge-8-lnc2",
            }
        ]
        for minor in MINORS:
            kubernetes_validate.validate(claimed, minor, strict=True)

    def test_the_template_of_the_claim_is_the_golden_one(self) -> None:
        eight = work("compile", target=target("neuron-native", tensor_parallel_size=32))
        assert eight.devices is not None
        made = claim_template(eight.devices, place(devices="dra"))
        assert made == yaml.safe_load((GOLDEN / "claim-of-8-devices.yaml").read_text())
        for minor in MINORS:
            kubernetes_validate.validate(made, minor, strict=True)

    def test_a_claim_says_which_logical_cores_it_wants_if_they_are_not_usual(self) -> None:
        changed = target("neuron-native", tensor_parallel_size=128, neuron__lnc=1)
        devices = work("compile", target=changed).devices
        assert devices is not None
        spec = claim_template(devices, place(devices="dra"))["spec"]["spec"]["devices"]
        assert spec["requests"][0]["exactly"]["allocationMode"] == "All"
        assert spec["config"][0]["opaque"]["parameters"]["logicalNeuronCore"] == 1

    @pytest.mark.parametrize("step", ["download", "gate", "publish"])
    def test_other_steps_take_no_device(self, step: str) -> None:
        manifest = pod(step=step)
        assert "limits" not in container(manifest)["resources"]
        assert manifest["spec"]["tolerations"] == []
        assert manifest["spec"]["nodeSelector"] == {}


class TestSizes:
    @pytest.mark.parametrize(
        ("gigabytes", "name"),
        [(0, "small"), (3, "small"), (16, "medium"), (70, "large"), (141, "huge")],
    )
    def test_the_checkpoint_says_which_class(self, gigabytes: int, name: str) -> None:
        assert class_of(gigabytes * 10**9).name == name

    def test_larger_classes_ask_for_more(self) -> None:
        memories = [each.memory_gib for each in CLASSES]
        assert memories == sorted(memories)

    def test_each_lack_of_memory_doubles_what_is_asked_for(self) -> None:
        found = [
            container(pod(out_of_memory=count))["resources"]["requests"]["memory"]
            for count in range(5)
        ]
        # A trn2.48xlarge has 2 TiB; two of its sixteen chips are given an eighth of 85 %.
        assert found == ["96Gi", "192Gi", "217Gi", "217Gi", "217Gi"]

    def test_no_pod_asks_for_more_than_its_node_has(self) -> None:
        small = target("neuron-nxdi", instance="inf2.8xlarge", tensor_parallel_size=2)
        size = size_of(
            "compile", small, checkpoint_bytes=BYTES_OF_8B, work_gib=100, out_of_memory=3
        )
        assert size.memory_gib == 108
        assert size.cpus == 6

    def test_the_disk_holds_the_checkpoint(self) -> None:
        size = size_of(
            "measure", target("neuron-native"), checkpoint_bytes=140 * 10**9, work_gib=100
        )
        assert size.disk_gib > 140

    def test_a_server_on_the_cpu_has_room_for_weights_and_cache(self) -> None:
        cpu = target("cpu", kv_cache_gib=8)
        size = size_of("measure", cpu, checkpoint_bytes=4 << 30, work_gib=1)
        assert size.memory_gib == 4 + 2 * 4 + 8
        assert size.shm_gib == 1

    @pytest.mark.parametrize(("lane", "alone_gib"), [("cpu", 4 + 2 * 4 + 1), ("neuron-native", 32)])
    def test_the_parity_reference_needs_memory_beside_the_server(
        self, lane: str, alone_gib: int
    ) -> None:
        def asked(step: str, reference_gib: float) -> int:
            one = target(lane, kv_cache_gib=1) if lane == "cpu" else target(lane)
            return size_of(
                step,
                one,
                checkpoint_bytes=4 << 30,
                work_gib=1,
                reference_gib=reference_gib,
            ).memory_gib

        assert asked("measure", 0.0) == alone_gib
        assert asked("measure", 10.6) == alone_gib + 11
        assert asked("compile", 10.6) == asked("compile", 0.0), "a compile makes no reference"


class TestReservations:
    BLOCK = "cr-0123456789abcdef0"

    def block(self, hours: float, **more: Any) -> Any:
        ends = NOW + timedelta(hours=hours)
        return {
            "id": self.BLOCK,
            "instance": "trn2.48xlarge",
            "ends_at": ends.isoformat(),
            **more,
        }

    def test_pods_go_to_the_nodes_of_the_reservation(self) -> None:
        manifest = pod(place(reservations=[self.block(48)]))
        assert manifest["spec"]["nodeSelector"] == {
            "node.kubernetes.io/instance-type": "trn2.48xlarge",
            "karpenter.k8s.aws/capacity-reservation-id": self.BLOCK,
        }
        assert manifest["spec"]["activeDeadlineSeconds"] == 6 * 3600

    def test_the_pod_ends_an_hour_before_the_block_does(self) -> None:
        manifest = pod(place(reservations=[self.block(5)]))
        assert manifest["spec"]["activeDeadlineSeconds"] == 4 * 3600

    def test_work_that_cannot_end_in_time_is_refused(self) -> None:
        with pytest.raises(BadInput) as refused:
            pod(place(reservations=[self.block(2.5)]))
        assert "may need 2.0 h" in refused.value.message
        assert f"Capacity Block {self.BLOCK}" in refused.value.message
        assert "only 1.5 h are left" in refused.value.message
        assert "Extend the block" in refused.value.hint

    def test_a_block_that_is_over_is_refused(self) -> None:
        with pytest.raises(BadInput, match=r"only 0\.0 h are left"):
            pod(place(reservations=[self.block(-3)]))

    def test_the_reservation_that_lasts_longest_is_taken(self) -> None:
        other = self.block(90, id="cr-fedcba98")
        endless = {"id": "cr-00000000", "instance": "trn2.48xlarge"}
        for first in ([self.block(48), other], [other, self.block(48)]):
            chosen = pod(place(reservations=first))["spec"]["nodeSelector"]
            assert chosen["karpenter.k8s.aws/capacity-reservation-id"] == "cr-fedcba98"
        chosen = pod(place(reservations=[other, endless]))["spec"]["nodeSelector"]
        assert chosen["karpenter.k8s.aws/capacity-reservation-id"] == "cr-00000000"

    def test_a_reservation_of_other_instances_changes_nothing(self) -> None:
        other = self.block(0.1, instance="trn1.32xlarge")
        assert pod(place(reservations=[other])) == pod()


class TestPlace:
    def test_the_targets_image_serves_and_the_steps_image_does_the_rest(self) -> None:
        own = target("neuron-native").neuron
        assert own is not None
        assert container(pod(step="measure"))["image"] == own.image
        assert variables(pod(step="measure"))["TRAINYARD_IMAGE"] == own.image
        assert container(pod(step="publish"))["image"] == place().image

    def test_without_any_image_it_is_refused(self) -> None:
        with pytest.raises(BadInput, match="No image is named for step compile of target cpu"):
            pod(place(image=""), lane="cpu")

    def test_a_store_that_no_pod_sees_is_refused(self) -> None:
        env = {**environment("compile"), "TRAINYARD_STORE": "/srv/store"}
        with pytest.raises(BadInput, match="/srv/store is a folder that no pod sees"):
            step_pod(work("compile", "cpu"), place(), env=env, now=NOW)

    @pytest.mark.parametrize(("read_only", "good"), [(False, True), (True, False)])
    def test_a_store_on_a_mount_is_seen_if_it_can_be_written(
        self, read_only: bool, good: bool
    ) -> None:
        env = {**environment("compile"), "TRAINYARD_STORE": "/srv/yard/store"}
        mount = {"host_path": "/data", "mount_path": "/srv/yard", "read_only": read_only}
        there = place(host_mounts=[mount])
        if not good:
            with pytest.raises(BadInput, match="no pod sees"):
                step_pod(work("compile", "cpu"), there, env=env, now=NOW)
            return
        manifest = step_pod(work("compile", "cpu"), there, env=env, now=NOW)
        assert {"name": "host-0", "hostPath": {"path": "/data"}} in manifest["spec"]["volumes"]

    def test_what_the_place_adds(self) -> None:
        rich = place(
            env={"TRAINYARD_S3_REGION": "eu-west-1", "EXTRA": "1"},
            env_from_secrets=[{"name": "s3-keys", "optional": True}],
            image_pull_secrets=["registry"],
            image_pull_policy="Never",
            node_selector={"disk": "nvme"},
            tolerations=[
                {"key": "team", "operator": "Equal", "value": "ml", "effect": "NoExecute"}
            ],
            serve_python="/opt/vllm/bin/python",
            measure_priority_class=None,
            service_accounts={},
        )
        manifest = pod(rich, step="measure", lane="cpu", secret="trainyard-step-1")
        spec, got = manifest["spec"], variables(manifest)
        assert (got["TRAINYARD_S3_REGION"], got["EXTRA"]) == ("eu-west-1", "1")
        assert got["TRAINYARD_SERVE_PYTHON"] == "/opt/vllm/bin/python"
        assert container(manifest)["envFrom"] == [
            {"secretRef": {"name": "s3-keys", "optional": True}},
            {"secretRef": {"name": "trainyard-step-1"}},
        ]
        assert container(manifest)["imagePullPolicy"] == "Never"
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        assert spec["nodeSelector"] == {"disk": "nvme"}
        assert spec["tolerations"] == [
            {"key": "team", "operator": "Equal", "value": "ml", "effect": "NoExecute"}
        ]
        assert "priorityClassName" not in spec
        assert spec["serviceAccountName"] == "trainyard-steps"
        for minor in MINORS:
            kubernetes_validate.validate(manifest, minor, strict=True)

    def test_names_fit_kubernetes_however_long_they_are(self) -> None:
        long = pod(plan_id="m" * 40 + "-0123456789ab")
        assert len(long["metadata"]["name"]) <= 50
        for minor in MINORS:
            kubernetes_validate.validate(long, minor, strict=True)

    def test_nodes_whose_devices_failed_are_avoided(self) -> None:
        manifest = pod(avoided_nodes=("ip-1", "ip-2"))
        (term,) = manifest["spec"]["affinity"]["nodeAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]["nodeSelectorTerms"]
        assert term["matchExpressions"] == [
            {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["ip-1", "ip-2"]}
        ]
        for minor in MINORS:
            kubernetes_validate.validate(manifest, minor, strict=True)


class TestEnvironment:
    def test_paths_and_secrets_of_this_machine_stay_here(self) -> None:
        settings = Settings(
            store="s3://yard/x",
            hub_token="hf_secret",
            signing_key="c2VjcmV0",
            registry_password="secret",
            s3_profile="mine",
            s3_timeout_s=7.5,
            s3_bucket_key=False,
        )
        env = step_environment(settings, step="publish", dag_run="d/r", requested_by="")
        assert "secret" not in json.dumps(env).lower().replace("c2vjcmv0", "secret")
        assert env == {
            "TRAINYARD_STORE": "s3://yard/x",
            "TRAINYARD_DAG_RUN": "d/r",
            "TRAINYARD_REQUESTED_BY": "",
            "TRAINYARD_S3_TIMEOUT_S": "7.5",
            "TRAINYARD_S3_BUCKET_KEY": "false",
        }

    def test_it_says_the_same_to_the_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = Settings(store="s3://yard/x", s3_bucket_key=False, step_lock_s=90.0)
        env = step_environment(given, step="compile", dag_run="d/r", requested_by="ada")
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        there = Settings()
        assert (there.store_name, there.s3_bucket_key) == ("s3://yard/x", False)
        assert (there.step_lock_s, there.dag_run, there.requested_by) == (90.0, "d/r", "ada")

    def test_only_publishing_learns_of_the_signing_key(self) -> None:
        settings = Settings(store="s3://yard/x", signing_kms_key="alias/x")
        found = {
            step: "TRAINYARD_SIGNING_KMS_KEY"
            in step_environment(settings, step=step, dag_run="", requested_by="")
            for step in ("download", "compile", "measure", "publish")
        }
        assert found == {"download": False, "compile": False, "measure": False, "publish": True}

    def test_a_pod_that_would_sign_with_a_key_of_its_own_is_refused(self) -> None:
        with pytest.raises(BadInput, match="no key to sign with"):
            check_signing({}, secrets=False)
        check_signing({"TRAINYARD_SIGNING_KMS_KEY": "alias/x"}, secrets=False)
        check_signing({}, secrets=True)


class TestSecrets:
    def test_a_secret_holds_what_the_manifest_may_not(self) -> None:
        made = secret_object("trainyard-step-1", place(), {"TRAINYARD_HUB_TOKEN": "hf_x"})
        assert made["stringData"] == {"TRAINYARD_HUB_TOKEN": "hf_x"}
        for minor in MINORS:
            kubernetes_validate.validate(made, minor, strict=True)
        assert "hf_x" not in json.dumps(pod(secret="trainyard-step-1"))

    def test_each_task_has_one_and_each_try_the_same(self) -> None:
        names = {
            secret_name(run, task)
            for run in ("neuron_release/a", "neuron_release/b")
            for task in ("download/", "target.compile/trn2", "target.compile/trn2")
        }
        assert len(names) == 4
        assert all(name.startswith("trainyard-step-") for name in names)


def test_a_moment_without_a_time_zone_is_no_end_of_a_block() -> None:
    block = {"id": "cr-01234567", "instance": "trn2.48xlarge", "ends_at": "2026-11-27T12:00:00"}
    with pytest.raises(ValueError, match="timezone"):
        place(reservations=[block])
