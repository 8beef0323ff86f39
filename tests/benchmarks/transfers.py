"""How fast files come from the store to a node, and from a source into the store, beside others.

    python tests/benchmarks/transfers.py [--short] [--share 1] [--repeat 3] [--folder FOLDER]

One file of 2 GiB and 2,000 files of 1 MiB over loopback. The server is a fake S3 (and Hub) that
sends with sendfile(2); what it can do by itself is measured in the same run, and so are this
machine's own limits: sha256 on one and on all processors, and writing to the disk's cache. Every
contender is a process of its own and measured from its start to its end, with the memory of itself
and its children. Only ours hashes (and links through a node cache); nobody flushes to the disk.

Contenders: AWS CLI (`aws s3 cp`, from a virtual environment that is made for the run, unless there
is one on the PATH), boto3's transfer manager, and the same on the AWS common runtime (CRT).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.unit import yard
from tests.unit.sources.model_files import write_model

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.documents.release import Release
from trainyard.documents.statement import payload_of_release
from trainyard.releases import release_id_of
from trainyard.serving.process import free_port
from trainyard.settings import Settings
from trainyard.signing.envelope import seal
from trainyard.signing.keys import signing_key
from trainyard.store.layout import bundle_manifest_key, checkpoint_manifest_key, release_key

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
BUCKET = "yard"
REPOSITORY = "yard/adder"
GOAL_RATIO = 1.5
GOAL_MEMORY_MIB = 512

BOTO3 = """
import sys
from pathlib import Path
import boto3
from boto3.s3.transfer import TransferConfig
from s3transfer.manager import TransferManager

endpoint, prefix, dest = sys.argv[1:4]
session = boto3.session.Session()
client = session.client("s3", endpoint_url=endpoint)
keys = [
    found["Key"]
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="yard", Prefix=prefix)
    for found in page["Contents"]
]

def manager():
    if sys.argv[4] == "classic":
        return TransferManager(client, TransferConfig())
    from s3transfer.crt import (
        BotocoreCRTCredentialsWrapper, BotocoreCRTRequestSerializer, CRTTransferManager,
        create_s3_crt_client,
    )
    credentials = BotocoreCRTCredentialsWrapper(session.get_credentials())
    crt = create_s3_crt_client(
        "us-east-1", crt_credentials_provider=credentials.to_crt_credentials_provider(),
        use_ssl=False,
    )
    serializer = BotocoreCRTRequestSerializer(
        session._session, {"endpoint_url": endpoint, "region_name": "us-east-1"}
    )
    return CRTTransferManager(crt, serializer)

with manager() as transfers:
    futures = []
    for key in keys:
        path = Path(dest, key[len(prefix):])
        path.parent.mkdir(parents=True, exist_ok=True)
        futures.append(transfers.download("yard", key, str(path)))
    for future in futures:
        future.result()
"""


SNAPSHOT = """
import sys
from huggingface_hub import snapshot_download
snapshot_download("yard/adder", local_dir=sys.argv[1])
"""

UPLOAD = """
import sys
from pathlib import Path
import boto3
from boto3.s3.transfer import TransferConfig
from s3transfer.manager import TransferManager

root, prefix = Path(sys.argv[1]), sys.argv[2]
client = boto3.session.Session().client("s3")
with TransferManager(client, TransferConfig()) as transfers:
    futures = [
        transfers.upload(str(path), "yard", prefix + path.relative_to(root).as_posix())
        for path in root.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    ]
    for future in futures:
        future.result()
"""

PLAN = """
from tests.unit import yard
from trainyard.settings import get_settings
from trainyard.sources.files import read_architecture
from trainyard.sources.factory import open_source
from trainyard.store.documents import create_document
from trainyard.store.factory import open_store
from trainyard.store.layout import plan_key

