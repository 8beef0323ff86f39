"""Processes that kill themselves at the n-th moment at which what is stored may change."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable
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
