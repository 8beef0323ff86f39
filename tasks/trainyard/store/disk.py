"""What a folder needs from the operating system: durable writes, locks, errors in words."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainyard.errors import BadInput, StorageFull, TrainyardError, Transient

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_SHAPE = {
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def storage_error(error: OSError, action: str, path: Path) -> TrainyardError:
    """Return the error of ours that says what `error` means for a file below a store.

    Args:
        error: what the operating system said.
        action: what was tried, as in `write`.
        path: the file or folder.
    """
    text = f"Cannot {action} {path}: {error.strerror or error}."
    if error.errno in _FULL:
        return StorageFull(
            text,
            hint="Free space on that file system (or lift the quota or file size limit), "
            "then try again; nothing half-written was kept.",
        )
    if error.errno in _FORBIDDEN:
        return BadInput(
            text,
            hint="Give the user that runs Trainyard the right to read and write there, "
            "or name another folder.",
        )
    if error.errno in _SHAPE:
        return BadInput(text, hint="Something else is in the way; look at what lies there.")
    return Transient(text, hint="Look at the health of that file system, then try again.")


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into an error of ours."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, action, path) from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` (made if need be); the kernel frees it when the process dies."""
    with explained("lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with explained("lock", path):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`; the system may take it in pieces."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` from `offset` on; the system may take it in pieces."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a loss of power; one that is gone needs no care."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make `folder` and its parents, durably."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folders(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    sync_folder(folder.parent)


def boot_id() -> str:
    """Return what names this boot of the machine; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
