"""A source as the steps see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Protocol

from trainyard.errors import NotFound


@dataclass(frozen=True)
class SourceFile:
    """One file of a revision."""

    path: str
    """Relative POSIX path."""
    size: int
    """Bytes."""
    sha256: str | None = None
    """Hash of the content, where the source knows it (64 hex digits)."""
    git_blob_id: str | None = None
    """The content's git object id (40 hex digits), where the source knows that."""
    version: str | None = None
    """What the source calls this content of the path (an ETag, an object version)."""


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
    allowed: tuple[str, ...] = ()
    """The files among them that are code or pickles, which the spec allows by name."""


class Source(Protocol):
    """Where a model comes from."""

    def peek(self, revision: str | None) -> tuple[str, str]:
        """Return what `revision` (None: the newest) is now: the exact revision and its fingerprint.

        As cheap as the source allows: no file of the Hub or of S3 is read. Files are not judged.
        Equal to those of `resolve` if that finds nothing wrong. Safe to call from many threads.

        Raises NotFound, BadInput (credentials, names), Transient.
        """

    def resolve(self, revision: str | None) -> ResolvedRevision:
        """Resolve `revision` (None: the newest) and list its files.

        Raises NotFound, BadInput (files that Trainyard would not load: pickles, code), Transient.
        """

    def open(self, resolved: ResolvedRevision, path: str) -> BinaryIO:
        """Open one listed file; the stream can seek. Raises NotFound, Transient."""

    def open_range(self, resolved: ResolvedRevision, path: str, start: int, size: int) -> BinaryIO:
        """Open `size` bytes of one listed file from byte `start` on; nothing else is fetched.

        The stream ends after them, or with the file. May be called from several threads. Raises
        NotFound, Transient.
        """


def listed(resolved: ResolvedRevision, path: str) -> SourceFile:
    """Return the listing's entry for `path`. Raises NotFound."""
    for file in resolved.files:
        if file.path == path:
            return file
    raise NotFound(
        f"{path!r} is not a file of revision {resolved.revision!r}.",
        hint="Only the files of its listing can be read.",
    )
