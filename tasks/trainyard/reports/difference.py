"""Differences of two identities as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import Enum
from typing import Any, Protocol

from rich.table import Table


class Difference(Protocol):
    """A field that differs, as `trainyard.explain` finds it."""

    @property
    def path(self) -> str:
        """Dotted name of the field."""

    @property
    def left(self) -> Any:
        """Its value on one side; a member of an enumeration stands for itself."""

    @property
    def right(self) -> Any:
        """Its value on the other side."""

    @property
    def why(self) -> str:
        """What the field is to the code."""


def difference_table(left: str, right: str, rows: Iterable[tuple[str, Difference]]) -> Table:
    """Return one row a field.

    Args:
        left: name of one side.
        right: name of the other.
        rows: what the field belongs to (code, serving, weights), and the field.
    """
    table = Table("Of", "Field", left, right, "Because", box=None, pad_edge=False)
    for part, each in rows:
        table.add_row(part, each.path, _shown(each.left), _shown(each.right), each.why)
    return table


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
