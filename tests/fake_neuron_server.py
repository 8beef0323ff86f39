"""A fake of vLLM's command line with the Neuron plugins: compiles through a fake `neuronx-cc`.

`FakeServing` makes a serving environment of it: an interpreter in which `vllm`, the plugin's and
the compiler's packages, lm-evaluation-harness and vLLM's benchmark are fakes, so that Trainyard's
steps run it like the real one (`TRAINYARD_SERVE_PYTHON`). How it behaves is read at each start from
`behaviour.json` in that environment:

    device        is there a Neuron device? (else the plugin steps aside, as the real one does)
    pause_s       seconds between two writes of the compiler
    fail_at       number of the graph that the compiler rejects, with `code`
    kill_at       number of the graph in whose middle the process is killed
    salt          something outside of all keys that changes the compiled code (a patched plugin)
    extra_graphs  more graphs at a start than were compiled (a shape that warm-up did not know)
    unreadable    the plugin cannot load the compiled model (lane neuron-nxdi)
    config        fields that NxD Inference compiles in otherwise than it was told
    code          the compiler's error code
    cpu_stays     a CPU compile keeps its HTTP interface instead of ending
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests import fake_neuron
from tests.fake_neuron import NativeCache, Neff, put, write_nxdi

REPOSITORY = Path(__file__).parents[1]
MODULES = {
    "neuronx-cc": "neuronxcc",
    "libneuronxla": "libneuronxla",
    "libtorch-neuronx-lite": "libtorch_neuronx_lite",
    "torch-neuronx": "torch_neuronx",
    "neuronx-distributed": "neuronx_distributed",
    "neuronx-distributed-inference": "neuronx_distributed_inference",
    "nki": "nki",
    "vllm-neuron": "vllm_neuron",
}
_COMPILER = """\
#!/bin/sh
# A fake of neuronx-cc: writes the NEFF that lies beside it to --output, or fails with a code.
out=""; log=/dev/null
while [ $# -gt 0 ]; do
  case "$1" in --output) out="$2"; shift;; --logfile) log="$2"; shift;; esac
  shift
done
here=$(dirname "$0")
if [ -n "$FAKE_COMPILER_FAILS" ]; then
  echo "ERROR [$FAKE_COMPILER_FAILS] cannot compile" | tee -a "$log" >&2
  exit 70
