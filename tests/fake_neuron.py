"""A fake Neuron toolchain: writes what neuronx-cc, the vLLM plugin and NxD Inference leave behind.

AWS's compiler cannot be had here. Everything is written byte by byte as it is documented (NEFF:
the SDK's guide "Work with NEFF files"; compile cache: the plugin's page "Compilation Cache";
persistent cache: "Neuron Persistent Cache"), without the code that reads it. As a program it
compiles slowly, fails, or is killed in the middle:

    python tests/fake_neuron.py CACHE_ROOT --graphs 3 --pause 0.2 [--fail-at 1]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

WHEN = 1_700_000_000


def archive(content: bytes = b"graph", *, packaging: int = 2) -> bytes:
    """Return the tar archive of a NEFF, compressed for packaging 2."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("neff.json", "sg00/def.json"):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), WHEN
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(made.getvalue(), mtime=WHEN) if packaging == 2 else made.getvalue()


@dataclass(frozen=True)
class Neff:
    """The fields of a NEFF's header, by their documented names."""

    pkg_version: int = 2
    header_size: int = 1024
    data_size: int | None = None
    """None: that of the archive."""
    neff_version_major: int = 2
    neff_version_minor: int = 0
    neff_build_version: bytes = b"2.0.21884.0%kaena-tools/develop@6c66f4b"
    num_tpb: int = 1
    hash: bytes | None = None
    """None: of the archive, as pkg_version says."""
    uuid: bytes = bytes(range(16))
    name: bytes = b"graph"
    requested_tpb_count: int = 1
    tpb_per_node: bytes = b"\x01"
    feature_bits: int = 0
    lnc_size: int = 2
    pad: bytes = b""
    data: bytes | None = None
    """None: a small archive."""

    def to_bytes(self) -> bytes:
        """Return the file, one field after the other."""
        data = archive(packaging=self.pkg_version) if self.data is None else self.data
        made = hashlib.md5(data) if self.pkg_version == 2 else hashlib.sha256(data)
        out = b""
        out += self.pkg_version.to_bytes(8, "little")
        out += self.header_size.to_bytes(8, "little")
        out += (len(data) if self.data_size is None else self.data_size).to_bytes(8, "little")
        out += self.neff_version_major.to_bytes(8, "little")
        out += self.neff_version_minor.to_bytes(8, "little")
        out += self.neff_build_version.ljust(128, b"\0")
        out += self.num_tpb.to_bytes(4, "little")
        out += (made.digest() if self.hash is None else self.hash).ljust(32, b"\0")
        out += self.uuid.ljust(16, b"\0")
        out += self.name.ljust(256, b"\0")
        out += self.requested_tpb_count.to_bytes(4, "little")
        out += self.tpb_per_node.ljust(64, b"\0")
        out += self.feature_bits.to_bytes(8, "little")
        out += self.lnc_size.to_bytes(4, "little")
        out += self.pad.ljust(468, b"\0")
        assert len(out) == 1024
        return out + data


def graph_key(number: int) -> str:
    """Return the cache key of a graph: 32 hex digits."""
    return hashlib.md5(f"graph {number}".encode()).hexdigest()


@dataclass(frozen=True)
class NativeCache:
    """The compile cache of the native plugin below `root`, which is `$VLLM_CACHE_ROOT`."""

    root: Path
    target: str = "trn2"
    neff: Neff = Neff()
    compiler: str = "2.27.5334.0+b7b01d0a"

    @property
    def folder(self) -> Path:
        """Where the entries are."""
        return self.root / "neuron" / "compile_cache"

    def entry(self, key: str) -> Path:
        """The folder of an entry."""
        return self.folder / key

    def writes(self, key: str) -> Iterator[tuple[Path, bytes]]:
        """Yield the files of one compile in the order in which they are written."""
        entry = self.entry(key)
        lock = self.folder / f".{key}.compilation_metadata"
        executable = replace(self.neff, name=f"graph_{key}".encode()).to_bytes()
        yield lock.with_name(f"{lock.name}.lock"), b""
        yield lock, b"pid:4711\nprocess_name:python\ncmdline:['python']\n"
        yield entry / "fxgraph.txt", b"graph():\n"
        yield entry / "example_inputs.txt", b"bfloat16[1, 128]\n"
        yield entry / "graph.hlo", b"\x0a\x05graph"
        yield entry / "command.txt", self.command(key).encode()
        yield entry / "log-neuron-cc.txt", self.log().encode()
        yield entry / f"graph_{key}.neff", executable
        yield entry / ".artifact_metadata_v0.json", self.metadata(key)
        mark = f"completed:{WHEN}.25\nneff_size:{len(executable)}\n"
        yield entry / ".compilation_complete", mark.encode()

    def command(self, key: str) -> str:
        """Return the compiler's command line."""
        entry = self.entry(key)
        return (
            f"/usr/bin/neuronx-cc compile {entry}/graph.hlo --framework XLA --target {self.target} "
            f"--output {entry}/graph_{key}.neff --logfile {entry}/log-neuron-cc.txt "
            f"--auto-cast=none --lnc={self.neff.lnc_size}"
        )

    def log(self, *, failure: str = "") -> str:
        """Return the compiler's log."""
        end = f"ERROR [{failure}] cannot compile\n" if failure else "Compiler status PASS\n"
        return f"NeuronX Compiler version {self.compiler}\n{end}"

    def metadata(self, key: str) -> bytes:
        """Return the plugin's description of an entry."""
        values = {"version": 0, "cache_key": key, "output_count": 1, "io_map": {}}
        return json.dumps(values, indent=2).encode()

    def compile(self, number: int = 0) -> str:
        """Write a whole entry and return its key."""
        key = graph_key(number)
        for path, content in self.writes(key):
            put(path, content)
        return key

    def fail(self, number: int = 0, code: str = "NCC_EVRF009") -> str:
        """Write what a failed compile leaves and return its key."""
        key = graph_key(number)
        for path, content in self.writes(key):
            if path.suffix == ".neff":
                break
            failed = path.name == "log-neuron-cc.txt"
            put(path, self.log(failure=code).encode() if failed else content)
        return key

    def kernel(self, number: int = 0) -> Path:
        """Write a compiled NKI kernel and return its path."""
        path = self.folder / "nki" / f"{graph_key(1000 + number)}.json"
        put(path, b'{"schema_version":0,"dumped_config":"eyJ9"}')
        put(path.with_suffix(".lock"), b"")
        return path

    def hit(self, key: str) -> None:
        """Write what a hit leaves behind."""
        put(self.entry(key) / ".cache_accessed", str(WHEN).encode())


