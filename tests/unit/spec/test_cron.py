"""Cron expressions: a strict subset of what Airflow's own parser accepts."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from croniter import croniter
from hypothesis import given
from hypothesis import strategies as st

from trainyard.spec.cron import cron_problem


@pytest.mark.parametrize(
    "expression",
    [
        "* * * * *",
        "0 3 * * mon",
        "*/15 0-6/2 1,15 jan-mar,dec mon-fri",
        "59 23 31 12 6",
        "0 0 29 2 *",
        "0 0 31 * 0",
    ],
)
def test_plain_expressions(expression: str) -> None:
    assert cron_problem(expression) is None


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "0 fields"),
        ("@daily", "1 fields"),
        ("* * * * * *", "6 fields"),
        ("60 * * * *", "'60' is no minute (0 to 59)"),
        ("* 24 * * *", "no hour"),
        ("* * 0 * *", "no day of the month"),
        ("* * * 13 *", "no month"),
        ("* * * * 7", "no day of the week"),
        ("* * * * foo", "no day of the week"),
        ("5-1 * * * *", "'5-1'"),
        ("*/0 * * * *", "'*/0'"),
        ("*/99 * * * *", "'*/99'"),
        ("5/10 * * * *", "'5/10'"),
        ("*-5 * * * *", "'*-5'"),
        ("1,,2 * * * *", "''"),
        ("0 0 L * *", "'l'"),
        ("0 0 30 2 *", "none of its months"),
        ("0 0 31 4,6,sep *", "none of its months"),
    ],
)
def test_everything_else(expression: str, words: str) -> None:
    problem = cron_problem(expression)

    assert problem is not None
    assert words in problem


def field(lowest: int, highest: int) -> st.SearchStrategy[str]:
    number = st.integers(lowest - 1, highest + 1)
    item = st.one_of(
        st.just("*"),
        number.map(str),
        st.tuples(number, number).map(lambda pair: f"{pair[0]}-{pair[1]}"),
        number.map(lambda step: f"*/{step}"),
        st.tuples(number, number, number).map(lambda t: f"{t[0]}-{t[1]}/{t[2]}"),
    )
    return st.lists(item, min_size=1, max_size=3).map(",".join)


@given(st.tuples(field(0, 59), field(0, 23), field(1, 31), field(1, 12), field(0, 6)))
def test_what_is_accepted_has_a_next_time_in_airflow(fields: tuple[str, ...]) -> None:
    expression = " ".join(fields)
    if cron_problem(expression) is None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        assert croniter(expression, start).get_next(datetime) > start
