"""Lane `neuron-native`: the native vLLM Neuron plugin on Trn2 and Trn3.

vLLM compiles one graph for each bucket while it warms up, into a cache below `VLLM_CACHE_ROOT`,
which is the bundle. A start that must not compile says so with the plugin's own switch: a miss ends
it.

Sources: AWS Neuron SDK 2.32, `vllm-neuron/docs` (guides/reference-configuration.md,
guides/features-guide.md, design/compilation), and what is published of 2.33.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.behaviour import Capability
from trainyard.lanes import native_cache
from trainyard.lanes.capabilities import of_neuron
from trainyard.lanes.cpu import SHUTDOWN_TIMEOUT_S
from trainyard.lanes.neuron_common import (
    DEFAULT_BLOCK_SIZE,
    as_json,
    common_arguments,
    common_environment,
    common_key_inputs,
    common_problems,
    common_warnings,
    dumped,
    extra_problems,
    extra_warnings,
    family_warnings,
    powers_of_two,
    quantization_problems,
    sdk_at_least,
    settings_of,
    start_timeout_s,
    world_size,
)
from trainyard.lanes.neuron_stages import neuron_stage
from trainyard.lanes.neuron_support import NeuronLaneName, family_of
from trainyard.lanes.neuron_toolchain import mismatches, read_neuron_toolchain
from trainyard.lanes.protocol import LOOPBACK, Returned, ServerCommand, StartProof
from trainyard.spec.model import BehaviourName, Target
from trainyard.spec.neuron import NativeConfig, NativeSettings

_LANE: NeuronLaneName = "neuron-native"

SEGMENT_SIZES = (512, 1024, 2048, 4096, 8192)
CONTEXT_UNIT = 128


class NativeLane:
    """See `trainyard.lanes.protocol.Lane`."""

    name = "neuron-native"
    finishes_requests = True

    def problems(self, target: Target) -> Sequence[str]:
        """Return every rule of the lane that `target` breaks, each with the remedy."""
        return tuple(_problems(target))

    def warnings(self, target: Target, config: Mapping[str, Any] | None = None) -> Sequence[str]:
        """Return what is allowed but should be known, each as sentences."""
        return (*_warnings(target), *family_warnings(_LANE, config))

    def returned(self, target: Target) -> Returned:
        """Return what the plugin's sampler can do.

        It fills in log-probs of answers where it samples on the CPU, and never those of prompts
        (AWS Neuron SDK 2.32, vllm-neuron/docs/design/vllm/vllm-integration-design-reference.md).
        """
        if native_of(target).neuron_config.on_device_sampling_config is not None:
            return Returned(0, False, "it samples on the device, which returns tokens only")
        return Returned(20, False, "its plugin returns no log-probs of prompts")

    def model_problems(self, target: Target, config: Mapping[str, Any]) -> Sequence[str]:
        """Return what the lane cannot do with a model of this config.json."""
        return tuple(_model_problems(target, config))

    def capability(self, target: Target, name: BehaviourName) -> Capability:
        """Return what a server of `target` can do of one thing that the checks ask for."""
        return of_neuron(name)

    def toolchain(self, python: Path) -> dict[str, str]:
        """Return the versions that compiled code depends on."""
        return read_neuron_toolchain(python, _LANE)

    def toolchain_problems(self, target: Target, toolchain: Mapping[str, str]) -> Sequence[str]:
        """Return where the toolchain is not that of the target's SDK."""
        return mismatches(settings_of(target).sdk, _LANE, toolchain)

    def key_inputs(
        self,
        target: Target,
        *,
        architecture_digest: str,
        toolchain: Mapping[str, str],
        draft_architecture_digest: str = "",
    ) -> dict[str, Any]:
        """Return what changes the compiled code: shapes, number formats, the KV cache, tools."""
        native = native_of(target)
        inputs = common_key_inputs(
            target,
            _LANE,
            architecture_digest=architecture_digest,
            draft_architecture_digest=draft_architecture_digest,
            toolchain=toolchain,
        )
        inputs |= {
            "route": route_of(target),
            "optimization_level": native.optimization_level,
            "block_size": block_size_of(target),
            "kv_cache_dtype": native.kv_cache_dtype,
            "gpu_memory_utilization": native.gpu_memory_utilization,
            "kv_budget_cap_fraction": native.kv_budget_cap_fraction,
            "enable_expert_parallel": native.enable_expert_parallel,
            "enable_prompt_embeds": native.enable_prompt_embeds,
            **additional_config(target),
        }
        return inputs

    def serving_settings(self, target: Target, *, served_model_name: str) -> dict[str, Any]:
        """Return the serving settings that the compile key leaves out."""
        return {
            "served_model_name": served_model_name,
            "instance": target.instance,
            "image": settings_of(target).image,
            "async_scheduling": native_of(target).async_scheduling,
        }

    def command(
        self,
        target: Target,
        *,
        python: Path,
        model_dir: Path,
        cache_dir: Path,
        served_model_name: str,
        port: int,
        cache_only: bool,
        host: str = LOOPBACK,
    ) -> ServerCommand:
        """Return `vllm serve` with everything spelled out that the compile key names."""
        native = native_of(target)
        argv = [
            str(python.absolute()),
            "-P",  # The working folder holds no modules.
            "-m",
            "vllm.entrypoints.cli.main",
            *common_arguments(
                target,
                model_dir=model_dir,
                served_model_name=served_model_name,
                port=port,
                host=host,
            ),
            # Every image of this lane has vLLM 0.21 or newer, which knows it.
            f"--shutdown-timeout={SHUTDOWN_TIMEOUT_S}",
            f"--block-size={block_size_of(target)}",
            f"--gpu-memory-utilization={native.gpu_memory_utilization:g}",
        ]
        if native.kv_cache_dtype != "auto":
            argv.append(f"--kv-cache-dtype={native.kv_cache_dtype}")
        if native.optimization_level is not None:
            argv.append(f"--optimization-level={native.optimization_level}")
        if native.enable_expert_parallel:
            argv.append("--enable-expert-parallel")
        if native.enable_prompt_embeds:
            argv.append("--enable-prompt-embeds")
        if native.async_scheduling is not None:
            argv.append(f"--{'' if native.async_scheduling else 'no-'}async-scheduling")
        argv.append(f"--additional-config={as_json(additional_config(target))}")
        return ServerCommand(
            tuple(argv),
            _environment(target, cache_dir, cache_only=cache_only),
            answers=cache_only or settings_of(target).compile_on == "device",
        )

    def misfits(self, target: Target, cache_dir: Path) -> Sequence[str]:
        """Return which compiled graphs do not run on the cores that the target takes."""
        return native_cache.misfits(cache_dir, target)

    def start_timeout_s(self, *, cache_only: bool) -> float:
        """Return the time that a compile of a large model, or a start without one, may take."""
        return start_timeout_s(cache_only=cache_only)

    def stage(self, log: str) -> str:
        """Return what a starting server does now, from its log."""
        return neuron_stage(log)

    def keep_whole(self, cache_dir: Path, target: Target) -> int:
        """Remove all but the entries that bear their mark and are made for the target."""
        return native_cache.keep_whole(cache_dir, target)

    def capture(
        self, cache_dir: Path, target: Target | None = None
    ) -> tuple[Sequence[Path], Sequence[str]]:
        """Return the files of a bundle (relative to `cache_dir`) and what was dropped and why."""
        return native_cache.capture(cache_dir, target)

    def snapshot(self, cache_dir: Path) -> frozenset[str]:
        """Return the compiler's outputs, to compare two starts."""
        return native_cache.snapshot(cache_dir)

    def missed(self, log: str) -> str:
        """Return which graph a start did not find, if it ended for that."""
        return native_cache.missed(log)

    def prove_start(
        self,
        *,
        log: str,
        before: frozenset[str],
        after: frozenset[str],
        bundle: BundleManifest | None,
    ) -> StartProof:
        """Judge whether a start used its bundle."""
        return native_cache.prove_start(log=log, before=before, after=after, bundle=bundle)


