"""Lane `neuron-nxdi`: vLLM with NxD Inference on Inf2, Trn1 and, until SDK 2.34, Trn2.

The plugin compiles into the folder that `NEURON_COMPILED_ARTIFACTS` names, which is the bundle. It
has no switch that forbids compiling: when it cannot load the folder it compiles again without a
word. A start that must not compile therefore finds no compiler (`without_compiler`).

Sources: NxD Inference 0.10 (`models/config.py`, `models/application_base.py`), vllm-neuron 0.2
(`worker/neuronx_distributed_model_loader.py`), AWS Neuron SDK 2.32
(`libraries/nxd-inference/developer_guides/vllm-user-guide-v1`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.behaviour import Capability
from trainyard.lanes import nxdi_folder
from trainyard.lanes.cache_files import empty
from trainyard.lanes.capabilities import of_nxdi
from trainyard.lanes.neuron_common import (
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
    lnc_of,
    quantization_problems,
    settings_of,
    start_timeout_s,
)
from trainyard.lanes.neuron_native import ascending_problems
from trainyard.lanes.neuron_stages import neuron_stage
from trainyard.lanes.neuron_support import NeuronLaneName, family_of
from trainyard.lanes.neuron_toolchain import mismatches, read_neuron_toolchain
from trainyard.lanes.protocol import LOOPBACK, Returned, ServerCommand, StartProof
from trainyard.spec.model import BehaviourName, Target
from trainyard.spec.neuron import NxdiConfig, NxdiSettings

_LANE: NeuronLaneName = "neuron-nxdi"

MANAGED: Mapping[str, str] = {
    "batch_size": "max_num_seqs",
    "max_batch_size": "max_num_seqs",
    "seq_len": "max_model_len",
    "max_length": "max_model_len",
    "max_context_length": "max_model_len",
    "n_positions": "max_model_len",
    "torch_dtype": "dtype",
    "tp_degree": "tensor_parallel_size",
    "world_size": "tensor_parallel_size",
    "logical_nc_config": "neuron.lnc",
    "target": "instance",
    "quantized_checkpoints_path": "the checkpoint itself",
    "skip_sharding": "the lane: weights are sharded when they are loaded",
}
"""Keys of NeuronConfig that Trainyard sets, by what they follow from."""


class NxdiLane:
    """See `trainyard.lanes.protocol.Lane`."""

    name = "neuron-nxdi"
    # Its images have vLLM 0.16 or older; `--shutdown-timeout` begins with 0.18.
    finishes_requests = False

    def problems(self, target: Target) -> Sequence[str]:
        """Return every rule of the lane that `target` breaks, each with the remedy."""
        return tuple(_problems(target))

    def warnings(self, target: Target, config: Mapping[str, Any] | None = None) -> Sequence[str]:
        """Return what is allowed but should be known, each as sentences."""
        return (*_warnings(target), *family_warnings(_LANE, config))

    def returned(self, target: Target) -> Returned:
        """Return what the plugin can do: its compiled graph returns tokens.

        Versions that return more are not told apart; a log-prob that is not promised is not used.
        """
        return Returned(0, False, "its plugin promises tokens only")

    def model_problems(self, target: Target, config: Mapping[str, Any]) -> Sequence[str]:
        """Return what the lane cannot do with a model of this config.json."""
        return tuple(quantization_problems(target, config))

    def capability(self, target: Target, name: BehaviourName) -> Capability:
        """Return what a server of `target` can do of one thing that the checks ask for."""
        return of_nxdi(name, target)

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
        inputs = common_key_inputs(
            target,
            _LANE,
            architecture_digest=architecture_digest,
            draft_architecture_digest=draft_architecture_digest,
            toolchain=toolchain,
        )
        inputs["block_size"] = target.block_size
        inputs["override_neuron_config"] = override_neuron_config(target)
        return inputs

    def serving_settings(self, target: Target, *, served_model_name: str) -> dict[str, Any]:
        """Return the serving settings that the compile key leaves out."""
        return {
            "served_model_name": served_model_name,
            "instance": target.instance,
            "image": settings_of(target).image,
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
        """Return `vllm serve`, without a compiler in reach if it may not compile."""
        config = override_neuron_config(target)
        if config.get("quantized"):
            # Where the quantized weights are is nothing that code depends on: not in the key.
            config["quantized_checkpoints_path"] = str(model_dir.absolute())
        module = "trainyard.lanes.without_compiler" if cache_only else "vllm.entrypoints.cli.main"
        argv = [
            str(python.absolute()),
            "-P",  # The working folder holds no modules.
            "-m",
            module,
            *common_arguments(
                target,
                model_dir=model_dir,
                served_model_name=served_model_name,
                port=port,
                host=host,
            ),
        ]
        if target.block_size is not None:
            argv.append(f"--block-size={target.block_size}")
        argv.append(f"--additional-config={as_json({'override_neuron_config': config})}")
        env = {
            **common_environment(target, cache_only=cache_only),
            "NEURON_COMPILED_ARTIFACTS": str(cache_dir.absolute()),
        }
        return ServerCommand(tuple(argv), env)

    def misfits(self, target: Target, cache_dir: Path) -> Sequence[str]:
        """Return every field that was compiled in otherwise than the target asks for.

        The plugin would load the folder all the same, without a word.
        """
        return nxdi_folder.misfits(cache_dir, target)

    def start_timeout_s(self, *, cache_only: bool) -> float:
        """Return the time that a compile of a large model, or a start without one, may take."""
        return start_timeout_s(cache_only=cache_only)

    def stage(self, log: str) -> str:
        """Return what a starting server does now, from its log."""
        return neuron_stage(log)

    def keep_whole(self, cache_dir: Path, target: Target) -> int:
        """Remove everything: nothing in these caches says that it is finished."""
        empty(cache_dir)
        return 0

    def capture(
        self, cache_dir: Path, target: Target | None = None
    ) -> tuple[Sequence[Path], Sequence[str]]:
        """Return the files of a bundle (relative to `cache_dir`) and what was dropped and why."""
        return nxdi_folder.capture(cache_dir, target)

    def snapshot(self, cache_dir: Path) -> frozenset[str]:
        """Return the compiler's outputs, to compare two starts."""
        return nxdi_folder.snapshot(cache_dir)

    def missed(self, log: str) -> str:
        """Return that a start called the compiler, which was out of its reach."""
        return nxdi_folder.missed(log)

    def prove_start(
        self,
        *,
        log: str,
        before: frozenset[str],
        after: frozenset[str],
        bundle: BundleManifest | None,
    ) -> StartProof:
        """Judge whether a start used its bundle."""
        return nxdi_folder.prove_start(log=log, before=before, after=after, bundle=bundle)