fi
cp "$here/fake.neff" "$out"
echo "Compiler status PASS" >> "$log"
"""
_PACKAGES = {
    "vllm/__init__.py": "",
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/cli/__init__.py": "",
    "vllm/entrypoints/cli/main.py": """
        from tests.fake_neuron_server import main

        if __name__ == "__main__":
            main()
        """,
    "vllm/utils/__init__.py": "",
    "vllm/utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser",
    "vllm/benchmarks/__init__.py": "",
    "vllm/benchmarks/serve.py": """
        from tests.fake_neuron_server import add_cli_args, benchmark as main
        """,
    "datasets.py": "def disable_progress_bars(): pass",
    "lm_eval/__init__.py": "from tests.fake_neuron_server import simple_evaluate",
    "lm_eval/evaluator.py": "",
    "lm_eval/models/__init__.py": "",
    "lm_eval/models/openai_completions.py": "",
    "lm_eval/tasks.py": "from tests.fake_neuron_server import TaskManager",
}


@dataclass(frozen=True)
class FakeServing:
    """A serving environment in `folder`."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, packages: Mapping[str, str]) -> FakeServing:
        """Make one whose packages have these versions."""
        venv.create(folder, symlinks=True, with_pip=False)
        made = cls(folder)
        site = made._site
        # This interpreter's own packages come last: the fakes win.
        paths = [REPOSITORY, REPOSITORY / "tasks", *(p for p in sys.path if "site-packages" in p)]
        (site / "fake.pth").write_text("".join(f"{path}\n" for path in paths))
        for name, text in _PACKAGES.items():
            put(site / name, textwrap.dedent(text).encode())
        for name, module in MODULES.items():
            if name in packages:
                put(site / module / "__init__.py", b"")
        for name, version in packages.items():
            if name not in ("machine", "python"):
                made.install(name, version)
        put(folder / "bin" / "fake.neff", Neff().to_bytes())
        compiler = folder / "bin" / "neuronx-cc"
        compiler.write_text(_COMPILER)
        compiler.chmod(0o755)
        made.behave()
        return made

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def _site(self) -> Path:
        (site,) = self.folder.glob("lib/python*/site-packages")
        return site

    def install(self, name: str, version: str) -> None:
        """Say that a package of that version is installed."""
        for old in self._site.glob(f"{name.replace('-', '_')}-*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        folder = self._site / f"{name.replace('-', '_')}-{version}.dist-info"
        put(folder / "METADATA", metadata.encode())

    def behave(self, **behaviour: Any) -> None:
        """Say how the next starts behave; what is not named is as it should be."""
        put(self.folder / "behaviour.json", json.dumps({"device": True, **behaviour}).encode())
        put(self.folder / "bin" / "fake.neff", Neff(**behaviour.get("neff", {})).to_bytes())


@dataclass(frozen=True)
class Start:
    """One start of the fake server."""

    arguments: argparse.Namespace
    behaviour: Mapping[str, Any]

    @property
    def additional(self) -> dict[str, Any]:
        """vLLM's `--additional-config`."""
        found: dict[str, Any] = json.loads(self.arguments.additional_config)
        return found

    def graphs(self) -> list[str]:
        """Return the names of the graphs that are compiled: one for each bucket."""
        config = self.additional["neuron_config"]
        names = [f"prefill_s{size}" for size in config["num_batched_tokens_buckets"]]
        names += [f"decode_b{size}" for size in config["num_seqs_buckets"]]
        return names + [f"late_{n}" for n in range(self.behaviour.get("extra_graphs", 0))]

    def key(self, graph: str) -> str:
        """Return the cache's key of a graph: everything that changes its code, and nothing else."""
        asked = {
            name: value
            for name, value in vars(self.arguments).items()
            if name not in ("model", "served_model_name", "host", "port")
        }
        model = json.loads(Path(self.arguments.model, "config.json").read_bytes())
        inputs = [graph, asked, model, platform_target(), self.behaviour.get("salt", "")]
        return hashlib.md5(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def platform_target() -> str:
    """Return what the compiler compiles for: the device's, which is a trn2 here, or as told."""
    return os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")


def main() -> None:
    """Serve as `vllm serve` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for name in ("served-model-name", "host", "dtype", "hf-overrides", "speculative-config",
                 "additional-config", "kv-cache-dtype"):  # fmt: skip
        parser.add_argument(f"--{name}", default="")
    for name in ("port", "tensor-parallel-size", "data-parallel-size", "max-model-len",
                 "block-size", "max-num-batched-tokens", "max-num-seqs",
                 "num-gpu-blocks-override", "optimization-level"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    for name in ("enable-prefix-caching", "enable-expert-parallel", "enable-prompt-embeds",
                 "async-scheduling"):  # fmt: skip
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    arguments = parser.parse_args()
    start = Start(arguments, json.loads(Path(sys.prefix, "behaviour.json").read_bytes()))
    # Where an image has it; whoever shadows the compiler comes before.
    os.environ["PATH"] += os.pathsep + str(Path(sys.prefix, "bin"))
    if start.behaviour.get("code"):
        os.environ["FAKE_COMPILER_FAILS"] = start.behaviour["code"]
    off_device = os.environ.get("VLLM_NEURON_CPU_COMPILE") == "1"
    if start.behaviour["device"] or off_device:
        say(fake_neuron.PLATFORM.rstrip())
    else:
        say("WARNING [__init__.py:31] No Neuron device found, the Neuron plugin is not used")
    say("INFO [utils.py:233] non-default args: {}")
    if not Path(arguments.model, "model.safetensors").is_file():
        raise FileNotFoundError(f"{arguments.model}/model.safetensors")
    say("INFO [gpu_model_runner.py:4] Starting to load model")
    if start.behaviour["device"] or off_device:
        (native if "neuron_config" in start.additional else nxdi)(start)
    say(fake_neuron.READY.rstrip())
    if off_device and not start.behaviour.get("cpu_stays"):
        return
    serve(arguments.port)


def say(line: str) -> None:
    """Write a line of the log."""
    print(line, flush=True)


def native(start: Start) -> None:
    """Find every graph in the cache, or compile it, or fail, as the native plugin does."""
    cache = NativeCache(Path(os.environ["VLLM_CACHE_ROOT"]), target=platform_target())
    cores = int(os.environ["NEURON_LOGICAL_NC_CONFIG"])
    cache = replace(cache, neff=Neff(**{"lnc_size": cores, **start.behaviour.get("neff", {})}))
    for number, graph in enumerate(start.graphs()):
        key = start.key(graph)
        if (cache.entry(key) / ".compilation_complete").is_file():
            cache.hit(key)
            say(fake_neuron.HIT.format(key=key).rstrip())
            continue
        if os.environ.get("VLLM_NEURON_DISABLE_WARMUP_COMPILE") == "1":
            say("Traceback (most recent call last):")
            say(fake_neuron.FATAL_MISS.format(key=key).rstrip())
            raise SystemExit(1)
        say(fake_neuron.MISS.format(key=key).rstrip())
        compile_graph(cache, key, number, start.behaviour)


def compile_graph(cache: NativeCache, key: str, number: int, behaviour: Mapping[str, Any]) -> None:
    """Write an entry file by file, as long as the behaviour lets it."""
    if number == behaviour.get("fail_at"):
        for path, content in failed(cache, key, behaviour.get("code") or "NCC_EVRF009"):
            put(path, content)
        say(f"ERROR [{behaviour.get('code') or 'NCC_EVRF009'}] cannot compile")
        say("RuntimeError: neuronx-cc compilation failed with 70. Check compiler logs.")
        raise SystemExit(1)
    for path, content in cache.writes(key):
        if number == behaviour.get("kill_at") and path.suffix == ".neff":
            put(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        put(path, content)
        time.sleep(behaviour.get("pause_s", 0.0))


def failed(cache: NativeCache, key: str, code: str) -> Iterator[tuple[Path, bytes]]:
    """Yield what a failed compile leaves."""
    for path, content in cache.writes(key):
        if path.suffix == ".neff":
            return
        log = path.name == "log-neuron-cc.txt"
        yield path, cache.log(failure=code).encode() if log else content


def nxdi(start: Start) -> None:
    """Load the compiled folder whatever was asked for, or compile into it, as the plugin does."""
    folder = Path(os.environ["NEURON_COMPILED_ARTIFACTS"])
    there = (folder / "model.pt").is_file() and (folder / "neuron_config.json").is_file()
    if there and not start.behaviour.get("unreadable"):
        say(fake_neuron.LOADED.format(folder=folder).rstrip())
        return
    say(fake_neuron.NOT_FOUND.format(folder=folder).rstrip())
    work = Path(os.environ.get("TMPDIR", "/tmp")) / "nxd_model"
    for submodel in ("context_encoding_model", "token_generation_model"):
        module = fake_neuron.write_module(work, state="empty")
        command = ["neuronx-cc", "compile", "model.hlo_module.pb", "--framework", "XLA"]
        command += ["--target", platform_target(), "--output", str(module / "model.neff")]
        say(f"INFO Generating HLOs for {submodel}; Call compiler with cmd: {' '.join(command)}")
        code = subprocess.run(command, check=False).returncode
        if code:
            say("Traceback (most recent call last):")
            say(f"RuntimeError: neuronx-cc failed with exit code {code}")
            raise SystemExit(1)
        time.sleep(start.behaviour.get("pause_s", 0.0))
    asked = start.arguments
    write_nxdi(
        folder,
        **{
            "tp_degree": asked.tensor_parallel_size,
            "batch_size": asked.max_num_seqs,
            "seq_len": asked.max_model_len,
            "torch_dtype": asked.dtype,
            "is_prefix_caching": bool(asked.enable_prefix_caching),
            "is_block_kv_layout": bool(asked.enable_prefix_caching),
            **start.additional["override_neuron_config"],
            **start.behaviour.get("config", {}),
        },
    )


def serve(port: int) -> None:
    """Answer until SIGTERM, then finish."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "fake"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({"choices": [{"text": "640."}]})

        def answer(self, value: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *words: Any) -> None:
            pass

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        say("INFO:     Application startup complete.")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.05)
    say("INFO:     Application shutdown complete.")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Take every argument of vLLM's benchmark."""
    parser.parse_args = lambda words: argparse.Namespace(words=words)  # type: ignore[assignment,misc]


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return figures as vLLM's benchmark does, made up."""
    names = [f"{p}_{what}_ms" for p in ("p50", "p90", "p99", "median", "mean")
             for what in ("ttft", "tpot", "e2el", "itl")]  # fmt: skip
    return {
        **dict.fromkeys(names, 25.0),
        "output_throughput": 800.0,
        "request_throughput": 4.0,
        "failed": 0,
        "completed": 8,
        "duration": 2.0,
    }


class TaskManager:
    """Knows the task `sums`."""

    all_tasks = ("sums",)

    def __init__(self, **_: Any) -> None: ...

    def load(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the tasks by name."""
        task = type("Task", (), {"OUTPUT_TYPE": "generate_until"})
        return {"tasks": dict.fromkeys(names, task)}


def simple_evaluate(*, tasks: Sequence[str], **_: Any) -> dict[str, Any]:
    """Return scores as lm-evaluation-harness does, made up."""
    (name,) = tasks
    return {
        "results": {name: {"exact_match,none": 0.95, "exact_match_stderr,none": 0.01}},
        "n-samples": {name: {"effective": 20}},
        "versions": {name: "1"},
    }


if __name__ == "__main__":
    main()
