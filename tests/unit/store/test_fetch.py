from __future__ import annotations

import io
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
from tests.unit.store.flaky import FlakyStore, RemoteStore, StalledStore

from trainyard.errors import CorruptFile, NotFound, StorageFull, Transient
from trainyard.store.fetch import FetchPolicy, Wanted, fetch_files

ROOT = Path(__file__).parents[3]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tasks")])

PART = 10_000
POLICY = FetchPolicy(
    workers=4, part_bytes=PART, chunk_bytes=1000, first_pause_s=0.001, longest_pause_s=0.01
)
PATIENT = replace(POLICY, attempts=30)
SIZES = {"big": 25 * PART + 7, "even": 4 * PART, "part": PART, "small": 17, "empty": 0}


def content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZES[name])


class World:
    """A store with files, and a folder to bring them to."""

    def __init__(self, root: Path, store: RemoteStore) -> None:
        self.store = store
        self.partial, self.done = root / "partial", root / "done"
        self.partial.mkdir(exist_ok=True)
        self.done.mkdir(exist_ok=True)
        self.moved = 0

    def put(self, *names: str) -> list[Wanted]:
        return [
            Wanted(name, self.store.upload(name, io.BytesIO(content(name))))
            for name in names or SIZES
        ]

    def commit(self, wanted: Wanted, path: Path) -> None:
        path.replace(self.done / wanted.entry.sha256)

    def count(self, size: int) -> None:
        self.moved += size

    def fetch(self, wanted: list[Wanted], policy: FetchPolicy = POLICY) -> None:
        fetch_files(
            self.store,
            wanted,
            self.partial,
            self.commit,
            is_there=lambda each: (self.done / each.entry.sha256).exists(),
            on_bytes=self.count,
            policy=policy,
        )

    def check_whole(self, wanted: list[Wanted]) -> None:
        for each in wanted:
            assert (self.done / each.entry.sha256).read_bytes() == content(each.key)

    def check(self, wanted: list[Wanted]) -> None:
        self.check_whole(wanted)
        assert list(self.partial.iterdir()) == []


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, RemoteStore(tmp_path / "store"))


class TestWhatArrives:
    @pytest.mark.parametrize("workers", [1, 2, 8])
    def test_every_file_is_whole(self, world: World, workers: int) -> None:
        wanted = world.put()
        world.fetch(wanted, FetchPolicy(workers=workers, part_bytes=PART, chunk_bytes=1000))
        world.check(wanted)
        assert world.store.read_bytes == sum(SIZES.values())

    def test_a_big_file_comes_in_parts(self, world: World) -> None:
        world.fetch(world.put("big"))
        assert {size for _, _, size in world.store.asked} == {PART, 7}
        assert len(world.store.asked) == 26

    def test_the_same_content_is_brought_once(self, world: World) -> None:
        wanted = world.put("even")
        again = Wanted("again", world.store.upload("again", io.BytesIO(content("even"))))
        world.fetch([*wanted, again])
        assert world.store.read_bytes == SIZES["even"]

    def test_nothing_to_bring(self, world: World) -> None:
        world.fetch([])
        assert world.store.asked == []

    def test_what_is_there_is_not_brought(self, world: World) -> None:
        wanted = world.put()
        world.fetch(wanted)
        world.store.asked.clear()
        world.fetch(wanted)
        assert world.store.asked == []
        world.check(wanted)


class TestDamage:
    @pytest.mark.parametrize("at", [0, PART, 7 * PART + 1, SIZES["big"] - 1])
    def test_a_flipped_byte_is_found_and_the_file_named(self, world: World, at: int) -> None:
        wanted = world.put("big", "small")
        path = world.store.root / "big"
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptFile, match=r"^big in file:.* is damaged"):
            world.fetch(wanted)
        assert not (world.done / wanted[0].entry.sha256).exists()
        assert not list(world.partial.glob(f"{wanted[0].entry.sha256}*"))

    @pytest.mark.parametrize("name", ["big", "small"])
    def test_a_file_that_is_too_short(self, world: World, name: str) -> None:
        wanted = world.put(name)
        path = world.store.root / name
        path.chmod(0o644)
        path.write_bytes(content(name)[:-5])
        with pytest.raises(CorruptFile, match=f"^{name} in"):
            world.fetch(wanted)
        assert not (world.done / wanted[0].entry.sha256).exists()

    def test_a_file_that_is_not_there(self, world: World) -> None:
        wanted = world.put("small", "big")
        world.store.delete("big")
        with pytest.raises(NotFound, match="big does not exist"):
            world.fetch(wanted)

    def test_a_partial_file_that_is_not_what_it_seems_starts_over(self, world: World) -> None:
        (wanted,) = world.put("big")
        half_way(world, wanted)
        partial = world.partial / wanted.entry.sha256
        with partial.open("r+b") as file:
            file.write(bytes(PART))
        world.fetch([wanted])
        world.check([wanted])
        assert world.moved == SIZES["big"]


def half_way(world: World, wanted: Wanted) -> None:
    """Let a transfer fail for good after exactly six parts.

    By one worker: of several, one that fails may cut off what the others are at.
    """
    store, world.store = world.store, Ending(world.store.root, ranges=6)
    with pytest.raises(Transient, match="503"):
        world.fetch([wanted], FetchPolicy(workers=1, part_bytes=PART, attempts=1))
    world.store = store
    world.moved = 0


