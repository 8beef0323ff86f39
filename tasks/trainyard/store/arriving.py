"""The parts of one file under way: which there are, which are here, what can be hashed already.

A file is moved in parts of equal size, several at once and started in order. The record beside a
partial file names the parts that are whole in it, one a line, so that a killed transfer moves at
most the parts again that it was in the middle of. The file's own sha256 has the last word: a
partial file that grew out of several attempts and does not match it starts over.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from trainyard.store.parts import Part, parts_of

PART_BYTES = 16 << 20
"""Big enough that what a request costs does not show, small enough to move again."""


def read_record(data: bytes, size: int, part_bytes: int) -> frozenset[int]:
    """Return the parts that a record names.

    A record of another size or another way to split, or one that cannot be read, names none. The
    last line may be torn.
    """
    first, _, rest = data.partition(b"\n")
    if first != _head(size, part_bytes):
        return frozenset()
    count = len(parts_of(size, part_bytes))
    lines = rest.split(b"\n")[:-1]
    return frozenset(int(line) for line in lines if line.isdigit() and int(line) < count)


def _head(size: int, part_bytes: int) -> bytes:
    return f"trainyard parts of {part_bytes} bytes, {size} in all".encode()


class Record:
    """The record of a partial file; a file of one part needs none."""

    def __init__(self, path: Path, size: int, part_bytes: int) -> None:
        """Use the record at `path`, which need not exist."""
        self._path = path
        self._head = _head(size, part_bytes)
        self._size = size
        self._part_bytes = part_bytes
        self._descriptor: int | None = None

    def read(self) -> frozenset[int]:
        """Return the parts that are here. Raises OSError."""
        try:
            return read_record(self._path.read_bytes(), self._size, self._part_bytes)
        except FileNotFoundError:
            return frozenset()

    def begin(self, here: frozenset[int]) -> None:
        """Start writing, with the parts that are here already. Raises OSError."""
        text = self._head + b"\n" + b"".join(b"%d\n" % index for index in sorted(here))
        temporary = self._path.with_name(f"{self._path.name}.new")
        temporary.write_bytes(text)
        temporary.replace(self._path)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, index: int) -> None:
        """Note that a part is whole. Raises OSError."""
        if self._descriptor is not None:
            os.write(self._descriptor, b"%d\n" % index)

    def close(self) -> None:
        """Stop writing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Forget all parts. Raises OSError."""
        self.close()
        self._path.unlink(missing_ok=True)


class Hashing:
    """The sha256 of a file that arrives in parts: hashed in order, as far as it is whole.

    Whoever brings bytes calls `arrived`; one of them at a time hashes on, the bytes that it just
    brought from memory, those that others brought before from the file (which the kernel still has
    in memory: parts are started in order). So there is one pass over the network, and none waits.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        here: frozenset[int],
        read: Callable[[memoryview, int], int],
    ) -> None:
        """Hash `parts`, of which some are whole already.

        Args:
            parts: all parts of the file.
            here: indices of those that are whole.
            read: fills a buffer from an offset of the partial file and returns how many bytes.
        """
        self._parts = parts
        self._size = sum(part.size for part in parts)
        self._written = [part.size if part.index in here else 0 for part in parts]
        self._read = read
        self._sha256 = hashlib.sha256()
        self._hashed = 0
        self._front = 0
        self._busy = False
        self._mutex = Lock()

    @property
    def complete(self) -> bool:
        """Has all of the file been hashed?"""
        return self._hashed == self._size

    def hexdigest(self) -> str:
        """Return the hash of what was hashed."""
        return self._sha256.hexdigest()

    def arrived(self, part: Part, data: memoryview, scratch: memoryview) -> None:
        """Take note of the next bytes of `part`, which are in the file; hash on if nobody does.

        Args:
            part: what the bytes belong to.
            data: the bytes.
            scratch: memory to read into; not that of `data`.

        Raises:
            OSError: the partial file cannot be read.
        """
        with self._mutex:
            at = part.start + self._written[part.index]
            self._written[part.index] += len(data)
        self._hash(at, data, scratch)

    def go_on(self, scratch: memoryview) -> None:
        """Hash what is there, unless somebody does. Raises as `arrived`."""
        self._hash(0, scratch[:0], scratch)

    def _hash(self, at: int, data: memoryview, scratch: memoryview) -> None:
        with self._mutex:
            if self._busy:
                # Whoever hashes looks again, under the mutex, before it stops.
                return
            self._busy = True
        try:
            while (end := self._go_on_to()) is not None:
                piece = self._piece(at, data, scratch[: end - self._hashed])
                self._sha256.update(piece)
                self._hashed += len(piece)
        except BaseException:
            self._busy = False
            raise

    def _go_on_to(self) -> int | None:
        """Return how far can be hashed now; None, and others may hash, if nothing is left."""
        with self._mutex:
            while (
                self._front < len(self._parts)
                and self._written[self._front] == self._parts[self._front].size
            ):
                self._front += 1
            end = self._size
            if self._front < len(self._parts):
                end = self._parts[self._front].start + self._written[self._front]
            if end > self._hashed:
                return end
            self._busy = False
            return None

    def _piece(self, at: int, data: memoryview, room: memoryview) -> memoryview:
        """Return the next bytes: those of `data`, which lie at `at`, from memory."""
        ahead = at - self._hashed
        if -len(data) < ahead <= 0:
            return data[-ahead:]
        if 0 < ahead < len(room):
            room = room[:ahead]
        count = self._read(room, self._hashed)
        if not count:
            raise OSError(errno.EIO, "the partial file became shorter")
        return room[:count]
