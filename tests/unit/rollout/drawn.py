"""Reads the tables in the docstring of the state machine, and draws its edges for the docs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from trainyard.rollout import state_machine

GROUPS = {
    "starting": ("deploying", "warming", "scaling"),
    "compared": ("shifting", "holding"),
    "exposed": ("shifting", "holding", "baking"),
}
"""What the docstring says of several states in one row."""


class Drawn(NamedTuple):
    """An edge of the docstring."""

    before: str
    after: str
    event: str
    why: str


def edges() -> list[Drawn]:
    """Return the edges of the docstring, in its order, with groups of states resolved."""
    found = []
    for before, after, words in _rows("from"):
        event, _, why = words.partition(": ")
        found += [Drawn(one, after, event, why) for one in GROUPS.get(before, (before,))]
    return found


def events_without_edges() -> list[str]:
    """Return the names of the events of the second table."""
    return [name for name, _ in _rows("event")]


def mermaid() -> str:
    """Return the edges as the state diagram of docs/rollout.md, one arrow for two states."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for edge in edges():
        arrows.setdefault((edge.before, edge.after), []).append(edge.why)
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> idle"]
    for (before, after), whys in arrows.items():
        words = "<br>".join(re.sub(r"`|; ", lambda m: "" if m[0] == "`" else ", ", w) for w in whys)
        lines.append(f"    {before} --> {after}: {words}")
    return "\n".join([*lines, "```", ""])


def _rows(first: str) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table whose first column has this heading."""
    lines = iter((state_machine.__doc__ or "").splitlines())
    bar = ""
    for line in lines:
        if line.startswith(first) and bar:
            break
        bar = line if line.startswith("==") else ""
    begins = [match.start() for match in re.finditer(r"(?<!=)=", bar)]
    spans = list(pairwise([*begins, None]))
    assert next(lines) == bar
    row: list[str] = []
    for line in lines:
        cells = [line[begin:end].strip() for begin, end in spans]
        if line == bar or cells[0]:
            if row:
                yield tuple(row)
            row = cells
        else:
            row[-1] = f"{row[-1]} {cells[-1]}"
        if line == bar:
            return
