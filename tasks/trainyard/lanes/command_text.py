"""A Neuron lane's command and environment as a shell script, each line with its source.

For people: the script runs as it is in the target's image, once model and cache are there.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from trainyard.lanes.protocol import ServerCommand

_SDK = "AWS Neuron SDK 2.32"
_NATIVE = f"{_SDK}, vllm-neuron/docs"
_REFERENCE = f"{_NATIVE}/guides/reference-configuration.md"
_FEATURES = f"{_NATIVE}/guides/features-guide.md"
_CACHE = f"{_NATIVE}/design/compilation/compilation_cache.md"
_CPU = f"{_NATIVE}/design/compilation/cpu_compilation.md"
_QUICKSTART = f"{_NATIVE}/getting-started/quickstart-online-serving.md"
_NXDI = f"{_SDK}, libraries/nxd-inference/developer_guides/vllm-user-guide-v1.rst"
_NXDI_CONFIG = "NxD Inference 0.10, models/config.py"
_VLLM = "vLLM, docs/cli/serve"
_VLLM_ENV = "vLLM, vllm/envs.py"
_OURS = "Trainyard"

ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "-P": f"{_OURS}: the working folder holds no modules",
        "-m": _VLLM,
        "serve": _VLLM,
        "--served-model-name": _VLLM,
        "--host": f"{_OURS}: servers listen on loopback",
        "--port": _VLLM,
        "--dtype": _VLLM,
        "--tensor-parallel-size": _FEATURES,
        "--data-parallel-size": _FEATURES,
        "--max-model-len": _QUICKSTART,
        "--max-num-batched-tokens": _REFERENCE,
        "--max-num-seqs": _REFERENCE,
        "--num-gpu-blocks-override": f"{_FEATURES} (Sizing the KV cache); {_NXDI}",
        "--enable-prefix-caching": _FEATURES,
        "--no-enable-prefix-caching": _FEATURES,
        "--hf-overrides": _QUICKSTART,
        "--speculative-config": _FEATURES,
        "--disable-uvicorn-access-log": _VLLM,
        "--block-size": _REFERENCE,
        "--gpu-memory-utilization": f"{_NATIVE}/design/vllm/determine_available_memory_design.md",
        "--kv-cache-dtype": _REFERENCE,
        "--optimization-level": f"{_NATIVE}/tutorials/tutorial-llama3-70b.md",
        "--enable-expert-parallel": _FEATURES,
        "--enable-prompt-embeds": _FEATURES,
        "--async-scheduling": _FEATURES,
        "--no-async-scheduling": _FEATURES,
        "--additional-config": f"{_REFERENCE}; {_NXDI}",
    }
)
"""Where each argument of `vllm serve` is documented."""

VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "NEURON_LOGICAL_NC_CONFIG": (
            f"{_SDK}, libraries/nxd-inference/developer_guides/feature-guide.rst"
        ),
        "NEURON_SKIP_EFA_AFFINITY": f"{_SDK}, deploy/environments/quickstart-deploy-dlc.rst",
        "HF_HUB_OFFLINE": f"{_OURS}: a server loads its checkpoint and nothing else",
        "VLLM_NO_USAGE_STATS": _VLLM_ENV,
        "DO_NOT_TRACK": _VLLM_ENV,
        "VLLM_LOGGING_COLOR": _VLLM_ENV,
        "VLLM_LOG_STATS_INTERVAL": _VLLM_ENV,
        "VLLM_ENGINE_READY_TIMEOUT_S": _VLLM_ENV,
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": _QUICKSTART,
        "NEURON_CC_FLAGS": f"{_SDK}, compiler/neuronx-cc",
        "NEURON_PLATFORM_TARGET_OVERRIDE": _CPU,
        "VLLM_CACHE_ROOT": _CACHE,
        "VLLM_NEURON_KV_GMU_BUDGET_CAP_FRACTION": (
            f"{_NATIVE}/design/vllm/determine_available_memory_design.md"
        ),
        "VLLM_NEURON_BACKEND": (
            "AWS Neuron SDK 2.33, how-to-choose-compilation-route (excerpts only)"
        ),
        "VLLM_NEURON_DISABLE_WARMUP_COMPILE": _CACHE,
        "NEURON_LIBTORCH_DISABLE_GRAPH_CAPTURE_BACKEND": _CPU,
        "VLLM_NEURON_COMPILATION_TIMEOUT": _QUICKSTART,
        "NEURON_LIBTORCH_COMPILATION_TIMEOUT": _CACHE,
        "NEURON_LIBTORCH_PARALLEL_COMPILE_WORKERS": _CPU,
        "VLLM_NEURON_CPU_COMPILE": _CPU,
        "NEURON_COMPILED_ARTIFACTS": (
            f"{_SDK}, libraries/nxd-inference/vllm/quickstart-vllm-online-serving.rst"
        ),
    }
)
"""Where each variable is documented."""

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "vllm.entrypoints.cli.main": _VLLM,
        "trainyard.lanes.without_compiler": (
            f"{_OURS}: the plugin has no switch that forbids compiling, so it finds no compiler"
        ),
    }
)

NATIVE_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "num_batched_tokens_buckets": _REFERENCE,
        "num_seqs_buckets": _REFERENCE,
        "kv_segment_size_buckets": _REFERENCE,
        "decode_context_length_buckets": _REFERENCE,
        "on_device_sampling_config": _REFERENCE,
        "quantization": f"{_REFERENCE}; {_NATIVE}/tutorials/tutorial-qwen3-vl-32b.md",
        "ep_degree": _FEATURES,
        "fp8_packed_kv": f"{_NATIVE}/tutorials/tutorial-llama3-70b.md",
    }
)

_UNKNOWN = "no source on record: from extra_neuron_config"


def script(command: ServerCommand, *, title: str) -> str:
    """Return a bash script that starts `command`, each line with its source.

    Args:
        command: of a Neuron lane.
        title: what the first line says.
    """
    variables = (
        _with_source(f"export {name}={shlex.quote(value)}", VARIABLES.get(name))
        for name, value in sorted(command.env.items())
    )
    words = (f"  {line}" for line in _words(command))
    head = ("#!/bin/bash", f"# {title}", "", *variables, "", "command=(")
    return "\n".join([*head, *words, ")", 'exec "${command[@]}"', ""])


def _words(command: ServerCommand) -> Iterator[str]:
    python, *rest = command.argv
    yield _with_source(shlex.quote(python), f"{_OURS}: the serving interpreter of the image")
    previous = python
    for word in rest:
        name, _, value = word.partition("=")
        if previous == "-m":
            source = MODULES.get(word)
        elif previous == "serve":
            source = f"{_OURS}: the restored checkpoint"
        else:
            source = ARGUMENTS.get(name)
        if name == "--additional-config":
            yield from (f"# {line}" for line in _keys(json.loads(value)))
        yield _with_source(shlex.quote(word), source)
        previous = word


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key of `--additional-config` with its source."""
    for part, value in sorted(config.items()):
        if not isinstance(value, Mapping):
            yield f"{part}: {_REFERENCE}"
            continue
        for key in sorted(value):
            yield f"{part}.{key}: {_source_of_key(part, key)}"


def _source_of_key(part: str, key: str) -> str:
    match part:
        case "neuron_config":
            return NATIVE_KEYS.get(key, _UNKNOWN)
        case "override_neuron_config":
            return _NXDI_CONFIG
    return f"{_NATIVE}/tutorials/tutorial-qwen3-vl-32b.md"


def _with_source(text: str, source: str | None) -> str:
    return f"{text}  # {source or _UNKNOWN}"
