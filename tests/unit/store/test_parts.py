"""Cutting files into parts, and moving parts at the same time in their order."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.store.conformance import content, ranges, sha256

from trainyard.store.parts import MAX_PARTS, Budget, hash_ranges, in_memory, in_order, parts_of


@given(st.integers(0, 10**13), st.integers(1 << 20, 1 << 30))
def test_parts_cover_a_file_once(size: int, part_bytes: int) -> None:
    parts = parts_of(size, part_bytes)
    assert len(parts) <= MAX_PARTS
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))
    position = 0
    for part in parts:
        assert part.start == position
        assert part.size > 0
        position += part.size
    assert position == size
    assert all(part.size >= part_bytes for part in parts[:-1])


@pytest.mark.parametrize("size", [0, 1, 1000, 12345])
def test_hashing_in_ranges_is_hashing(size: int) -> None:
    data = content(size)
    found = hash_ranges(ranges(data), 1000)
    assert (found.size, found.sha256) == (size, sha256(data))


def test_what_is_held_in_memory_is_given_back_whatever_happens() -> None:
    budget = Budget(10)

    def fail() -> None:
        with in_memory(8, budget):
            assert not budget.take(3, wait=False)
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        fail()
    assert budget.take(10, wait=False)


def test_results_come_in_order_whoever_is_faster() -> None:
    def work(number: int) -> int:
        time.sleep(0.001 * (7 * number % 5))
        return number

    done = in_order(range(50), work, size_of=lambda number: 1, budget=Budget(10))
    assert list(done) == list(range(50))


def test_no_more_is_in_memory_than_allowed() -> None:
    alive = 0
    most = 0
    mutex = threading.Lock()

    def work(number: int) -> int:
        nonlocal alive, most
        with mutex:
            alive += 1
            most = max(most, alive)
        return number

    budget = Budget(3 * 10)

    def move() -> None:
        nonlocal alive
        with closing(in_order(range(40), work, size_of=lambda n: 10, budget=budget)) as done:
            for _ in done:
                with mutex:
                    alive -= 1

    threads = [threading.Thread(target=move) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alive == 0
    assert 1 <= most <= 3
    assert budget.take(30, wait=False)


def test_a_part_larger_than_all_memory_goes_alone() -> None:
    budget = Budget(10)
    assert list(in_order([1, 2, 3], lambda n: n, size_of=lambda n: 100, budget=budget)) == [1, 2, 3]
    assert budget.take(10, wait=False)


def test_an_error_ends_everything_and_gives_its_memory_back() -> None:
    budget = Budget(10)
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise KeyError(number)
        return number

    with pytest.raises(KeyError):
        list(in_order(range(1000), work, size_of=lambda n: 1, budget=budget))
    assert len(begun) < 20
    assert budget.take(10, wait=False)


def test_leaving_early_ends_it_too() -> None:
    budget = Budget(10)
    with closing(in_order(range(1000), lambda n: n, size_of=lambda n: 1, budget=budget)) as done:
        assert next(done) == 0
    assert budget.take(10, wait=False)
    assert not [t for t in threading.enumerate() if t.name.startswith("part")]


MEMORY = """
import re, sys, threading
from pathlib import Path
from trainyard.store.folder import FolderStore
from trainyard.store.parts import Ranges

store = FolderStore(Path(sys.argv[1]))
size = int(sys.argv[2])

def move(number):
    store.upload_ranged(str(number), Ranges(size, str(number), lambda start, size: bytes(size)))
    store.delete(str(number))

threads = [threading.Thread(target=move, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
# Of this program alone: ru_maxrss would count that of the process it was started from.
print(int(re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]) >> 10)
"""


@pytest.mark.parametrize(
    "size", [96 << 20, pytest.param(2 << 30, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_four_large_files_at_once_need_little_memory(tmp_path: Path, size: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(size)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=250,
    )
    peak_mib = int(done.stdout)
    assert peak_mib < 512