PLATFORM = "INFO [__init__.py:282] Platform plugin neuron is activated\n"
HIT = "INFO [backend.py:214] Local cache hit for key: {key}\n"
MISS = "INFO [cache.py:71] Local cache miss for key: {key}\n"
FATAL_MISS = (
    "RuntimeError: VLLM_NEURON_DISABLE_WARMUP_COMPILE: local compile cache miss for key {key}. "
    "All graphs must be pre-compiled when warmup compilation is disabled.\n"
)
READY = (
    "INFO [core.py:214] init engine (profile, create kv cache, warmup model) took 41.50 seconds\n"
)
LOADED = "INFO Successfully loaded pre-compiled model artifacts from {folder}\n"
NOT_FOUND = "WARNING Unable to find precompiled artifacts from {folder}. Recompiling...\n"


NEURON_CONFIG: Mapping[str, Any] = {
    "tp_degree": 8,
    "batch_size": 16,
    "seq_len": 2048,
    "torch_dtype": "bfloat16",
    "is_prefix_caching": True,
    "is_block_kv_layout": True,
    "pa_block_size": 32,
    "logical_nc_config": 2,
    "save_sharded_checkpoint": False,
    "on_device_sampling_config": {"do_sample": True, "top_k": 1, "global_topk": 256},
}


def torchscript(content: bytes = b"\x80\x02}q\x00.") -> bytes:
    """Return an archive as torch.jit.save writes it: stored members below one folder."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive_:
        for name, data in {
            "model/data.pkl": content,
            "model/code/__torch__.py": b"class NxDModel(Module):\n",
            "model/constants.pkl": b"\x80\x02).",
            "model/version": b"3\n",
        }.items():
            archive_.writestr(zipfile.ZipInfo(name, (2026, 11, 1, 0, 0, 0)), data)
    return made.getvalue()


def write_nxdi(folder: Path, *, shards: int = 0, **fields: Any) -> Path:
    """Write a compiled model of NxD Inference and return its folder."""
    config = {**NEURON_CONFIG, **fields}
    document = {"hidden_size": 4096, "model_type": "llama", "neuron_config": config}
    put(folder / "neuron_config.json", json.dumps(document, indent=2).encode())
    put(folder / "model.pt", torchscript())
    for rank in range(shards):
        name = f"tp{rank}_sharded_checkpoint.safetensors"
        put(folder / "weights" / name, b"\x02\0\0\0\0\0\0\0{}")
    return folder


def write_module(cache: Path, number: int = 0, *, state: str = "done", neff: Neff = Neff()) -> Path:
    """Write an entry of libneuronxla's persistent cache and return its folder.

    Args:
        cache: its root.
        number: of the graph.
        state: `done`, `failed`, `locked`, `half` or `empty`.
        neff: the executable.
    """
    key = graph_key(number)
    folder = cache / "neuronxcc-2.27.5334.0+b7b01d0a" / f"MODULE_{key[:20]}+{key[-8:]}"
    put(folder / "model.hlo_module.pb", b"\x0a\x05graph")
    put(folder / "compile_flags.json", b'["--target=trn2"]')
    if state in ("done", "half"):
        put(folder / "model.neff", neff.to_bytes())
    if state == "done":
        put(folder / "model.done", b"")
    if state == "failed":
        put(folder / "model.log", b"ERROR [NCC_ITEN404] Internal tensorizer error\n")
    if state == "locked":
        put(folder / "model.hlo_module.pb.lock", b"")
    return folder


def put(path: Path, content: bytes) -> None:
    """Write a file below folders that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main() -> int:
    """Compile graphs one after the other, each byte half of a file at a time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--graphs", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two writes")
    parser.add_argument("--fail-at", type=int, default=-1, help="number of the graph that fails")
    arguments = parser.parse_args()
    cache = NativeCache(arguments.root)
    for number in range(arguments.graphs):
        if number == arguments.fail_at:
            cache.fail(number)
            print("neuronx-cc compilation failed with 70. Check compiler logs.", flush=True)
            return 70
        key = graph_key(number)
        print(MISS.format(key=key), end="", flush=True)
        for path, content in cache.writes(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb", buffering=0) as file:
                for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                    file.write(half)
                    time.sleep(arguments.pause)
    print(READY, end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
