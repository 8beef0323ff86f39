"""Steps and a place to render pods for: each lane on the kind of instance that it is meant for."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tests.unit.lanes.neuron_targets import BASES, changed

from trainyard.kubernetes.step_env import step_environment
from trainyard.kubernetes.step_pod import Object, StepWork, step_pod
from trainyard.settings import Settings
from trainyard.spec.kubernetes import KubernetesSteps
from trainyard.spec.model import Target

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
REGISTRY = "public.ecr.aws/neuron/pytorch-inference-vllm-neuronx"
IMAGES = {
    "neuron-native": f"{REGISTRY}:0.24.0.1.1.0-neuronx-py313-sdk2.32.0-ubuntu24.04",
    "neuron-nxdi": f"{REGISTRY}:0.13.0-neuronx-py312-sdk2.28.1-ubuntu24.04",
}
BYTES_OF_8B = 16_060_522_240
REFERENCE_GIB_OF_8B = 36.9
"""In float32, with what comes on top (`trainyard.references.reference_gib`)."""

PLACE: dict[str, Any] = {
    "namespace": "trainyard-steps",
    "image": "registry.example/trainyard@sha256:" + "0" * 64,
    "python": "python3",
    "service_accounts": {
        step: f"trainyard-{step}" for step in ("download", "compile", "measure", "publish")
    },
    "scheduler_name": "my-scheduler",
    "slots": {"cpu": 2, "trn2": 1, "inf2": 1},
}


def place(**changes: Any) -> KubernetesSteps:
    """Return the place with some settings changed."""
    return KubernetesSteps.model_validate({**PLACE, **changes})


def target(lane: str, **changes: Any) -> Target:
    """Return the lane's target, in its image; double underscores stand for dots."""
    own = {"neuron.image": IMAGES[lane]} if lane in IMAGES else {}
    own |= {name.replace("__", "."): value for name, value in changes.items()}
    return changed(BASES[lane], own)


def work(step: str, lane: str = "", **changes: Any) -> StepWork:
    """Return the work of a step, for a lane's target if the step has one."""
    values: dict[str, Any] = {
        "step": step,
        "plan_id": "llama-3-8b-4f1d2c3b4a59",
        "model": "llama-3-8b",
        "target": target(lane) if lane else None,
        "checkpoint_bytes": BYTES_OF_8B,
        **changes,
    }
    return StepWork(**values)


def environment(step: str) -> Mapping[str, str]:
    """Return the variables of an installation on EKS."""
    settings = Settings(
        store="s3://yard/trainyard",
        s3_region="us-west-2",
        signing_kms_key="alias/trainyard-release",
    )
    return step_environment(
        settings, step=step, dag_run="neuron_release/manual-1", requested_by="ada"
    )


def rendered(step: str, lane: str = "", **changes: Any) -> Object:
    """Return the pod of a step in the place as it is."""
    return step_pod(work(step, lane, **changes), place(), env=environment(step), now=NOW)


PODS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "download": ("download", "", {}),
    "native-tasks": ("tasks", "neuron-native", {}),
    "cpu-compile": ("compile", "cpu", {"checkpoint_bytes": 1_200_000}),
    "cpu-measure": ("measure", "cpu", {"checkpoint_bytes": 1_200_000}),
    "native-compile": ("compile", "neuron-native", {}),
    "native-compile-on-cpu": (
        "compile",
        "neuron-native",
        {"target": target("neuron-native", neuron__compile_on="cpu", neuron__speculation=None)},
    ),
    "native-measure": ("measure", "neuron-native", {"reference_gib": REFERENCE_GIB_OF_8B}),
    "native-logits": ("logits", "neuron-native", {"reference_gib": REFERENCE_GIB_OF_8B}),
    "nxdi-compile": ("compile", "neuron-nxdi", {}),
    "nxdi-measure": ("measure", "neuron-nxdi", {"reference_gib": REFERENCE_GIB_OF_8B}),
    "publish": ("publish", "neuron-native", {}),
}
"""Name of the golden file: step, lane, and what else differs."""
