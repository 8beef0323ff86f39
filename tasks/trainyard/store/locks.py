"""Step locks: `locks/<step key>.json` keeps two processes from doing the same step at once.

A lock has a holder, an epoch and an expiry (by the clock of the machine, UTC). The holder renews it
every third of its time. Whoever finds it expired takes it with a higher epoch; so does, at once,
whoever finds on the same machine that the holder's process is dead. Every change is a
compare-and-swap, so at most one of them succeeds, and a holder that was replaced learns it at its
next renewal or when it asks: it must not commit anything then. The document stays when the lock is
free, so that epochs only grow.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from types import TracebackType

from trainyard.documents.base import Document, Frozen
from trainyard.errors import Busy, Conflict, NotFound, TrainyardError
from trainyard.store.disk import boot_id
from trainyard.store.documents import read_versioned
from trainyard.store.layout import lock_key
from trainyard.store.protocol import Store

_POLL_S = 0.5


class Holder(Frozen):
    """The process that has a lock."""

    token: str
    """Random; two locks of one process differ in it."""
    work: str
    """What it does, for people and to tell two attempts of one step from two steps."""
    host: str
    machine: str
    """Names host, boot and process namespace; empty where the system cannot tell."""
    pid: int
    process_started: str
    """Start of the process as the kernel counts it; empty where it cannot be told."""
    since: datetime

    @classmethod
    def me(cls, work: str) -> Holder:
        """Return a new holder for this process."""
        return cls(
            token=secrets.token_hex(8),
            work=work,
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            process_started=_process_started(os.getpid()) or "",
            since=datetime.now(UTC),
        )

    def is_gone(self) -> bool:
        """Tell whether the process is certainly dead; False if that cannot be known here."""
        if not self.machine or self.machine != _machine() or not self.process_started:
            return False
        return _process_started(self.pid) != self.process_started


class StepLock(Document):
    """`locks/<step key>.json`."""

    step_key: str
    epoch: int
    """Counts the takings."""
    holder: Holder | None
    """Empty: the lock is free."""
    expires_at: datetime

    def is_free(self, now: datetime) -> bool:
        """May it be taken?"""
        return self.holder is None or self.expires_at <= now or self.holder.is_gone()


class HeldElsewhere(Busy):
    """Somebody else has the lock."""

    def __init__(self, lock: StepLock, holder: Holder) -> None:
        super().__init__(
            f"Step {lock.step_key} is being done by process {holder.pid} on {holder.host} "
            f"({holder.work}, since {holder.since:%H:%M:%S} UTC).",
            hint=f"Wait for it; if it is dead, its lock ends at {lock.expires_at:%H:%M:%S} UTC.",
        )
        self.holder = holder


class HeldLock:
    """A lock that this process has, renewed by a thread until it is released."""

    def __init__(
        self,
        store: Store,
        lock: StepLock,
        version: str,
        *,
        duration_s: float,
        on_lost: Callable[[], None] | None,
    ) -> None:
        """Use `acquire_lock` instead."""
        self._store = store
        self._lock = lock
        self._version = version
        self._duration_s = duration_s
        self._on_lost = on_lost
        self._mutex = threading.Lock()
        self._released = threading.Event()
        self._lost = False
        self._successor: Holder | None = None
        self._thread = threading.Thread(target=self._renew, name="step-lock", daemon=True)
        self._thread.start()

    @property
    def epoch(self) -> int:
        """The epoch of this holding; a later one has a higher epoch."""
        return self._lock.epoch

    @property
    def lost(self) -> bool:
        """Did somebody else take the lock?"""
        return self._lost

    @property
    def successor(self) -> Holder | None:
        """Who took it, if that is known."""
        return self._successor

    def ensure_held(self) -> None:
        """Return if the lock is still ours; call this before a commit.

        Raises:
            Busy: somebody else took it, or it expired and cannot be renewed.
        """
        if not self._lost and datetime.now(UTC) >= self._lock.expires_at:
            # This process was stopped for long. If nobody took the lock meanwhile, it is ours yet.
            self._extend()
        if self._lost or datetime.now(UTC) >= self._lock.expires_at:
            raise Busy(
                f"This process lost the lock of step {self._lock.step_key}.",
                hint="It was stopped or cut off for too long, and somebody else may have taken "
                "over; nothing was committed. Try again.",
            )

    def release(self) -> None:
        """Free the lock; if the store cannot be reached, its expiry does."""
        self._released.set()
        self._thread.join()
        if self._lost:
            return
        free = self._lock.model_copy(update={"holder": None})
        try:
            self._store.replace(
                lock_key(self._lock.step_key), free.to_bytes(), version=self._version
            )
        except TrainyardError:
            return

    def __enter__(self) -> HeldLock:
        """Return the lock itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release it."""
        self.release()

    def _renew(self) -> None:
        while not self._released.wait(self._duration_s / 3):
            self._extend()
            if self._lost:
                if self._on_lost is not None and not self._released.is_set():
                    self._on_lost()
                return

    def _extend(self) -> None:
        """Move the expiry; note if the lock was taken. A store that fails now is tried again."""
        with self._mutex:
            expires_at = datetime.now(UTC) + timedelta(seconds=self._duration_s)
            renewed = self._lock.model_copy(update={"expires_at": expires_at})
            key = lock_key(self._lock.step_key)
            try:
                self._version = self._store.replace(key, renewed.to_bytes(), version=self._version)
                self._lock = renewed
            except Conflict:
                self._look_who_has_it(key)
            except TrainyardError:
                return

    def _look_who_has_it(self, key: str) -> None:
        try:
            current, version = read_versioned(self._store, key, StepLock)
        except NotFound:
            self._lost = True
            return
        except TrainyardError:
            return
        mine = self._lock.holder
        if current.holder is not None and mine is not None and current.holder.token == mine.token:
            # An earlier renewal arrived although the store reported a failure.
            self._lock, self._version = current, version
        else:
            self._lost = True
            self._successor = current.holder


def acquire_lock(
    store: Store,
    step_key: str,
    *,
    work: str,
    duration_s: float,
    wait_s: float,
    on_wait: Callable[[HeldElsewhere], None] | None = None,
    on_lost: Callable[[], None] | None = None,
    pause: threading.Event | None = None,
) -> HeldLock:
    """Take the lock of a step, waiting for its holder if need be.

    Args:
        store: where the lock is.
        step_key: names the step: everybody who does the same work uses the same key.
        work: what this process does, for people.
        duration_s: seconds until it expires unless renewed.
        wait_s: seconds to wait for somebody else.
        on_wait: called once, before the first wait.
        on_lost: called from the renewing thread if somebody else took the lock.
        pause: set it to end the waiting early.

    Raises:
        HeldElsewhere: somebody else has it and kept it.
        Transient, BadInput: the store cannot be used.
    """
    holder = Holder.me(work)
    pause = pause or threading.Event()
    deadline = monotonic() + wait_s
    waited = False
    while True:
        taken = _try_to_take(store, step_key, holder, duration_s)
        if not isinstance(taken, HeldElsewhere):
            lock, version = taken
            return HeldLock(store, lock, version, duration_s=duration_s, on_lost=on_lost)
        left_s = deadline - monotonic()
        if left_s <= 0 or pause.is_set():
            raise taken
        if not waited and on_wait is not None:
            on_wait(taken)
        waited = True
        pause.wait(min(_POLL_S, left_s))


def _try_to_take(
    store: Store, step_key: str, holder: Holder, duration_s: float
) -> tuple[StepLock, str] | HeldElsewhere:
    key = lock_key(step_key)
    while True:
        now = datetime.now(UTC)
        expires_at = now + timedelta(seconds=duration_s)
        try:
            try:
                current, version = read_versioned(store, key, StepLock)
            except NotFound:
                first = StepLock(step_key=step_key, epoch=1, holder=holder, expires_at=expires_at)
                return first, store.create(key, first.to_bytes())
            if current.holder is not None and not current.is_free(now):
                return HeldElsewhere(current, current.holder)
            taken = StepLock(
                step_key=step_key, epoch=current.epoch + 1, holder=holder, expires_at=expires_at
            )
            return taken, store.replace(key, taken.to_bytes(), version=version)
        except Conflict:
            # Somebody else was faster; look again at what they made of it.
            continue


def _machine() -> str:
    """Name host, boot and process namespace: within one, process ids mean the same."""
    boot = boot_id()
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return ""
    return f"{platform.node()}/{boot}/{namespace}" if boot else ""


def _process_started(pid: int) -> str | None:
    """Return the start of a living process in the kernel's ticks; None if there is none.

    Ticks since the boot, unlike times of day, do not move when the clock is set.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field, the name in brackets, may itself hold spaces and brackets.
    fields = text[text.rindex(")") + 2 :].split()
    state, started = fields[0], fields[19]
    return None if state in {"Z", "X"} else started
