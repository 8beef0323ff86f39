"""Streams: copy and hash in one pass, with bounded memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

CHUNK_BYTES = 4 << 20
"""Bytes held at a time."""


@dataclass(frozen=True)
class Content:
    """What went through a stream."""

    size: int
    """Bytes."""
    sha256: str
    """64 lower-case hex digits."""


def pump(source: BinaryIO, write: Callable[[bytes], object] | None = None) -> Content:
    """Read `source` to its end, hand each chunk to `write`, and return size and hash."""
    sha256 = hashlib.sha256()
    size = 0
    while chunk := source.read(CHUNK_BYTES):
        if write is not None:
            write(chunk)
        sha256.update(chunk)
        size += len(chunk)
    return Content(size=size, sha256=sha256.hexdigest())


def hash_file(path: Path) -> Content:
    """Return size and hash of a local file. Raises OSError."""
    with path.open("rb") as file:
        return pump(file)


def limited(stream: BinaryIO, start: int, size: int) -> BinaryIO:
    """Return a stream of `size` bytes of an open file from `start` (fewer at its end).

    Closing it closes the file.
    """
    try:
        stream.seek(start)
    except BaseException:
        stream.close()
        raise
    return cast(BinaryIO, io.BufferedReader(_Limited(stream, size)))


class _Limited(io.RawIOBase):
    """The next bytes of a stream, and no more."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        super().__init__()
        self._stream = stream
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        # Straight into the caller's memory: a big read is copied once, by the kernel.
        count: int = cast(io.BufferedIOBase, self._stream).readinto(
            memoryview(buffer)[: self._left]
        )
        self._left -= count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
