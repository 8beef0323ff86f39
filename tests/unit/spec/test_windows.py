"""Freezes and quiet hours: when an environment takes no promotions, and until when."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfoNotFoundError

import pytest

from trainyard.errors import BadInput
from trainyard.spec.check import check_files
from trainyard.spec.loader import load_environments
from trainyard.spec.windows import (
    Closure,
    FreezeWindow,
    QuietHours,
    closure_at,
    never_opens,
    time_zone,
)

WEEKEND = QuietHours(days=("sat", "sun"), start="00:00", end="24:00")
NIGHTS = QuietHours(start="22:00", end="06:00", time_zone="Europe/Berlin", reason="no one is up")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def freeze(start: str, end: str) -> FreezeWindow:
    return FreezeWindow(start=at(start), end=at(end), reason="release of the website")


def test_without_windows_an_environment_is_open() -> None:
    assert closure_at((), (), at("2026-03-07T12:00")) is None


@pytest.mark.parametrize(
    ("now", "held"),
    [
        ("2026-12-18T17:59:59", False),
        ("2026-12-18T18:00:00", True),
        ("2027-01-04T07:59:59", True),
        ("2027-01-04T08:00:00", False),
    ],
)
def test_a_freeze_holds_from_its_start_to_before_its_end(now: str, held: bool) -> None:
    window = freeze("2026-12-18T18:00", "2027-01-04T08:00")
    closure = closure_at((window,), (), at(now))
    expected = Closure(at("2027-01-04T08:00"), "it is frozen (release of the website)")
    assert closure == (expected if held else None)


@pytest.mark.parametrize(
    ("now", "until"),
    [
        # Winter: Berlin is an hour ahead of UTC.
        ("2026-01-14T20:59", None),
        ("2026-01-14T21:00", "2026-01-15T05:00"),
        ("2026-01-15T04:59", "2026-01-15T05:00"),
        ("2026-01-15T05:00", None),
        # Summer: two hours.
        ("2026-07-14T20:00", "2026-07-15T04:00"),
        # The night in which clocks go forward is an hour shorter.
        ("2026-03-28T21:30", "2026-03-29T04:00"),
    ],
)
def test_quiet_hours_follow_their_own_clock_over_midnight(now: str, until: str | None) -> None:
    closure = closure_at((), (NIGHTS,), at(now))
    assert (closure and closure.until) == (at(until) if until else None)


def test_windows_that_follow_each_other_are_one() -> None:
    """A freeze that begins in the weekend holds on to the end of the freeze."""
    window = freeze("2026-03-08T20:00", "2026-03-09T10:00")
    closure = closure_at((window,), (WEEKEND,), at("2026-03-07T12:00"))
    assert closure == Closure(
        at("2026-03-09T10:00"), "these are its quiet hours (00:00 to 24:00 UTC)"
    )


def test_the_reason_is_that_of_the_present_window() -> None:
    closure = closure_at((), (NIGHTS,), at("2026-01-14T23:00"))
    assert closure is not None
    assert (
        closure.reason == "these are its quiet hours (22:00 to 06:00 Europe/Berlin: no one is up)"
    )


def test_hours_that_leave_nothing_are_told_from_those_that_do() -> None:
    assert never_opens((QuietHours(start="00:00", end="24:00"),))
    assert never_opens(
        (QuietHours(start="00:00", end="12:00"), QuietHours(start="12:00", end="00:00"))
    )
    assert not never_opens((WEEKEND, NIGHTS))


def test_utc_needs_no_database_of_time_zones() -> None:
    assert time_zone("UTC") is UTC
    with pytest.raises(BadInput, match="Mars/Olympus"):
        time_zone("Mars/Olympus")


def test_an_image_without_time_zones_still_reads_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard and servers need the rest of the file, and ask for no window."""

    def absent(name: str) -> None:
        raise ZoneInfoNotFoundError(name)

    monkeypatch.setattr("zoneinfo.ZoneInfo", absent)
    path = tmp_path / "environments.yaml"
    hours = '{start: "22:00", end: "06:00", time_zone: Europe/Berlin}'
    path.write_text(
        f"schema: trainyard/v1\nenvironments:\n  one: {{target: cpu, quiet_hours: [{hours}]}}\n"
    )
    assert check_files([path]) == []
    with pytest.raises(BadInput) as refused:
        load_environments(path).environments["one"].closure(at("2026-01-14T23:00"))
    assert "install the package tzdata" in refused.value.hint


WRONG = """\
schema: trainyard/v1
environments:
  production:
    target: cpu
    freeze:
      - {start: 2026-12-18T18:00:00Z, end: 2026-12-18T18:00:00Z, reason: none}
      - {start: 2026-12-18, end: 2026-12-19T00:00:00Z, reason: no time}
    quiet_hours:
      - {start: "18:00", end: "18:00"}
      - {start: "25:00", end: "06:00"}
      - {start: "18:00", end: "24:00", time_zone: Europe/Atlantis, days: [friday]}
  always:
    target: cpu
    quiet_hours: [{start: "00:00", end: "24:00"}]
"""


def test_mistakes_are_named_with_what_would_be_right(tmp_path: Path) -> None:
    path = tmp_path / "environments.yaml"
    path.write_text(WRONG)
    found = {problem.key: str(problem) for problem in check_files([path])}
    production = "environments.production"
    assert set(found) == {
        f"{production}.freeze[1].start",
        f"{production}.quiet_hours[0].end",
        f"{production}.quiet_hours[1].start",
        f"{production}.quiet_hours[2].time_zone",
        f"{production}.quiet_hours[2].days[0]",
        "environments.always.quiet_hours",
    }
    assert "such as `2026-12-01T11:30:00Z`" in found[f"{production}.freeze[1].start"]
    assert "hours and minutes in quotes" in found[f"{production}.quiet_hours[1].start"]
    assert "such as `Europe/Berlin`" in found[f"{production}.quiet_hours[2].time_zone"]
    assert "no minute of the week" in found["environments.always.quiet_hours"]


def test_a_freeze_that_ends_before_it_begins_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "environments.yaml"
    path.write_text("\n".join(WRONG.splitlines()[:6]) + "\n")
    (problem,) = check_files([path])
    assert problem.key == "environments.production.freeze[0].end"
