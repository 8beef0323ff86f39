"""Brings checkpoints and bundles from the store into local folders that a server can use.

A restored folder holds exactly the files of its manifest, each checked against its sha256. A marker
beside the folder is written last: a restore that was killed leaves no marker, and the next one goes
on with what has arrived; one that is complete is checked and used again. Model files may be hard
links to the files of a folder store or of a node cache (read-only, no copy); the folder of a bundle
is always a private copy, because servers write into their caches.

Nothing is flushed to the disk here: the store has it, and a marker counts only until the machine
starts anew. After that, every file is hashed before it is used again.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.documents.release import Release
from trainyard.errors import CorruptFile
from trainyard.names import check_relative_path
from trainyard.node_cache.cache import NodeCache
from trainyard.releases import read_pinned
from trainyard.store.disk import boot_id, exclusive, explained, write_all
from trainyard.store.fetch import DEFAULT_POLICY, FetchPolicy, Wanted, damaged, fetch_files
from trainyard.store.layout import (
    bundle_manifest_key,
    bundle_prefix,
    checkpoint_manifest_key,
    checkpoint_prefix,
)
from trainyard.store.protocol import Store
from trainyard.store.transfer import Content, hash_file, pump

log = logging.getLogger(__name__)

_HASHERS = min(8, os.cpu_count() or 1)
"""Files hashed at a time: hashing keeps a processor busy."""


@dataclass(frozen=True)
class Materialized:
    """Where a release lies on this machine."""

    model_dir: Path
    """The checkpoint; read-only, its files may be links into the store."""
    cache_dir: Path
    """The bundle; a private copy that the server may write to."""


@dataclass(frozen=True)
class Means:
    """How files are brought, and who watches."""

    cache: NodeCache | None = None
    """Of this machine; its caller keeps what is needed in it (`NodeCache.use`)."""
    on_bytes: Callable[[int], None] = lambda size: None
    """Told the bytes that are here, by several threads; a negative number if a file starts over."""
    policy: FetchPolicy = DEFAULT_POLICY


DEFAULT_MEANS = Means()


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
    boot: str = ""
    """Boot of the machine in which their content was checked."""
    files: dict[str, _Seen]


def manifests_of(store: Store, release: Release) -> tuple[CheckpointManifest, BundleManifest]:
    """Return the manifests of a release.

    Raises:
        NotFound: checkpoint or bundle are not in the store.
        CorruptFile: they are not those that the release was made from.
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
    _demand_digest(checkpoint.files, checkpoint.digest, f"{checkpoint.model} {checkpoint.revision}")
    _demand_digest(bundle.files, bundle.digest, f"bundle {bundle.compile_key}")
    return checkpoint, bundle


def materialize_release(store: Store, release: Release, dest: Path) -> Materialized:
    """Restore the checkpoint and bundle of `release` below `dest`, which belongs to one server.

    Call it before each start of the server: the cache is then exactly the bundle again, whatever a
    killed server left in it. Never call it while a server uses `dest`.

    Raises:
        NotFound: checkpoint or bundle are not in the store.
        CorruptFile: they are not those that the release was made from, or a stored file is damaged.
        Transient, StorageFull: the store or the disk fails now.
    """
    checkpoint, bundle = manifests_of(store, release)
    return Materialized(
        model_dir=materialize_checkpoint(store, checkpoint, dest / "model"),
        cache_dir=materialize_bundle(store, bundle, dest / "cache"),
    )


def materialize_checkpoint(
    store: Store, manifest: CheckpointManifest, dest: Path, means: Means = DEFAULT_MEANS
) -> Path:
    """Restore a checkpoint into the folder `dest` and return it. Raises as `materialize_files`."""
    _demand_digest(manifest.files, manifest.digest, f"{manifest.model} {manifest.revision}")
    prefix = checkpoint_prefix(manifest.model, manifest.revision)
    return materialize_files(store, prefix, manifest.files, dest, link=True, means=means)


def materialize_bundle(
    store: Store, manifest: BundleManifest, dest: Path, means: Means = DEFAULT_MEANS
) -> Path:
    """Restore a bundle into the folder `dest`, as a private copy, and return it.

    Raises as `materialize_files`.
    """
    _demand_digest(manifest.files, manifest.digest, f"bundle {manifest.compile_key}")
    prefix = bundle_prefix(manifest.compile_key)
    return materialize_files(store, prefix, manifest.files, dest, link=False, means=means)


