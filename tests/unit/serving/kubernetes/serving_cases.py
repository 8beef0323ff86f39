"""Releases and places whose servers the tests render: one of each lane, as one would run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.unit.yard import SPEC

from trainyard.documents.release import Release
from trainyard.settings import Settings
from trainyard.spec.kubernetes import KubernetesServing
from trainyard.spec.model import ModelSpec

ENVIRONMENT = "production"

TARGETS: Mapping[str, dict[str, Any]] = {
    "cpu": {
        "name": "cpu",
        "lane": "cpu",
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 16,
        "block_size": 64,
    },
    # AWS Neuron SDK 2.32, vllm-neuron/docs/tutorials/tutorial-llama3-70b.md.
    "neuron-native": {
        "name": "trn2",
        "lane": "neuron-native",
        "instance": "trn2.48xlarge",
        "tensor_parallel_size": 16,
        "max_model_len": 16384,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 8,
        "block_size": 128,
        "neuron": {
            "sdk": "2.32.0",
            "image": "registry.example.com/trainyard/serve-neuron:"
            "0.24.0.1.1.0-neuronx-py313-sdk2.32.0-ubuntu24.04",
            "num_gpu_blocks": 1024,
        },
        "native": {
            "optimization_level": 2,
            "neuron_config": {
                "kv_segment_size_buckets": [8192],
                "num_batched_tokens_buckets": [8192],
                "num_seqs_buckets": [8],
                "fp8_packed_kv": True,
            },
        },
    },
    # The safe choice on Inf2: SDK 2.28 with vLLM 0.13. `num_gpu_blocks` as the user guide has it.
    "neuron-nxdi": {
        "name": "inf2",
        "lane": "neuron-nxdi",
        "instance": "inf2.48xlarge",
        "tensor_parallel_size": 24,
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "neuron": {
            "sdk": "2.28.0",
            "image": "registry.example.com/trainyard/serve-neuron:"
            "0.13.0-neuronx-py312-sdk2.28.0-ubuntu24.04",
            "num_gpu_blocks": 8,
        },
        "nxdi": {
            "override_neuron_config": {
                "enable_bucketing": True,
                "on_device_sampling_config": {"do_sample": True},
            }
        },
    },
}

RELEASE_IDS: Mapping[str, str] = {
    "cpu": "adder-0123456789ab",
    "neuron-native": "llama-3-3-70b-0123456789ab",
    "neuron-nxdi": "llama-3-8b-0123456789ab",
}

PLACES: Mapping[str, dict[str, Any]] = {
    # A bare cluster of one node, without a registry: as `make test-cluster` has it.
    "cpu": {
        "namespace": "serving",
        "image": "trainyard-cpu:test",
        "image_pull_policy": "Never",
        "serve_python": "/opt/serve/bin/python",
        "env_from_secrets": [{"name": "store-login"}],
        "node_cache": {"host_path": "/var/lib/trainyard", "gib": 20},
        "host_mounts": [{"host_path": "/srv/store", "mount_path": "/srv/store"}],
        "env": {"TRAINYARD_STORE": "/srv/store"},
        "run_as_user": 1000,
        "stable_priority_class": None,
    },
    "neuron-native": {
        "namespace": "serving",
        "scheduler_name": "my-scheduler",
        "env": {"AWS_REGION": "us-east-1"},
    },
    "neuron-nxdi": {"namespace": "serving", "node_cache": None},
}

SETTINGS = Settings(store="s3://example-models/trainyard", s3_region="us-east-1")


def release(lane: str, **changes: Any) -> Release:
    """Return the release of a lane."""
    release_id = RELEASE_IDS[lane]
    model = release_id.rpartition("-")[0]
    spec = ModelSpec.model_validate({**SPEC, "model": model, "targets": [TARGETS[lane]]})
    values: dict[str, Any] = {
        "release_id": release_id,
        "model": model,
        "target": spec.targets[0],
        "lane": lane,
        "checkpoint_key": f"checkpoints/{model}/v1/manifest.json",
        "checkpoint_digest": "0" * 64,
        "revision": "v1",
        "compile_key": "key",
        "bundle_digest": "1" * 64,
        "serving": {},
        "serving_digest": "2" * 64,
        "served_model_name": model,
        "toolchain": {},
        "measurement_id": "measurement",
        "spec": spec,
    }
    return Release(**{**values, **changes})


def place(lane: str, **changes: Any) -> KubernetesServing:
    """Return where servers of a lane run."""
    return KubernetesServing.model_validate({**PLACES[lane], **changes})
