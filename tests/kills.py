"""Processes that kill themselves at the n-th moment at which what is stored may change.

Attempts are forked, one after the other, from a process that has imported everything: that spares
each the second that imports take.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainyard.store.s3_bucket import Bucket

_CALLS = ("open", "write", "fsync", "link", "replace", "unlink", "rmdir", "ftruncate", "fchmod")


class Events:
    """Counts events of all threads and kills this process at one of them.

    An event is the beginning or the end of a request to S3, or of a call of the system that
    changes a folder: between two of them nothing can be seen from outside.
    """

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

    def watch(self, *, in_folder: bool) -> None:
        """Count from now on what this process does to a store in a folder, or in a bucket."""
        if in_folder:
            for name in _CALLS:
                setattr(os, name, self.around(getattr(os, name)))
        else:
            Bucket.call = self.around(Bucket.call)  # type: ignore[method-assign]


def take_jobs(attempt: Callable[..., int]) -> None:
    """Take jobs from standard input, one a line, each the arguments of an attempt that is forked;
    answer each with the exit code of its attempt.
    """
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                code = attempt(**job)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                code = 99
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@contextmanager
def forking(module: str) -> Iterator[subprocess.Popen[str]]:
    """Have a process of a module that takes jobs."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def attempted(process: subprocess.Popen[str], job: dict[str, Any]) -> int:
    """Give a process a job, and return the exit code of the attempt."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())
