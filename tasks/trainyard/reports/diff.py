"""Two documents field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["added", "removed", "changed"]

_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One field in which two documents differ."""

    path: str
    """Such as `target.max_num_seqs` or `spec.gates.latency.levels[0].name`."""
    before: str
    """The value as text; empty where the first document has no such field."""
    after: str
    kind: Kind


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return the fields in which two JSON objects differ, sorted by path.

    Lists are compared place by place.
    """
    # An empty document has no fields, whereas an empty object inside one is a value.
    first, second = (dict(_leaves(each, "")) if each else {} for each in (before, after))
    found = []
    for path in sorted({*first, *second}):
        old, new = first.get(path, _ABSENT), second.get(path, _ABSENT)
        # 1 and True are equal in Python and differ in JSON.
        if old == new and type(old) is type(new):
            continue
        kind: Kind = "added" if old is _ABSENT else "removed" if new is _ABSENT else "changed"
        found.append(Difference(path, _text(old), _text(new), kind))
    return tuple(found)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _leaves(each, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value:
        for index, each in enumerate(value):
            yield from _leaves(each, f"{path}[{index}]")
    else:
        yield path, value


def _text(value: Any) -> str:
    if value is _ABSENT:
        return ""
    if isinstance(value, str):
        return value
    words: dict[Any, str] = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return words[value]
    return str(value)