def native_of(target: Target) -> NativeSettings:
    """Return the plugin's settings; the defaults if the target gives none."""
    return target.native or NativeSettings()


def block_size_of(target: Target) -> int:
    """Return the tokens of one block: the spec's number or the plugin's default."""
    return target.block_size or DEFAULT_BLOCK_SIZE


def route_of(target: Target) -> str:
    """Return how graphs are lowered: the spec's route or the SDK's default."""
    chosen = native_of(target).route
    return chosen or ("native" if sdk_at_least(target, 2, 33) else "xla")


def additional_config(target: Target) -> dict[str, Any]:
    """Return vLLM's `--additional-config`, the plugin's defaults for buckets spelled out.

    A later plugin with other defaults compiles the same buckets, and the key says which.
    """
    native = native_of(target)
    config = dumped(native.neuron_config)
    config.setdefault(
        "num_batched_tokens_buckets", powers_of_two(128, target.max_num_batched_tokens)
    )
    config.setdefault("num_seqs_buckets", powers_of_two(1, target.max_num_seqs))
    if native.enable_expert_parallel:
        config.setdefault("ep_degree", world_size(target))
    found: dict[str, Any] = {"neuron_config": {**native.extra_neuron_config, **config}}
    if native.vision_neuron_config is not None:
        found["vision_neuron_config"] = dumped(native.vision_neuron_config)
    if native.mm_language_model_only:
        # At the top level: anywhere else the plugin ignores it without a word.
        found["mm_language_model_only"] = True
    return found


