"""Writes the status document of a step while the step runs.

Everything is written by one background thread, so that a slow store never slows the step, at most
once in `INTERVAL_S`, and at least once in `HEARTBEAT_S`: a status document that says `running` and
was not updated for much longer belongs to a process that was killed.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from trainyard.documents.base import Provenance
from trainyard.documents.status import StepStatus
from trainyard.errors import NotFound, TrainyardError
from trainyard.failures.tuning import Tuning
from trainyard.settings import Settings
from trainyard.store.documents import read_document
from trainyard.store.layout import status_key, status_prefix
from trainyard.store.protocol import Store

INTERVAL_S = 1.0
"""Seconds between two writes at least."""

HEARTBEAT_S = 10.0
"""Seconds between two writes at most."""

TAIL_LINES = 200
"""Lines of the log that a status document keeps."""

TAIL_LINE_CHARS = 1000
"""Characters kept of one line."""

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]")


def clean_lines(text: str) -> list[str]:
    """Return the lines of `text` without terminal escapes and other control characters."""
    return [
        "".join(c if c.isprintable() else " " for c in _ESCAPES.sub("", line)).rstrip()
        for line in text.splitlines()
    ]


def read_status(store: Store, plan_id: str, step: str, target: str = "") -> StepStatus | None:
    """Return the status document of a step, or None if it never ran.

    Raises:
        TrainyardError: the store or the document cannot be read.
    """
    try:
        return read_document(store, status_key(plan_id, step, target), StepStatus)
    except NotFound:
        return None


def list_statuses(store: Store, plan_id: str) -> list[StepStatus]:
    """Return the status of every step of a plan, in the order in which they started.

    Raises:
        BadInput: the id is not valid.
    """
    keys = [entry.key for entry in store.list(status_prefix(plan_id))]
    statuses = [read_document(store, key, StepStatus) for key in keys]
    return sorted(statuses, key=lambda status: status.started_at)


class StatusWriter:
    """The status document of one attempt at a step."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        plan_id: str,
        step: str,
        target: str,
        interval_s: float = INTERVAL_S,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """Write nothing yet. Raises BadInput if a name cannot be part of a key."""
        self._store = store
        self._key = status_key(plan_id, step, target)
        self._interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        now = datetime.now(UTC)
        self._status = StepStatus(
            created_at=now,
            provenance=Provenance.of(settings),
            plan_id=plan_id,
            step=step,
            target=target,
            state="running",
            started_at=now,
            updated_at=now,
        )
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._mutex = threading.Lock()
        self._dirty = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def key(self) -> str:
        """Key of the document."""
        return self._key

    @property
    def tuning(self) -> Tuning:
        """What this attempt does differently, because the one before it failed."""
        return Tuning.from_json(self._status.tuning)

    @property
    def begun(self) -> bool:
        """Was anything written?"""
        return self._thread is not None

    def begin(self) -> None:
        """Say that the step runs, count the attempt, and start the heartbeat; once.

        Raises:
            TrainyardError: the store cannot be written.
        """
        if self._thread is not None:
            return
        earlier = self._earlier()
        if earlier is not None:
            self.change(attempt=earlier.attempt + 1)
            if earlier.state != "done":
                self.change(tuning=earlier.tuning)
        self._write()
        self._thread = threading.Thread(target=self._beat, name="step-status", daemon=True)
        self._thread.start()

    def change(self, **changes: Any) -> None:
        """Change fields of the document; they are written soon."""
        with self._mutex:
            self._status = self._status.model_copy(update=changes)
        self._dirty.set()

    def log(self, lines: Iterable[str]) -> None:
        """Append lines to the tail of the log; they are written soon."""
        with self._mutex:
            self._tail.extend(line[:TAIL_LINE_CHARS] for line in lines)
        self._dirty.set()

    def finish(self, **changes: Any) -> None:
        """Stop the heartbeat and write the end of the attempt.

        Raises:
            TrainyardError: the store cannot be written.
        """
        self.stop()
        self.change(**changes)
        self._write()

    def stop(self) -> None:
        """Stop the heartbeat; nothing is written any more."""
        self._ended.set()
        self._dirty.set()
        if self._thread is not None:
            self._thread.join()

    def _earlier(self) -> StepStatus | None:
        try:
            return read_document(self._store, self._key, StepStatus)
        except TrainyardError:
            # None yet, or one that nobody can read; this attempt writes a good one.
            return None

    def _write(self) -> None:
        self._dirty.clear()
        with self._mutex:
            status = self._status.model_copy(
                update={"updated_at": datetime.now(UTC), "log_tail": tuple(self._tail)}
            )
        self._store.put(self._key, status.to_bytes())

    def _beat(self) -> None:
        while True:
            self._dirty.wait(self._heartbeat_s)
            if self._ended.wait(self._interval_s):
                return
            try:
                self._write()
            except TrainyardError:
                # The step matters more than its status; the next beat tries again.
                self._dirty.set()
