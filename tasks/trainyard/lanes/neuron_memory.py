"""Do weights and KV cache fit a target's devices? A bound from below, from sizes alone.

Activations, code and the collectives' buffers come on top, and differ with every compiler; so what
does not fit here fits nowhere, and what fits barely is a warning. Sources: `neuron_support`
(memory of devices and hosts); AWS Neuron SDK 2.32, vllm-neuron/docs/design/vllm/
determine_available_memory_design.md (the native plugin's least KV cache).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainyard.lanes.neuron_common import block_tokens, lnc_of, world_size
from trainyard.lanes.neuron_support import INSTANCES, Instance
from trainyard.spec.model import Target

GIB = 1 << 30
LEAST_KV_GIB = 1.0
"""`VLLM_NEURON_MIN_KV_BUDGET_GIB`: with less the native plugin does not start."""
FULL = 0.9
"""Share of a core's memory from which on people are warned."""
HOST_FACTOR = 3
"""A host with less memory than so many times the weights ran out of it while it compiled: 8B models
on hosts of 32 GiB (aws-neuron-sdk issues 706 and 87 of nki-samples)."""

_KV_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Need:
    """Memory of one logical core, in GiB, at least."""

    weights: float
    kv_cache: float
    core: float
    """What it has."""

    @property
    def total(self) -> float:
        """Weights and KV cache."""
        return self.weights + self.kv_cache


def need_of(target: Target, config: Mapping[str, Any], weights_bytes: int) -> Need | None:
    """Return what one core of a target needs and has; None for unknown instances.

    Args:
        target: of a Neuron lane.
        config: the model's config.json.
        weights_bytes: all tensors, in the number format that they are loaded in.
    """
    instance = INSTANCES.get(target.instance)
    if instance is None or target.neuron is None:
        return None
    return Need(
        weights=weights_bytes / world_size(target) / GIB,
        kv_cache=_kv_gib(target, config),
        core=_core_gib(instance, lnc_of(target)),
    )


def memory_problems(target: Target, config: Mapping[str, Any], weights_bytes: int) -> Iterator[str]:
    """Yield why a model cannot fit a target's devices, with the remedy."""
    need = need_of(target, config, weights_bytes)
    if need is None or need.total <= need.core:
        return
    yield (
        f"One core of {target.instance} has {need.core:.1f} GiB, and the model needs "
        f"{need.total:.1f} GiB of it ({need.weights:.1f} for weights, {need.kv_cache:.1f} for the "
        "KV cache): raise tensor_parallel_size, or lower num_gpu_blocks, max_num_seqs or "
        "max_model_len."
    )


def memory_warnings(target: Target, config: Mapping[str, Any], weights_bytes: int) -> Iterator[str]:
    """Yield what is tight, on the devices and on the host that compiles."""
    need, instance = need_of(target, config, weights_bytes), INSTANCES.get(target.instance)
    if need is None or instance is None or target.neuron is None:
        return
    if FULL * need.core < need.total <= need.core:
        yield (
            f"Weights and KV cache take {need.total / need.core:.0%} of each core's "
            f"{need.core:.1f} GiB, and activations and code come on top: the compiler may say "
            "NCC_EVRF009."
        )
    host = instance.host_memory_gib
    weights = weights_bytes / GIB
    if target.neuron.compile_on == "device" and host is not None and host < HOST_FACTOR * weights:
        yield (
            f"{target.instance} has {host} GiB of host memory, and compiling a model of "
            f"{weights:.0f} GiB may need more: compile on a larger instance of its kind, on a CPU "
            "(neuron.compile_on), or with neuron.parallel_compile_workers: 1."
        )


def _core_gib(instance: Instance, lnc: int) -> float:
    return instance.hbm_gib_per_chip * lnc / instance.cores_per_chip


def _kv_gib(target: Target, config: Mapping[str, Any]) -> float:
    """Return the KV cache of one core; what is not known counts as nothing."""
    tokens = block_tokens(target)
    least = LEAST_KV_GIB if target.lane == "neuron-native" else 0.0
    if tokens is None or _is_split(target):
        return least
    return tokens * _token_bytes(target, config) / GIB


def _is_split(target: Target) -> bool:
    """Tell whether the KV cache is spread over the cores in a way that is not computed here."""
    nxdi = target.nxdi.override_neuron_config if target.nxdi else None
    return nxdi is not None and any(
        (nxdi.cp_degree, nxdi.attention_dp_degree, nxdi.pp_degree, nxdi.flash_decoding_enabled)
    )


def _token_bytes(target: Target, config: Mapping[str, Any]) -> int:
    """Return the bytes that one token takes on one core; 0 if the model does not say."""
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    kv_heads = text.get("num_key_value_heads", heads)
    size = text.get("head_dim")
    hidden = text.get("hidden_size")
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        size = hidden // heads
    if not all(isinstance(each, int) and each > 0 for each in (layers, kv_heads, size)):
        return 0
    # Fewer heads than cores are copied to each core.
    here = -(-int(kv_heads or 0) // target.tensor_parallel_size)
    return 2 * int(layers or 0) * here * int(size or 0) * _kv_bytes(target)


def _kv_bytes(target: Target) -> int:
    native = target.native is not None and target.native.kv_cache_dtype == "fp8"
    nxdi = target.nxdi is not None and bool(target.nxdi.override_neuron_config.kv_cache_quant)
    return 1 if native or nxdi else _KV_BYTES[target.dtype]
