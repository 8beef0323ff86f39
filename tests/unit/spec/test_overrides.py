"""Overrides change settings of a target, within its rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.errors import BadInput
from trainyard.spec.model import Target
from trainyard.spec.overrides import apply_overrides

TARGET = Target(name="cpu", lane="cpu", max_model_len=256, max_num_batched_tokens=256)

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "instance": st.sampled_from(["local", "trn2.48xlarge"]),
        "required": st.booleans(),
        "tensor_parallel_size": st.integers(1, 128),
        "dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
        "max_model_len": st.integers(256, 100_000),
        "max_num_batched_tokens": st.integers(4096, 100_000),
        "max_num_seqs": st.integers(1, 4096),
        "block_size": st.none() | st.integers(1, 256),
        "kv_cache_gib": st.floats(0.01, 1000),
        "enable_prefix_caching": st.booleans(),
    },
)


@given(SETTINGS)
def test_exactly_the_named_settings_change(overrides: dict[str, Any]) -> None:
    # 4096 tokens a step leave room for any max_num_seqs.
    base = apply_overrides(TARGET, {"max_num_batched_tokens": 4096})

    changed = apply_overrides(base, overrides)

    assert changed.model_dump() == base.model_dump() | overrides
    assert apply_overrides(changed, overrides) == changed
    assert Target.model_validate_json(changed.model_dump_json(), strict=True) == changed


def test_nothing_to_override() -> None:
    assert apply_overrides(TARGET, {}) == TARGET


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"max_num_seq": 4}, ["max_num_seq:", "Did you mean max_num_seqs?"]),
        ({"name": "other"}, ["name:", "cannot be overridden"]),
        ({"lane": "neuron-native"}, ["lane:", "cannot be overridden"]),
        ({"max_num_seqs": 0}, ["max_num_seqs:", "at least 1"]),
        ({"max_num_seqs": "4"}, ["max_num_seqs:", "whole number"]),
        ({"max_num_seqs": True}, ["max_num_seqs:", "whole number"]),
        ({"max_num_seqs": 4.5}, ["max_num_seqs:", "whole number"]),
        ({"max_num_seqs": 512}, ["max_num_batched_tokens 256 is less than max_num_seqs 512"]),
        ({"dtype": "bfloat61"}, ["dtype:", "Did you mean bfloat16?"]),
        ({"kv_cache_gib": float("nan")}, ["plain JSON"]),
        ({"kv_cache_gib": {1, 2}}, ["plain JSON"]),
        ({"block_size": [16]}, ["block_size:", "whole number"]),
        ({"lane": "x", "speed": 9, "dtype": "x"}, ["lane:", "speed:", "dtype:"]),
    ],
)
def test_what_cannot_be_overridden_is_named(overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        apply_overrides(TARGET, overrides)

    for word in words:
        assert word in str(caught.value)


def test_of_a_setting_with_settings_only_the_named_ones_change() -> None:
    target = Target.model_validate(
        {
            "name": "trn2",
            "lane": "neuron-native",
            "neuron": {"sdk": "2.32.0", "num_gpu_blocks": 64, "hf_overrides": {"a": 1}},
        }
    )

    changed = apply_overrides(target, {"neuron": {"num_gpu_blocks": 32, "hf_overrides": {"b": 2}}})

    assert changed.neuron is not None
    assert changed.neuron.model_dump(exclude_defaults=True) == {
        "sdk": "2.32.0",
        "num_gpu_blocks": 32,
        "hf_overrides": {"a": 1, "b": 2},
    }
    assert apply_overrides(changed, {"neuron": None}).neuron is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"neuron": {"num_gpu_block": 1}}, ["neuron.num_gpu_block:", "Did you mean num_gpu_block"]),
        ({"neuron": {"num_gpu_blocks": 1}}, ["neuron.sdk:", "is missing"]),
        ({"neuron": {"sdk": "2.32.0"}}, ["neuron:", "this target's is cpu", "Remove neuron"]),
        ({"native": {"neuron_config": {"num_seqs_buckets": [0]}}}, ["num_seqs_buckets.0:"]),
    ],
)
def test_what_is_wrong_inside_a_setting_is_named_by_its_path(
    overrides: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(BadInput) as caught:
        apply_overrides(TARGET, overrides)

    for word in words:
        assert word in str(caught.value)
