"""How often, and after which waits, a request to a source is made again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trainyard.errors import TrainyardError
from trainyard.store.pausing import doubled_s

T = TypeVar("T")

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0
"""Also the longest that a source's own wish (`Retry-After`) is granted within a step."""


@dataclass(frozen=True)
class Failure:
    """What a failed request means."""

    error: TrainyardError
    """What to raise when it cannot be, or is not, tried again."""
    retry_after_s: float = 0.0
    """Seconds that the source asked to wait."""


Judge = Callable[[Exception], Failure | None]
"""Tells what a library's exception means; None: it is a defect and must not be swallowed."""


@dataclass(frozen=True)
class Retries:
    """The policy of one source."""

    attempts: int
    """Requests in all."""
    sleep: Callable[[float], object] = time.sleep
    """Waits that many seconds; may raise to end it all."""

    def call(self, request: Callable[[], T], judge: Judge) -> T:
        """Return what `request` returns, trying again while that can help.

        Raises:
            TrainyardError: what `judge` made of the last failure.
        """
        failures = 0
        while True:
            try:
                return request()
            except Exception as error:
                failures += 1
                self.wait(error, judge, failures)

    def wait(self, error: Exception, judge: Judge, failures: int) -> None:
        """Wait before the next attempt, or raise what the failure means if there is none.

        Args:
            error: what was raised.
            judge: tells what it means.
            failures: how many there were in a row, with this one.
        """
        failure = Failure(error) if isinstance(error, TrainyardError) else judge(error)
        if failure is None:
            raise error
        if not failure.error.retryable or failures >= self.attempts:
            raise failure.error from (None if failure.error is error else error)
        self.sleep(wait_s(failures, failure.retry_after_s))


def wait_s(failures: int, retry_after_s: float = 0.0) -> float:
    """Return the seconds to wait after so many failures in a row."""
    doubled = doubled_s(failures, first_s=FIRST_WAIT_S, longest_s=LONGEST_WAIT_S)
    return max(doubled, min(retry_after_s, LONGEST_WAIT_S))
