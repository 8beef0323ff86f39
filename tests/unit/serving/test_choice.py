"""Weights hold in every short run of requests."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trainyard.serving.choice import WeightedChoice


@given(
    weight=st.integers(1, 99),
    start=st.floats(0, 0.999),
    skip=st.integers(0, 300),
    length=st.integers(1, 500),
)
def test_every_run_of_requests_is_divided_by_weight(
    weight: int, start: float, skip: int, length: int
) -> None:
    choice = WeightedChoice(start)
    picks = [choice.choose({"a": 100 - weight, "b": weight}) for _ in range(skip + length)]
    share = picks[skip:].count("b")
    assert abs(share - length * weight / 100) < 4


@given(period=st.integers(2, 50), phase=st.integers(0, 49))
def test_a_client_with_a_rhythm_sees_the_same_weights(period: int, phase: int) -> None:
    choice = WeightedChoice()
    picks = [choice.choose({"a": 90, "b": 10}) for _ in range(period * 1000)]
    own = Counter(picks[phase % period :: period])
    assert 60 <= own["b"] <= 140


def test_nothing_goes_where_the_weight_is_zero() -> None:
    choice = WeightedChoice(0.999)
    assert {choice.choose({"a": 0, "b": 100, "c": 0}) for _ in range(1000)} == {"b"}


def test_without_weights_there_is_no_choice() -> None:
    assert WeightedChoice().choose({}) is None
    assert WeightedChoice().choose({"a": 0}) is None


def test_a_change_of_weights_holds_at_once() -> None:
    choice = WeightedChoice()
    before = [choice.choose({"a": 90, "b": 10}) for _ in range(100)]
    after = [choice.choose({"a": 50, "b": 50}) for _ in range(100)]
    assert abs(before.count("b") - 10) <= 2
    assert abs(after.count("b") - 50) <= 2
