"""Lane `cpu`: vLLM on the CPU, with TorchInductor as its compiler.

The compiler's caches are the bundle: `inductor/` (generated C++ and the shared objects made of it,
and the graphs that lead to them) and `vllm/modelinfos/` (what vLLM found out about the model's
class, which saves a process at each start). They name no folder that matters, so a bundle can be
restored anywhere, for any weights of the same architecture. `docs/lane-cpu.md` has the
measurements behind the compile key and the switches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.behaviour import Capability
from trainyard.errors import Refused
from trainyard.lanes.cache_files import empty
from trainyard.lanes.capabilities import of_cpu
from trainyard.lanes.cpu_toolchain import read_toolchain
from trainyard.lanes.protocol import LOOPBACK, Returned, ServerCommand, StartProof
from trainyard.spec.model import BehaviourName, Target

SHUTDOWN_TIMEOUT_S = 60
"""Seconds that vLLM gives running requests after SIGTERM; it ends at once when there are none."""

_COMPILER_SWITCHES = {
    # vLLM's own ahead-of-time artifact does not load again on a CPU in 0.32.
    "VLLM_USE_AOT_COMPILE": "0",
    # Headers would be precompiled into /tmp, 150 to 300 MB of them, with the openssl program, and
    # save nothing.
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
}
"""Variables that decide what is compiled: TorchInductor has some of them in its own keys."""

_STAGES = (
    ("Application startup complete", "ready"),
    ("init engine (", "starting the HTTP interface"),
    ("Warming up done", "making room for the KV cache"),
    ("Warming up model for the compilation", "tracing the model and compiling what is not cached"),
    ("Starting to load model", "loading the weights"),
    ("Resolved architecture", "starting the engine's process"),
    ("non-default args", "reading the model's configuration"),
)
"""What vLLM writes to its log, the last first, and what happens after that."""

_INDUCTOR = "inductor"
_VLLM = "vllm"
_ENGINE_INIT = re.compile(r"init engine \([^)]*\) took ([\d.]+) s")
_ELF = b"\x7fELF"


class CpuLane:
    """See `trainyard.lanes.protocol.Lane`."""

    name = "cpu"
    finishes_requests = True

    def problems(self, target: Target) -> Sequence[str]:
        """Return every rule of the lane that `target` breaks, each with the remedy."""
        return tuple(_problems(target))

    def warnings(self, target: Target, config: Mapping[str, Any] | None = None) -> Sequence[str]:
        """Return nothing: the lane has no setting that works and surprises."""
        return ()

    def returned(self, target: Target) -> Returned:
        """Return what vLLM itself can do: its default limit is 20 log-probs a token."""
        return Returned(top_logprobs=20, prompt_logprobs=True)

    def model_problems(self, target: Target, config: Mapping[str, Any]) -> Sequence[str]:
        """Return nothing: vLLM itself says what it cannot serve."""
        return ()

    def capability(self, target: Target, name: BehaviourName) -> Capability:
        """Return what a server of `target` can do of one thing that the checks ask for."""
        return of_cpu(name)

    def toolchain(self, python: Path) -> dict[str, str]:
        """Return the versions and processor features that compiled code depends on."""
        return read_toolchain(python)

    def toolchain_problems(self, target: Target, toolchain: Mapping[str, str]) -> Sequence[str]:
        """Return nothing: a target of this lane asks for no versions."""
        return ()

    def key_inputs(
        self,
        target: Target,
        *,
        architecture_digest: str,
        toolchain: Mapping[str, str],
        draft_architecture_digest: str = "",
    ) -> dict[str, Any]:
        """Return what changes the compiled code.

        Lengths, batch sizes, blocks and cache sizes do not: the graph has symbolic shapes.
        """
        return {
            "lane": self.name,
            "architecture_digest": architecture_digest,
            "dtype": target.dtype,
            "tensor_parallel_size": target.tensor_parallel_size,
            "switches": dict(_COMPILER_SWITCHES),
            "toolchain": dict(sorted(toolchain.items())),
        }

    def serving_settings(self, target: Target, *, served_model_name: str) -> dict[str, Any]:
        """Return the serving settings that the compile key leaves out."""
        return {
            "served_model_name": served_model_name,
            "max_model_len": target.max_model_len,
            "max_num_batched_tokens": target.max_num_batched_tokens,
            "max_num_seqs": target.max_num_seqs,
            "block_size": target.block_size,
            "kv_cache_gib": target.kv_cache_gib,
            "enable_prefix_caching": target.enable_prefix_caching,
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
        """Return the command that serves `model_dir` with `cache_dir` as its caches.

        vLLM has no switch that forbids compiling on a CPU: `cache_only` changes nothing, and
        `prove_start` finds out.
        """
        argv = [
            str(python.absolute()),
            "-P",  # The working folder holds no modules.
            "-m",
            "trainyard.lanes.cpu_server",
            f"--model={model_dir.absolute()}",
            f"--served-model-name={served_model_name}",
            f"--host={host}",
            f"--port={port}",
            f"--dtype={target.dtype}",
            f"--tensor-parallel-size={target.tensor_parallel_size}",
            f"--max-model-len={target.max_model_len}",
            f"--max-num-batched-tokens={target.max_num_batched_tokens}",
            f"--max-num-seqs={target.max_num_seqs}",
            f"--kv-cache-memory-bytes={round(target.kv_cache_gib * 2**30)}",
            "--enable-prefix-caching"
            if target.enable_prefix_caching
            else "--no-enable-prefix-caching",
            # The engine's process also does the computing; with VLLM_ENABLE_V1_MULTIPROCESSING=0
            # vLLM lets it. A worker process of its own would cost another import of everything.
            "--distributed-executor-backend=uni",
            f"--shutdown-timeout={SHUTDOWN_TIMEOUT_S}",
            "--disable-uvicorn-access-log",
        ]
        if target.block_size is not None:
            argv.append(f"--block-size={target.block_size}")
        cache_dir = cache_dir.absolute()
        env = {
            "VLLM_CACHE_ROOT": str(cache_dir / _VLLM),
            "TORCHINDUCTOR_CACHE_DIR": str(cache_dir / _INDUCTOR),
            **_COMPILER_SWITCHES,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # By itself each server binds its threads to the first core: two servers would share it.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_COLOR": "0",
            "VLLM_LOG_STATS_INTERVAL": "60",
        }
        return ServerCommand(argv=tuple(argv), env=env)

    def misfits(self, target: Target, cache_dir: Path) -> Sequence[str]:
        """Return nothing: TorchInductor's code says nowhere what it was made for."""
        return ()

    def start_timeout_s(self, *, cache_only: bool) -> float:
        """Return nothing: the settings are made for this lane."""
        return 0.0

    def stage(self, log: str) -> str:
        """Return what a starting server does now, from its log."""
        return next((words for mark, words in _STAGES if mark in log), "starting Python")

    def keep_whole(self, cache_dir: Path, target: Target) -> int:
        """Remove everything: nothing in these caches says that it is finished."""
        empty(cache_dir)
        return 0

    def capture(
        self, cache_dir: Path, target: Target | None = None
    ) -> tuple[Sequence[Path], Sequence[str]]:
        """Return the files of a bundle (relative to `cache_dir`) and what was dropped and why.

        TorchInductor's files do not say what they were compiled for: `target` changes nothing.
        """
        kept: list[Path] = []
        dropped: list[str] = []
        for path in _files(cache_dir / _INDUCTOR):
            relative = path.relative_to(cache_dir)
            if _is_lock(relative):
                continue
            reason = _defect(path)
            if reason:
                dropped.append(f"{relative.as_posix()}: {reason}")
            else:
                kept.append(relative)
        compiled = any(path.suffix == ".so" for path in kept)
        if not compiled or not any("fxgraph" in path.parts for path in kept):
            raise Refused(
                f"The compiler left no complete result in {cache_dir / _INDUCTOR}: "
                f"{len(kept)} usable files, {len(dropped)} unusable.",
                hint="Look at the server's log for errors of the C++ compiler, then compile again.",
            )
        kept += [
            path.relative_to(cache_dir)
            for path in _files(cache_dir / _VLLM / "modelinfos")
            if path.suffix == ".json"
        ]
        return sorted(kept), sorted(dropped)

    def snapshot(self, cache_dir: Path) -> frozenset[str]:
        """Return `<path>|<bytes>|<time of change>` for each output of the compiler.

        Rewriting a file under its old name changes its entry.
        """
        return frozenset(
            f"{path.relative_to(cache_dir).as_posix()}|{stat.st_size}|{stat.st_mtime_ns}"
            for path in _files(cache_dir / _INDUCTOR)
            if not _is_lock(path.relative_to(cache_dir))
            for stat in (path.stat(),)
        )

    def missed(self, log: str) -> str:
        """Return nothing: this lane has no start that may not compile."""
        return ""

    def prove_start(
        self,
        *,
        log: str,
        before: frozenset[str],
        after: frozenset[str],
        bundle: BundleManifest | None,
    ) -> StartProof:
        """Judge whether a start used its bundle: the compiler wrote nothing, with it in place."""
        match = _ENGINE_INIT.search(log)
        engine_init_s = float(match[1]) if match else None
        written = tuple(sorted({entry.split("|")[0] for entry in after - before}))

        def verdict(used: bool, reason: str) -> StartProof:
            return StartProof(used, reason, engine_init_s, written)

        if bundle is None:
            return verdict(False, "There was no bundle to start from.")
        present = {entry.split("|")[0] for entry in before}
        missing = sorted(
            file.path
            for file in bundle.files
            if file.path.startswith(f"{_INDUCTOR}/") and file.path not in present
        )
        if missing:
            return verdict(
                False,
                f"{len(missing)} files of the bundle were not in the cache before the start, "
                f"such as {missing[0]}.",
            )
        if written:
            return verdict(
                False, f"The server compiled: {len(written)} new files, such as {written[0]}."
            )
        if engine_init_s is None:
            return verdict(False, "The log does not say that the engine was initialised.")
        before_words = (
            f" (compiling took {bundle.engine_init_s:.1f} s)" if bundle.engine_init_s else ""
        )
        return verdict(
            True,
            f"No new file in the compiler's cache, and the engine was ready in "
            f"{engine_init_s:.1f} s{before_words}.",
        )


