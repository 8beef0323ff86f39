"""What the two Neuron lanes share: rules, arguments, environment, parts of the compile key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainyard.errors import BadInput
from trainyard.lanes.neuron_support import (
    AS_OF,
    FAMILIES,
    INSTANCES,
    Instance,
    NeuronLaneName,
    as_version,
    family_of,
    parse_image,
    preflight,
)
from trainyard.spec.model import Target
from trainyard.spec.neuron import NeuronSettings
from trainyard.spec.part import SpecPart
from trainyard.spec.sentences import did_you_mean

DRAFT = "draft"
"""Folder below the model's that holds the draft model."""

UNPROVEN_PAIR = "Unproven: "
"""How the warning begins that nobody has proven an image on an instance; a proof takes it away."""

QUANTIZED_ELSEWHERE = {
    "awq": "AWQ", "gptq": "GPTQ", "gguf": "GGUF", "bitsandbytes": "bitsandbytes", "aqlm": "AQLM",
}  # fmt: skip
"""Ways to quantize weights that neither lane can load, by `quant_method` of config.json.
Source: vLLM, features/quantization/supported_hardware (column AWS Neuron); AWS Neuron SDK 2.32,
vllm-neuron/docs/guides/features-guide.md (two ways: static FP8 from ModelOpt, and MXFP4)."""

_FP8 = frozenset({"fp8", "modelopt", "fbgemm_fp8"})


def settings_of(target: Target) -> NeuronSettings:
    """Return the settings of a target that has them. Raises BadInput if it has none."""
    if target.neuron is None:
        raise BadInput(
            f"Target {target.name} has no `neuron:` settings, which lane {target.lane} needs.",
            hint="Add `neuron: {sdk: 2.32.0}` with the SDK of the serving image.",
        )
    return target.neuron


def platform_target(target: Target) -> str:
    """Return what neuronx-cc compiles for. Raises BadInput if the instance has no Neuron device."""
    family = family_of(target.instance)
    if family is None:
        raise BadInput(
            f"Instance {target.instance!r} of target {target.name} has no Neuron device.",
            hint=f"Known instances: {', '.join(INSTANCES)}.",
        )
    return family


def lnc_of(target: Target) -> int:
    """Return how many physical cores make a logical one: the spec's number or the default."""
    chosen = settings_of(target).lnc
    if chosen is not None:
        return chosen
    return 2 if platform_target(target) in ("trn2", "trn3") else 1


def world_size(target: Target) -> int:
    """Return the logical cores of one server."""
    config = target.nxdi.override_neuron_config if target.nxdi else None
    pipeline = (config.pp_degree or 1) if config else 1
    return target.tensor_parallel_size * settings_of(target).data_parallel_size * pipeline


DEFAULT_BLOCK_SIZE = 32
"""Tokens of one block, unless the spec says otherwise."""


def block_tokens(target: Target) -> int | None:
    """Return the tokens that the KV cache of a server holds; None if the spec does not tell."""
    blocks = settings_of(target).num_gpu_blocks
    if blocks is None:
        return None
    config = target.nxdi.override_neuron_config if target.nxdi else None
    in_blocks = target.enable_prefix_caching or bool(config and config.is_block_kv_layout)
    if target.lane == "neuron-nxdi" and not in_blocks:
        return target.max_num_seqs * target.max_model_len
    return blocks * (target.block_size or DEFAULT_BLOCK_SIZE)


def compiled_off_device(target: Target) -> bool:
    """Tell whether a target's bundle is compiled on a machine that cannot run it."""
    return target.neuron is not None and target.neuron.compile_on == "cpu"