class Ending(RemoteStore):
    """Answers some times and never again."""

    def __init__(self, root: Path, *, ranges: int) -> None:
        super().__init__(root)
        self._left = ranges

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        self._left -= 1
        if self._left < 0:
            raise Transient("503 Slow Down")
        return super().open_range(key, start, size)


class TestFailures:
    @pytest.mark.parametrize("seed", range(5))
    def test_a_store_that_fails_now_and_then(self, tmp_path: Path, seed: int) -> None:
        store = FlakyStore(tmp_path / "store", seed=seed, rate=0.3)
        world = World(tmp_path, store)
        wanted = world.put()
        world.fetch(wanted, PATIENT)
        world.check(wanted)
        assert store.failures > 3
        assert world.moved == sum(SIZES.values())

    def test_a_cut_part_goes_on_where_it_was_cut(self, tmp_path: Path) -> None:
        store = FlakyStore(tmp_path / "store", seed=1, rate=0.5)
        world = World(tmp_path, store)
        world.fetch(world.put("big"), PATIENT)
        assert store.read_bytes == SIZES["big"]

    def test_a_store_that_only_fails(self, tmp_path: Path) -> None:
        world = World(tmp_path, Ending(tmp_path / "store", ranges=0))
        with pytest.raises(Transient, match="503"):
            world.fetch(world.put())
        assert len(world.store.asked) == 0
        # For an empty file nothing is asked: it may be there already.
        assert [path for path in world.done.iterdir() if path.stat().st_size] == []

    def test_a_store_that_stalls(self, tmp_path: Path) -> None:
        store = StalledStore(tmp_path / "store")
        world = World(tmp_path, store)
        wanted = world.put("small", "even")
        try:
            with pytest.raises(Transient, match="has sent nothing for"):
                world.fetch(wanted, FetchPolicy(workers=2, part_bytes=PART, stall_s=0.2))
        finally:
            store.let_go.set()
        assert list(world.done.iterdir()) == []
        # The workers that hung let go of their files once they wake.
        world.fetch(wanted)
        world.check(wanted)

    def test_what_arrived_is_not_moved_again(self, world: World) -> None:
        (wanted,) = world.put("big")
        half_way(world, wanted)
        before = world.store.read_bytes
        world.fetch([wanted])
        world.check([wanted])
        assert world.store.read_bytes - before == SIZES["big"] - 6 * PART
        assert world.moved == SIZES["big"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: a disk that is full, for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("name", "room"), [("big", 24 * PART), ("part", PART // 2)])
def test_a_full_disk_leaves_nothing(world: World, name: str, room: int) -> None:
    wanted = world.put(name)
    with largest_file(room), pytest.raises(StorageFull):
        world.fetch(wanted)
    assert list(world.partial.iterdir()) == []
    assert list(world.done.iterdir()) == []
    world.fetch(wanted)
    world.check(wanted)


FETCH = """
import os, sys, time
from pathlib import Path
from tests.unit.store.flaky import RemoteStore
from tests.unit.store.test_fetch import SIZES, World
from trainyard.store.fetch import FetchPolicy

class Slow(RemoteStore):
    def open_range(self, key, start, size):
        time.sleep(float(sys.argv[3]))
        os.write(log, f"{size} ".encode())
        return super().open_range(key, start, size)

root = Path(sys.argv[1])
log = os.open(root / "asked", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
world = World(root, Slow(root / "store"))
wanted = world.put()
print("ready", flush=True)
sys.stdin.read()
world.fetch(wanted, FetchPolicy(workers=int(sys.argv[2]), part_bytes=10_000, chunk_bytes=1000))
world.check_whole(wanted)
print(world.store.read_bytes)
"""


def start(root: Path, *, workers: int, pause_s: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, str(root), str(workers), str(pause_s)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None


def test_processes_share_the_work(world: World, tmp_path: Path) -> None:
    wanted = world.put()
    processes = [start(tmp_path, workers=2, pause_s=0.005) for _ in range(4)]
    try:
        for process in processes:
            go(process)
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(map(int, outputs)) == sum(SIZES.values())
    world.check(wanted)


def kill_and_resume(root: Path, seed: int) -> None:
    """Kill a transfer at a random moment; the next moves at most one part a worker again."""
    workers = 2
    world = World(root, RemoteStore(root / "store"))
    wanted = world.put()
    process = start(root, workers=workers, pause_s=0.003)
    try:
        go(process)
        time.sleep(random.Random(seed).uniform(0, 0.08))
    finally:
        process.kill()
        process.communicate()
    for each in wanted:
        done = world.done / each.entry.sha256
        assert not done.exists() or done.read_bytes() == content(each.key)
    world.fetch(wanted)
    world.check(wanted)
    asked = root / "asked"
    before = sum(map(int, asked.read_text().split())) if asked.exists() else 0
    assert before + world.store.read_bytes <= sum(SIZES.values()) + workers * PART


@pytest.mark.parametrize("seed", range(4))
def test_a_transfer_that_is_killed_is_resumed(tmp_path: Path, seed: int) -> None:
    kill_and_resume(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 200))
def test_a_transfer_that_is_killed_is_resumed_at_whatever_moment(tmp_path: Path, seed: int) -> None:
    kill_and_resume(tmp_path, seed)
