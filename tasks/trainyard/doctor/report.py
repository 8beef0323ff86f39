"""Findings of the doctor: what was looked at, how it stands, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trainyard.errors import BadInput, TrainyardError, Transient

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    """Such as `store: conditional writes`."""
    state: State
    found: str
    """What was seen, one sentence."""
    remedy: str = ""
    """What to do about it; empty if nothing."""
    retryable: bool = False
    """It failed for now: looking again may show something else."""


def ok(name: str, found: str) -> Check:
    """Return a check that holds."""
    return Check(name, "ok", found)


def warn(name: str, found: str, remedy: str = "") -> Check:
    """Return a check that holds, or cannot be made, and should be known."""
    return Check(name, "warn", found, remedy)


def fail(name: str, found: str, remedy: str = "") -> Check:
    """Return a check that does not hold."""
    return Check(name, "fail", found, remedy)


def failed(name: str, error: TrainyardError) -> Check:
    """Return the check that an error makes."""
    return Check(name, "fail", error.message, error.hint, retryable=error.retryable)


def guarded(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Yield what a look finds; an error of ours becomes a failed check of that name."""
    try:
        yield from look()
    except TrainyardError as error:
        yield failed(name, error)


def exit_code(checks: Iterable[Check]) -> int:
    """Return 0 if nothing failed, 30 if only what may pass by itself did, else 10."""
    bad = [check for check in checks if check.state == "fail"]
    if not bad:
        return 0
    return Transient.exit_code if all(check.retryable for check in bad) else BadInput.exit_code


def as_json(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Return the checks for programs."""
    return [asdict(check) for check in checks]
