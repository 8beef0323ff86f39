from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.store.arriving import Hashing, Record, read_record
from trainyard.store.parts import Part, parts_of


class TestSplit:
    @given(st.integers(0, 10_000), st.integers(1, 500))
    def test_parts_cover_the_file_in_order(self, size: int, part_bytes: int) -> None:
        parts = parts_of(size, part_bytes)
        assert [part.index for part in parts] == list(range(len(parts)))
        assert sum(part.size for part in parts) == size
        assert all(0 < part.size <= part_bytes for part in parts)
        assert [part.start for part in parts] == [part.index * part_bytes for part in parts]


class TestRecord:
    def test_it_names_the_parts_that_were_added(self, tmp_path: Path) -> None:
        record = Record(tmp_path / "x.parts", 100, 10)
        assert record.read() == frozenset()
        record.begin(frozenset({3}))
        record.add(0)
        record.add(9)
        record.close()
        assert Record(tmp_path / "x.parts", 100, 10).read() == {0, 3, 9}

    def test_a_record_of_something_else_names_none(self, tmp_path: Path) -> None:
        record = Record(tmp_path / "x.parts", 100, 10)
        record.begin(frozenset({3}))
        record.close()
        assert Record(tmp_path / "x.parts", 101, 10).read() == frozenset()
        assert Record(tmp_path / "x.parts", 100, 20).read() == frozenset()

    def test_a_torn_line_is_no_part(self, tmp_path: Path) -> None:
        record = Record(tmp_path / "x.parts", 10_000, 10)
        record.begin(frozenset())
        record.add(123)
        record.close()
        data = (tmp_path / "x.parts").read_bytes()
        for cut in range(1, 5):
            assert read_record(data[:-cut], 10_000, 10) == frozenset()

    @given(st.binary(max_size=60))
    def test_any_bytes_are_read(self, data: bytes) -> None:
        assert read_record(data, 100, 10) <= set(range(10))

    @given(st.binary(max_size=60))
    def test_any_tail_names_parts_that_exist(self, tail: bytes) -> None:
        head = b"trainyard parts of 10 bytes, 100 in all\n"
        assert read_record(head + tail, 100, 10) <= set(range(10))


class Arrivals:
    """A file that arrives, and what hashes it."""

    def __init__(self, data: bytes, part_bytes: int, here: frozenset[int]) -> None:
        self.data = data
        self.parts = tuple(parts_of(len(data), part_bytes))
        self.file = bytearray(len(data))
        for part in self.parts:
            if part.index in here:
                self.put(part, 0, part.size)
        self.hashing = Hashing(self.parts, here, self.read)

    def put(self, part: Part, at: int, size: int) -> memoryview:
        piece = memoryview(self.data)[part.start + at : part.start + at + size]
        self.file[part.start + at : part.start + at + size] = piece
        return piece

    def read(self, room: memoryview, at: int) -> int:
        piece = self.file[at : at + len(room)]
        room[: len(piece)] = piece
        return len(piece)

    def arrive(self, part: Part, at: int, size: int) -> None:
        self.hashing.arrived(part, self.put(part, at, size), memoryview(bytearray(7)))


class TestHashing:
    @given(st.data())
    def test_the_hash_is_that_of_the_file_in_whatever_order_it_arrives(
        self, data: st.DataObject
    ) -> None:
        content = data.draw(st.binary(min_size=1, max_size=200))
        part_bytes = data.draw(st.integers(1, 50))
        parts = tuple(parts_of(len(content), part_bytes))
        here = frozenset(data.draw(st.sets(st.sampled_from([part.index for part in parts]))))
        arrivals = Arrivals(content, part_bytes, here)
        arrivals.hashing.go_on(memoryview(bytearray(7)))
        at = {part.index: 0 for part in parts if part.index not in here}
        while at:
            assert not arrivals.hashing.complete
            index = data.draw(st.sampled_from(sorted(at)))
            part = parts[index]
            size = data.draw(st.integers(1, part.size - at[index]))
            arrivals.arrive(part, at[index], size)
            at[index] += size
            if at[index] == part.size:
                del at[index]
        assert arrivals.hashing.complete
        assert arrivals.hashing.hexdigest() == hashlib.sha256(content).hexdigest()

    def test_several_threads_at_once(self) -> None:
        content = bytes(range(256)) * 1000
        arrivals = Arrivals(content, 1000, frozenset())
        left = list(reversed(arrivals.parts))
        mutex = threading.Lock()

        def work() -> None:
            while True:
                with mutex:
                    if not left:
                        return
                    part = left.pop()
                for at in range(0, part.size, 64):
                    arrivals.arrive(part, at, min(64, part.size - at))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert arrivals.hashing.complete
        assert arrivals.hashing.hexdigest() == hashlib.sha256(content).hexdigest()

    def test_a_file_that_cannot_be_read_is_no_reason_to_hang(self) -> None:
        parts = tuple(parts_of(20, 10))
        hashing = Hashing(parts, frozenset(), lambda room, at: 0)
        scratch = memoryview(bytearray(10))
        hashing.arrived(parts[1], memoryview(b"x" * 10), scratch)
        with pytest.raises(OSError, match="became shorter"):
            hashing.arrived(parts[0], memoryview(b"y" * 10), scratch)
        assert not hashing.complete
