"""Tells how far a step is with bringing stored files to its machine."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from rich.filesize import decimal

from trainyard.documents.base import FileEntry
from trainyard.materialize import Means
from trainyard.steps.context import Progress


def told_to(progress: Progress, files: Iterable[FileEntry]) -> Means:
    """Return the means to restore `files` so that `progress` hears of every byte."""
    total = sum(file.size for file in files)
    mutex = threading.Lock()
    done = 0

    def on_bytes(size: int) -> None:
        nonlocal done
        with mutex:
            done += size
            here = done
        share = min(max(here / total, 0.0), 1.0) if total else 1.0
        progress.fraction(share, f"{decimal(here)} of {decimal(total)} restored")

    return Means(on_bytes=on_bytes)
