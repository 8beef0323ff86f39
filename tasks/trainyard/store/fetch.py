"""Files from the store onto this machine: several at once, hashed on the way, resumed after a kill.

Workers take parts of files; what is under way lies in a folder of its own, one partial file per
content, and a file leaves it for its place only when its size and sha256 are right. Two processes
that want the same content share the work: whoever locks the partial file brings it, the other one
brings something else meanwhile and then uses it. Memory is bounded by the buffers of the workers.

Files are not flushed to the disk one by one: they are copies of what the store keeps, and whoever
uses them hashes them again after a restart of the machine (see `trainyard.materialize`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from time import monotonic
from typing import BinaryIO

from trainyard.documents.base import FileEntry
from trainyard.errors import CorruptFile, StorageFull, TrainyardError, Transient
from trainyard.store.arriving import PART_BYTES, Hashing, Record
from trainyard.store.disk import explained, write_at
from trainyard.store.parts import Part, parts_of
from trainyard.store.pausing import spread_s
from trainyard.store.protocol import Store

_POLL_S = 0.05
"""Seconds between two looks at a file that another process brings."""
_LAST_WAIT_S = 5.0
"""Seconds that workers get to leave what they are at when one of them failed."""


@dataclass(frozen=True)
class FetchPolicy:
    """How hard to try, and with how much at once."""

    workers: int = 8
    """Parts under way at a time."""
    part_bytes: int = PART_BYTES
    chunk_bytes: int = 1 << 20
    """Bytes that a worker holds at a time, twice."""
    attempts: int = 6
    """Tries of one part that bring nothing before the transfer fails."""
    first_pause_s: float = 0.2
    """Longest pause before the second try; it doubles from try to try."""
    longest_pause_s: float = 10.0
    stall_s: float = 120.0
    """Seconds without a byte from any worker after which the store counts as stalled. The second
    line of defence: a back end has its own, shorter, timeouts."""


DEFAULT_POLICY = FetchPolicy()


@dataclass(frozen=True)
class Wanted:
    """One file to bring."""

    key: str
    """In the store."""
    entry: FileEntry
    """Its size and hash."""


Commit = Callable[[Wanted, Path], None]
"""Moves a whole and checked file from its partial name to where it belongs. Called by workers, for
one content at most once at a time over all processes."""


def damaged(store: Store, key: str) -> CorruptFile:
    """Return the error for a stored file that is not what its manifest says."""
    return CorruptFile(
        f"{key} in {store.url} is damaged: it does not match the hash in its manifest.",
        hint="Remove that file from the store and release the same revision again (what is missing "
        "is made again), or bring it back from a backup.",
    )


def fetch_files(
    store: Store,
    wanted: Iterable[Wanted],
    folder: Path,
    commit: Commit,
    *,
    is_there: Callable[[Wanted], bool] = lambda wanted: False,
    on_bytes: Callable[[int], None] = lambda size: None,
    policy: FetchPolicy = DEFAULT_POLICY,
) -> None:
    """Bring files from the store, each once whatever others do, and hand them to `commit`.

    Args:
        store: where they are.
        wanted: what to bring; entries of the same content are brought once.
        folder: for partial files; it exists, and `commit` can rename out of it.
        commit: puts a finished file in place.
        is_there: has another process brought it meanwhile?
        on_bytes: told the bytes of each piece that is here, by several threads; a negative number
            if a file starts over.
        policy: how much at once, how often.

    Raises:
        NotFound: a file is not in the store.
        CorruptFile: a stored file does not match its hash; its partial file is removed.
        StorageFull: no room is left; the partial files of this call are removed.
        Transient: the store fails or stalls in spite of several tries; what arrived is kept.
    """
    fetch = _Fetch(store, wanted, folder, commit, is_there, on_bytes, policy)
    fetch.run()


class _Stopped(Exception):
    """Another worker failed, or the caller gave up."""


class _CutOff(Exception):
    """The store failed in the middle; another try can help."""

    def __init__(self, problem: Exception) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass
class _File:
    """A partial file that this process has locked."""

    wanted: Wanted
    path: Path
    descriptor: int
    record: Record | None
    """None for a file of one part: there is nothing to resume."""
    hashing: Hashing
    left: deque[Part]
    """Parts that nobody has begun."""
    resumed: bool
    """Does it hold bytes of an earlier attempt?"""
    under_way: int = 0
    """Workers that are at it."""

    def let_go(self, *, remove: bool) -> None:
        """Close it, which unlocks it; its bytes stay for the next attempt if they can be used."""
        with contextlib.suppress(OSError):
            if remove or self.record is None:
                self.path.unlink(missing_ok=True)
            if self.record is not None:
                self.record.close()
                if remove:
                    self.record.remove()
        os.close(self.descriptor)


class _Fetch:
    """One call of `fetch_files`."""

    def __init__(
        self,
        store: Store,
        wanted: Iterable[Wanted],
        folder: Path,
        commit: Commit,
        is_there: Callable[[Wanted], bool],
        on_bytes: Callable[[int], None],
        policy: FetchPolicy,
    ) -> None:
        self._store = store
        self._folder = folder
        self._commit = commit
        self._is_there = is_there
        self._on_bytes = on_bytes
        self._policy = policy
        contents = {each.entry.sha256: each for each in wanted}
        # Big ones first: small ones fill the gaps at the end.
        self._waiting = deque(sorted(contents.values(), key=lambda each: -each.entry.size))
        self._elsewhere: deque[Wanted] = deque()
        self._opening = 0
        self._files: list[_File] = []
        # Each file is hashed by one thread at a time: so many files keep all processors busy.
        self._lanes = min(policy.workers, os.cpu_count() or 1)
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._running = 0
        self._reading = 0
        self._moved_at = monotonic()
        self._stalled = False

    def run(self) -> None:
        if not self._waiting:
            return
        threads = [
            # Daemons: one that hangs in a stalled read must not keep the process from ending.
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(min(self._policy.workers, self._most_parts()))
        ]
        self._running = len(threads)
        try:
            for thread in threads:
                thread.start()
            self._wait()
        finally:
            self._stop.set()
            deadline = monotonic() + (0.0 if self._stalled else _LAST_WAIT_S)
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - monotonic()))
            self._let_go_of_idle_files()
        if self._error is not None:
            raise self._error

    def _most_parts(self) -> int:
        part_bytes = self._policy.part_bytes
        return sum(max(1, -(-each.entry.size // part_bytes)) for each in self._waiting)

    def _wait(self) -> None:
        """Wait until all workers are done, or the store has been silent for too long."""
        with self._changed:
            while self._running:
                self._changed.wait(min(1.0, self._policy.stall_s / 4))
                silent_s = monotonic() - self._moved_at
                if self._reading and self._error is None and silent_s > self._policy.stall_s:
                    self._stalled = True
                    self._error = Transient(
                        f"{self._store.url} has sent nothing for {silent_s:.0f} s.",
                        hint="Look at the health of the store and the way to it, then try again; "
                        "what has arrived is kept.",
                    )
                if self._error is not None:
                    return

    def _work(self) -> None:
        chunk = memoryview(bytearray(self._policy.chunk_bytes))
        scratch = memoryview(bytearray(self._policy.chunk_bytes))
        try:
            while (task := self._next()) is not None:
                file, part = task
                try:
                    if part is not None:
                        self._bring(file, part, chunk, scratch)
                    else:
                        with explained("read", file.path):
                            file.hashing.go_on(scratch)
                finally:
                    self._leave(file)
        except _Stopped:
            pass
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
            self._stop.set()
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
            self._let_go_of_idle_files()

    def _next(self) -> tuple[_File, Part | None] | None:
        """Return what to do next; None if nothing is left to begin.

        Without a part, the file is here in full and has only to be hashed.
        """
        while not self._stop.is_set():
            with self._changed:
                file = self._with_parts_left()
                if file is not None:
                    file.under_way += 1
                    return file, file.left.popleft()
                if not (self._waiting or self._elsewhere or self._opening):
                    return None
                wanted = self._waiting.popleft() if self._waiting else None
                if wanted is None and self._elsewhere:
                    wanted, pause_s = self._elsewhere.popleft(), _POLL_S
                else:
                    pause_s = 0.0 if wanted else _POLL_S
                self._opening += wanted is not None
            self._stop.wait(pause_s)
            if wanted is not None and (opened := self._open(wanted)) is not None:
                return opened, None
        raise _Stopped

    def _with_parts_left(self) -> _File | None:
        """Return the file to help with; None if another one should be begun first."""
        if self._waiting and len(self._files) < self._lanes:
            return None
        files = [file for file in self._files if file.left]
        return min(files, key=lambda file: file.under_way, default=None)

    def _open(self, wanted: Wanted) -> _File | None:
        """Begin a file; returned is one that is here in full already, but not hashed."""
        file: _File | None = None
        busy = whole = False
        try:
            descriptor = self._lock(self._folder / wanted.entry.sha256)
            if descriptor is None:
                busy = True
            elif self._is_there(wanted):
                (self._folder / wanted.entry.sha256).unlink(missing_ok=True)
                os.close(descriptor)
                self._on_bytes(wanted.entry.size)
            else:
                file = self._begin(wanted, descriptor)
                whole = not file.left
        finally:
            with self._changed:
                self._opening -= 1
                if busy:
                    self._elsewhere.append(wanted)
                if file is not None:
                    # From here on other workers take part in it.
                    self._files.append(file)
                    file.under_way += whole
        return file if whole else None

    def _lock(self, path: Path) -> int | None:
        """Open and lock a partial file; None if another process has it."""
        with explained("open", path):
            while True:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Whoever had it may have finished it: then that name is free, or a new file.
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        return descriptor
                except BlockingIOError:
                    os.close(descriptor)
                    return None
                except FileNotFoundError:
                    pass
                os.close(descriptor)

    def _begin(self, wanted: Wanted, descriptor: int) -> _File:
        path = self._folder / wanted.entry.sha256
        size, part_bytes = wanted.entry.size, self._policy.part_bytes
        parts = tuple(parts_of(size, part_bytes))
        record = None
        here: frozenset[int] = frozenset()
        try:
            with explained("write", path):
                if len(parts) > 1:
                    record = Record(path.with_name(f"{path.name}.parts"), size, part_bytes)
                    here = record.read()
                if os.fstat(descriptor).st_size != size:
                    here = frozenset()
                if not here:
                    os.ftruncate(descriptor, 0)
                if record is not None:
                    # A full disk shows now, not after an hour.
                    os.posix_fallocate(descriptor, 0, size)
                    record.begin(here)
        except BaseException as error:
            if record is not None:
                record.close()
            if isinstance(error, StorageFull):
                path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        self._on_bytes(sum(part.size for part in parts if part.index in here))
        return _File(
            wanted,
            path,
            descriptor,
            record,
            Hashing(parts, here, lambda room, at: self._read_back(descriptor, room, at)),
            deque(part for part in parts if part.index not in here),
            resumed=bool(here),
        )

    def _read_back(self, descriptor: int, room: memoryview, at: int) -> int:
        """Read what is here to hash it; a store that waits meanwhile is not to blame."""
        self._moved_at = monotonic()
        return os.preadv(descriptor, [room], at)

    def _bring(self, file: _File, part: Part, chunk: memoryview, scratch: memoryview) -> None:
        """Move one part, going on where a failed try stopped."""
        done = 0
        failures = 0
        while True:
            before = done
            problem: Exception | None = None
            pieces = self._pieces(file.wanted.key, part.start + done, part.size - done, chunk)
            try:
                with contextlib.closing(pieces):
                    for piece in pieces:
                        with explained("write", file.path):
                            write_at(file.descriptor, piece, part.start + done)
                        done += len(piece)
                        with explained("read", file.path):
                            file.hashing.arrived(part, piece, scratch)
                        self._on_bytes(len(piece))
            except _CutOff as cut:
                problem = cut.problem
            if done == part.size:
                break
            failures = 1 if done > before else failures + 1
            self._pause(file.wanted, failures, problem)
        if file.record is not None:
            with explained("write", file.path):
                file.record.add(part.index)

    def _pieces(
        self, key: str, start: int, size: int, chunk: memoryview
    ) -> Generator[memoryview, None, None]:
        """Yield what the store has of a range, until it ends or raises `_CutOff`."""
        with self._changed:
            self._moved_at = monotonic()
            self._reading += 1
        try:
            with self._store.open_range(key, start, size) as stream:
                while size > 0 and (piece := self._read(stream, chunk[:size])):
                    size -= len(piece)
                    yield piece
        except (Transient, OSError, HTTPException) as error:
            raise _CutOff(error) from error
        finally:
            with self._changed:
                self._reading -= 1

    def _read(self, stream: BinaryIO, chunk: memoryview) -> memoryview:
        """Return the next bytes, in `chunk` where the stream can do that; none at the end."""
        if self._stop.is_set():
            raise _Stopped
        readinto = getattr(stream, "readinto", None)
        piece = chunk[: readinto(chunk)] if readinto else memoryview(stream.read(len(chunk)))
        if self._stop.is_set():
            raise _Stopped
        self._moved_at = monotonic()
        return piece

    def _pause(self, wanted: Wanted, failures: int, problem: Exception | None) -> None:
        """Wait before the next try of a part, or raise what is wrong for good."""
        if problem is None:
            # It ended before its time, but in order: perhaps a cut, certain when it does so again.
            if failures > 1:
                raise damaged(self._store, wanted.key)
            return
        if failures >= self._policy.attempts:
            if isinstance(problem, TrainyardError):
                raise problem
            raise Transient(
                f"{wanted.key} cannot be read from {self._store.url}: {problem!r}.",
                hint="Look at the health of the store and the way to it, then try again; what has "
                "arrived is kept.",
            ) from problem
        first_s, longest_s = self._policy.first_pause_s, self._policy.longest_pause_s
        # Not a wait for anything: spreads the tries of all workers and nodes.
        self._stop.wait(spread_s(failures, first_s=first_s, longest_s=longest_s))
        if self._stop.is_set():
            raise _Stopped

    def _leave(self, file: _File) -> None:
        """Take a worker off a file; the last one finishes it."""
        with self._changed:
            file.under_way -= 1
            finished = not file.under_way and not file.left and file.hashing.complete
            if finished:
                self._files.remove(file)
        if not finished:
            return
        entry = file.wanted.entry
        if file.hashing.hexdigest() == entry.sha256:
            try:
                self._commit(file.wanted, file.path)
            except BaseException:
                file.let_go(remove=True)
                raise
            if file.record is not None:
                with explained("remove", file.path):
                    file.record.remove()
            os.close(file.descriptor)
        else:
            file.let_go(remove=True)
            if not file.resumed:
                raise damaged(self._store, file.wanted.key)
            # What an earlier attempt left was not what it seemed: once more from the beginning.
            self._on_bytes(-entry.size)
            with self._changed:
                self._waiting.append(file.wanted)

    def _let_go_of_idle_files(self) -> None:
        """After a stop: close files that no worker is at, so that others may go on with them."""
        if not self._stop.is_set():
            return
        with self._changed:
            idle = [file for file in self._files if not file.under_way]
            self._files = [file for file in self._files if file.under_way]
        for file in idle:
            file.let_go(remove=isinstance(self._error, StorageFull))
