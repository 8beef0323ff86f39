"""Targets of the three lanes in which every part is present, and toolchains to go with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainyard.spec.model import Target

CPU: dict[str, Any] = {
    "name": "cpu",
    "lane": "cpu",
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "block_size": 64,
}

NATIVE: dict[str, Any] = {
    "name": "trn2",
    "lane": "neuron-native",
    "instance": "trn2.48xlarge",
    "tensor_parallel_size": 8,
    "max_model_len": 4096,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 8,
    "block_size": 128,
    "neuron": {
        "sdk": "2.32.0",
        "num_gpu_blocks": 256,
        "speculation": {"num_speculative_tokens": 4},
    },
    "native": {
        "neuron_config": {
            "num_batched_tokens_buckets": [512, 2048],
            "num_seqs_buckets": [1, 8],
            "on_device_sampling_config": {"all_greedy": True},
        },
        "vision_neuron_config": {},
    },
}

NXDI: dict[str, Any] = {
    "name": "inf2",
    "lane": "neuron-nxdi",
    "instance": "inf2.48xlarge",
    "tensor_parallel_size": 8,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 4,
    "block_size": 32,
    "neuron": {
        "sdk": "2.28.1",
        "num_gpu_blocks": 512,
        "speculation": {"method": "eagle", "num_speculative_tokens": 4},
    },
    "nxdi": {"override_neuron_config": {"on_device_sampling_config": {"do_sample": True}}},
}

BASES: Mapping[str, dict[str, Any]] = {"cpu": CPU, "neuron-native": NATIVE, "neuron-nxdi": NXDI}

TOOLCHAINS: Mapping[str, dict[str, str]] = {
    "cpu": {
        "machine": "x86_64",
        "python": "3.11",
        "torch": "2.13.0",
        "vllm": "0.32.0",
        "c++": "12.2.0",
        "processor": "avx2",
        "site-packages": "/opt/serve/lib",
    },
    "neuron-native": {
        "machine": "x86_64",
        "python": "3.13",
        "torch": "2.11.0",
        "vllm": "0.24.0",
        "vllm-neuron": "0.24.0.1.1.0",
        "neuronx-cc": "2.27.5334.0+ab12",
        "libtorch-neuronx-lite": "2.11.0.1.0.1284",
        "torch-neuronx": "2.9.0.2.15.32035",
        "libneuronxla": "2.2.1",
        "torch-xla": "2.9.0",
        "nki": "0.6.0",
        "transformers": "5.0.0",
    },
    "neuron-nxdi": {
        "machine": "x86_64",
        "python": "3.12",
        "torch": "2.9.0",
        "vllm": "0.13.0",
        "vllm-neuron": "0.4.1",
        "neuronx-cc": "2.23.6484.0+ab12",
        "torch-neuronx": "2.9.0.2.11",
        "libtorch-neuronx-lite": "1.0",
        "libneuronxla": "2.2.1",
        "torch-xla": "2.9.0",
        "nki": "0.3.0",
        "neuronx-distributed": "0.15.1",
        "neuronx-distributed-inference": "0.8.16251",
        "transformers": "4.57.0",
    },
}


NEEDED: Mapping[str, dict[str, Any]] = {
    "neuron": {"sdk": "2.32.0"},
    "speculation": {"num_speculative_tokens": 4},
}
"""What a part needs when a change makes it."""


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Target:
    """Return the target of a base with some values changed, by their dotted paths."""
    data: dict[str, Any] = Target.model_validate(base).model_dump(mode="json")
    for path, value in changes.items():
        *way, last = path.split(".")
        inner = data
        for step in way:
            if inner.get(step) is None:
                inner[step] = dict(NEEDED.get(step, {}))
            inner = inner[step]
        inner[last] = value
    return Target.model_validate(data)


def native(**changes: Any) -> Target:
    """Return a target of lane neuron-native without speculation; `__` in a name is a dot."""
    return _plain(NATIVE, changes)


def nxdi(**changes: Any) -> Target:
    """Return a target of lane neuron-nxdi without speculation; `__` in a name is a dot."""
    return _plain(NXDI, changes)


def _plain(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Target:
    """Return the target with changes, and without what only makes it complete."""
    plain: dict[str, Any] = {"neuron.speculation": None}
    if base["lane"] == "neuron-native":
        plain["native.vision_neuron_config"] = None
    return changed(base, plain | {path.replace("__", "."): v for path, v in changes.items()})