def nxdi_of(target: Target) -> NxdiSettings:
    """Return the plugin's settings; the defaults if the target gives none."""
    return target.nxdi or NxdiSettings()


def override_neuron_config(target: Target) -> dict[str, Any]:
    """Return the plugin's `override_neuron_config`, what follows from other settings included."""
    nxdi = nxdi_of(target)
    config = {**nxdi.extra_neuron_config, **dumped(nxdi.override_neuron_config)}
    config["logical_nc_config"] = lnc_of(target)
    if target.enable_prefix_caching:
        config.setdefault("is_prefix_caching", True)
        config.setdefault("is_block_kv_layout", True)
    if config.get("is_block_kv_layout"):
        config.setdefault("pa_num_blocks", settings_of(target).num_gpu_blocks)
        config.setdefault("pa_block_size", target.block_size)
    return config


def _problems(target: Target) -> Iterator[str]:
    yield from common_problems(target, _LANE)
    if target.neuron is None:
        return
    nxdi = nxdi_of(target)
    yield from _bucket_problems(target, nxdi.override_neuron_config)
    yield from _block_problems(target, nxdi.override_neuron_config)
    yield from _agreement_problems(target, nxdi.override_neuron_config)
    yield from _quantization_problems(target, nxdi.override_neuron_config)
    yield from extra_problems(nxdi.extra_neuron_config, NxdiConfig, managed=MANAGED)
    if nxdi.override_neuron_config.save_sharded_checkpoint:
        yield (
            "save_sharded_checkpoint would put weights into the bundle, which checkpoints of the "
            "same architecture share: leave it out."
        )
    if target.neuron.compile_on == "cpu":
        yield (
            "The plugin of lane neuron-nxdi loads what it compiled at once, which needs a device: "
            "set neuron.compile_on: device."
        )
    if target.neuron.data_parallel_size > 1:
        yield (
            "Lane neuron-nxdi has no data parallelism inside one server: set "
            "neuron.data_parallel_size: 1 and run more replicas."
        )


