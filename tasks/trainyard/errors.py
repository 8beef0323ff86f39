"""Every error that Trainyard raises on purpose, and what a caller may do about it.

::

    TrainyardError                exit  retry can help
    ├── BadInput                  10    no     the request, spec or source is wrong
    │   ├── NotFound              10    no     a named model, revision or document does not exist
    │   ├── CorruptFile           10    no     a file is truncated or does not match its hash
    │   └── UnusableKey           10    no     the key that signed it did not count at that date
    │       └── RevokedKey        10    no     the key that signed it was revoked
    ├── Refused                   20    no     the compiler, the model or a gate says no
    │   ├── CacheMiss             20    no     a start compiled in spite of its bundle
    │   └── Closed                20    no     the environment takes no promotions at this time
    ├── Transient                 30    yes    a network, a process or a store failed for now
    │   ├── Conflict              30    yes    somebody else changed the document first
    │   └── StorageFull           30    yes    the disk under the store or the work folder is full
    ├── OutOfCapacity             40    yes    out of memory or devices: later, or do less at once
    └── Busy                      75    yes    somebody else is doing this very step
        └── StaleDriver           75    no     another run or attempt drives the rollout now

Own exceptions exist because the exit code is the contract with Airflow (and with any shell script):
the class decides whether a task is tried again. Errors of libraries are chained (``raise … from``),
never swallowed; an exception outside this tree means a defect and exits with 1.
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar


class TrainyardError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what was wrong and where, one sentence.
        hint: what to do about it, one sentence; may be empty.
        code: of the known failure that it is (see `trainyard.failures`); may be empty.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadInput(TrainyardError):
    """The request, the spec or the source is wrong; trying again cannot help."""

    exit_code = 10


class NotFound(BadInput):
    """A model, revision, release, environment or document of that name does not exist."""


class CorruptFile(BadInput):
    """A file is truncated, unreadable or does not match its hash."""


class UnusableKey(BadInput):
    """A document is signed by a trusted key that did not count when the document is dated."""


class RevokedKey(UnusableKey):
    """A document is signed by a key that was revoked."""


class Refused(TrainyardError):
    """The compiler, the model or a gate says no; trying again cannot help."""

    exit_code = 20


class CacheMiss(Refused):
    """A server that should have started from its bundle had to compile."""


class Closed(Refused):
    """The environment takes no promotions now: it is frozen, or these are its quiet hours.

    Args:
        message: as of any error.
        until: when it takes them again, in UTC.
        hint: as of any error.
    """

    def __init__(self, message: str, *, until: datetime, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.until = until


class Transient(TrainyardError):
    """Something failed for now; trying again can help."""

    exit_code = 30
    retryable = True


class Conflict(Transient):
    """Somebody else changed the document between our read and our write."""


class StorageFull(Transient):
    """No room is left on the disk under the store or the work folder."""


class OutOfCapacity(TrainyardError):
    """Out of memory or devices; less parallelism or a later try can help."""

    exit_code = 40
    retryable = True


class Busy(TrainyardError):
    """Somebody else holds the lock of this step."""

    exit_code = 75
    retryable = True


class StaleDriver(Busy):
    """Another run or attempt has taken the rollout over; this one must stop driving it."""

    retryable = False
