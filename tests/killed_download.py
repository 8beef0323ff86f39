"""Downloads that are killed: a process that forks one attempt after the other.

Forking spares each attempt the second that imports take. An attempt kills itself with SIGKILL at
the n-th event: a call of the system that changes a folder, or the beginning or the end of a
request to S3.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from trainyard.documents.plan import Plan
from trainyard.settings import Settings
from trainyard.steps.download import download
from trainyard.steps.runner import run_step
from trainyard.store import partial
from trainyard.store.documents import read_document
from trainyard.store.factory import open_store
from trainyard.store.layout import plan_key
from trainyard.store.s3_bucket import Bucket

PLAN_ID = "p1"
FOLDER_PART_BYTES = 1 << 20
"""Bytes of a part in the folder, so that a small file has many."""

NO_DOCUMENT_BYTES = 1 << 16
"""Whatever is larger is no document."""

_CALLS = ("write", "fsync", "link", "replace", "unlink", "ftruncate", "fchmod")


class Events:
    """Counts events of all threads and kills this process at one of them."""

    def __init__(self, die_at: int) -> None:
        self.die_at = die_at
        self.numbers = itertools.count(1)
        self.last = 0
        self.mutex = threading.Lock()

    def happened(self) -> None:
        with self.mutex:
            self.last = next(self.numbers)
            if self.last == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.happened()
            result = call(*args, **kwargs)
            self.happened()
            return result

        return wrapped


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
    if made.store.startswith("s3:"):
        Bucket.call = events.around(Bucket.call)  # type: ignore[method-assign]
    else:
        for name in _CALLS:
            setattr(os, name, events.around(getattr(os, name)))
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


def main() -> None:
    """Take jobs from standard input, one a line; answer each with the exit code of its attempt."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                code = attempt(**job)
            except BaseException:
                code = 99
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
