"""A check of cron expressions: the plain five-field form that every scheduler reads alike.

Allowed in each field: `*`, a number, a range `a-b`, a step `*/n` or `a-b/n`, lists of these with
commas; months and days of the week also by their three-letter English names. Left out on purpose,
because schedulers disagree about them: `@daily`, `L`, `W`, `#`, `?`, a sixth field, ranges that
wrap around, names in steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONGEST_MONTH = {month: 30 if month in (4, 6, 9, 11) else 31 for month in range(1, 13)} | {2: 29}
_ITEM = re.compile(r"(\*|[0-9]{1,3}|[a-z]{3})(?:-([0-9]{1,3}|[a-z]{3}))?(?:/([0-9]{1,3}))?")


@dataclass(frozen=True)
class _Field:
    what: str
    lowest: int
    highest: int
    names: tuple[str, ...] = ()

    def number(self, text: str) -> int | None:
        """Return the number that `text` stands for; None if it is not one of this field."""
        if text in self.names:
            return self.names.index(text) + self.lowest
        if text.isdigit() and self.lowest <= int(text) <= self.highest:
            return int(text)
        return None


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of the week", 0, 6, _DAYS),
)


def cron_problem(expression: str) -> str | None:
    """Return what is wrong with a cron expression, one sentence; None if it is fine."""
    parts = expression.lower().split()
    if len(parts) != len(_FIELDS):
        return f"{expression!r} has {len(parts)} fields; a cron expression has five."
    values: list[set[int]] = []
    for field, part in zip(_FIELDS, parts, strict=True):
        allowed: set[int] = set()
        for item in part.split(","):
            numbers = _numbers(field, item)
            if numbers is None:
                return f"{item!r} is no {field.what} ({field.lowest} to {field.highest})."
            allowed |= numbers
        values.append(allowed)
    if parts[4] == "*" and not _some_month_has(values[2], values[3]):
        return f"{expression!r} names a day that none of its months has."
    return None


def _numbers(field: _Field, item: str) -> set[int] | None:
    """Return the numbers of one item of a field's list; None if it is not valid."""
    match = _ITEM.fullmatch(item)
    if match is None:
        return None
    start_text, end_text, step_text = match.groups()
    if start_text == "*":
        if end_text is not None:
            return None
        start, end = field.lowest, field.highest
    else:
        first = field.number(start_text)
        last = first if end_text is None else field.number(end_text)
        if first is None or last is None or last < first:
            return None
        if step_text is not None and end_text is None:  # `5/10`: read differently by schedulers
            return None
        start, end = first, last
    step = 1 if step_text is None else int(step_text)
    if not 1 <= step <= field.highest:
        return None
    return set(range(start, end + 1, step))


def _some_month_has(days: set[int], months: set[int]) -> bool:
    return any(min(days) <= _LONGEST_MONTH[month] for month in months)
