"""The store as the rest of Trainyard sees it.

Keys are relative POSIX paths (`releases/adder/adder-0123456789ab.json`). Nothing is half-visible:
a key either has its whole content or does not exist. Nothing is overwritten by accident: `create`
never replaces, `replace` only what the caller has read, and only `put` (status documents,
progress) lets the last writer win.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from trainyard.documents.base import FileEntry
from trainyard.store.parts import Ranges


@dataclass(frozen=True)
class Stored:
    """The content of a key and the version to hand to `replace` or `delete`."""

    data: bytes
    version: str


@dataclass(frozen=True)
class Entry:
    """One key of a listing."""

    key: str
    size: int
    version: str = field(default="", compare=False)
    """Its version, where the back end's listing tells it; else empty."""
    modified_at: datetime | None = field(default=None, compare=False)
    """When it was written last (UTC, by the clock of the store); None if the store cannot tell."""


@dataclass(frozen=True)
class Internal:
    """Something that a store keeps for itself: no key, but bytes that somebody pays for."""

    name: str
    """What people call it; unique."""
    key: str
    """The key that it is about; empty: of none, or nobody knows."""
    size: int
    """Bytes."""
    modified_at: datetime | None
    needed: bool
    """Is it of use? If not, it is left of something that was cut, which may still go on with it."""
    handle: str = ""
    """What the store itself calls it."""


class Store(Protocol):
    """Where everything lives that outlasts a process."""

    @property
    def url(self) -> str:
        """What people call this store; holds no credentials."""

    def read(self, key: str) -> Stored:
        """Return the content of `key`. Raises NotFound."""

    def exists(self, key: str) -> bool:
        """Tell whether `key` exists."""

    def create(self, key: str, data: bytes) -> str:
        """Write `key`, which must not exist, and return its version.

        Raises Conflict if it exists already (whatever its content), StorageFull.
        """

    def replace(self, key: str, data: bytes, *, version: str) -> str:
        """Replace `key` if its version still is `version`; return the new one.

        Raises Conflict if it changed or is gone, StorageFull.
        """

    def put(self, key: str, data: bytes) -> str:
        """Write `key` whatever it held; the last writer wins. Raises StorageFull."""

    def delete(self, key: str, *, version: str | None = None) -> None:
        """Remove `key`; absent keys are fine.

        With `version`, only that version is removed (Conflict if it changed or is gone).
        """

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the keys below `prefix` (a folder, with or without its final slash), sorted."""

    def open(self, key: str) -> BinaryIO:
        """Open `key` for reading as a stream. Raises NotFound."""

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        """Open `size` bytes of `key` from the offset `start` (fewer at the end of the file).

        Raises NotFound.
        """

    def upload(self, key: str, source: BinaryIO, *, sha256: str | None = None) -> FileEntry:
        """Store a stream under `key`, hashing it in the same pass; idempotent.

        Returns the entry (its `path` is `key`). With `sha256`, content that differs is refused
        (CorruptFile) and leaves nothing behind. A key that already holds the same content is kept.
        Raises Conflict if it holds other content, StorageFull.
        """

    def upload_ranged(
        self, key: str, source: Ranges, *, sha256: str | None = None, new: bool = False
    ) -> FileEntry:
        """Store a file that can be read in ranges; idempotent, and otherwise as `upload`.

        Parts are moved at the same time and hashed in their order. An upload that was cut is found
        again: what is there and equal to the source is not moved again. `new` says that the key was
        not there a moment ago, which saves asking for it; it need not be true any more.
        """

    def local_path(self, key: str) -> Path | None:
        """Return a path to read `key` in place, where the back end has one."""

    def internals(self) -> Iterator[Internal]:
        """Yield what the store keeps for itself, such as parts of files that are not whole yet."""

    def remove_internal(self, internal: Internal) -> None:
        """Remove what `internals` yielded, unless this very moment somebody writes it."""