def _environment(target: Target, cache_dir: Path, *, cache_only: bool) -> dict[str, str]:
    neuron, native = settings_of(target), native_of(target)
    env = {
        **common_environment(target, cache_only=cache_only),
        "VLLM_CACHE_ROOT": str(cache_dir.absolute()),
        "VLLM_NEURON_KV_GMU_BUDGET_CAP_FRACTION": f"{native.kv_budget_cap_fraction:g}",
    }
    if sdk_at_least(target, 2, 33):
        # Explicit, because the cache of traces works only then. AWS documents `neuron_native`; the
        # other value is that of third-party code.
        env["VLLM_NEURON_BACKEND"] = (
            "neuron_native" if route_of(target) == "native" else "vllm_neuron"
        )
    if cache_only:
        # A miss is an error, and no compile in the middle of the night. AWS documents the two
        # together (design/compilation/cpu_compilation.md).
        env["VLLM_NEURON_DISABLE_WARMUP_COMPILE"] = "1"
        env["NEURON_LIBTORCH_DISABLE_GRAPH_CAPTURE_BACKEND"] = "1"
        return env
    timeout_s = str(start_timeout_s(cache_only=False))
    env["VLLM_NEURON_COMPILATION_TIMEOUT"] = timeout_s
    env["NEURON_LIBTORCH_COMPILATION_TIMEOUT"] = timeout_s
    if neuron.parallel_compile_workers is not None:
        env["NEURON_LIBTORCH_PARALLEL_COMPILE_WORKERS"] = str(neuron.parallel_compile_workers)
    if neuron.compile_on == "cpu":
        env["VLLM_NEURON_CPU_COMPILE"] = "1"
    return env


def _problems(target: Target) -> Iterator[str]:
    yield from common_problems(target, _LANE)
    if target.neuron is None:
        return
    native = native_of(target)
    yield from _bucket_problems(target, native.neuron_config)
    yield from _segment_problems(target, native.neuron_config)
    yield from _block_problems(target)
    yield from _cpu_compile_problems(target)
    yield from _sampling_problems(target)
    yield from _expert_problems(target)
    yield from _route_problems(target)
    yield from _vision_problems(target)
    yield from extra_problems(native.extra_neuron_config, NativeConfig, managed={})
    quantization = native.neuron_config.quantization
    if quantization in ("mxfp4", "mxfp8") and family_of(target.instance) == "trn2":
        yield (
            f"quantization {quantization} exists on Trn3 only: leave it out on Trn2, where weights "
            "stay in bfloat16."
        )


def _bucket_problems(target: Target, config: NativeConfig) -> Iterator[str]:
    limits = (
        ("num_batched_tokens_buckets", "max_num_batched_tokens", target.max_num_batched_tokens),
        ("num_seqs_buckets", "max_num_seqs", target.max_num_seqs),
    )
    for name, limit_name, limit in limits:
        buckets: tuple[int, ...] | None = getattr(config, name)
        if buckets is None:
            continue
        yield from ascending_problems(name, buckets)
        if not buckets or max(buckets) != limit:
            yield (
                f"The largest of {name} must be {limit_name} ({limit}): end the list with {limit}."
            )
    lengths = config.decode_context_length_buckets
    if lengths is None:
        return
    yield from ascending_problems("decode_context_length_buckets", lengths)
    for length in lengths:
        if length % CONTEXT_UNIT or length >= target.max_model_len:
            yield (
                f"decode_context_length_buckets has {length}: give multiples of {CONTEXT_UNIT} "
                f"below max_model_len ({target.max_model_len})."
            )


def ascending_problems(name: str, buckets: Sequence[int]) -> Iterator[str]:
    """Yield what is wrong if a list of buckets does not grow."""
    if any(after <= before for before, after in pairwise(buckets)):
        yield f"{name} must grow: write {sorted(set(buckets))}."


def _segment_problems(target: Target, config: NativeConfig) -> Iterator[str]:
    segments = config.kv_segment_size_buckets
    if segments is None:
        return
    sizes = ", ".join(map(str, SEGMENT_SIZES))
    if len(segments) != 1:
        yield (
            f"kv_segment_size_buckets has {len(segments)} sizes; the plugin supports exactly one: "
            f"give one of {sizes}."
        )
    for size in segments:
        if size not in SEGMENT_SIZES:
            yield f"kv_segment_size_buckets has {size}: give one of {sizes}."
        if size % block_size_of(target):
            yield (
                f"Segment size {size} is no multiple of block_size {block_size_of(target)}: give "
                "a block_size that divides it."
            )
    if segments != config.num_batched_tokens_buckets:
        yield (
            "With kv_segment_size_buckets, num_batched_tokens_buckets must be the same list: write "
            f"num_batched_tokens_buckets: {list(segments)}."
        )


