"""Brings checkpoints and bundles from the store into local folders that a server can use.

A restored folder holds exactly the files of its manifest, each checked against its sha256. A marker
beside the folder is written last: a restore that was killed leaves no marker and starts over, and
one that is complete is checked and used again. Model files may be hard links to the files of a
folder store (read-only, no copy); the folder of a bundle is always a private copy, because servers
write into their caches.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.documents.release import Release
from trainyard.errors import CorruptFile
from trainyard.names import check_relative_path
from trainyard.releases import read_pinned
from trainyard.store.disk import exclusive, explained, write_all
from trainyard.store.layout import (
    bundle_manifest_key,
    bundle_prefix,
    checkpoint_manifest_key,
    checkpoint_prefix,
)
from trainyard.store.protocol import Store
from trainyard.store.transfer import hash_file, pump


@dataclass(frozen=True)
class Materialized:
    """Where a release lies on this machine."""

    model_dir: Path
    """The checkpoint; read-only, its files may be links into the store."""
    cache_dir: Path
    """The bundle; a private copy that the server may write to."""


class _Seen(BaseModel):
    """How a file looked when its content was last checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    mtime_ns: int
    inode: int


class _Marker(BaseModel):
    """`<folder>.restored.json`: the folder is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    """Of the files; another set of files starts over."""
    files: dict[str, _Seen]


def materialize_release(store: Store, release: Release, dest: Path) -> Materialized:
    """Restore the checkpoint and bundle of `release` below `dest`, which belongs to one server.

    Call it before each start of the server: the cache is then exactly the bundle again, whatever a
    killed server left in it. Never call it while a server uses `dest`.

    Raises:
        NotFound: checkpoint or bundle are not in the store.
        CorruptFile: they are not those that the release was made from, or a stored file is damaged.
        Transient, StorageFull: the store or the disk fails now.
    """
    checkpoint = read_pinned(
        store,
        release,
        "checkpoint-manifest",
        checkpoint_manifest_key(release.model, release.revision),
        CheckpointManifest,
    )
    bundle = read_pinned(
        store,
        release,
        "bundle-manifest",
        bundle_manifest_key(release.compile_key),
        BundleManifest,
    )
    for what, found, wanted in (
        ("checkpoint", checkpoint.digest, release.checkpoint_digest),
        ("bundle", bundle.digest, release.bundle_digest),
    ):
        if found != wanted:
            raise CorruptFile(
                f"The stored {what} of {release.release_id} is not the one it was made from.",
                hint="Somebody replaced stored files; make a new release.",
            )
    return Materialized(
        model_dir=materialize_checkpoint(store, checkpoint, dest / "model"),
        cache_dir=materialize_bundle(store, bundle, dest / "cache"),
    )


def materialize_checkpoint(store: Store, manifest: CheckpointManifest, dest: Path) -> Path:
    """Restore a checkpoint into the folder `dest` and return it. Raises as `materialize_files`."""
    _demand_digest(manifest.files, manifest.digest, f"{manifest.model} {manifest.revision}")
    prefix = checkpoint_prefix(manifest.model, manifest.revision)
    return materialize_files(store, prefix, manifest.files, dest, link=True)


def materialize_bundle(store: Store, manifest: BundleManifest, dest: Path) -> Path:
    """Restore a bundle into the folder `dest`, as a private copy, and return it.

    Raises as `materialize_files`.
    """
    _demand_digest(manifest.files, manifest.digest, f"bundle {manifest.compile_key}")
    prefix = bundle_prefix(manifest.compile_key)
    return materialize_files(store, prefix, manifest.files, dest, link=False)


def materialize_files(
    store: Store,
    prefix: str,
    files: Iterable[FileEntry],
    dest: Path,
    *,
    link: bool,
    on_bytes: Callable[[int], None] = lambda size: None,
) -> Path:
    """Make `dest` a folder of exactly `files`, each with the content of its sha256.

    Args:
        store: where they are stored.
        prefix: the key that their paths are below.
        files: what to restore.
        dest: the folder; it is made, repaired, and cleared of everything else.
        link: may files be hard links to the store's, if it has files on the same file system? Such
            files must never be written to. With `link`, files that look as they did when their
            content was last checked (size, time of change, inode) are trusted; without it, what is
            in `dest` is hashed again, because something writes there.
        on_bytes: told the bytes of each file that is in place.

    Returns:
        `dest`.

    Raises:
        NotFound: a file is not in the store.
        CorruptFile: a stored file does not match its hash.
        BadInput: a path leaves the folder.
        Transient, StorageFull: the store or the disk fails now.
    """
    entries = {check_relative_path(entry.path): entry for entry in files}
    with explained("make folder", dest):
        dest.mkdir(parents=True, exist_ok=True)
    marker = dest.with_name(f"{dest.name}.restored.json")
    with exclusive(dest.with_name(f"{dest.name}.lock")):
        wanted = files_digest(entries.values())
        seen = _read_marker(marker, wanted)
        with explained("restore", dest):
            marker.unlink(missing_ok=True)
            _remove_strangers(dest, entries)
        part = dest.with_name(f"{dest.name}.part")
        now_seen = {}
        for path, entry in entries.items():
            restored = dest / path
            if not _is_intact(restored, entry, seen.get(path) if link else None):
                _restore(store, f"{prefix}/{path}", entry, restored, part, link=link)
            with explained("look at", restored):
                now_seen[path] = _look(restored)
            on_bytes(entry.size)
        with explained("write", marker):
            _write_marker(marker, _Marker(digest=wanted, files=now_seen))
    return dest


def _demand_digest(files: Iterable[FileEntry], wanted: str, what: str) -> None:
    if files_digest(files) != wanted:
        raise CorruptFile(
            f"The manifest of {what} contradicts itself.",
            hint="It was changed by hand; make the release again.",
        )


def _read_marker(marker: Path, wanted: str) -> Mapping[str, _Seen]:
    try:
        found = _Marker.model_validate_json(marker.read_bytes())
    except (OSError, ValidationError):
        return {}
    return found.files if found.digest == wanted else {}


def _write_marker(marker: Path, content: _Marker) -> None:
    temporary = marker.with_name(f"{marker.name}.new")
    temporary.write_text(content.model_dump_json())
    temporary.replace(marker)


def _remove_strangers(dest: Path, entries: Mapping[str, FileEntry]) -> None:
    """Remove all that is in `dest` and not wanted there, links first of all."""
    folders = {
        parent.as_posix() for path in entries for parent in Path(path).parents if parent.name
    }
    for folder, subfolders, names in os.walk(dest, topdown=True):
        for name in [*subfolders, *names]:
            path = Path(folder, name)
            relative = path.relative_to(dest).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                if relative not in folders:
                    shutil.rmtree(path)
                    subfolders.remove(name)
            elif relative not in entries or not stat.S_ISREG(mode):
                path.unlink()
                if name in subfolders:
                    subfolders.remove(name)


def _is_intact(path: Path, entry: FileEntry, seen: _Seen | None) -> bool:
    try:
        if seen is not None and _look(path) == seen:
            return True
        content = hash_file(path)
    except OSError:
        return False
    return content.size == entry.size and content.sha256 == entry.sha256


def _look(path: Path) -> _Seen:
    found = path.stat()
    return _Seen(size=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino)


def _restore(
    store: Store, key: str, entry: FileEntry, path: Path, part: Path, *, link: bool
) -> None:
    """Put the stored file in place, whole and checked, or raise and leave nothing new.

    `part` takes the bytes until they are complete.
    """
    with explained("restore", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    if link and _link(store, key, entry, path):
        return
    with explained("restore", part):
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:

        def write(chunk: bytes) -> None:
            with explained("restore", path):
                write_all(descriptor, chunk)

        with store.open(key) as stream:
            content = pump(stream, write)
        if content.size != entry.size or content.sha256 != entry.sha256:
            raise _damaged(store, key)
        with explained("restore", path):
            os.fsync(descriptor)
            part.replace(path)
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)


def _link(store: Store, key: str, entry: FileEntry, path: Path) -> bool:
    """Link to the store's own file; False where that is not possible."""
    stored = store.local_path(key)
    if stored is None:
        return False
    try:
        path.hardlink_to(stored)
    except OSError:
        # Another file system, or one without hard links.
        return False
    if not _is_intact(path, entry, None):
        path.unlink(missing_ok=True)
        raise _damaged(store, key)
    return True


def _damaged(store: Store, key: str) -> CorruptFile:
    return CorruptFile(
        f"{key} in {store.url} is damaged: it does not match the hash in its manifest.",
        hint="Remove that file from the store and release the same revision again (what is missing "
        "is made again), or bring it back from a backup.",
    )