settings = get_settings()
spec = yard.spec(source={"kind": "huggingface", "repo": "yard/adder"})
source = open_source(spec.source, base=settings.catalogue, settings=settings)
resolved = source.resolve(None)
plan = yard.plan(model_spec=spec, revision=resolved.revision).model_copy(
    update={
        "source_fingerprint": resolved.fingerprint,
        "architecture_digest": read_architecture(source, resolved).digest,
    }
)
create_document(open_store(settings), plan_key(plan.plan_id), plan)
"""


@dataclass(frozen=True)
class Workload:
    """A set of files."""

    name: str
    count: int
    size: int
    """Bytes of each file."""

    @property
    def bytes(self) -> int:
        return self.count * self.size


@dataclass(frozen=True)
class Run:
    """One contender, once."""

    seconds: float
    memory_mib: float
    """Peak of resident memory, children included."""
    cpu_s: float
    """Seconds of processors, of user and system; depends less on what else the machine does."""


class World:
    """The server, the files, the environment of the contenders."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        self.folder = folder / workload.name.replace(" ", "-").replace(",", "")
        self.workload = workload
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.settings = Settings(
            home=self.folder / "home",
            store=f"s3://{BUCKET}",
            node_cache=self.folder / "cache",
        )
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tasks'}",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": self.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_ENDPOINT": f"{self.endpoint}/hub",
            "HF_HOME": str(self.folder / "hf"),
            "TRAINYARD_HUB_ENDPOINT": f"{self.endpoint}/hub",
            "TRAINYARD_HOME": str(self.settings.home),
            "TRAINYARD_STORE": self.settings.store,
            "TRAINYARD_NODE_CACHE": str(self.settings.node_cache),
            "TRAINYARD_S3_ENDPOINT_URL": self.endpoint,
            "TRAINYARD_S3_REGION": "us-east-1",
            "TRAINYARD_S3_ADDRESSING_STYLE": "path",
        }
        self.release_id = ""

    @property
    def prefix(self) -> str:
        return "checkpoints/adder/v1/"

    def seed(self) -> None:
        """Write a signed release into what the server begins with, and its model into the Hub."""
        seed = self.folder / "fake" / "seed" / BUCKET
        hub = self.folder / "fake" / "hub" / REPOSITORY
        files = []
        hub.mkdir(parents=True)
        (seed / self.prefix).mkdir(parents=True)
        index = {}
        for number in range(self.workload.count):
            tensor = f"layers.{number}.weight"
            name = f"model-{number + 1:05}-of-{self.workload.count:05}.safetensors"
            index[tensor] = name
            path = seed / self.prefix / name
            sha256 = _write_safetensors(path, tensor, self.workload.size)
            (hub / name).hardlink_to(path)
            files.append(FileEntry(path=name, size=self.workload.size, sha256=sha256))
        write_model(hub)
        (hub / "model.safetensors").unlink()
        (hub / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
        self._seed_documents(seed, tuple(files))

    def _seed_documents(self, seed: Path, files: tuple[FileEntry, ...]) -> None:
        spec = yard.spec()
        checkpoint = CheckpointManifest(
            model="adder",
            revision="v1",
            source="benchmark",
            files=files,
            digest=files_digest(files),
            architecture_digest="0",
            parameters=1,
        )
        code = b"code"
        bundled = (
            FileEntry(path="code.so", size=len(code), sha256=hashlib.sha256(code).hexdigest()),
        )
        bundle = BundleManifest(
            compile_key="key",
            lane="cpu",
            key_inputs={},
            files=bundled,
            digest=files_digest(bundled),
            toolchain={},
            compile_s=1.0,
        )
        self.release_id = release_id_of(
            "adder", checkpoint_digest=checkpoint.digest, compile_key="key", serving_digest="0"
        )
        release = Release(
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            release_id=self.release_id,
            model="adder",
            target=spec.targets[0],
            lane="cpu",
            checkpoint_key=checkpoint_manifest_key("adder", "v1"),
            checkpoint_digest=checkpoint.digest,
            revision="v1",
            compile_key="key",
            bundle_digest=bundle.digest,
            serving={},
            serving_digest="0",
            served_model_name="adder",
            toolchain={},
            measurement_id="m",
            spec=spec,
        )
        signed = seal(payload_of_release(release), signing_key(self.settings))
        for key, data in {
            checkpoint_manifest_key("adder", "v1"): checkpoint.to_bytes(),
            bundle_manifest_key("key"): bundle.to_bytes(),
            "bundles/key/code.so": code,
            release_key("adder", self.release_id): signed,
        }.items():
            path = seed / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        server = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "fast_fake_s3.py"),
                str(self.folder / "fake"),
                str(self.port),
            ]
        )
        try:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", self.port), 1).close()
                    break
                time.sleep(0.05)
            yield
        finally:
            server.terminate()
            server.wait()


