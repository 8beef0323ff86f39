"""A folder of files by their sha256 that all restores on one machine share.

::

    <cache>/files/<2 digits>/<sha256>     whole, checked, read-only; restored folders link to them
    <cache>/partial/<sha256>[.parts]      under way; locked by whoever brings it
    <cache>/documents/<key>               copies of releases and manifests: the store may be down
    <cache>/releases/<release id>.json    which files a release needs, and when it was used last
    <cache>/pins/<digest>.json            who needs a release to stay
    <cache>/sessions/<name>.json          restores under way; locked while their process lives
    <cache>/lock                          held, shortly, by whoever decides what goes

What is evicted is decided by `policy`: never what is pinned, what a restore under way needs, or
what a restored folder links to (removing that would free nothing). The time of a file's last use is
its access time, which is set at each use whatever the file system's own rule is.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from trainyard.canonical import digest
from trainyard.documents.base import FileEntry
from trainyard.errors import NotFound, StorageFull
from trainyard.names import check_release_id
from trainyard.node_cache.policy import Eviction, Held, choose_evictions
from trainyard.node_cache.records import CachedRelease, Pin, Session
from trainyard.store.disk import exclusive, explained, write_all
from trainyard.store.fetch import DEFAULT_POLICY, FetchPolicy, Wanted, fetch_files
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)

RecordT = TypeVar("RecordT", bound=BaseModel)

GIB = 1 << 30

_REMEMBERED_FOR = timedelta(hours=1)
"""What a release without files in the cache is remembered for, from its last use on."""


@dataclass(frozen=True)
class CacheState:
    """What lies in the cache at one moment."""

    releases: tuple[CachedRelease, ...]
    """Last used first."""
    pins: tuple[Pin, ...]
    sizes: Mapping[str, int]
    """Bytes of each whole file."""
    linked: frozenset[str]
    """Files that a restored folder uses."""
    partial_bytes: int
    limit_bytes: int | None

    @property
    def bytes(self) -> int:
        """Return the bytes in use."""
        return sum(self.sizes.values()) + self.partial_bytes


class NodeCache:
    """The cache in one folder; any number of processes may use it at once."""

    def __init__(self, root: Path, *, limit_bytes: int | None = None) -> None:
        """Use `root`, which is made at the first use.

        Args:
            root: the folder.
            limit_bytes: what it may hold; None: as much as the disk.
        """
        self._root = root.expanduser().resolve()
        self._limit_bytes = limit_bytes

    @property
    def root(self) -> Path:
        """The folder."""
        return self._root

    @property
    def documents(self) -> Path:
        """Where copies of documents lie."""
        return self._root / "documents"

    def path(self, sha256: str) -> Path:
        """Return where the file of that content lies, or would lie."""
        return self._root / "files" / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Tell whether the file is here."""
        return self.path(sha256).is_file()

    def remember(self, release: CachedRelease) -> None:
        """Take note of a release that is going to be restored, so that it can be pinned."""
        self._make_folders()
        with self._locked():
            self._write(self._release_path(release.release_id), release)

    @contextmanager
    def use(self, release: CachedRelease) -> Iterator[int]:
        """Keep the files of a release here as long as the block runs; make room for them first.

        Yields:
            The bytes by which the cache grows beyond its limit, because all else is pinned or in
            use.

        Raises:
            StorageFull: the disk has no room for what is missing.
        """
        self._make_folders()
        name = f"{os.getpid()}-{secrets.token_hex(8)}.json"
        path = self._root / "sessions" / name
        session = Session(
            release_id=release.release_id,
            pid=os.getpid(),
            since=datetime.now(UTC),
            files=release.files,
        )
        with ExitStack() as ending:
            with self._locked():
                with explained("write", path):
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    descriptor = os.open(path, flags, 0o600)
                    ending.callback(os.close, descriptor)
                    ending.callback(path.unlink, missing_ok=True)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    write_all(descriptor, session.model_dump_json().encode())
                self._write(self._release_path(release.release_id), release)
                over_bytes = self._evict(self._limit_bytes).over_bytes
                self._touch(release.files)
            self._demand_room(release.files)
            yield over_bytes

    def bring(
        self,
        store: Store,
        wanted: Iterable[Wanted],
        *,
        on_bytes: Callable[[int], None] = lambda size: None,
        policy: FetchPolicy = DEFAULT_POLICY,
    ) -> None:
        """Make sure that the files are here, hashed on the way. Raises as `fetch_files`."""
        fetch_files(
            store,
            wanted,
            self._root / "partial",
            self._commit,
            is_there=lambda each: self.has(each.entry.sha256),
            on_bytes=on_bytes,
            policy=policy,
        )

    def is_tight(self, release: CachedRelease) -> bool:
        """Tell whether something would have to go for a release."""
        if self._limit_bytes is None:
            return False
        state = self.state()
        missing = {name: size for name, size in release.files.items() if name not in state.sizes}
        return state.bytes + sum(missing.values()) > self._limit_bytes

    def discard(self, sha256: str) -> None:
        """Remove a damaged file."""
        path = self.path(sha256)
        with explained("remove", path):
            path.unlink(missing_ok=True)

    def pin(self, pin: Pin) -> None:
        """Let a release stay until the pin is taken back or its owner is gone.

        Raises:
            NotFound: the release was never restored through this cache.
        """
        if self._release(pin.release_id) is None:
            raise NotFound(
                f"Release {pin.release_id} is not in the cache {self._root}.",
                hint="`trainyard node-cache ls` shows what is; `trainyard materialize` brings it.",
            )
        with self._locked():
            self._write(self._pin_path(pin.owner, pin.release_id), pin)

    def unpin(self, owner: str, release_id: str | None = None) -> int:
        """Take back the pins of an owner (for one release, or all); return how many there were."""
        if not self._root.is_dir():
            return 0
        with self._locked():
            mine = [
                pin
                for pin in self._read_all("pins", Pin)
                if pin.owner == owner and release_id in (None, pin.release_id)
            ]
            for pin in mine:
                self._pin_path(pin.owner, pin.release_id).unlink(missing_ok=True)
        return len(mine)

    def evict(self, limit_bytes: int | None) -> Eviction:
        """Give up what nobody needs, least recently used first, down to `limit_bytes`."""
        self._make_folders()
        with self._locked():
            return self._evict(limit_bytes)

    def state(self) -> CacheState:
        """Return what lies here now; pins without an owner are taken back first."""
        self._make_folders()
        with self._locked():
            self._drop_orphaned_pins()
            files = list(self._scan())
            partial = sum(held.size for held, _ in self._partials(set()))
            return CacheState(
                releases=tuple(
                    sorted(
                        self._read_all("releases", CachedRelease),
                        key=lambda each: each.used_at,
                        reverse=True,
                    )
                ),
                pins=tuple(sorted(self._read_all("pins", Pin), key=lambda pin: pin.since)),
                sizes={held.name: held.size for held, _ in files},
                linked=frozenset(held.name for held, linked in files if linked),
                partial_bytes=partial,
                limit_bytes=self._limit_bytes,
            )

    def _evict(self, limit_bytes: int | None) -> Eviction:
        """Remove what has to go; the lock is held."""
        self._drop_orphaned_pins()
        releases = {each.release_id: each for each in self._read_all("releases", CachedRelease)}
        needed: dict[str, int] = {}
        for session in self._sessions():
            needed |= session.files
        keep = set(needed)
        for pin in self._read_all("pins", Pin):
            if pin.release_id in releases:
                keep |= releases[pin.release_id].files.keys()
        files = list(self._scan())
        here = {held.name for held, _ in files}
        keep |= {held.name for held, linked in files if linked}
        partials = list(self._partials(needed.keys()))
        eviction = choose_evictions(
            [*(held for held, _ in files), *(held for held, _ in partials)],
            keep=keep,
            incoming_bytes=sum(size for sha256, size in needed.items() if sha256 not in here),
            limit_bytes=limit_bytes,
        )
        paths = {held.name: path for held, path in partials}
        for name in eviction.remove:
            path = paths.get(name) or self.path(name)
            with explained("remove", path):
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}.parts").unlink(missing_ok=True)
        if eviction.remove:
            log.info("%d files were removed from the cache %s", len(eviction.remove), self._root)
            self._forget_empty_releases(releases.values())
        return eviction

    def _forget_empty_releases(self, releases: Collection[CachedRelease]) -> None:
        """Remove the records and documents of releases of which nothing is left."""
        live = {session.release_id for session in self._sessions()}
        pinned = {pin.release_id for pin in self._read_all("pins", Pin)}
        kept = {
            each.release_id: each
            for each in releases
            # A restore that begins has taken note of its release before it has a session.
            if each.release_id in live | pinned
            or each.used_at > datetime.now(UTC) - _REMEMBERED_FOR
            or any(map(self.has, each.files))
        }
        still = {key for each in kept.values() for key in each.documents}
        for each in releases:
            if each.release_id in kept:
                continue
            self._release_path(each.release_id).unlink(missing_ok=True)
            for key in set(each.documents) - still:
                (self.documents / key).unlink(missing_ok=True)

    def _drop_orphaned_pins(self) -> None:
        for pin in self._read_all("pins", Pin):
            if pin.is_orphaned():
                log.info("The pin of %s on %s ended with it", pin.owner, pin.release_id)
                self._pin_path(pin.owner, pin.release_id).unlink(missing_ok=True)

    def _scan(self) -> Iterator[tuple[Held, bool]]:
        """Yield every whole file, and whether something else links to it."""
        for folder in sorted((self._root / "files").iterdir()):
            for entry in os.scandir(folder):
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(found.st_mode):
                    held = Held(entry.name, found.st_size, found.st_atime)
                    yield held, found.st_nlink > 1

    def _partials(self, expected: Iterable[str]) -> Iterator[tuple[Held, Path]]:
        """Yield what lies half-brought and is not expected to be finished."""
        skip = set(expected)
        for path in sorted((self._root / "partial").iterdir()):
            name = path.name.partition(".")[0]
            with suppress(FileNotFoundError):
                found = path.stat()
                if name not in skip:
                    # What a partial file will never become is the first to go.
                    yield Held(f"partial/{path.name}", found.st_blocks * 512, 0.0), path

    def _sessions(self) -> Iterator[Session]:
        """Yield the restores under way; remove what dead ones left. The lock is held."""
        for path in (self._root / "sessions").iterdir():
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                session = _read(path, Session)
                if session is not None:
                    yield session
            finally:
                os.close(descriptor)

    def _commit(self, wanted: Wanted, partial: Path) -> None:
        path = self.path(wanted.entry.sha256)
        with explained("write", path):
            path.parent.mkdir(exist_ok=True)
            partial.chmod(0o444)
            partial.replace(path)

    def _touch(self, files: Iterable[str]) -> None:
        """Note that files are used now; their time of change stays."""
        now_ns = int(datetime.now(UTC).timestamp() * 1e9)
        for sha256 in files:
            path = self.path(sha256)
            with suppress(FileNotFoundError):
                os.utime(path, ns=(now_ns, path.stat().st_mtime_ns))

    def _demand_room(self, files: Mapping[str, int]) -> None:
        missing = 0
        for sha256, size in files.items():
            if not self.has(sha256):
                partial = self._root / "partial" / sha256
                with suppress(FileNotFoundError):
                    size -= partial.stat().st_blocks * 512
                missing += max(0, size)
        room = os.statvfs(self._root)
        free = room.f_bavail * room.f_frsize
        if missing > free:
            raise StorageFull(
                f"The node cache {self._root} needs {missing / GIB:.2f} GiB more, but its file "
                f"system has {free / GIB:.2f} GiB left.",
                hint="Free space there, or lower what is pinned: `trainyard node-cache ls`.",
            )

    def _release(self, release_id: str) -> CachedRelease | None:
        return _read(self._release_path(release_id), CachedRelease)

    def _release_path(self, release_id: str) -> Path:
        return self._root / "releases" / f"{check_release_id(release_id)}.json"

    def _pin_path(self, owner: str, release_id: str) -> Path:
        return self._root / "pins" / f"{digest([owner, release_id])[:32]}.json"

    def _read_all(self, folder: str, kind: type[RecordT]) -> list[RecordT]:
        found = (_read(path, kind) for path in sorted((self._root / folder).glob("*.json")))
        return [record for record in found if record is not None]

    def _write(self, path: Path, record: BaseModel) -> None:
        """Replace a record; the lock is held, so the temporary name is ours."""
        temporary = path.with_name(f"{path.name}.new")
        with explained("write", path):
            temporary.write_text(record.model_dump_json())
            temporary.replace(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with exclusive(self._root / "lock"):
            yield

    def _make_folders(self) -> None:
        for name in ("files", "partial", "documents", "releases", "pins", "sessions"):
            folder = self._root / name
            with explained("make folder", folder):
                folder.mkdir(parents=True, exist_ok=True)


def _read(path: Path, kind: type[RecordT]) -> RecordT | None:
    """Return a record; one that cannot be read is none."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def files_of(*sets: Iterable[FileEntry]) -> dict[str, int]:
    """Return sizes by sha256 of all files of some manifests."""
    return {entry.sha256: entry.size for entries in sets for entry in entries}