def _block_problems(target: Target) -> Iterator[str]:
    blocks, size = settings_of(target).num_gpu_blocks, block_size_of(target)
    if blocks is not None and blocks * size < target.max_model_len:
        least = -(-target.max_model_len // size)
        yield (
            f"{blocks} blocks of {size} tokens hold no request of max_model_len "
            f"({target.max_model_len}): give num_gpu_blocks of at least {least}."
        )


def _cpu_compile_problems(target: Target) -> Iterator[str]:
    neuron = settings_of(target)
    if neuron.compile_on == "cpu" and neuron.num_gpu_blocks is None:
        # design/vllm/determine_available_memory_design.md: without a device the plugin estimates
        # the memory in another way than on one, and the shape of the KV cache is compiled in.
        yield (
            "Compiling on a CPU needs neuron.num_gpu_blocks: without it a CPU and a device count "
            "other numbers of blocks, and no graph of the one would be found on the other. Give a "
            "number."
        )


def _sampling_problems(target: Target) -> Iterator[str]:
    native, speculation = native_of(target), settings_of(target).speculation
    on_device = native.neuron_config.on_device_sampling_config is not None
    if native.async_scheduling and not on_device:
        yield (
            "async_scheduling needs sampling on the device: add "
            "`on_device_sampling_config: {all_greedy: true}` or other parameters."
        )
    if speculation is None:
        return
    if speculation.method != "eagle3":
        yield (
            f"The native plugin knows method eagle3 only, not {speculation.method}: use an EAGLE3 "
            "draft, or lane neuron-nxdi."
        )
    if not on_device:
        yield (
            "Speculative decoding needs sampling on the device: add "
            "`on_device_sampling_config: {temperature: 0}` or other parameters."
        )


def _expert_problems(target: Target) -> Iterator[str]:
    native, degree = native_of(target), native_of(target).neuron_config.ep_degree
    if degree is not None and degree > 1 and not native.enable_expert_parallel:
        yield "ep_degree needs `enable_expert_parallel: true`: add it, or remove ep_degree."
    data = settings_of(target).data_parallel_size
    if native.enable_expert_parallel and data > 1 and degree not in (None, world_size(target)):
        yield (
            f"With data_parallel_size {data}, ep_degree must be tensor times data parallel degree "
            f"({world_size(target)}): give that, or leave it out."
        )


def _route_problems(target: Target) -> Iterator[str]:
    if native_of(target).route == "native" and not sdk_at_least(target, 2, 33):
        yield (
            f"SDK {settings_of(target).sdk} has the xla route only; native begins with 2.33.0: "
            "leave route out."
        )


def _vision_problems(target: Target) -> Iterator[str]:
    vision = native_of(target).vision_neuron_config
    if vision is None:
        return
    if native_of(target).mm_language_model_only:
        yield "mm_language_model_only leaves the vision part out: remove vision_neuron_config."
    if vision.num_vision_tokens_buckets is not None:
        yield from ascending_problems("num_vision_tokens_buckets", vision.num_vision_tokens_buckets)
    ranks = world_size(target)
    if vision.tp_size and vision.dp_size and vision.tp_size * vision.dp_size != ranks:
        yield (
            f"tp_size {vision.tp_size} times dp_size {vision.dp_size} of the vision encoder must "
            f"be {ranks}, the cores of the server: leave one of them out."
        )


def _model_problems(target: Target, config: Mapping[str, Any]) -> Iterator[str]:
    yield from quantization_problems(target, config)
    quantization = native_of(target).neuron_config.quantization
    if quantization == "mxfp4" and config.get("model_type") != "gpt_oss":
        yield (
            "quantization mxfp4 is for gpt-oss only, and the model is "
            f"{config.get('model_type', 'of an unknown type')}: leave it out."
        )


def _warnings(target: Target) -> Iterator[str]:
    yield from common_warnings(target, _LANE)
    native = native_of(target)
    yield from extra_warnings(native.extra_neuron_config, NativeConfig)
    if target.neuron is None:
        return
    if target.neuron.num_gpu_blocks is None:
        yield (
            "neuron.num_gpu_blocks is empty: each start counts the blocks that the free memory "
            "holds, and another number is other code. Give a number to make starts repeatable."
        )
    if native.route == "xla" and sdk_at_least(target, 2, 33):
        yield "Route xla is deprecated from SDK 2.33 on. Leave route out to take native."
    if native.kv_cache_dtype == "fp8":
        yield (
            "kv_cache_dtype fp8 takes its scales from the checkpoint; without them they are 1.0, "
            "which costs accuracy."
        )
