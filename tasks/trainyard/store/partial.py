"""A large file of a folder store while it grows, kept between attempts.

The bytes arrive in their order, so what is there is always a beginning. A record beside the file
says how long a beginning was received and its sha256. The next attempt at the same content reads
that beginning again; if it has the recorded hash, only the rest is moved. A partial file is locked
by its writer for as long as it lives; others write one of their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError

from trainyard.store.disk import explained, write_all
from trainyard.store.parts import PART_BYTES, Bytes, Part, Ranges, in_order, parts_of
from trainyard.store.transfer import CHUNK_BYTES, Content

KEPT_S = 14 * 24 * 3600.0
"""Seconds after which a partial file that nobody touched is removed."""


class _Record(BaseModel):
    """What was received."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    """Bytes, from the beginning."""
    sha256: str


class PartialFile:
    """The file under its partial name, open and locked; a context manager."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `PartialFile.of`."""
        self.path = path
        self._record = path.with_suffix(".json")
        self._descriptor = descriptor

    @classmethod
    def of(cls, folder: Path, key: str, source: Ranges) -> PartialFile:
        """Open what an earlier attempt at the same content left in `folder`, or begin.

        Raises:
            BadInput, StorageFull, Transient: it cannot be opened.
        """
        _sweep(folder)
        name = hashlib.sha256(f"{key}\0{source.identity}\0{source.size}".encode()).hexdigest()
        number = 0
        while True:
            path = folder / f"{name}-{number}.part"
            with explained("write", path):
                descriptor = _open_locked(path)
            if descriptor is not None:
                return cls(path, descriptor)
            number += 1

    def fill(self, source: Ranges, *, mode: int) -> Content:
        """Receive what is missing, durably, and return size and hash of the whole.

        Args:
            source: what to receive.
            mode: rights that the whole file gets, as far as the umask allows.

        Raises:
            BadInput, StorageFull, Transient: the disk cannot be written.
            Exception: whatever reading the source raises.
        """
        with explained("read", self.path):
            sha256, have = self._beginning(source.size)
            os.ftruncate(self._descriptor, have)
            os.lseek(self._descriptor, have, os.SEEK_SET)

        def read(part: Part) -> Bytes:
            return source.read(have + part.start, part.size)

        parts = parts_of(source.size - have, PART_BYTES)
        done = have
        with closing(in_order(parts, read, size_of=lambda part: part.size)) as arriving:
            for data in arriving:
                sha256.update(data)
                done += len(data)
                with explained("write", self.path):
                    write_all(self._descriptor, data)
                    if len(parts) > 1:
                        self._note(_Record(size=done, sha256=sha256.copy().hexdigest()))
        with explained("write", self.path):
            os.fchmod(self._descriptor, os.fstat(self._descriptor).st_mode & mode)
            os.fsync(self._descriptor)
        return Content(size=done, sha256=sha256.hexdigest())

    def discard(self) -> None:
        """Remove the partial name, and the record with it."""
        _remove(self.path)

    def __enter__(self) -> PartialFile:
        """Return the file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unlock it; what arrived stays for the next attempt, if there is a record of it."""
        if not self._record.exists():
            self.discard()
        os.close(self._descriptor)

    def _beginning(self, size: int) -> tuple[hashlib._Hash, int]:
        """Hash what was received; nothing counts unless it is as recorded."""
        try:
            record = _Record.model_validate_json(self._record.read_bytes())
        except (FileNotFoundError, ValidationError):
            return hashlib.sha256(), 0
        sha256 = hashlib.sha256()
        left = record.size
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        while left and (data := os.read(self._descriptor, min(left, CHUNK_BYTES))):
            sha256.update(data)
            left -= len(data)
        if left or record.size > size or sha256.hexdigest() != record.sha256:
            self._record.unlink(missing_ok=True)
            return hashlib.sha256(), 0
        return sha256, record.size

    def _note(self, record: _Record) -> None:
        new = self._record.with_suffix(".new")
        new.write_text(record.model_dump_json())
        new.replace(self._record)


def _open_locked(path: Path) -> int | None:
    """Open `path`, made if need be; None if somebody else writes it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:
            # It was finished, and so made read-only, but got no name.
            _remove(path)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        names = os.fstat(descriptor).st_nlink
        if names == 1:
            return descriptor
        if names > 1:
            # It was stored, and must not be written to any more; only this name was left.
            _remove(path)
        os.close(descriptor)


def remove_idle(path: Path) -> None:
    """Remove a partial file, unless somebody writes it. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what nobody went on with for long."""
    now = time.time()
    for path in folder.glob("*.part"):
        with suppress(OSError):
            if now - path.stat().st_mtime > KEPT_S:
                _remove(path)