def _problems(target: Target) -> Iterator[str]:
    if target.instance != "local":
        yield (
            f"Lane cpu runs on this machine, not on {target.instance!r}: set `instance: local`, "
            "or choose a Neuron lane."
        )
    if target.tensor_parallel_size != 1:
        yield (
            "Lane cpu runs each server in one process: set `tensor_parallel_size: 1` "
            f"(it is {target.tensor_parallel_size})."
        )
    if target.max_num_batched_tokens < target.max_num_seqs:
        yield (
            f"max_num_batched_tokens ({target.max_num_batched_tokens}) is less than max_num_seqs "
            f"({target.max_num_seqs}), so one engine step could not give every request a token: "
            "raise the one or lower the other."
        )
    if target.block_size is not None and target.block_size % 32:
        yield (
            f"vLLM's CPU attention needs a `block_size` that is a multiple of 32 "
            f"(it is {target.block_size}): use 32, 64 or 128, or leave it out."
        )


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path


def _is_lock(relative: Path) -> bool:
    return relative.suffix == ".lock" or "locks" in relative.parts[:-1]


def _defect(path: Path) -> str:
    """Return why a file of TorchInductor's cache cannot be used; empty if it can."""
    if path.name.startswith(".") or path.suffix == ".tmp":
        return "temporary file of an interrupted write"
    if path.stat().st_size == 0:
        return "empty"
    if path.suffix == ".so":
        with path.open("rb") as handle:
            if handle.read(len(_ELF)) != _ELF:
                return "not a shared object"
    if path.suffix == ".cpp" and not path.with_suffix(".so").exists():
        return "source without its compiled code"
    return ""
