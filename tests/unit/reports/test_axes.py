"""Axes hold their values, and their marks are round."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.reports.axes import Axis, figure, linear_axis, log_axis

VALUES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=20)


@given(VALUES)
def test_a_logarithmic_axis_holds_its_values_between_round_ends(values: list[float]) -> None:
    axis = log_axis(values, 300.0)

    assert axis.low <= min(values) * (1 + 1e-9)
    assert axis.high >= max(values) * (1 - 1e-9)
    assert axis.low < axis.high
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 300 for place in places)
    ticks = axis.ticks(7)
    assert 1 <= len(ticks) <= 8
    assert len({tick.label for tick in ticks}) == len(ticks)


@given(VALUES)
def test_a_linear_axis_begins_at_nothing(values: list[float]) -> None:
    axis = linear_axis(values, 300.0)

    assert axis.place(0.0) == 0.0
    assert axis.place(max(values)) <= 300.0
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert ticks[0].label == "0"
    assert [tick.at for tick in ticks] == sorted(tick.at for tick in ticks)


def test_a_vertical_axis_runs_from_the_bottom_up() -> None:
    axis = Axis(0.0, 100.0, 150.0, is_vertical=True)

    assert (axis.place(0), axis.place(100), axis.place(1000)) == (150.0, 0.0, 0.0)


def test_marks_of_a_logarithmic_axis_are_thinned() -> None:
    narrow = log_axis([120.0, 900.0], 300.0)
    wide = log_axis([0.5, 3_000_000.0], 300.0)

    assert [tick.label for tick in narrow.ticks()] == ["100", "200", "500", "1,000"]
    assert [tick.label for tick in wide.ticks()] == ["1", "100", "10,000", "1,000,000"]


@pytest.mark.parametrize("values", [[], [0.0], [math.nan]])
def test_an_axis_without_values_is_still_one(values: list[float]) -> None:
    for axis in (log_axis(values, 300.0), linear_axis(values, 300.0)):
        assert axis.low < axis.high


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.25, "0.25"), (12.0, "12"), (1234.5, "1.23e+03"), (12345.6, "12,346")],
)
def test_figures_are_short(value: float, text: str) -> None:
    assert figure(value) == text
