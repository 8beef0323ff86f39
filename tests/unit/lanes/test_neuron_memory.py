"""What does not fit is refused, what fits barely is a warning."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.lanes.neuron_targets import NATIVE, NXDI, changed

from trainyard.lanes.neuron_memory import GIB, memory_problems, memory_warnings, need_of
from trainyard.sources.architecture import Tensor, loaded_bytes
from trainyard.spec.model import Target

LLAMA_70B: dict[str, Any] = {
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192,
    "head_dim": 128,
}
WEIGHTS_70B = 141 * 10**9


def native(**changes: Any) -> Target:
    return changed(NATIVE, {name.replace("__", "."): value for name, value in changes.items()})


def nxdi(**changes: Any) -> Target:
    return changed(NXDI, {name.replace("__", "."): value for name, value in changes.items()})


def test_a_70b_model_fits_16_cores_of_trainium2_and_not_4() -> None:
    wide = native(tensor_parallel_size=16, neuron__num_gpu_blocks=1024)
    assert list(memory_problems(wide, LLAMA_70B, WEIGHTS_70B)) == []
    narrow = native(tensor_parallel_size=4, neuron__num_gpu_blocks=1024)
    (problem,) = memory_problems(narrow, LLAMA_70B, WEIGHTS_70B)
    assert "has 24.0 GiB" in problem
    assert "raise tensor_parallel_size" in problem


def test_the_kv_cache_counts_blocks_layers_and_heads() -> None:
    target = native(tensor_parallel_size=16, neuron__num_gpu_blocks=1024)
    need = need_of(target, LLAMA_70B, 0)
    assert need is not None
    # 1024 blocks of 128 tokens; of each token keys and values of 80 layers, one head, 128 numbers.
    assert need.kv_cache == pytest.approx(1024 * 128 * 2 * 80 * 1 * 128 * 2 / GIB)
    packed = need_of(native(native__kv_cache_dtype="fp8", tensor_parallel_size=16,
                            neuron__num_gpu_blocks=1024), LLAMA_70B, 0)  # fmt: skip
    assert packed is not None
    assert packed.kv_cache == pytest.approx(need.kv_cache / 2)


def test_a_cache_that_does_not_fit_is_refused() -> None:
    target = native(neuron__num_gpu_blocks=60_000)
    (problem,) = memory_problems(target, LLAMA_70B, WEIGHTS_70B // 9)
    assert "lower num_gpu_blocks" in problem


def test_without_blocks_the_native_plugin_wants_its_least_cache() -> None:
    target = native(neuron__num_gpu_blocks=None, tensor_parallel_size=1)
    assert list(memory_problems(target, LLAMA_70B, int(22.9 * GIB))) == []
    assert list(memory_problems(target, LLAMA_70B, int(23.1 * GIB)))


def test_without_block_layout_nxdi_holds_every_request_whole() -> None:
    target = nxdi(enable_prefix_caching=False, block_size=None, neuron__num_gpu_blocks=4)
    need = need_of(target, LLAMA_70B, 0)
    assert need is not None
    assert need.core == 16.0
    assert need.kv_cache == pytest.approx(4 * 4096 * 2 * 80 * 1 * 128 * 2 / GIB)
    split = need_of(nxdi(nxdi__override_neuron_config__cp_degree=2), LLAMA_70B, 0)
    assert split is not None
    assert split.kv_cache == 0.0


def test_what_is_not_known_counts_as_nothing() -> None:
    need = need_of(native(), {"model_type": "mamba"}, 0)
    assert need is not None
    assert need.total == 0.0
    assert need_of(native(instance="trn9.48xlarge"), LLAMA_70B, 0) is None
    inner = need_of(native(), {"text_config": LLAMA_70B}, 0)
    assert inner == need_of(native(), LLAMA_70B, 0)


def test_a_core_that_is_nearly_full_is_a_warning() -> None:
    target = native(tensor_parallel_size=1, neuron__num_gpu_blocks=32)
    (warning,) = memory_warnings(target, {}, 23 * GIB)
    assert "96%" in warning
    assert "NCC_EVRF009" in warning
    assert list(memory_warnings(target, {}, 10 * GIB)) == []


def test_a_host_that_is_too_small_to_compile_is_a_warning() -> None:
    small = nxdi(instance="trn1.2xlarge", tensor_parallel_size=2, neuron__num_gpu_blocks=512)
    (warning,) = memory_warnings(small, {}, 15 * GIB)
    assert "32 GiB of host memory" in warning
    elsewhere = native(neuron__compile_on="cpu", instance="trn2.3xlarge", tensor_parallel_size=4)
    assert list(memory_warnings(elsewhere, {}, 60 * GIB)) == []


def test_weights_are_counted_as_they_are_loaded() -> None:
    tensors = [Tensor("a", "F32", (4, 2)), Tensor("b", "F8_E4M3", (8,)), Tensor("c", "I32", (2,))]
    assert loaded_bytes(tensors, "bfloat16") == 16 + 8 + 8
    assert loaded_bytes(tensors, "float32") == 32 + 8 + 8
