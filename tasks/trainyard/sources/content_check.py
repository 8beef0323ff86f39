"""Checks content against the hashes that its source announced, in the pass that moves it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import BinaryIO, cast

from trainyard.errors import CorruptFile
from trainyard.sources.protocol import SourceFile


class ContentCheck:
    """Watches the bytes of one file, from the first to the last.

    Whoever hashes with sha256 anyway hands that to `finish`, so that nothing is hashed twice.

    Args:
        file: what the source says about the file.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._size = 0
        self._git = None
        if file.git_blob_id is not None and file.sha256 is None:
            # Git's own object id: no protection, but a name that the content must have.
            self._git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        self._size += len(data)
        if self._git is not None:
            self._git.update(data)

    def finish(self, sha256: str | None = None) -> None:
        """Compare with what the source announced.

        Args:
            sha256: hash of all the bytes, if the caller has it.

        Raises:
            CorruptFile: the content is not the announced one; the message names the file.
        """
        file = self._file
        if self._size != file.size:
            raise self._differs(f"{self._size} bytes instead of {file.size}")
        if self._git is not None and self._git.hexdigest() != file.git_blob_id:
            raise self._differs(
                f"the git object id {self._git.hexdigest()} instead of {file.git_blob_id}"
            )
        if sha256 is not None and file.sha256 is not None and sha256 != file.sha256:
            raise self._differs(f"sha256 {sha256} instead of {file.sha256}")

    def watch(
        self, stream: BinaryIO, *, on_read: Callable[[int], object] = lambda size: None
    ) -> BinaryIO:
        """Return `stream` so that reading it to its end checks it.

        The hash of type sha256 is left to whoever reads: see `finish`.

        Args:
            stream: of the whole file.
            on_read: told the bytes of each reading; may raise to end it.
        """
        return cast(BinaryIO, _Watched(stream, self, on_read))

    def _differs(self, how: str) -> CorruptFile:
        return CorruptFile(
            f"{self._file.path} has {how}: it is not what its source announced.",
            hint="Nothing was kept. Try again; if it stays so, the file is damaged in the source.",
        )


class _Watched(io.RawIOBase):
    def __init__(
        self, stream: BinaryIO, check: ContentCheck, on_read: Callable[[int], object]
    ) -> None:
        super().__init__()
        self._stream = stream
        self._check = check
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._stream.read(-1 if size is None else size)
        self._check.update(data)
        self._on_read(len(data))
        if not data and size != 0:
            self._check.finish()
        return data


def check_content(file: SourceFile, content: bytes) -> None:
    """Compare the whole content of a small file with what its source announced.

    Raises:
        CorruptFile: they differ; the message names the file.
    """
    check = ContentCheck(file)
    check.update(content)
    check.finish(hashlib.sha256(content).hexdigest())
