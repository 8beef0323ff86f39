"""When an environment takes no promotions: freezes by date, quiet hours by the week. Pure."""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from trainyard.errors import BadInput
from trainyard.spec.part import SpecPart

TIME_OF_DAY_PATTERN = r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$"
TIME_ZONE_PATTERN = r"^[A-Za-z][A-Za-z0-9_+-]{0,30}(/[A-Za-z0-9_+-]{1,30}){0,2}$"

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
TimeOfDay = Annotated[str, StringConstraints(pattern=TIME_OF_DAY_PATTERN)]

_HORIZON = timedelta(days=400)
"""Windows that follow each other for longer than this have no end that matters."""


class FreezeWindow(SpecPart):
    """A time in which an environment takes no promotions."""

    start: AwareDatetime
    """When it begins, with a time zone."""
    end: AwareDatetime
    """When it is over, with a time zone."""
    reason: str = Field(min_length=1, max_length=200)
    """Why, for people."""


class QuietHours(SpecPart):
    """Hours of the week in which an environment takes no promotions."""

    days: tuple[Day, ...] = Field(default=DAYS, min_length=1)
    """Days on which they begin."""
    start: TimeOfDay
    """When they begin, such as `18:00`."""
    end: TimeOfDay
    """When they are over, such as `24:00`; one that is not after `start` is on the next day."""
    time_zone: str = Field(default="UTC", pattern=TIME_ZONE_PATTERN)
    """Whose hours these are, such as `Europe/Berlin`."""
    reason: str = Field(default="", max_length=200)
    """Why, for people."""


@dataclass(frozen=True)
class Closure:
    """An environment takes no promotions now."""

    until: datetime
    """When it takes them again (UTC); windows that follow without a gap count."""
    reason: str
    """Half a sentence about the window that is open now."""


def closure_at(
    freeze: Sequence[FreezeWindow], quiet_hours: Sequence[QuietHours], now: datetime
) -> Closure | None:
    """Return why promotions are held at `now`, and until when; None if they are not.

    Args:
        freeze: windows by date.
        quiet_hours: windows by the week.
        now: with a time zone.

    Raises BadInput if a time zone is not known here.
    """
    until, reason = now.astimezone(UTC), ""
    while until - now < _HORIZON:
        found = max(_windows_at(freeze, quiet_hours, until), default=None)
        if found is None:
            break
        until, reason = found[0], reason or found[1]
    return Closure(until, reason) if reason else None


def time_zone(name: str) -> tzinfo:
    """Return a time zone. Raises BadInput if it is not known here."""
    if name == "UTC":  # known without a database of time zones, which small images lack
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, OSError) as error:
        raise BadInput(
            f"There is no time zone {name!r}.",
            hint="Write a name of the IANA database, such as `Europe/Berlin`."
            if has_time_zones()
            else "This machine has no database of time zones; install the package tzdata.",
        ) from error


def has_time_zones() -> bool:
    """Tell whether this machine has a database of time zones at all; small images do not."""
    try:
        zoneinfo.ZoneInfo("Etc/UTC")
    except (zoneinfo.ZoneInfoNotFoundError, OSError):
        return False
    return True


def never_opens(quiet_hours: Sequence[QuietHours]) -> bool:
    """Tell whether quiet hours leave no minute of the week. Raises as `closure_at`."""
    begin = datetime(2026, 1, 5, tzinfo=UTC)
    closure = closure_at((), quiet_hours, begin)
    return closure is not None and closure.until - begin > timedelta(days=14)


def _windows_at(
    freeze: Iterable[FreezeWindow], quiet_hours: Iterable[QuietHours], now: datetime
) -> Iterator[tuple[datetime, str]]:
    """Yield the end and the words of every window that is open at `now`."""
    for window in freeze:
        if window.start <= now < window.end:
            yield window.end.astimezone(UTC), f"it is frozen ({window.reason})"
    for hours in quiet_hours:
        for begin, end in _around(hours, now):
            if begin <= now < end:
                what = f"{hours.start} to {hours.end} {hours.time_zone}"
                why = f": {hours.reason}" if hours.reason else ""
                yield end.astimezone(UTC), f"these are its quiet hours ({what}{why})"


def _around(hours: QuietHours, now: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Yield the quiet hours that begin today or began yesterday, by their own calendar."""
    zone = time_zone(hours.time_zone)
    today = now.astimezone(zone).date()
    for day in (today - timedelta(days=1), today):
        if DAYS[day.weekday()] in hours.days:
            # Text of this form has the order of the times.
            last = day + timedelta(days=hours.end <= hours.start)
            yield _moment(day, hours.start, zone), _moment(last, hours.end, zone)


def _moment(day: date, clock: str, zone: tzinfo) -> datetime:
    if clock == "24:00":
        day, clock = day + timedelta(days=1), "00:00"
    return datetime.combine(day, time.fromisoformat(clock), zone).astimezone(UTC)
