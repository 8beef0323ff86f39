"""What `trainyard materialize` says: a bar on a terminal, lines in a log, JSON for machines.

With a file for the status, that always holds the newest one, whole.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from trainyard.documents.restore import RestoreStatus
from trainyard.errors import TrainyardError
from trainyard.restore import Restored
from trainyard.store.disk import explained

_INTERVAL_S = 5.0
"""Seconds between two lines where there is no bar."""

_STATUS_INTERVAL_S = 1.0
"""Seconds between two writes of the status, at least."""


class RestoreReport:
    """The `Watcher` of one restore."""

    def __init__(
        self,
        console: Console,
        release_id: str,
        *,
        as_json: bool,
        status: Path | None = None,
    ) -> None:
        """Report to `console`; `as_json`: one JSON object a line, and nothing else.

        Args:
            console: for people.
            release_id: what is restored.
            as_json: for programs instead.
            status: a file that always holds the newest `RestoreStatus`.
        """
        self._console = console
        self._release_id = release_id
        self._as_json = as_json
        self._mutex = threading.Lock()
        self._total = 0
        self._done = 0
        self._shown_at = monotonic()
        self._bar: Progress | None = None
        self._status = status
        self._noted_at = monotonic()

    def __enter__(self) -> RestoreReport:
        """Begin. Raises BadInput, StorageFull, Transient: the status cannot be written."""
        if self._status is not None:
            with explained("write", self._status):
                self._note()
        if self._console.is_terminal and not self._as_json:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task(self._release_id, total=None)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if isinstance(error, TrainyardError):
            self._end(
                state="failed", exit_code=error.exit_code, reason=error.message, hint=error.hint
            )
        elif error is not None:
            self._end(state="failed", exit_code=1, reason=f"{type(error).__name__}: {error}")

    def total(self, size: int) -> None:
        """Learn how many bytes there are."""
        self._total = size
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, total=size)

    def moved(self, size: int) -> None:
        """Learn of bytes that are in place."""
        with self._mutex:
            self._done += size
            if self._bar is not None:
                self._bar.update(self._bar.tasks[0].id, completed=self._done)
            elif monotonic() - self._shown_at >= _INTERVAL_S:
                self._shown_at = monotonic()
                self._show()
            if self._status is not None and monotonic() - self._noted_at >= _STATUS_INTERVAL_S:
                self._noted_at = monotonic()
                with suppress(OSError):
                    self._note()

    def finished(self, restored: Restored) -> None:
        """Say where the release is now."""
        where = restored.where
        self._end(
            state="done",
            exit_code=0,
            model_dir=str(where.model_dir),
            cache_dir=str(where.cache_dir),
        )
        if self._as_json:
            self._line(
                json.dumps(
                    {
                        "release_id": restored.release_id,
                        "model_dir": str(where.model_dir),
                        "cache_dir": str(where.cache_dir),
                        "size_bytes": restored.size_bytes,
                        "seconds": round(restored.seconds, 3),
                        "over_limit_bytes": restored.over_limit_bytes,
                        "store_problem": restored.store_problem,
                    }
                )
            )
            return
        size = f"{restored.size_bytes / 2**20:,.0f} MiB"
        self._line(f"{restored.release_id}: {size} in {restored.seconds:.1f} s.")
        self._line(f"model  {where.model_dir}")
        self._line(f"cache  {where.cache_dir}")
        if restored.store_problem:
            self._line(f"From the node cache alone; the store failed: {restored.store_problem}")

    def _end(self, **outcome: Any) -> None:
        """Write the last status; that it cannot be written changes nothing of the outcome."""
        if self._status is not None:
            with self._mutex, suppress(OSError):
                self._note(**outcome)

    def _note(self, **outcome: Any) -> None:
        """Write the status, whole or not at all. Raises OSError."""
        assert self._status is not None
        status = RestoreStatus(
            release_id=self._release_id,
            done_bytes=self._done,
            total_bytes=self._total,
            **outcome,
        )
        new = self._status.with_name(f".{self._status.name}.{os.getpid()}")
        new.write_text(status.model_dump_json(indent=2) + "\n")
        new.replace(self._status)

    def _show(self) -> None:
        if self._as_json:
            self._line(json.dumps({"done_bytes": self._done, "total_bytes": self._total}))
        else:
            share = self._done / self._total if self._total else 1.0
            done, total = self._done / 2**20, self._total / 2**20
            self._line(f"{share:4.0%} {done:,.0f} of {total:,.0f} MiB")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
