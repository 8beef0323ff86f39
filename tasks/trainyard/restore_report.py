"""What `trainyard materialize` says: a bar on a terminal, lines in a log, JSON for machines."""

from __future__ import annotations

import json
import threading
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from trainyard.restore import Restored

_INTERVAL_S = 5.0
"""Seconds between two lines where there is no bar."""


class RestoreReport:
    """The `Watcher` of one restore."""

    def __init__(self, console: Console, release_id: str, *, as_json: bool) -> None:
        """Report to `console`; `as_json`: one JSON object a line, and nothing else."""
        self._console = console
        self._release_id = release_id
        self._as_json = as_json
        self._mutex = threading.Lock()
        self._total = 0
        self._done = 0
        self._shown_at = monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> RestoreReport:
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

    def finished(self, restored: Restored) -> None:
        """Say where the release is now."""
        where = restored.where
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

    def _show(self) -> None:
        if self._as_json:
            self._line(json.dumps({"done_bytes": self._done, "total_bytes": self._total}))
        else:
            share = self._done / self._total if self._total else 1.0
            done, total = self._done / 2**20, self._total / 2**20
            self._line(f"{share:4.0%} {done:,.0f} of {total:,.0f} MiB")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
