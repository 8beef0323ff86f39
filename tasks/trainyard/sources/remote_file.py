"""Files behind a network as streams that can seek, and that go on where a connection was cut."""

from __future__ import annotations

import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

from trainyard.errors import Transient
from trainyard.sources.content_check import check_content
from trainyard.sources.protocol import ResolvedRevision, SourceFile, listed
from trainyard.sources.retrying import Judge, Retries

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PART_BYTES = 1 << 30
"""Most bytes asked for at once. Links to content networks expire, and some serve no more than 50 GB
to one request."""

BUFFER_BYTES = 1 << 20

Fetch = Callable[[int, int], Iterator[bytes]]
"""Yields the bytes from the first position up to the second, not included. It raises the library's
exceptions, and closes its connection when it is closed."""


def open_remote(
    fetch: Fetch, start: int, size: int, *, name: str, retries: Retries, judge: Judge
) -> BinaryIO:
    """Return `size` bytes from `start` on as a stream; nothing is fetched before the first read.

    Args:
        fetch: fetches a range.
        start: first byte.
        size: bytes in all.
        name: what messages call the file.
        retries: how often a range is asked for without getting any further.
        judge: tells what an exception of `fetch` means.
    """
    raw = _Remote(fetch, start, size, name, retries, judge)
    return cast(BinaryIO, io.BufferedReader(raw, BUFFER_BYTES))


class _Remote(io.RawIOBase):
    def __init__(
        self, fetch: Fetch, start: int, size: int, name: str, retries: Retries, judge: Judge
    ) -> None:
        super().__init__()
        self._fetch = fetch
        self._start = start
        self._size = size
        self._name = name
        self._retries = retries
        self._judge = judge
        self._position = 0
        self._part_end = 0
        self._chunks: Iterator[bytes] | None = None
        self._rest = memoryview(b"")
        self._failures = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        position = max(0, base + offset)
        if position != self._position:
            self._disconnect()
            self._position = position
        return position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._rest:
            if self._position >= self._size or not target:
                return 0
            self._rest = memoryview(self._next_chunk())
        # A source may send more than was asked for.
        count = min(len(target), len(self._rest), self._size - self._position)
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _next_chunk(self) -> bytes:
        """Return the next bytes; empty where a connection ended, so that the next one begins."""
        try:
            if self._chunks is None:
                self._part_end = min(self._size, self._position + PART_BYTES)
                first, end = self._start + self._position, self._start + self._part_end
                self._chunks = self._fetch(first, end)
            chunk = next(self._chunks, b"")
            if not chunk and self._position < self._part_end:
                raise Transient(
                    f"{self._name} ends after {self._position} of {self._size} bytes.",
                    hint="The source, or something on the way to it, cuts transfers. Try again.",
                )
        except Exception as error:
            self._disconnect()
            self._failures += 1
            self._retries.wait(error, self._judge, self._failures)
            return b""
        if chunk:
            self._failures = 0
        else:
            self._disconnect()
        return chunk

    def _disconnect(self) -> None:
        close = getattr(self._chunks, "close", None)
        self._chunks = None
        self._rest = memoryview(b"")
        if close is not None:
            close()


class RemoteReader(ABC):
    """The reading half of a `Source` behind a network."""

    def __init__(self, attempts: int, sleep: Callable[[float], object]) -> None:
        """Read nothing yet.

        Args:
            attempts: requests for the same thing, in all.
            sleep: waits so many seconds before a request is made again; may raise to end it all.
        """
        self._retries = Retries(attempts, sleep)
        self._reads = SmallReads()

    def open(self, resolved: ResolvedRevision, path: str) -> BinaryIO:
        """Open one listed file. Raises NotFound, BadInput, Transient, also while it is read."""
        file = listed(resolved, path)
        return self._remote(resolved.revision, file, 0, file.size)

    def open_range(self, resolved: ResolvedRevision, path: str, start: int, size: int) -> BinaryIO:
        """Open a range of one listed file. Raises as `open`."""
        file = listed(resolved, path)
        remembered = self._reads.recall(file, start, size)
        return remembered or self._remote(resolved.revision, file, start, size)

    def _open(self, revision: str, file: SourceFile, start: int, size: int) -> BinaryIO:
        """Open a range to judge the revision by; it is kept in memory as long as there is room."""
        return self._reads.open(
            file, start, size, lambda: self._remote(revision, file, start, size)
        )

    @abstractmethod
    def _remote(self, revision: str, file: SourceFile, start: int, size: int) -> BinaryIO:
        """Open a range of a file as it is at a revision."""


class SmallReads:
    """Remembers small contents by what the source calls them, so that each is fetched once.

    A revision is judged when it is resolved, and again when its architecture is read.

    Args:
        limit_bytes: of everything that is remembered; what does not fit is fetched again.
    """

    def __init__(self, limit_bytes: int = 64 << 20) -> None:
        self._room = limit_bytes
        self._contents: dict[tuple[str, str | None, int, int], bytes] = {}
        self._mutex = threading.Lock()

    def recall(self, file: SourceFile, start: int, size: int) -> BinaryIO | None:
        """Return a range that is remembered; None if it is not. Nothing is fetched."""
        known = self._contents.get((file.path, file.version, start, size))
        return None if known is None else io.BytesIO(known)

    def open(
        self, file: SourceFile, start: int, size: int, connect: Callable[[], BinaryIO]
    ) -> BinaryIO:
        """Return what `connect` opens, or the same bytes from memory.

        Args:
            file: the file; its `version` never stands for two contents.
            start: first byte of the range.
            size: bytes of the range.
            connect: opens the range.

        Raises:
            CorruptFile: it is the whole file, and not what its source announced.
        """
        key = (file.path, file.version, start, size)
        known = self._contents.get(key)
        if known is None:
            with connect() as stream:
                known = stream.read()
            if size == file.size:
                check_content(file, known)
            with self._mutex:
                if len(known) <= self._room and key not in self._contents:
                    self._room -= len(known)
                    self._contents[key] = known
        return io.BytesIO(known)