def chips_needed(target: Target) -> int:
    """Return the whole devices that one server takes (`aws.amazon.com/neuron`)."""
    instance = INSTANCES[target.instance]
    per_chip = instance.cores_per_chip // lnc_of(target)
    return -(-world_size(target) // per_chip)


def common_problems(target: Target, lane: NeuronLaneName) -> Iterator[str]:
    """Yield every rule of both lanes that a target breaks, each with the remedy."""
    if target.neuron is None:
        yield (
            f"Lane {lane} needs to know the SDK of its image: add `neuron: {{sdk: 2.32.0}}` "
            "(or another release)."
        )
        return
    yield from _instance_problems(target, lane, target.neuron)
    yield from _image_problems(lane, target.neuron)
    if target.max_num_batched_tokens < target.max_num_seqs:
        yield (
            f"max_num_batched_tokens ({target.max_num_batched_tokens}) is less than max_num_seqs "
            f"({target.max_num_seqs}): raise the one or lower the other."
        )
    if target.kv_cache_gib != Target.model_fields["kv_cache_gib"].default:
        yield (
            "kv_cache_gib is for lane cpu and would be ignored: remove it, and give "
            "neuron.num_gpu_blocks."
        )
    if target.neuron.compile_on == "cpu" and target.neuron.speculation is not None:
        yield (
            "Compiling on a CPU knows no speculative decoding: set neuron.compile_on: device, or "
            "remove neuron.speculation."
        )


def _instance_problems(
    target: Target, lane: NeuronLaneName, neuron: NeuronSettings
) -> Iterator[str]:
    instance, family = INSTANCES.get(target.instance), family_of(target.instance)
    if instance is None or family is None:
        if target.instance == "local":
            yield f"Lane {lane} needs `instance`, such as trn2.48xlarge."
        else:
            yield (
                f"{target.instance!r} is not in Trainyard's table of Neuron instances of {AS_OF}. "
                f"{did_you_mean(target.instance, INSTANCES)} Known: {', '.join(INSTANCES)}."
            ).replace("  ", " ")
        return
    known = preflight(neuron.sdk, lane, family)
    if known.state == "refused":
        yield f"{known.reason} {known.remedy} (Source: {known.source}.)"
    if neuron.lnc == 2 and instance.default_lnc == 1:
        yield f"lnc 2 exists on Trn2 and Trn3 only: remove neuron.lnc, {family} has lnc 1."
        return
    yield from _core_problems(target, instance)


def _core_problems(target: Target, instance: Instance) -> Iterator[str]:
    lnc = lnc_of(target)
    cores, needed = instance.logical_cores(lnc), world_size(target)
    if needed > cores:
        yield (
            f"One server needs {needed} logical cores (tensor, data and pipeline parallel "
            f"together), and {instance.name} has {cores} with lnc {lnc}: lower the degrees, or "
            "take a larger instance."
        )
        return
    chips = chips_needed(target)
    if instance.chip_counts and chips not in instance.chip_counts:
        counts = ", ".join(map(str, instance.chip_counts))
        yield (
            f"One server would take {chips} devices, and {instance.name} gives {counts} of them "
            "to one pod: choose another tensor_parallel_size."
        )


def _image_problems(lane: NeuronLaneName, neuron: NeuronSettings) -> Iterator[str]:
    tag = parse_image(neuron.image)
    if tag is not None and tag.sdk != neuron.sdk:
        yield (
            f"neuron.image is of SDK {tag.sdk} and neuron.sdk says {neuron.sdk}: correct one of "
            "the two."
        )
    if tag is not None and tag.lane != lane:
        yield (
            f"neuron.image has vLLM {tag.vllm}, which is an image of lane {tag.lane}: use one of "
            f"lane {lane}."
        )
    if neuron.image.endswith(":latest"):
        yield "neuron.image is `latest`, which changes: give a tag with versions, or a digest."


def common_warnings(target: Target, lane: NeuronLaneName) -> Iterator[str]:
    """Yield what a target may do but should know, each as sentences."""
    neuron, family = target.neuron, family_of(target.instance)
    if neuron is None or family is None:
        return
    known = preflight(neuron.sdk, lane, family)
    if known.state == "unproven":
        yield f"{UNPROVEN_PAIR}{known.reason} {known.remedy}".strip()
    if neuron.compiler_flags:
        yield (
            "neuron.compiler_flags go into NEURON_CC_FLAGS and may replace the flags that the "
            "framework chooses itself."
        )
    if neuron.compile_on == "cpu":
        yield (
            "A bundle compiled on a CPU counts only when a server on a device has started from "
            "it; the device path is the better tested one."
        )


def family_warnings(lane: NeuronLaneName, config: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a warning if nobody documents that the lane serves such models.

    Args:
        lane: the lane.
        config: the model's config.json; None if it is not known.
    """
    if config is None:
        return
    documented = [each.model_type for each in FAMILIES if each.lane == lane]
    kind = config.get("model_type", "unknown")
    if kind not in documented:
        yield (
            f"Unproven model: type {kind!r} is not among those that lane {lane} is documented "
            f"to serve ({', '.join(documented)})."
        )


def extra_warnings(extra: Mapping[str, Any], config: type[SpecPart]) -> Iterator[str]:
    """Yield a warning for each key that Trainyard does not know."""
    for key in extra:
        guess = did_you_mean(key, config.model_fields)
        yield (
            f"extra_neuron_config.{key} is unknown to this version: it is passed on unchecked and "
            f"is part of the compile key. {guess}"
        ).strip()


def extra_problems(
    extra: Mapping[str, Any], config: type[SpecPart], *, managed: Mapping[str, str]
) -> Iterator[str]:
    """Yield why keys of `extra_neuron_config` do not belong there.

    Args:
        extra: the keys.
        config: the typed model, whose keys have a place of their own.
        managed: keys that follow from other settings, by the setting to use.
    """
    for key in extra:
        if key in config.model_fields:
            yield f"extra_neuron_config.{key} has a key of its own: move it there."
        elif key in managed:
            yield f"extra_neuron_config.{key} follows from {managed[key]}: set that instead."


def quantization_problems(target: Target, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a checkpoint's quantization cannot be served on a target's chips.

    Args:
        target: of a Neuron lane.
        config: the model's config.json.
    """
    neuron, family = target.neuron, family_of(target.instance)
    if neuron is None or family is None:
        return
    merged = {**config, **neuron.hf_overrides}
    quantization = merged.get("quantization_config")
    method = str(quantization.get("quant_method", "")) if isinstance(quantization, dict) else ""
    name = QUANTIZED_ELSEWHERE.get(method.lower())
    if name is not None:
        yield (
            f"The checkpoint is quantized with {name}, which no Neuron lane can load: use the "
            "unquantized weights, or FP8 weights made with ModelOpt on Trn2 and Trn3."
        )
    if method.lower() in _FP8 and family in ("inf2", "trn1"):
        yield (
            f"The checkpoint has FP8 weights, which are documented for Trn2 and Trn3 only, not for "
            f"{family}: use the bfloat16 weights."
        )
    if method.lower() == "mxfp4" and family != "trn3":
        yield (
            "The checkpoint has MXFP4 weights, which only Trn3 computes with: on "
            f"{family} add `hf_overrides: {{quantization_config: {{}}}}` for bfloat16."
        )
    if method.lower() == "compressed-tensors" and target.lane == "neuron-native":
        yield (
            "The native plugin refuses weights quantized with compressed-tensors: use a ModelOpt "
            "FP8 checkpoint or the unquantized weights."
        )


def dumped(part: SpecPart) -> dict[str, Any]:
    """Return the keys of a part that are set, as JSON values."""
    found: dict[str, Any] = part.model_dump(mode="json", exclude_none=True)
    return found


def common_key_inputs(
    target: Target,
    lane: NeuronLaneName,
    *,
    architecture_digest: str,
    draft_architecture_digest: str,
    toolchain: Mapping[str, str],
) -> dict[str, Any]:
    """Return the part of the key inputs that both lanes have.

    The instance's size is not in it: code is compiled for a kind of chip and a number of cores.
    """
    neuron = settings_of(target)
    inputs: dict[str, Any] = {
        "lane": lane,
        "architecture_digest": architecture_digest,
        "sdk": neuron.sdk,
        "toolchain": dict(sorted(toolchain.items())),
        "platform_target": platform_target(target),
        "lnc": lnc_of(target),
        "tensor_parallel_size": target.tensor_parallel_size,
        "data_parallel_size": neuron.data_parallel_size,
        "dtype": target.dtype,
        "max_model_len": target.max_model_len,
        "max_num_batched_tokens": target.max_num_batched_tokens,
        "max_num_seqs": target.max_num_seqs,
        "num_gpu_blocks": neuron.num_gpu_blocks,
        "enable_prefix_caching": target.enable_prefix_caching,
        "hf_overrides": dict(neuron.hf_overrides),
        "compiler_flags": list(neuron.compiler_flags),
        "compile_on": neuron.compile_on,
    }
    if neuron.speculation is not None:
        inputs["speculation"] = {
            **dumped(neuron.speculation),
            "draft_architecture_digest": draft_architecture_digest,
        }
    return inputs


def common_arguments(
    target: Target, *, model_dir: Path, served_model_name: str, port: int, host: str
) -> Iterator[str]:
    """Yield what both lanes pass to `vllm serve`, after the interpreter."""
    neuron = settings_of(target)
    yield "serve"
    yield str(model_dir.absolute())
    yield f"--served-model-name={served_model_name}"
    yield f"--host={host}"
    yield f"--port={port}"
    yield f"--dtype={target.dtype}"
    yield f"--tensor-parallel-size={target.tensor_parallel_size}"
    if neuron.data_parallel_size > 1:
        yield f"--data-parallel-size={neuron.data_parallel_size}"
    yield f"--max-model-len={target.max_model_len}"
    yield f"--max-num-batched-tokens={target.max_num_batched_tokens}"
    yield f"--max-num-seqs={target.max_num_seqs}"
    if neuron.num_gpu_blocks is not None:
        yield f"--num-gpu-blocks-override={neuron.num_gpu_blocks}"
    caching = target.enable_prefix_caching
    yield "--enable-prefix-caching" if caching else "--no-enable-prefix-caching"
    if neuron.hf_overrides:
        yield f"--hf-overrides={as_json(neuron.hf_overrides)}"
    if neuron.speculation is not None:
        speculation = {
            "method": neuron.speculation.method,
            "model": str((model_dir / DRAFT).absolute()),
            "num_speculative_tokens": neuron.speculation.num_speculative_tokens,
        }
        yield f"--speculative-config={as_json(speculation)}"
    yield "--disable-uvicorn-access-log"


def common_environment(target: Target, *, cache_only: bool) -> dict[str, str]:
    """Return the variables that both lanes set.

    `NEURON_RT_VISIBLE_CORES` is not among them: vLLM refuses it with more than one core.
    """
    neuron = settings_of(target)
    env = {
        # Otherwise the node's setting decides, and the NEFF's must be the same.
        "NEURON_LOGICAL_NC_CONFIG": str(lnc_of(target)),
        # One node: no Elastic Fabric Adapter is needed, and its absence must not stop the start.
        "NEURON_SKIP_EFA_AFFINITY": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_LOG_STATS_INTERVAL": "60",
    }
    timeout_s = str(start_timeout_s(cache_only=cache_only))
    env["VLLM_ENGINE_READY_TIMEOUT_S"] = timeout_s
    if not cache_only:
        env["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = timeout_s
    if neuron.compiler_flags:
        env["NEURON_CC_FLAGS"] = " ".join(neuron.compiler_flags)
    if neuron.compile_on == "cpu" and not cache_only:
        env["NEURON_PLATFORM_TARGET_OVERRIDE"] = platform_target(target)
    return env


def start_timeout_s(*, cache_only: bool) -> int:
    """Return how long a server may take to start, in seconds.

    Compiling 70B models takes 15 to 40 minutes, the largest take hours; from a bundle a start is
    one to five minutes.
    """
    return 15 * 60 if cache_only else 4 * 3600


def as_json(value: Any) -> str:
    """Return compact JSON with sorted keys, for an argument."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sdk_at_least(target: Target, *numbers: int) -> bool:
    """Tell whether the target's SDK is of this release or newer."""
    return as_version(settings_of(target).sdk) >= numbers


def powers_of_two(first: int, last: int) -> list[int]:
    """Return first, 2 * first, 4 * first … below `last`, and `last`."""
    found = []
    size = first
    while size < last:
        found.append(size)
        size *= 2
    return [*found, last]