def materialize_files(
    store: Store,
    prefix: str,
    files: Iterable[FileEntry],
    dest: Path,
    *,
    link: bool,
    means: Means = DEFAULT_MEANS,
) -> Path:
    """Make `dest` a folder of exactly `files`, each with the content of its sha256.

    Args:
        store: where they are stored.
        prefix: the key that their paths are below.
        files: what to restore.
        dest: the folder; it is made, repaired, and cleared of everything else.
        link: may files be hard links to those of the store or the node cache, if these are on the
            same file system? Such files must never be written to. With `link`, files that look as
            they did when their content was last checked (size, time of change, inode), since the
            machine started, are trusted; without it, what is in `dest` is hashed again, because
            something writes there.
        means: the node cache, who is told of progress, how transfers are done.

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
        seen = _read_marker(marker, wanted) if link else {}
        with explained("restore", dest):
            marker.unlink(missing_ok=True)
            _remove_strangers(dest, entries)
        with ThreadPoolExecutor(_HASHERS, thread_name_prefix="restore") as pool:
            restore = _Restore(store, prefix, dest, link, means, pool)
            restore.run(entries, seen)
        with explained("look at", dest):
            now_seen = {path: _look(dest / path) for path in entries}
        with explained("write", marker):
            _write_marker(marker, _Marker(digest=wanted, boot=boot_id(), files=now_seen))
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
    same_boot = bool(found.boot) and found.boot == boot_id()
    return found.files if found.digest == wanted and same_boot else {}


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


class _Restore:
    """One call of `materialize_files`, with the lock of the folder held."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        dest: Path,
        link: bool,
        means: Means,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._dest = dest
        self._link = link
        self._means = means
        self._pool = pool
        self._part = dest.with_name(f"{dest.name}.part")

    def run(self, entries: Mapping[str, FileEntry], seen: Mapping[str, _Seen]) -> None:
        """Put every file in place that is not there, whole and checked."""
        missing = self._failing(
            entries, lambda path, entry: _is_intact(self._dest / path, entry, seen.get(path))
        )
        with explained("restore", self._dest):
            for path in missing:
                (self._dest / path).parent.mkdir(parents=True, exist_ok=True)
                (self._dest / path).unlink(missing_ok=True)
            if missing:
                self._part.mkdir(exist_ok=True)
        if self._means.cache is not None:
            missing = self._failing(missing, self._take_from_cache)
            self._bring_through_cache(missing, self._means.cache)
        else:
            if self._link:
                missing = self._failing(missing, self._link_to_store)
            self._bring(missing)
        with explained("remove", self._part), suppress(FileNotFoundError):
            shutil.rmtree(self._part)

    def _failing(
        self, entries: Mapping[str, FileEntry], check: Callable[[str, FileEntry], bool]
    ) -> dict[str, FileEntry]:
        """Return those files for which `check` is not true; it runs for several at once."""

        def checked(item: tuple[str, FileEntry]) -> bool:
            passed = check(*item)
            if passed:
                self._means.on_bytes(item[1].size)
            return passed

        results = self._pool.map(checked, entries.items())
        return {
            path: entry
            for (path, entry), passed in zip(entries.items(), results, strict=True)
            if not passed
        }

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}"

    def _wanted(self, missing: Mapping[str, FileEntry]) -> list[Wanted]:
        return [Wanted(self._key(path), entry) for path, entry in missing.items()]

    def _bring(self, missing: Mapping[str, FileEntry]) -> None:
        """Move files from the store into the folder."""
        places: dict[str, list[Path]] = {}
        for path, entry in missing.items():
            places.setdefault(entry.sha256, []).append(self._dest / path)

        def commit(wanted: Wanted, partial: Path) -> None:
            first, *others = places[wanted.entry.sha256]
            with explained("restore", first):
                for other in others:
                    self._copy(partial, other)
                partial.replace(first)
            self._means.on_bytes(wanted.entry.size * len(others))

        fetch_files(
            self._store,
            self._wanted(missing),
            self._part,
            commit,
            on_bytes=self._means.on_bytes,
            policy=self._means.policy,
        )

    def _link_to_store(self, path: str, entry: FileEntry) -> bool:
        """Link to the store's own file; False where that is not possible."""
        stored = self._store.local_path(self._key(path))
        if stored is None:
            return False
        restored = self._dest / path
        try:
            restored.hardlink_to(stored)
        except OSError:
            # Another file system, or one without hard links.
            return False
        if not _is_intact(restored, entry, None):
            restored.unlink(missing_ok=True)
            raise damaged(self._store, self._key(path))
        return True

    def _take_from_cache(self, path: str, entry: FileEntry) -> bool:
        """Link to or copy the cached file; False where there is none, or a damaged one."""
        cache = self._means.cache
        assert cache is not None
        if not cache.has(entry.sha256):
            return False
        if self._place_cached(cache, path, entry, check=True):
            return True
        log.warning(
            "The copy of %s in the node cache (%s) is damaged; it is brought again from %s",
            self._key(path),
            cache.path(entry.sha256),
            self._store.url,
        )
        cache.discard(entry.sha256)
        return False

    def _bring_through_cache(self, missing: Mapping[str, FileEntry], cache: NodeCache) -> None:
        moved = self._wanted(missing)
        cache.bring(self._store, moved, on_bytes=self._means.on_bytes, policy=self._means.policy)
        # What several files have in common was moved, and told, once.
        told = {entry.sha256: entry.size for entry in missing.values()}
        self._means.on_bytes(sum(entry.size for entry in missing.values()) - sum(told.values()))
        for path, entry in missing.items():
            if not self._place_cached(cache, path, entry, check=False):
                raise damaged(self._store, self._key(path))

    def _place_cached(self, cache: NodeCache, path: str, entry: FileEntry, *, check: bool) -> bool:
        """Put a cached file in place; False, and nothing in place, if it is damaged.

        `check`: hash a file that is linked to; what is copied is always hashed on the way.
        """
        cached, restored = cache.path(entry.sha256), self._dest / path
        if self._link:
            try:
                restored.hardlink_to(cached)
            except OSError:
                # Another file system, or one without hard links.
                pass
            else:
                if not check or _is_intact(restored, entry, None):
                    return True
                restored.unlink(missing_ok=True)
                return False
        with explained("restore", restored):
            content = self._copy(cached, restored)
            if content == Content(entry.size, entry.sha256):
                return True
            restored.unlink(missing_ok=True)
        return False

    def _copy(self, source: Path, restored: Path) -> Content:
        """Copy a local file to its place and return what went through. Raises OSError."""
        temporary = self._part / f"copy-{secrets.token_hex(8)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with source.open("rb", buffering=0) as file:
                content = pump(file, lambda chunk: write_all(descriptor, chunk))
            temporary.replace(restored)
            return content
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
