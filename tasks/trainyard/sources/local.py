"""A folder on this machine with one subfolder for each revision."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from trainyard.canonical import digest
from trainyard.errors import BadInput, NotFound, TrainyardError, Transient
from trainyard.names import check_revision
from trainyard.sources.files import WEIGHTS_SUFFIX, Inspection, inspect_files, unusable
from trainyard.sources.protocol import ResolvedRevision, SourceFile, listed
from trainyard.sources.revision_names import is_revision, natural
from trainyard.sources.safetensors_header import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SMALL_BYTES = 1 << 20
"""Weight files below this are hashed whole for the fingerprint."""

_CHUNK_BYTES = 1 << 20


class LocalSource:
    """A `Source` in a folder."""

    def __init__(self, folder: Path, *, allow_files: Sequence[str] = ()) -> None:
        """Use `folder`; it is looked at only when a revision is resolved.

        Args:
            folder: has a subfolder for each revision.
            allow_files: exact names of code or pickles that are let in.
        """
        self._folder = folder
        self._allow_files = tuple(allow_files)

    def peek(self, revision: str | None) -> tuple[str, str]:
        """Return revision and fingerprint, whatever is wrong with the files.

        It reads what the fingerprint covers. Raises NotFound, BadInput, Transient.
        """
        folder, inspection, _ = self._look(revision)
        return folder.name, _fingerprint(folder, inspection.files)

    def resolve(self, revision: str | None) -> ResolvedRevision:
        """Resolve `revision` (None: the newest subfolder, by natural order of names).

        The fingerprint covers path and size of every file that is loaded, the content of text files
        and small weight files, and of larger weight files the header and the time of the last
        change: whatever is written into the folder changes it, without reading all weights.

        Raises:
            NotFound: there is no such folder or revision; the message lists those that exist.
            BadInput: files are refused, missing or broken; the message names all of them.
            Transient: the folder cannot be read now.
        """
        folder, inspection, links = self._look(revision)
        problems = (*links, *inspection.problems)
        if problems:
            raise unusable(folder.name, str(folder.parent), problems)
        return ResolvedRevision(
            revision=folder.name,
            uri=folder.as_uri(),
            files=inspection.files,
            fingerprint=_fingerprint(folder, inspection.files),
            allowed=inspection.allowed,
        )

    def open(self, resolved: ResolvedRevision, path: str) -> BinaryIO:
        """Open one listed file. Raises NotFound, Transient."""
        listed(resolved, path)
        return _open(self._revision_folder(resolved.revision), path)

    def open_range(self, resolved: ResolvedRevision, path: str, start: int, size: int) -> BinaryIO:
        """Open `size` bytes of one listed file from byte `start` on. Raises NotFound, Transient."""
        listed(resolved, path)
        return _open_range(self._revision_folder(resolved.revision), path, start, size)

    def _look(self, revision: str | None) -> tuple[Path, Inspection, list[str]]:
        """Return the folder of a revision, what is in it, and problems with links."""
        if revision is not None:
            check_revision(revision)
        folder = self._revision_folder(revision)
        listing, links = _list(folder)
        inspection = inspect_files(
            listing,
            lambda file, start, size: _open_range(folder, file.path, start, size),
            allow_files=self._allow_files,
        )
        return folder, inspection, links

    def _revision_folder(self, revision: str | None) -> Path:
        revisions = self._revisions()
        if revision is None:
            if not revisions:
                raise NotFound(
                    f"The source folder {self._folder} has no revisions.",
                    hint="Put each revision of the model into its own subfolder, such as v1.",
                )
            return max(revisions.values(), key=lambda found: natural(found.name))
        if revision not in revisions:
            known = ", ".join(sorted(revisions, key=natural)) or "none"
            raise NotFound(
                f"The source folder {self._folder} has no revision {revision!r}.",
                hint=f"Revisions that exist: {known}.",
            )
        return revisions[revision]

    def _revisions(self) -> dict[str, Path]:
        """Return the subfolders by name; a link to one of them stands for it."""
        try:
            top = self._folder.resolve()
            found = {path.name: path.resolve() for path in top.iterdir()}
            return {
                name: real
                for name, real in found.items()
                if is_revision(name)
                and is_revision(real.name)
                and real.parent == top
                and real.is_dir()
            }
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"The source folder {self._folder} does not exist.",
                hint="Correct `source.path` in the model's spec, or make the folder.",
            ) from None
        except OSError as error:
            raise _unreadable(self._folder, error) from error


def _list(folder: Path) -> tuple[list[SourceFile], list[str]]:
    """Return the files of the folder's top level, and problems with links.

    Subfolders are listed by no one: nothing in them is loaded.
    """
    files: list[SourceFile] = []
    problems: list[str] = []
    try:
        for path in sorted(folder.iterdir()):
            if path.is_symlink() and not path.resolve().is_relative_to(folder):
                problems.append(
                    f"{path.name} is a symbolic link out of the folder: copy the file itself "
                    "(`cp -L`)"
                )
                continue
            if path.is_symlink() and not path.exists():
                problems.append(f"{path.name} is a symbolic link to nothing: copy the file itself")
                continue
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                files.append(SourceFile(path=path.name, size=found.st_size))
    except OSError as error:
        raise _unreadable(folder, error) from error
    return files, problems


def _open(folder: Path, path: str) -> io.BufferedReader:
    file = folder / path
    try:
        if not file.resolve().is_relative_to(folder):
            raise BadInput(
                f"{file} is a symbolic link out of its folder.", hint="Copy the file itself."
            )
        return file.open("rb")
    except FileNotFoundError:
        raise NotFound(f"{file} does not exist any more.", hint="Plan again.") from None
    except OSError as error:
        raise _unreadable(file, error) from error


class _Part(io.RawIOBase):
    """A range of an open file."""

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        super().__init__()
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        count = self._file.readinto(memoryview(buffer).cast("B")[: self._left])
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_range(folder: Path, path: str, start: int, size: int) -> BinaryIO:
    file = _open(folder, path)
    file.seek(start)
    return cast(BinaryIO, _Part(file, size))


def _fingerprint(folder: Path, files: tuple[SourceFile, ...]) -> str:
    listing: list[list[object]] = []
    try:
        for file in files:
            mark = [_head_digest(folder / file.path, file)]
            if file.path.endswith(WEIGHTS_SUFFIX) and file.size >= SMALL_BYTES:
                mark.append(str(os.stat(folder / file.path).st_mtime_ns))
            listing.append([file.path, file.size, *mark])
    except OSError as error:
        raise _unreadable(folder, error) from error
    return digest(listing)


def _head_digest(path: Path, file: SourceFile) -> str:
    """Hash all of a small or text file, and the header of a large weight file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as stream:
        if file.path.endswith(WEIGHTS_SUFFIX) and file.size >= SMALL_BYTES:
            length = int.from_bytes(stream.read(8), "little")
            # A broken length may be anything; what is wrong is named where headers are judged.
            sha256.update(stream.read(min(length, file.size, MAX_HEADER_BYTES)))
        else:
            while chunk := stream.read(_CHUNK_BYTES):
                sha256.update(chunk)
    return sha256.hexdigest()


def _unreadable(path: Path, error: OSError) -> TrainyardError:
    text = f"Cannot read {path}: {error.strerror or error}."
    if isinstance(error, PermissionError):
        return BadInput(text, hint="Give the user that runs Trainyard the right to read it.")
    return Transient(text, hint="Look at that file system, then try again.")
