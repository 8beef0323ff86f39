"""A store that fails like a network does: a fake for what a real one does too seldom for a test."""

from __future__ import annotations

import io
import random
import threading
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainyard.errors import Transient
from trainyard.store.folder import FolderStore
from trainyard.store.protocol import Stored


class RemoteStore(FolderStore):
    """A store without files of its own, such as an object store; remembers what was asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, int, int]] = []
        """Key, start and size of each range."""
        self.read_bytes = 0

    @property
    def opened(self) -> list[str]:
        return [key for key, _, _ in self.asked]

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        self.asked.append((key, start, size))
        return cast(BinaryIO, _Counted(super().open_range(key, start, size), self))

    def local_path(self, key: str) -> Any:
        return None


class _Counted(io.RawIOBase):
    def __init__(self, stream: BinaryIO, store: RemoteStore) -> None:
        super().__init__()
        self._stream = stream
        self._store = store

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count: int = cast(io.RawIOBase, self._stream).readinto(buffer) or 0
        self._store.read_bytes += count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class FlakyStore(RemoteStore):
    """Fails now and then: 5xx before a stream begins, cuts in the middle, ends too early."""

    def __init__(self, root: Path, *, seed: int, rate: float) -> None:
        super().__init__(root)
        self._random = random.Random(seed)
        self._rate = rate
        self.failures = 0

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        stream = super().open_range(key, start, size)
        if self._random.random() >= self._rate:
            return stream
        self.failures += 1
        kind = self._random.choice(["refused", "cut", "reset", "short"])
        if kind == "refused":
            stream.close()
            raise Transient("503 Slow Down")
        # A stream that ends in order without a byte, twice in a row, is that of a file too short.
        good_bytes = self._random.randrange(size) + (kind == "short")
        return cast(BinaryIO, _Broken(stream, kind, good_bytes))


class _Broken(io.RawIOBase):
    """Breaks after some bytes."""

    def __init__(self, stream: BinaryIO, kind: str, good_bytes: int) -> None:
        super().__init__()
        self._stream = stream
        self._kind = kind
        self._left = good_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._left:
            if self._kind == "cut":
                raise Transient("the connection was cut")
            if self._kind == "reset":
                raise ConnectionResetError(104, "Connection reset by peer")
            return 0
        view = memoryview(buffer)[: self._left]
        count: int = cast(io.RawIOBase, self._stream).readinto(view) or 0
        self._left -= count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class StalledStore(RemoteStore):
    """Sends nothing until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.let_go = threading.Event()

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        self.let_go.wait()
        return super().open_range(key, start, size)


class DownStore(RemoteStore):
    """Cannot be reached while `down` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.down = False

    def _fail(self) -> None:
        if self.down:
            raise Transient("Connection refused")

    def read(self, key: str) -> Stored:
        self._fail()
        return super().read(key)

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        self._fail()
        return super().open_range(key, start, size)
