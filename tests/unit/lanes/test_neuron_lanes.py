"""The Neuron lanes refuse before a compile what cannot work, and start servers as documented."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.unit.lanes.neuron_targets import BASES, NATIVE, TOOLCHAINS, changed, native, nxdi

from trainyard.errors import BadInput
from trainyard.lanes.neuron_common import chips_needed
from trainyard.lanes.protocol import Lane, ServerCommand
from trainyard.lanes.registry import get_lane
from trainyard.spec.model import Target

CONFIG = "native__neuron_config__"
OVERRIDE = "nxdi__override_neuron_config__"
NEURON = {"neuron-native": native, "neuron-nxdi": nxdi}


def problems(target: Target) -> list[str]:
    return list(get_lane(target.lane).problems(target))


def refused(target: Target, *words: str) -> None:
    """Check that one problem has all the words, and says what to do."""
    found = problems(target)
    assert any(all(word in problem for word in words) for problem in found), found
    assert all(problem.endswith((".", ".)")) for problem in found)


@pytest.mark.parametrize("make", [native, nxdi])
def test_a_plain_target_breaks_no_rule(make: Any) -> None:
    assert problems(make()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{CONFIG}num_batched_tokens_buckets": [512, 1024]}, ["max_num_batched_tokens (2048)"]),
        ({f"{CONFIG}num_batched_tokens_buckets": []}, ["end the list with 2048"]),
        ({f"{CONFIG}num_batched_tokens_buckets": [2048, 512]}, ["must grow", "[512, 2048]"]),
        ({f"{CONFIG}num_seqs_buckets": [1, 4]}, ["max_num_seqs (8)", "end the list with 8"]),
        ({f"{CONFIG}kv_segment_size_buckets": [1024, 2048]}, ["exactly one"]),
        ({f"{CONFIG}kv_segment_size_buckets": [256]}, ["has 256", "512, 1024, 2048, 4096, 8192"]),
        ({f"{CONFIG}kv_segment_size_buckets": [2048]}, ["must be the same list", "[2048]"]),
        ({f"{CONFIG}kv_segment_size_buckets": [2048], "block_size": 96}, ["multiple of block_siz"]),
        ({f"{CONFIG}decode_context_length_buckets": [1000]}, ["has 1000", "multiples of 128"]),
        ({f"{CONFIG}decode_context_length_buckets": [4096]}, ["below max_model_len (4096)"]),
        ({f"{CONFIG}decode_context_length_buckets": [2048, 1024]}, ["must grow"]),
        ({f"{CONFIG}quantization": "mxfp4"}, ["Trn3 only"]),
        ({f"{CONFIG}ep_degree": 2}, ["enable_expert_parallel: true"]),
        ({f"{CONFIG}ep_degree": 2, "native__enable_expert_parallel": True,
          "neuron__data_parallel_size": 2}, ["(16)"]),
        ({"native__async_scheduling": True, f"{CONFIG}on_device_sampling_config": None},
         ["async_scheduling needs sampling on the device"]),
        ({"neuron__speculation": {"num_speculative_tokens": 4},
          f"{CONFIG}on_device_sampling_config": None}, ["Speculative decoding needs sampling"]),
        ({"neuron__speculation": {"method": "eagle", "num_speculative_tokens": 4}}, ["eagle3"]),
        ({"neuron__speculation": {"num_speculative_tokens": 4}, "neuron__compile_on": "cpu"},
         ["Compiling on a CPU", "speculative"]),
        ({"native__route": "native"}, ["2.32.0", "begins with 2.33.0"]),
        ({"neuron__num_gpu_blocks": 31}, ["at least 32"]),
        ({"tensor_parallel_size": 128}, ["128 logical cores", "has 64 with lnc 2"]),
        ({"tensor_parallel_size": 8, "instance": "trn2.3xlarge"}, ["has 4 with lnc 2"]),
        ({"neuron__data_parallel_size": 16}, ["128 logical cores"]),
        ({"instance": "trn1.32xlarge"}, ["Trn2 and Trn3 only", "neuron-nxdi", "Source"]),
        ({"instance": "trn2.48xlarg"}, ["not in Trainyard's table", "Did you mean trn2.48xlarge?"]),
        ({"instance": "local"}, ["needs `instance`"]),
        ({"neuron__sdk": "2.30.0"}, ["no native vLLM plugin", "2.31.0"]),
        ({"neuron__image": "r.example/v:0.21.0.1.0.0-neuronx-py313-sdk2.31.1-ubuntu24.04"},
         ["image is of SDK 2.31.1", "says 2.32.0"]),
        ({"neuron__image": "r.example/v:0.16.0-neuronx-py312-sdk2.32.0-ubuntu24.04"},
         ["image of lane neuron-nxdi"]),
        ({"neuron__image": "r.example/vllm:latest"}, ["`latest`"]),
        ({"kv_cache_gib": 2.0}, ["kv_cache_gib is for lane cpu"]),
        ({"neuron": None}, ["neuron: {sdk: 2.32.0}"]),
        ({"max_num_seqs": 4096}, ["max_num_batched_tokens (2048) is less"]),
        ({"native__extra_neuron_config": {"ep_degree": 2}}, ["has a key of its own"]),
        ({"native__vision_neuron_config": {"tp_size": 3, "dp_size": 2}}, ["must be 8"]),
        ({"native__vision_neuron_config": {}, "native__mm_language_model_only": True},
         ["remove vision_neuron_config"]),
    ],
)  # fmt: skip
def test_what_lane_native_refuses(changes: dict[str, Any], words: list[str]) -> None:
    refused(native(**changes), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{OVERRIDE}context_encoding_buckets": [512, 8192]}, ["at most max_model_len (4096)"]),
        ({f"{OVERRIDE}token_generation_buckets": [4096, 512]}, ["must grow"]),
        ({f"{OVERRIDE}prefix_buckets": [512, 128]}, ["prefix_buckets must grow"]),
        ({"neuron__num_gpu_blocks": None}, ["num_gpu_blocks of at least 512"]),
        ({"neuron__num_gpu_blocks": 511}, ["at least 512"]),
        ({"block_size": None}, ["need a block_size"]),
        ({"enable_prefix_caching": False}, ["must be max_num_seqs", "give 4"]),
        ({f"{OVERRIDE}pa_num_blocks": 100}, ["contradicts neuron.num_gpu_blocks (512)"]),
        ({f"{OVERRIDE}pa_block_size": 16}, ["contradicts block_size (32)"]),
        ({f"{OVERRIDE}is_prefix_caching": False}, ["contradicts enable_prefix_caching"]),
        ({f"{OVERRIDE}speculation_length": 4}, ["contradicts neuron.speculation"]),
        ({f"{OVERRIDE}save_sharded_checkpoint": True}, ["weights into the bundle"]),
        ({f"{OVERRIDE}quantization_dtype": "f8e4m3"}, ["FP8", "Trn2 and Trn3 only", "inf2"]),
        ({f"{OVERRIDE}kv_cache_quant": True}, ["kv_cache_quant is FP8"]),
        ({f"{OVERRIDE}quantized": True}, ["needs a quantization_dtype"]),
        ({f"{OVERRIDE}pp_degree": 4}, ["32 logical cores", "has 24 with lnc 1"]),
        ({"nxdi__extra_neuron_config": {"tp_degree": 8}}, ["follows from tensor_parallel_size"]),
        ({"neuron__compile_on": "cpu"}, ["needs a device"]),
        ({"neuron__data_parallel_size": 2}, ["more replicas"]),
        ({"neuron__lnc": 2}, ["lnc 2 exists on Trn2 and Trn3 only"]),
        ({"neuron__sdk": "2.26.1"}, ["fork of vLLM"]),
        ({"neuron__sdk": "2.32.0"}, ["no NxD Inference", "2.31.1"]),
        ({"neuron__sdk": "2.34.0", "instance": "trn2.48xlarge"}, ["no support on trn2"]),
        ({"instance": "trn1.32xlarge", "tensor_parallel_size": 6}, ["3 devices", "1, 4, 8, 16"]),
    ],
)  # fmt: skip
def test_what_lane_nxdi_refuses(changes: dict[str, Any], words: list[str]) -> None:
    refused(nxdi(**changes), *words)


def test_the_recipes_of_aws_break_no_rule() -> None:
    # SDK 2.32: vllm-neuron/docs/tutorials/tutorial-llama3-70b.md, without its number of blocks.
    recipe = native(
        tensor_parallel_size=16,
        max_model_len=16384,
        max_num_batched_tokens=8192,
        native__optimization_level=2,
        native__neuron_config={
            "kv_segment_size_buckets": [8192],
            "num_batched_tokens_buckets": [8192],
            "num_seqs_buckets": [8],
            "fp8_packed_kv": True,
        },
        neuron__num_gpu_blocks=None,
    )
    assert problems(recipe) == []
    assert chips_needed(recipe) == 4
    # libraries/nxd-inference: without prefix caching as many blocks as requests.
    plain = nxdi(enable_prefix_caching=False, block_size=None, neuron__num_gpu_blocks=4)
    assert problems(plain) == []
    assert chips_needed(plain) == 4


@pytest.mark.parametrize(
    ("make", "config", "words"),
    [
        (native, {"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        (nxdi, {"quantization_config": {"quant_method": "gptq"}}, "GPTQ"),
        (nxdi, {"quantization_config": {"quant_method": "gguf"}}, "GGUF"),
        (nxdi, {"quantization_config": {"quant_method": "fp8"}}, "not for inf2"),
        (native, {"quantization_config": {"quant_method": "compressed-tensors"}}, "refuses weight"),
        (native, {"quantization_config": {"quant_method": "mxfp4"}}, "hf_overrides"),
    ],
)
def test_weights_that_the_chip_cannot_use_are_refused(
    make: Any, config: dict[str, Any], words: str
) -> None:
    target = make()
    (problem,) = get_lane(target.lane).model_problems(target, config)
    assert words in problem


def test_weights_that_the_chip_can_use_are_not() -> None:
    lane = get_lane("neuron-native")
    modelopt = {"model_type": "llama", "quantization_config": {"quant_method": "modelopt"}}
    assert lane.model_problems(native(), modelopt) == ()
    # AWS's quickstart serves gpt-oss in bfloat16 on Trn2 like this.
    overridden = native(neuron__hf_overrides={"quantization_config": {}})
    gpt_oss = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    assert lane.model_problems(overridden, gpt_oss) == ()
    mxfp4 = native(instance="trn3.48xlarge", native__neuron_config__quantization="mxfp4")
    assert lane.model_problems(mxfp4, gpt_oss) == ()
    (problem,) = lane.model_problems(mxfp4, {"model_type": "llama"})
    assert "gpt-oss only" in problem


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (native(neuron__num_gpu_blocks=None), "num_gpu_blocks is empty"),
        (native(native__extra_neuron_config={"num_seq_buckets": [1]}), "Did you mean num_seqs_b"),
        (native(neuron__compiler_flags=["--auto-cast=none"]), "NEURON_CC_FLAGS"),
        (native(neuron__compile_on="cpu"), "compiled on a CPU"),
        (native(native__kv_cache_dtype="fp8"), "scales"),
        (native(neuron__sdk="2.33.0", native__route="xla"), "deprecated"),
        (native(neuron__sdk="2.99.0"), "not in Trainyard's table"),
        (nxdi(neuron__sdk="2.30.0"), "AWS contradicts itself"),
        (nxdi(), "ignores presence and repetition penalties"),
        (nxdi(max_num_seqs=1), "wrong answers in plugin 0.2"),
        (nxdi(**{f"{OVERRIDE}token_generation_buckets": [512, 2048]}), "have no compiled graph"),
        (nxdi(nxdi__extra_neuron_config={"brand_new": 1}), "extra_neuron_config.brand_new"),
    ],
)  # fmt: skip
def test_what_should_be_known_is_a_warning(target: Target, words: str) -> None:
    warnings = get_lane(target.lane).warnings(target)
    assert any(words in warning for warning in warnings), warnings
    assert not any(words in problem for problem in problems(target))


@pytest.mark.parametrize("make", [native, nxdi])
def test_models_that_nobody_documents_are_unproven(make: Any) -> None:
    lane = get_lane(make().lane)
    known = lane.warnings(make(), {"model_type": "llama"})
    assert known == lane.warnings(make())
    assert set(lane.warnings(make(), {"model_type": "mamba"})) - set(known) == {
        warning for warning in lane.warnings(make(), {"model_type": "mamba"}) if "mamba" in warning
    }
    assert len(lane.warnings(make(), {})) == len(known) + 1


@pytest.mark.parametrize("name", NEURON)
def test_a_start_that_compiles_may_take_hours(name: str) -> None:
    lane = get_lane(name)
    assert lane.start_timeout_s(cache_only=False) == 4 * 3600
    assert lane.start_timeout_s(cache_only=True) == 900
    assert command(NEURON[name]()).env["VLLM_ENGINE_READY_TIMEOUT_S"] == "900"


def test_unknown_keys_are_passed_on_and_part_of_the_key() -> None:
    target = native(native__extra_neuron_config={"brand_new": [1, 2]})
    inputs = key_inputs(target)
    assert inputs["neuron_config"]["brand_new"] == [1, 2]
    assert json.loads(argument(command(target), "additional-config")) == {
        "neuron_config": inputs["neuron_config"]
    }


def key_inputs(target: Target) -> dict[str, Any]:
    return get_lane(target.lane).key_inputs(
        target, architecture_digest="a", toolchain=TOOLCHAINS[target.lane]
    )


def command(target: Target, *, cache_only: bool = True) -> ServerCommand:
    return get_lane(target.lane).command(
        target,
        python=Path("/image/python"),
        model_dir=Path("/model"),
        cache_dir=Path("/cache"),
        served_model_name="adder",
        port=8123,
        cache_only=cache_only,
    )


def argument(made: ServerCommand, name: str) -> str:
    (found,) = [text for text in made.argv if text.startswith(f"--{name}=")]
    return found.removeprefix(f"--{name}=")


def test_what_the_plugin_would_choose_is_spelled_out() -> None:
    plain = native(native=None, max_num_batched_tokens=768, max_num_seqs=6, block_size=None)
    inputs = key_inputs(plain)
    assert inputs["neuron_config"] == {
        "num_batched_tokens_buckets": [128, 256, 512, 768],
        "num_seqs_buckets": [1, 2, 4, 6],
    }
    assert (inputs["block_size"], inputs["lnc"], inputs["route"]) == (32, 2, "xla")
    assert inputs["platform_target"] == "trn2"
    spelled = native(
        native={"route": "xla", "neuron_config": inputs["neuron_config"]},
        max_num_batched_tokens=768,
        max_num_seqs=6,
        block_size=32,
        neuron__lnc=2,
    )
    assert key_inputs(spelled) == inputs
    assert key_inputs(native(neuron__sdk="2.33.0"))["route"] == "native"


def test_lane_native_starts_as_documented() -> None:
    target = native(
        native__optimization_level=2,
        native__kv_cache_dtype="fp8",
        native__async_scheduling=False,
        native__enable_expert_parallel=True,
        native__enable_prompt_embeds=True,
        native__mm_language_model_only=True,
        neuron__data_parallel_size=2,
        neuron__hf_overrides={"quantization_config": {}},
        neuron__speculation={"num_speculative_tokens": 5},
    )
    assert shlex.join(command(target).argv) == (
        "/image/python -P -m vllm.entrypoints.cli.main serve /model --served-model-name=adder "
        "--host=127.0.0.1 --port=8123 --dtype=bfloat16 --tensor-parallel-size=8 "
        "--data-parallel-size=2 --max-model-len=4096 --max-num-batched-tokens=2048 "
        "--max-num-seqs=8 --num-gpu-blocks-override=256 --enable-prefix-caching "
        "'--hf-overrides={\"quantization_config\":{}}' "
        "'--speculative-config={\"method\":\"eagle3\",\"model\":\"/model/draft\","
        "\"num_speculative_tokens\":5}' --disable-uvicorn-access-log --block-size=128 "
        "--gpu-memory-utilization=0.9 --kv-cache-dtype=fp8 --optimization-level=2 "
        "--enable-expert-parallel --enable-prompt-embeds --no-async-scheduling "
        "'--additional-config={\"mm_language_model_only\":true,\"neuron_config\":{\"ep_degree\":16,"
        "\"num_batched_tokens_buckets\":[512,2048],\"num_seqs_buckets\":[1,8],"
        "\"on_device_sampling_config\":{\"all_greedy\":true}}}'"
    )  # fmt: skip


def test_a_cached_start_of_lane_native_cannot_compile() -> None:
    target = native(neuron__compile_on="cpu", neuron__parallel_compile_workers=2)
    cached, fresh = command(target).env, command(target, cache_only=False).env

    assert command(target).argv == command(target, cache_only=False).argv
    assert cached["VLLM_NEURON_DISABLE_WARMUP_COMPILE"] == "1"
    assert "VLLM_NEURON_CPU_COMPILE" not in cached
    assert "VLLM_NEURON_DISABLE_WARMUP_COMPILE" not in fresh
    assert fresh["VLLM_NEURON_CPU_COMPILE"] == "1"
    assert fresh["NEURON_PLATFORM_TARGET_OVERRIDE"] == "trn2"
    assert fresh["NEURON_LIBTORCH_PARALLEL_COMPILE_WORKERS"] == "2"
    for env in (cached, fresh):
        assert env["VLLM_CACHE_ROOT"] == "/cache"
        assert env["NEURON_LOGICAL_NC_CONFIG"] == "2"
        assert env["VLLM_NEURON_KV_GMU_BUDGET_CAP_FRACTION"] == "0.3"
        assert "VLLM_NEURON_BACKEND" not in env


@pytest.mark.parametrize(("route", "value"), [(None, "neuron_native"), ("xla", "vllm_neuron")])
def test_the_route_is_explicit_from_2_33_on(route: str | None, value: str) -> None:
    env = command(native(neuron__sdk="2.33.0", native__route=route)).env
    assert env["VLLM_NEURON_BACKEND"] == value


def test_lane_nxdi_starts_as_documented() -> None:
    target = nxdi(**{f"{OVERRIDE}quantized": True, f"{OVERRIDE}quantization_dtype": "int8"})
    fresh, cached = command(target, cache_only=False), command(target)

    assert fresh.argv[1:5] == ("-P", "-m", "vllm.entrypoints.cli.main", "serve")
    assert cached.argv[1:5] == ("-P", "-m", "trainyard.lanes.without_compiler", "serve")
    assert fresh.argv[5:] == cached.argv[5:]
    assert argument(fresh, "num-gpu-blocks-override") == "512"
    assert argument(fresh, "block-size") == "32"
    config = json.loads(argument(fresh, "additional-config"))["override_neuron_config"]
    assert config == {
        "is_block_kv_layout": True,
        "is_prefix_caching": True,
        "logical_nc_config": 1,
        "on_device_sampling_config": {"do_sample": True},
        "pa_block_size": 32,
        "pa_num_blocks": 512,
        "quantized": True,
        "quantization_dtype": "int8",
        "quantized_checkpoints_path": "/model",
    }
    for env in (fresh.env, cached.env):
        assert env["NEURON_COMPILED_ARTIFACTS"] == "/cache"
        assert env["NEURON_LOGICAL_NC_CONFIG"] == "1"
    assert "quantized_checkpoints_path" not in key_inputs(target)["override_neuron_config"]


@pytest.mark.parametrize("name", NEURON)
@pytest.mark.parametrize("cache_only", [True, False])
def test_nothing_of_the_old_plugins_is_used(name: str, cache_only: bool) -> None:
    made = command(NEURON[name](), cache_only=cache_only)
    words = " ".join(made.argv)
    for legacy in ("--device", "--override-neuron-config", "--quantization="):
        assert legacy not in words
    for variable in ("VLLM_NEURON_FRAMEWORK", "NEURON_RT_VISIBLE_CORES", "NEURON_CC_FLAGS"):
        assert variable not in made.env


def test_compiler_flags_are_pinned() -> None:
    target = native(neuron__compiler_flags=["--native-int64=enabled", "-O1"])
    assert command(target).env["NEURON_CC_FLAGS"] == "--native-int64=enabled -O1"


def test_a_target_without_its_settings_has_no_identity() -> None:
    bare = changed({**NATIVE, "neuron": None, "native": None}, {})
    with pytest.raises(BadInput, match="no `neuron:` settings"):
        key_inputs(bare)
    assert get_lane(bare.lane).warnings(bare, {"model_type": "llama"}) == ()
    with pytest.raises(BadInput, match="no Neuron device"):
        key_inputs(native(instance="local"))


@pytest.mark.parametrize("name", NEURON)
def test_the_log_tells_how_far_a_start_is(name: str) -> None:
    lane: Lane = get_lane(name)
    log, stages = "", [lane.stage("")]
    for line in ("non-default args", "Resolved architecture", "Starting to load model",
                 "neuronx-cc compile graph.hlo", "init engine (profile) took 3 s",
                 "Application startup complete"):  # fmt: skip
        log += f"{line}\n"
        stages.append(lane.stage(log))
    assert len(set(stages)) == len(stages)
    assert stages[-1] == "ready"


def test_every_base_is_of_its_lane() -> None:
    assert {name: base["lane"] for name, base in BASES.items()} == {name: name for name in BASES}
