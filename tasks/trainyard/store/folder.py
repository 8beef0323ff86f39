"""The store in a folder: every key is a file of the same relative name.

- A file is written under a temporary name, flushed to the disk, and only then linked (`create`,
  `upload`) or renamed (`replace`, `put`) to its key, so a key is whole or absent at any moment.
- `replace`, `put` and `delete` of one key exclude each other by a lock of the kernel, which dies
  with its holder. The version of a key is the sha256 of its content.
- A temporary file is locked by its writer for as long as the writer lives. One that can be locked
  was left by a crash, and the next writer removes it.
- A large file grows under a partial name (see `trainyard.store.partial`), which the next attempt
  goes on with.
- Stored files of checkpoints and bundles are read-only, because other folders may link to them.
- Below the root nothing may be a symbolic link.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from trainyard.documents.base import FileEntry
from trainyard.errors import BadInput, Conflict, CorruptFile, NotFound, Transient
from trainyard.names import check_relative_path
from trainyard.store.disk import (
    exclusive,
    explained,
    make_folders,
    storage_error,
    sync_folder,
    write_all,
)
from trainyard.store.partial import PartialFile, remove_idle
from trainyard.store.parts import Ranges, hash_ranges
from trainyard.store.protocol import Entry, Internal, Stored
from trainyard.store.transfer import Content, hash_file, limited, pump

RESERVED = ".trainyard"
"""The folder below the root for temporary files and locks; no key begins with it."""

_PARTIAL = "partial"
"""Below it, the folder of files that are not whole yet."""

_DOCUMENT_MODE = 0o666
_ARTIFACT_MODE = 0o444
_PLACE_ATTEMPTS = 100
"""Tries to place a file whose folder others keep removing as empty."""


class FolderStore:
    """A `Store` in a folder of this machine (or of a file system that several machines share)."""

    def __init__(self, root: Path) -> None:
        """Use `root`, which is made at the first write."""
        self._root = root.expanduser().resolve()
        self._swept = False

    @property
    def root(self) -> Path:
        """The folder, without symbolic links."""
        return self._root

    @property
    def url(self) -> str:
        """The folder as a `file:` URL."""
        return self._root.as_uri()

    def demand_content(self) -> None:
        """Raise if nothing was ever kept here: a folder that is not mounted must not look empty.

        Raises:
            Transient: the folder does not exist, or has nothing in it.
            BadInput: it is no folder.
        """
        what = "is empty"
        try:
            with os.scandir(self._root) as found:
                if any(found):
                    return
        except FileNotFoundError:
            what = "does not exist"
        except NotADirectoryError:
            raise BadInput(
                f"The store {self._root} is no folder.",
                hint="TRAINYARD_STORE names it, or TRAINYARD_HOME the folder that it is in.",
            ) from None
        except OSError as error:
            raise storage_error(error, "list", self._root) from error
        raise Transient(
            f"The store {self._root} {what}.",
            hint="If it is on another machine, is it mounted? TRAINYARD_STORE names it, or "
            "TRAINYARD_HOME the folder that it is in. On a new installation, the first plan "
            "fills it.",
        )

    def read(self, key: str) -> Stored:
        """Return the content of `key`. Raises NotFound."""
        with self.open(key) as file, explained("read", Path(file.name)):
            data = file.read()
        return Stored(data=data, version=_version(data))

    def exists(self, key: str) -> bool:
        """Tell whether `key` exists."""
        path = self._path(key)
        with explained("look at", path):
            return path.is_file()

    def create(self, key: str, data: bytes) -> str:
        """Write `key`, which must not exist. Raises Conflict, StorageFull."""
        path = self._path(key)
        with self._staged(_DOCUMENT_MODE) as (descriptor, temporary), explained("write", path):
            write_all(descriptor, data)
            os.fsync(descriptor)
            if not self._link(temporary, path):
                raise Conflict(
                    f"{key} exists already in {self.url}.",
                    hint="Stored documents are never replaced; read what is there.",
                )
        return _version(data)

    def replace(self, key: str, data: bytes, *, version: str) -> str:
        """Replace `key` if its version still is `version`. Raises Conflict, StorageFull."""
        path = self._path(key)
        with self._locked(key):
            self._demand_version(key, path, version)
            self._overwrite(path, data)
        return _version(data)

    def put(self, key: str, data: bytes) -> str:
        """Write `key` whatever it held; the last writer wins. Raises StorageFull."""
        path = self._path(key)
        with self._locked(key):
            self._overwrite(path, data)
        return _version(data)

    def delete(self, key: str, *, version: str | None = None) -> None:
        """Remove `key`; with `version`, only that one (Conflict otherwise)."""
        path = self._path(key)
        if version is None and not self.exists(key):
            return
        with self._locked(key):
            if version is not None:
                self._demand_version(key, path, version)
            with explained("remove", path):
                path.unlink(missing_ok=True)
                self._prune(path.parent)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the keys below the folder `prefix` (empty: all), sorted."""
        top = self._path(prefix.rstrip("/")) if prefix.strip("/") else self._root
        entries: list[Entry] = []
        for folder, folders, names in os.walk(top, onerror=_raise_unless_gone):
            if Path(folder) == self._root and RESERVED in folders:
                folders.remove(RESERVED)
            for name in names:
                path = Path(folder, name)
                try:
                    found = path.lstat()
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(found.st_mode):
                    key = path.relative_to(self._root).as_posix()
                    modified_at = datetime.fromtimestamp(found.st_mtime, UTC)
                    entries.append(Entry(key, found.st_size, modified_at=modified_at))
        # Sorted as whole strings, like an object store does, not folder by folder.
        yield from sorted(entries, key=lambda entry: entry.key)

    def open(self, key: str) -> BinaryIO:
        """Open `key` for reading as a stream. Raises NotFound."""
        path = self._path(key)
        try:
            return path.open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise _missing(key, self.url) from None
        except OSError as error:
            with explained("read", path):
                raise error

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        """Open `size` bytes of `key` from the offset `start`. Raises NotFound."""
        if start < 0 or size < 0:
            raise ValueError(f"no range of a file: start {start}, size {size}")
        return limited(self.open(key), start, size)

    def upload(self, key: str, source: BinaryIO, *, sha256: str | None = None) -> FileEntry:
        """Store a stream under `key`. Raises CorruptFile, Conflict, StorageFull."""
        path = self._path(key)
        if sha256 is not None and (found := self._content(path)) is not None:
            if found.sha256 != sha256:
                raise _other_content(key, self.url)
            return FileEntry(path=key, size=found.size, sha256=found.sha256)
        with self._staged(_ARTIFACT_MODE) as (descriptor, temporary):

            def write(chunk: bytes) -> None:
                with explained("write", path):
                    write_all(descriptor, chunk)

            content = pump(source, write)
            if sha256 is not None and content.sha256 != sha256:
                raise _announced_other(key, content.sha256, sha256)
            with explained("write", path):
                os.fsync(descriptor)
                linked = self._link(temporary, path)
        if not linked and self._content(path) != content:
            raise _other_content(key, self.url)
        return FileEntry(path=key, size=content.size, sha256=content.sha256)

    def upload_ranged(
        self, key: str, source: Ranges, *, sha256: str | None = None, new: bool = False
    ) -> FileEntry:
        """Store a file that can be read in ranges. Raises CorruptFile, Conflict, StorageFull."""
        path = self._path(key)
        if (found := self._content(path)) is not None:
            if found.sha256 != (sha256 or hash_ranges(source).sha256):
                raise _other_content(key, self.url)
            return FileEntry(path=key, size=found.size, sha256=found.sha256)
        folder = self._reserved(_PARTIAL)
        with PartialFile.of(folder, key, source) as partial:
            content = partial.fill(source, mode=_ARTIFACT_MODE)
            if sha256 is not None and content.sha256 != sha256:
                partial.discard()
                raise _announced_other(key, content.sha256, sha256)
            with explained("write", path):
                linked = self._link(partial.path, path)
            partial.discard()
        if not linked and self._content(path) != content:
            raise _other_content(key, self.url)
        return FileEntry(path=key, size=content.size, sha256=content.sha256)

    def local_path(self, key: str) -> Path:
        """Return the file of `key`; it must not be written to. Raises NotFound."""
        path = self._path(key)
        if not self.exists(key):
            raise _missing(key, self.url)
        return path

    def internals(self) -> Iterator[Internal]:
        """Yield the beginnings of files whose transfer was cut, or is under way."""
        folder = self._root / RESERVED / _PARTIAL
        with explained("list", folder):
            for path in sorted(folder.glob("*.part")):
                with suppress(FileNotFoundError):
                    found = path.stat()
                    yield Internal(
                        name=f"partial file {path.name}",
                        key="",
                        size=found.st_size,
                        modified_at=datetime.fromtimestamp(found.st_mtime, UTC),
                        needed=False,
                        handle=path.name,
                    )

    def remove_internal(self, internal: Internal) -> None:
        """Remove such a beginning, unless somebody writes it."""
        path = self._root / RESERVED / _PARTIAL / internal.handle
        with explained("remove", path):
            remove_idle(path)

    def _path(self, key: str) -> Path:
        parts = check_relative_path(key).split("/")
        if parts[0] == RESERVED:
            raise BadInput(
                f"Key {key!r} lies in the store's own folder {RESERVED!r}.",
                hint="Use another name.",
            )
        path = self._root
        for part in parts:
            path = path / part
            with explained("look at", path):
                if path.is_symlink():
                    raise BadInput(
                        f"{path} is a symbolic link.",
                        hint="A store holds plain files and folders only; replace the link by what "
                        "it points to, or link the whole store instead.",
                    )
        return path

    def _reserved(self, name: str) -> Path:
        folder = self._root / RESERVED / name
        with explained("make folder", folder):
            make_folders(folder)
        return folder

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Exclude other writers of `key`.

        A fixed set of lock files is shared by all keys: a lock file that is never removed needs no
        care for races between removing and locking.
        """
        lock = self._reserved("locks") / hashlib.sha256(key.encode()).hexdigest()[:2]
        with exclusive(lock):
            yield

    @contextmanager
    def _staged(self, mode: int) -> Iterator[tuple[int, Path]]:
        """Yield a new temporary file, open and locked; its temporary name is gone afterwards."""
        folder = self._reserved("tmp")
        if not self._swept:
            _sweep(folder)
            self._swept = True
        with explained("write", folder):
            descriptor, temporary = _open_temporary(folder, mode)
        try:
            yield descriptor, temporary
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)

    def _overwrite(self, path: Path, data: bytes) -> None:
        with self._staged(_DOCUMENT_MODE) as (descriptor, temporary), explained("write", path):
            write_all(descriptor, data)
            os.fsync(descriptor)
            _place(path, lambda: temporary.replace(path))

    def _link(self, temporary: Path, path: Path) -> bool:
        """Give the finished file its name; False if the name is taken."""
        try:
            _place(path, lambda: path.hardlink_to(temporary))
        except FileExistsError as error:
            # A folder of that name, or a file where one of its folders should be, is a mistake.
            if path.is_dir() or error.filename2 is None:
                raise
            return False
        return True

    def _demand_version(self, key: str, path: Path, version: str) -> None:
        content = self._content(path)
        if content is None or content.sha256 != version:
            what = "is gone" if content is None else "was changed by somebody else"
            raise Conflict(
                f"{key} {what} in {self.url}.", hint="Read it again and repeat the change."
            )

    def _content(self, path: Path) -> Content | None:
        try:
            return hash_file(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            with explained("read", path):
                raise error

    def _prune(self, folder: Path) -> None:
        """Remove folders that became empty, so that no deleted name is in the way of a new one."""
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:
                break
            folder = folder.parent
        sync_folder(folder)


def _raise_unless_gone(error: OSError) -> None:
    """A folder that vanished has no keys; one that cannot be read must not look empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise storage_error(error, "list", Path(error.filename)) from error


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _missing(key: str, url: str) -> NotFound:
    return NotFound(f"{key} does not exist in {url}.", hint="Check the name and the store.")


def _announced_other(key: str, arrived: str, announced: str) -> CorruptFile:
    return CorruptFile(
        f"{key} arrived with sha256 {arrived}, but {announced} was announced.",
        hint="The source is damaged or changed meanwhile; nothing was kept. Try again.",
    )


def _other_content(key: str, url: str) -> Conflict:
    return Conflict(
        f"{key} exists in {url} with other content.",
        hint="Stored files are never replaced; look at what is there.",
    )


def _place(path: Path, act: Callable[[], object]) -> None:
    """Make the folder of `path`, then `act`, which gives a file that name, durably.

    The folder may vanish in between, because somebody removes it as empty: then both are repeated.
    """
    for attempts_left in reversed(range(_PLACE_ATTEMPTS)):
        try:
            make_folders(path.parent)
            act()
            break
        except FileNotFoundError:
            if not attempts_left:
                raise
    sync_folder(path.parent)


def _open_temporary(folder: Path, mode: int) -> tuple[int, Path]:
    while True:
        temporary = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, mode)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # A sweep may have taken the file for a left-over before we had its lock.
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove temporary files whose writers are dead."""
    for temporary in folder.iterdir():
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)