def _bucket_problems(target: Target, config: NxdiConfig) -> Iterator[str]:
    for name in ("context_encoding_buckets", "token_generation_buckets"):
        buckets: tuple[int, ...] | None = getattr(config, name)
        if buckets is None:
            continue
        yield from ascending_problems(name, buckets)
        if not buckets or max(buckets) > target.max_model_len:
            # models/config.py of NxD Inference asserts it.
            yield (
                f"The largest of {name} must be at most max_model_len ({target.max_model_len}): "
                f"end the list with {target.max_model_len}."
            )
    if config.prefix_buckets is not None:
        yield from ascending_problems("prefix_buckets", config.prefix_buckets)


def _block_problems(target: Target, config: NxdiConfig) -> Iterator[str]:
    blocks, size = settings_of(target).num_gpu_blocks, target.block_size
    if not (target.enable_prefix_caching or config.is_block_kv_layout):
        if blocks != target.max_num_seqs:
            yield (
                "Without prefix caching and block layout, neuron.num_gpu_blocks must be "
                f"max_num_seqs: give {target.max_num_seqs}."
            )
        return
    if size is None:
        yield "Prefix caching and the block layout need a block_size: give one, such as 32."
        return
    least = -(-target.max_model_len // size) * target.max_num_seqs
    if blocks is None or blocks < least:
        yield (
            f"Every request may need all of max_model_len: give neuron.num_gpu_blocks of at least "
            f"{least} (max_model_len / block_size, rounded up, times max_num_seqs)."
        )


def _agreement_problems(target: Target, config: NxdiConfig) -> Iterator[str]:
    speculation = settings_of(target).speculation
    pairs = (
        ("is_prefix_caching", config.is_prefix_caching,
         "enable_prefix_caching", target.enable_prefix_caching),
        ("pa_num_blocks", config.pa_num_blocks,
         "neuron.num_gpu_blocks", settings_of(target).num_gpu_blocks),
        ("pa_block_size", config.pa_block_size, "block_size", target.block_size),
        ("speculation_length", config.speculation_length,
         "neuron.speculation.num_speculative_tokens",
         speculation.num_speculative_tokens if speculation else None),
    )  # fmt: skip
    for name, given, other, value in pairs:
        if given is not None and given != value:
            yield f"{name} {given} contradicts {other} ({value}): leave {name} out."


def _quantization_problems(target: Target, config: NxdiConfig) -> Iterator[str]:
    family = family_of(target.instance)
    fp8 = "quantization_dtype f8e4m3" if config.quantization_dtype == "f8e4m3" else ""
    fp8 = fp8 or ("kv_cache_quant" if config.kv_cache_quant else "")
    if fp8 and family in ("inf2", "trn1"):
        yield (
            f"{fp8} is FP8, which is documented for Trn2 and Trn3 only, not for {family}: use int8 "
            "or bfloat16."
        )
    if config.quantized and config.quantization_dtype is None:
        yield "quantized needs a quantization_dtype: give int8 or f8e4m3."


def _warnings(target: Target) -> Iterator[str]:
    yield from common_warnings(target, _LANE)
    nxdi = nxdi_of(target)
    yield from extra_warnings(nxdi.extra_neuron_config, NxdiConfig)
    yield from _short_buckets(target, nxdi.override_neuron_config)
    if nxdi.override_neuron_config.on_device_sampling_config is not None:
        yield (
            "Sampling on the device ignores presence and repetition penalties without a word: the "
            "release will carry that as a warning."
        )
    if target.enable_prefix_caching and target.max_num_seqs == 1:
        yield (
            "Prefix caching with max_num_seqs 1 gave wrong answers in plugin 0.2: the behaviour "
            "checks will stop a release that has them."
        )


def _short_buckets(target: Target, config: NxdiConfig) -> Iterator[str]:
    for name in ("context_encoding_buckets", "token_generation_buckets"):
        buckets: tuple[int, ...] | None = getattr(config, name)
        if buckets and max(buckets) < target.max_model_len:
            yield (
                f"The largest of {name} ({max(buckets)}) is less than max_model_len "
                f"({target.max_model_len}): longer requests have no compiled graph."
            )
