"""Finds the known failure in a log, an exit code or a pod."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainyard.errors import (
    BadInput,
    CacheMiss,
    OutOfCapacity,
    Refused,
    TrainyardError,
    Transient,
)
from trainyard.failures.table import EXIT_CODES, LOG, POD, Action, Change, Row

_COMPILER_CODE = re.compile(r"\bNCC_[A-Z]+\d+\b|\[F1\d\d\]")
_EVIDENCE_CHARS = 300

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """One failure that was recognised."""

    code: str
    """The vendor's own code where there is one."""
    reason: str
    """One sentence, with the line that shows it."""
    hint: str
    action: Action
    exit_code: int
    change: Change = ""

    def error(self) -> TrainyardError:
        """Return the error that a step raises for it."""
        kinds: dict[int, type[TrainyardError]] = {
            10: BadInput, 20: Refused, 30: Transient, 40: OutOfCapacity,
        }  # fmt: skip
        kind = CacheMiss if self.code == "cache-miss" else kinds[self.exit_code]
        return kind(self.reason, hint=self.hint, code=self.code)


def compiler_code(text: str) -> str:
    """Return the last error code of the compiler in a text, such as `NCC_EVRF009`; or nothing."""
    codes = _COMPILER_CODE.findall(text)
    return codes[-1] if codes else ""


def recognise_log(log: str) -> Failure | None:
    """Return the known failure that a log tells of, None if it tells of none.

    Args:
        log: of a server or compiler; the last megabyte is enough.
    """
    return _first(LOG, log.splitlines())


def recognise_pod(pod: Object | None, node: Object | None = None) -> Failure | None:
    """Return the known failure that ended a pod, or that keeps it from starting.

    Args:
        pod: as the API shows it; None: it is gone.
        node: the pod's, as far as it is known.
    """
    lines = list(pod_evidence(pod, node))
    return _first(POD, lines) or _first(EXIT_CODES, lines)


def pod_evidence(pod: Object | None, node: Object | None = None) -> Iterator[str]:
    """Yield what the API says of a pod and its node, one fact a line."""
    if pod is None:
        yield "pod gone"
    status = (pod or {}).get("status") or {}
    for name in ("reason", "message"):
        if status.get(name):
            yield f"pod {name}: {status[name]}"
    for condition in status.get("conditions") or ():
        # Being disrupted is bad when it is true, being scheduled when it is not.
        bad = "True" if condition.get("type") == "DisruptionTarget" else "False"
        if condition.get("status") == bad:
            yield f"condition {condition['type']}: {_said(condition)}"
    for container in (*_list(status, "initContainerStatuses"), *_list(status, "containerStatuses")):
        yield from _container_evidence(container)
    if node is not None:
        yield from _node_evidence(node)
    if status.get("phase"):
        yield f"phase {status['phase']}"


def container_exit_code(pod: Object | None, container: str = "base") -> int | None:
    """Return the exit code of a container that ended, None if it did not."""
    status = (pod or {}).get("status") or {}
    for each in _list(status, "containerStatuses"):
        terminated = (each.get("state") or {}).get("terminated")
        if each.get("name") == container and terminated:
            return int(terminated.get("exitCode", 0))
    return None


def _container_evidence(container: Object) -> Iterator[str]:
    name, state = container.get("name", ""), container.get("state") or {}
    terminated, waiting = state.get("terminated"), state.get("waiting")
    if terminated and terminated.get("exitCode"):
        yield f"container {name} terminated: {_said(terminated)}"
        yield f"exit code {terminated['exitCode']}"
    if waiting:
        yield f"container {name} waiting: {_said(waiting)}"


def _node_evidence(node: Object) -> Iterator[str]:
    for condition in _list(node.get("status") or {}, "conditions"):
        yield f"node condition {condition.get('type')}: {_said(condition)}"
    for taint in _list(node.get("spec") or {}, "taints"):
        yield f"node taint {taint.get('key')}:{taint.get('effect', '')}"


def _said(part: Object) -> str:
    return ": ".join(str(part[name]) for name in ("reason", "message") if part.get(name))


def _list(part: Object, name: str) -> Sequence[Object]:
    return part.get(name) or ()


def _first(rows: Iterable[Row], lines: Sequence[str]) -> Failure | None:
    for row in rows:
        pattern = re.compile(row.pattern)
        # The last line that says so: what was said before may have been overcome.
        for line in reversed(lines):
            if pattern.search(line):
                return _failure(row, line)
    return None


def _failure(row: Row, line: str) -> Failure:
    code = compiler_code(line).strip("[]") or row.code
    said = " ".join(line.split())[:_EVIDENCE_CHARS]
    return Failure(
        code=code,
        reason=f"{row.reason.rstrip('.')}: {said}",
        hint=row.hint,
        action=row.action,
        exit_code=row.exit_code,
        change=row.change,
    )
