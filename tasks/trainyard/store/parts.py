"""Large files in parts: read at the same time, hashed in their order, with bounded memory."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from trainyard.store.transfer import Content

Bytes = bytes | bytearray
"""What arrived: a buffer that was filled need not be copied."""

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

PART_BYTES = 8 << 20
"""Bytes of a part where the back end does not care."""

MAX_PARTS = 10_000
"""Parts that S3 allows for one file."""

THREADS = 4
"""Parts of one file that are moved at the same time."""

IN_FLIGHT_BYTES = 192 << 20
"""Bytes of parts in memory at once, of all files of this process together."""


@dataclass(frozen=True)
class Ranges:
    """A file that can be read in pieces, from several threads."""

    size: int
    """Bytes."""
    identity: str
    """Names this very content (source, revision, path): what was kept of a cut transfer counts only
    for the same identity."""
    read: Callable[[int, int], Bytes]
    """Returns exactly that many bytes from that offset, or raises: `read(start, size)`."""


@dataclass(frozen=True)
class Part:
    """One piece of a file."""

    number: int
    """Counts from 1."""
    start: int
    size: int


def parts_of(size: int, part_bytes: int) -> list[Part]:
    """Cut `size` bytes into parts of `part_bytes`, or larger ones if there were too many."""
    step = max(part_bytes, -(-size // MAX_PARTS))
    return [
        Part(number=number, start=start, size=min(step, size - start))
        for number, start in enumerate(range(0, size, step), start=1)
    ]


class Budget:
    """Bytes that may be in memory at once; whoever wants more waits."""

    def __init__(self, total: int) -> None:
        """Start with `total` bytes free."""
        self._total = total
        self._free = total
        self._changed = threading.Condition()

    def take(self, size: int, *, wait: bool) -> bool:
        """Take `size` bytes (at most all there are); tell whether they were free."""
        size = min(size, self._total)
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._free >= size)
            if self._free < size:
                return False
            self._free -= size
            return True

    def give(self, size: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._free += min(size, self._total)
            self._changed.notify_all()


_BUDGET = Budget(IN_FLIGHT_BYTES)


@contextmanager
def in_memory(size: int, budget: Budget = _BUDGET) -> Iterator[None]:
    """Wait for room for `size` bytes, and hold it for the block.

    Nothing in the block may wait for other room: whoever has that might wait for this.
    """
    budget.take(size, wait=True)
    try:
        yield
    finally:
        budget.give(size)


def in_order(
    items: Iterable[ItemT],
    work: Callable[[ItemT], ResultT],
    *,
    size_of: Callable[[ItemT], int],
    threads: int = THREADS,
    budget: Budget = _BUDGET,
) -> Generator[ResultT, None, None]:
    """Do `work` for all items in threads and yield the results in the order of the items.

    Close it (`contextlib.closing`) if it is left early: no thread goes on then.

    Args:
        items: what there is to do; taken only when there is room.
        work: done in a thread; its error ends everything.
        size_of: bytes that an item and its result hold in memory.
        threads: at the same time.
        budget: shared by all transfers of the process.
    """
    waiting: deque[tuple[Future[ResultT], int]] = deque()
    todo = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="part")
    try:
        item = next(todo, None)
        while item is not None or waiting:
            # Whoever holds parts must not wait for room: others may wait for that very room.
            while (
                item is not None
                and len(waiting) <= threads
                and budget.take(size_of(item), wait=not waiting)
            ):
                waiting.append((pool.submit(work, item), size_of(item)))
                item = next(todo, None)
            future, size = waiting[0]
            result = future.result()
            yield result
            del result, future
            waiting.popleft()
            budget.give(size)
    finally:
        pool.shutdown(cancel_futures=True)
        for _, size in waiting:
            budget.give(size)


def hash_ranges(source: Ranges, part_bytes: int = PART_BYTES) -> Content:
    """Read all of `source`, several parts at a time, and return size and hash."""
    sha256 = hashlib.sha256()
    parts = in_order(
        parts_of(source.size, part_bytes),
        lambda part: source.read(part.start, part.size),
        size_of=lambda part: part.size,
    )
    with closing(parts) as read:
        for data in read:
            sha256.update(data)
    return Content(size=source.size, sha256=sha256.hexdigest())
