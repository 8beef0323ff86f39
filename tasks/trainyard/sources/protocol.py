"""A source as the steps see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Protocol


@dataclass(frozen=True)
class SourceFile:
    """One file of a revision."""

    path: str
    """Relative POSIX path."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class ResolvedRevision:
    """One exact revision as the source describes it now."""

    revision: str
    uri: str
    """For people; holds no credentials."""
    files: tuple[SourceFile, ...]
    """Sorted by path; only files that would be loaded."""
    fingerprint: str
    """Digest that changes when the listing changes; cheap, not a content hash of everything."""


class Source(Protocol):
    """Where a model comes from."""

    def resolve(self, revision: str | None) -> ResolvedRevision:
        """Resolve `revision` (None: the newest) and list its files.

        Raises NotFound, BadInput (files that Trainyard would not load: pickles, code), Transient.
        """

    def open(self, resolved: ResolvedRevision, path: str) -> BinaryIO:
        """Open one listed file; the stream can seek. Raises NotFound, Transient."""

    def open_range(self, resolved: ResolvedRevision, path: str, start: int, size: int) -> BinaryIO:
        """Open `size` bytes of one listed file from the offset `start` (fewer at its end).

        May be called from several threads. Raises NotFound, Transient.
        """