def _write_safetensors(path: Path, tensor: str, size: int) -> str:
    """Write a file of `size` bytes with one tensor, and return its sha256."""
    for length in range(size, 0, -1):
        header = json.dumps(
            {tensor: {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}
        ).encode()
        if len(header) + 8 + length <= size:
            header = header.ljust(size - 8 - length)
            break
    block = bytearray(os.urandom(min(length, 8 * MIB)))
    head = len(header).to_bytes(8, "little") + header
    sha256 = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for start in range(0, length, len(block)):
            block[:8] = start.to_bytes(8, "big")
            piece = block[: length - start]
            sha256.update(piece)
            file.write(piece)
    return sha256.hexdigest()


def measured(argv: list[str], env: dict[str, str], cwd: Path) -> Run:
    """Run a program and return how long it took and how much memory it needed at most."""
    peak = 0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = psutil.Popen(
        argv, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.is_set():
            with contextlib.suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
                peak = max(peak, sum(each.memory_info().rss for each in family))
            ended.wait(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        output, _ = process.communicate(timeout=1800)
    finally:
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
        if process.poll() is None:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"{argv[:3]} ended with {process.returncode}:\n{output[-2000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return Run(seconds, peak / MIB, cpu_s)


def aws_cli(folder: Path) -> str:
    """Return an AWS CLI: the one on the PATH, or one in an environment of its own."""
    found = shutil.which("aws")
    if found:
        return found
    environment = folder / "awscli"
    uv = ROOT / ".venv-tools" / "bin" / "uv"
    links = [f"--find-links={place}" for place in os.environ.get("PIP_FIND_LINKS", "").split()]
    subprocess.run([uv, "venv", "-q", "-p", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([uv, "pip", "install", "-q", "--python", python, *links, "awscli"], check=True)
    return str(environment / "bin" / "aws")


Contenders = dict[str, Callable[[Path], Run]]
"""By name; ours is the first."""


def store_to_node(world: World, aws: str | None) -> Contenders:
    """Return what brings the checkpoint to a folder."""

    def run(*argv: str | Path) -> Run:
        return measured([str(word) for word in argv], world.environment, world.folder)

    def boto3(dest: Path, kind: str) -> Run:
        return run(sys.executable, "-c", BOTO3, world.endpoint, world.prefix, dest, kind)

    found: Contenders = {
        "trainyard materialize": lambda dest: run(
            sys.executable, "-m", "trainyard", "materialize", world.release_id, dest
        ),
        "boto3 (s3transfer)": lambda dest: boto3(dest, "classic"),
        "boto3 with CRT": lambda dest: boto3(dest, "crt"),
    }
    if aws:
        place = f"s3://{BUCKET}/{world.prefix}"
        found["aws s3 cp --recursive"] = lambda dest: run(
            aws, "s3", "cp", "--recursive", "--only-show-errors", place, dest
        )
    return found


def source_to_store(world: World, aws: str | None) -> Contenders:
    """Return what brings the model from the Hub into the store."""
    snapshot = world.folder / "snapshot"

    def run(*argv: str | Path) -> Run:
        return measured([str(word) for word in argv], world.environment, world.folder)

    def then(*argv: str | Path) -> Run:
        """Fetch the model, then store it."""
        first, second = run(sys.executable, "-c", SNAPSHOT, snapshot), run(*argv)
        return Run(
            first.seconds + second.seconds,
            max(first.memory_mib, second.memory_mib),
            first.cpu_s + second.cpu_s,
        )

    def planned(dest: Path) -> Run:
        """Write the plan, which is not measured, and carry its download out."""
        run(sys.executable, "-c", PLAN)
        return run(sys.executable, "-m", "trainyard", "download", "--plan", "adder-plan")

    found: Contenders = {
        "trainyard download": planned,
        "snapshot_download, then boto3": lambda dest: then(
            sys.executable, "-c", UPLOAD, snapshot, "copied/"
        ),
    }
    if aws:
        options = ("--recursive", "--only-show-errors", "--exclude=.cache/*")
        found["snapshot_download, then aws s3 cp"] = lambda dest: then(
            aws, "s3", "cp", *options, snapshot, f"s3://{BUCKET}/copied/"
        )
    return found


def forget_uploads(world: World) -> None:
    """Remove from the server's store what was brought there."""
    with socket.create_connection(("127.0.0.1", world.port)) as sock:
        sock.sendall(b"POST /_forget HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        sock.recv(65536)


def stored_bytes(world: World) -> int:
    """Return the bytes that were brought into the server's store."""
    return sum(path.stat().st_size for path in (world.folder / "fake" / "bodies").iterdir())


def clean(world: World) -> None:
    """Forget what a run has brought; what is not on the disk yet never gets there."""
    for name in ("dest", "cache", "hf", "snapshot"):
        shutil.rmtree(world.folder / name, ignore_errors=True)


def check_store(world: World, dest: Path) -> None:
    """Raise unless the store got the model; then let it forget it."""
    if stored_bytes(world) < world.workload.bytes:
        raise RuntimeError(f"only {stored_bytes(world)} bytes arrived in the store")
    forget_uploads(world)


def check_node(world: World, dest: Path) -> None:
    """Raise unless the checkpoint is in the folder."""
    files = list(dest.rglob("*.safetensors"))
    sizes = {path.stat().st_size for path in files}
    if len(files) != world.workload.count or sizes != {world.workload.size}:
        raise RuntimeError(f"{len(files)} files of {sizes} bytes arrived in {dest}")


# --- The machine's own limits -----------------------------------------------------------------


def rate(work: Callable[[], int], workers: int = 1) -> float:
    """Return MiB/s of several workers at once, each for about a second."""
    deadline = time.perf_counter() + 1.0

    def loop(_: int) -> int:
        total = 0
        while time.perf_counter() < deadline:
            total += work()
        return total

    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        total = sum(pool.map(loop, range(workers)))
    return total / (time.perf_counter() - started) / MIB


def hash_rate(workers: int) -> float:
    block = os.urandom(MIB)

    def work() -> int:
        hashlib.sha256(block)
        return MIB

    return rate(work, workers)


def write_rate(folder: Path, size: int, *, flush: bool) -> float:
    path = folder / "write-limit"
    block = os.urandom(MIB)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // MIB):
            file.write(block)
        if flush:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return size / seconds / MIB


def server_rate(world: World) -> float:
    """Return MiB/s that the server sends to clients that do nothing with it."""
    key = f"/{BUCKET}/{world.prefix}model-00001-of-{world.workload.count:05}.safetensors"
    local = threading.local()

    def work() -> int:
        if not hasattr(local, "sock"):
            local.sock = socket.create_connection(("127.0.0.1", world.port))
            local.room = memoryview(bytearray(MIB))
        size = min(world.workload.size, 16 * MIB)
        local.sock.sendall(f"GET {key} HTTP/1.1\r\nRange: bytes=0-{size - 1}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += local.sock.recv(65536)
        left = size - len(head.split(b"\r\n\r\n", 1)[1])
        while left:
            left -= local.sock.recv_into(local.room[: min(left, MIB)])
        return size

    return rate(work, os.cpu_count() or 1)


# --- Report -----------------------------------------------------------------------------------


def compare(
    world: World,
    what: str,
    contenders: Contenders,
    check: Callable[[World, Path], None],
    repeat: int,
    limit: float,
) -> dict[str, Any]:
    """Run everybody in turn, print a row each, and return ours against the best of the others."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, contender in contenders.items():
            clean(world)
            dest = world.folder / "dest"
            runs[name].append(contender(dest))
            check(world, dest)
            clean(world)
    seconds = {name: statistics.median(run.seconds for run in of) for name, of in runs.items()}
    cpu = {name: statistics.median(run.cpu_s for run in of) for name, of in runs.items()}
    memory = {name: max(run.memory_mib for run in of) for name, of in runs.items()}
    ours, *others = contenders
    best = min(others, key=lambda name: seconds[name])
    mib = world.workload.bytes / MIB
    print(f"\n{what}: {world.workload.name}, {mib:,.0f} MiB, median of {repeat}:")
    for name in contenders:
        print(
            f"  {name:36} {seconds[name]:7.2f} s {mib / seconds[name]:7.0f} MiB/s"
            f" {seconds[name] / seconds[ours]:5.2f} x ours {cpu[name]:7.2f} s of processors"
            f" {memory[name]:5.0f} MiB of memory"
        )
    ratio = seconds[best] / seconds[ours]
    print(
        f"  ours against the best of the others ({best}): {ratio:.2f} x (goal {GOAL_RATIO});"
        f" memory {memory[ours]:.0f} MiB (goal below {GOAL_MEMORY_MIB});"
        f" {mib / seconds[ours] / limit:.0%} of this machine's own limit"
    )
    return {
        "ratio": ratio,
        "memory_mib": memory[ours],
        "best": best,
        "ours_s": seconds[ours],
        "best_s": seconds[best],
        "seconds": seconds,
    }


def end_to_end(workload: Workload, halves: list[dict[str, Any]]) -> dict[str, object]:
    """Print how long the whole way takes: ours, and the best of the others in each half."""
    ours = sum(half["ours_s"] for half in halves)
    best = sum(half["best_s"] for half in halves)
    names = " and ".join(str(half["best"]) for half in halves)
    print(
        f"\nend to end: {workload.name}: ours {ours:.2f} s, {names} {best:.2f} s:"
        f" {best / ours:.2f} x (goal {GOAL_RATIO})"
    )
    return {"ratio": best / ours, "ours_s": ours, "best_s": best}


def limits(folder: Path, short: bool) -> float:
    """Print what this machine can do, and return the smaller of hashing and writing, in MiB/s."""
    cores = os.cpu_count() or 1
    one, every = hash_rate(1), hash_rate(cores)
    size = (64 if short else 1024) * MIB
    cached = write_rate(folder, size, flush=False)
    flushed = write_rate(folder, size // 4, flush=True)
    print(f"{cores} processors, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory")
    print(f"sha256: {one:,.0f} MiB/s on one processor, {every:,.0f} MiB/s on all")
    print(f"writing: {cached:,.0f} MiB/s to the cache, {flushed:,.0f} MiB/s flushed to the disk")
    return min(every, cached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="64 MiB and 62 files, once")
    parser.add_argument("--share", type=float, default=1.0, help="of the full size")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go")
    parser.add_argument("--without-aws", action="store_true", help="leave the AWS CLI out")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.repeat, arguments.share = 1, min(arguments.share, 1 / 32)
    size_mib, count = round(2048 * arguments.share), round(2000 * arguments.share)
    workloads = [
        Workload(f"1 x {size_mib:,} MiB", 1, size_mib * MIB),
        Workload(f"{count:,} x 1 MiB", count, MIB),
    ]
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="transfers-", dir=arguments.folder) as name:
        folder = Path(name)
        aws = None if arguments.without_aws else aws_cli(folder)
        limit = limits(folder, arguments.short)
        for workload in workloads:
            world = World(folder, workload)
            world.seed()
            with world.serving():
                print(f"\nThe server by itself: {server_rate(world):,.0f} MiB/s")
                halves = []
                for what, contenders, check in (
                    ("source to store", source_to_store, check_store),
                    ("store to node", store_to_node, check_node),
                ):
                    found = compare(
                        world, what, contenders(world, aws), check, arguments.repeat, limit
                    )
                    halves.append(found)
                    figures[f"{what}, {workload.name}"] = found
            figures[f"end to end, {workload.name}"] = end_to_end(workload, halves)
            shutil.rmtree(world.folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
