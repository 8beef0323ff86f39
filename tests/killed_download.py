"""Downloads that are killed, with SIGKILL at the n-th event (`tests.kills`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from tests.kills import Events, take_jobs

from trainyard.documents.plan import Plan
from trainyard.settings import Settings
from trainyard.steps.download import download
from trainyard.steps.runner import run_step
from trainyard.store import partial
from trainyard.store.documents import read_document
from trainyard.store.factory import open_store
from trainyard.store.layout import plan_key

PLAN_ID = "p1"
FOLDER_PART_BYTES = 1 << 20
"""Bytes of a part in the folder, so that a small file has many."""

NO_DOCUMENT_BYTES = 1 << 16
"""Whatever is larger is no document."""


def attempt(settings: dict[str, Any], die_at: int, report: str) -> int:
    """Download the plan, or die; report how many events there were and what was written."""
    made = Settings(**settings)
    store = open_store(made)
    events = Events(die_at)
    moved = os.open(f"{report}.written", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    really = os.write

    def write(descriptor: int, data: memoryview) -> int:
        count = really(descriptor, data)
        if count > NO_DOCUMENT_BYTES:
            really(moved, b"%d\n" % count)
        return count

    os.write = write  # type: ignore[assignment]
    partial.PART_BYTES = FOLDER_PART_BYTES
    events.watch(in_folder=not made.store.startswith("s3:"))
    with open(os.devnull, "w") as nowhere:
        code = run_step(
            "download",
            plan_id=PLAN_ID,
            body=lambda context: download(read_document(store, plan_key(PLAN_ID), Plan), context),
            settings=made,
            store=store,
            console=Console(file=nowhere),
        )
    Path(report).write_text(str(events.last))
    return code


if __name__ == "__main__":
    take_jobs(attempt)
