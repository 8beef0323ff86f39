"""A folder on this machine with one subfolder for each revision."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from trainyard.canonical import digest
from trainyard.errors import BadInput, NotFound, TrainyardError, Transient
from trainyard.names import check_revision
from trainyard.sources.files import WEIGHTS_SUFFIX, inspect_files, unusable
from trainyard.sources.protocol import ResolvedRevision, SourceFile
from trainyard.store.transfer import limited

SMALL_BYTES = 1 << 20
"""Weight files below this are hashed whole for the fingerprint."""

_CHUNK_BYTES = 1 << 20


class LocalSource:
    """A `Source` in a folder."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`; it is looked at only when a revision is resolved."""
        self._folder = folder

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
        if revision is not None:
            check_revision(revision)
        folder = self._revision_folder(revision)
        listing, links = _list(folder)
        inspection = inspect_files(listing, lambda path: _open(folder, path))
        problems = tuple(links) + inspection.problems
        if problems:
            raise unusable(folder.name, str(folder.parent), problems)
        return ResolvedRevision(
            revision=folder.name,
            uri=folder.as_uri(),
            files=inspection.files,
            fingerprint=_fingerprint(folder, inspection.files),
        )

    def open(self, resolved: ResolvedRevision, path: str) -> BinaryIO:
        """Open one listed file. Raises NotFound, Transient."""
        if all(file.path != path for file in resolved.files):
            raise NotFound(
                f"{path!r} is not a file of revision {resolved.revision!r}.",
                hint="Only the files of its listing can be read.",
            )
        return _open(self._revision_folder(resolved.revision), path)

    def open_range(self, resolved: ResolvedRevision, path: str, start: int, size: int) -> BinaryIO:
        """Open a range of one listed file. Raises NotFound, Transient."""
        stream = self.open(resolved, path)
        try:
            return limited(stream, start, size)
        except OSError as error:
            raise _unreadable(Path(path), error) from error

    def _revision_folder(self, revision: str | None) -> Path:
        revisions = self._revisions()
        if revision is None:
            if not revisions:
                raise NotFound(
                    f"The source folder {self._folder} has no revisions.",
                    hint="Put each revision of the model into its own subfolder, such as v1.",
                )
            return max(revisions.values(), key=lambda found: _natural(found.name))
        if revision not in revisions:
            known = ", ".join(sorted(revisions, key=_natural)) or "none"
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
                if _is_revision(name)
                and _is_revision(real.name)
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


def _is_revision(name: str) -> bool:
    try:
        check_revision(name)
    except BadInput:
        return False
    return True


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key by which v10 comes after v9."""
    parts = re.findall(r"\d+|\D+", name)
    # The name itself comes last, so that v1 and v01 still have an order.
    return (*((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts), (-1, 0, name))


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


def _open(folder: Path, path: str) -> BinaryIO:
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
            sha256.update(stream.read(length))
        else:
            while chunk := stream.read(_CHUNK_BYTES):
                sha256.update(chunk)
    return sha256.hexdigest()


def _unreadable(path: Path, error: OSError) -> TrainyardError:
    text = f"Cannot read {path}: {error.strerror or error}."
    if isinstance(error, PermissionError):
        return BadInput(text, hint="Give the user that runs Trainyard the right to read it.")
    return Transient(text, hint="Look at that file system, then try again.")
