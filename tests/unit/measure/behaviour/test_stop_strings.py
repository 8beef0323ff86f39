"""An answer with a stop string is the one without it, cut."""

from __future__ import annotations

import pytest
from tests.unit.measure.behaviour.some_answers import BROKE_DOWN, NEAR_TIE, said

from trainyard.measure.behaviour.answers import Answer
from trainyard.measure.behaviour.stop_strings import Stopped, judge, stop_of

WHOLE = said("640.12")


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("640.12", "40"),
        ("aaab", "ab"),
        ("aa", "aa"),
        ("a  \n b", " b"),
        ("a\ufffdb", ""),
        ("a", ""),
        ("", ""),
    ],
)
def test_a_stop_string_is_seen_for_the_first_time_where_it_is_taken(text: str, stop: str) -> None:
    assert stop_of(text) == stop


def outcomes(plain: Answer, streamed: Answer) -> list[str]:
    asked = [Stopped("a prompt", "0.", WHOLE, plain, streamed)]
    return [case.outcome for case in judge(asked, NEAR_TIE)]


def test_answers_that_end_before_the_stop_string_hold() -> None:
    cut = said("64", finish_reason="stop")
    assert outcomes(cut, cut) == ["held", "held"]


def test_an_answer_that_goes_on_is_broken() -> None:
    assert outcomes(WHOLE, said("64", finish_reason="stop")) == ["broken", "held"]


def test_an_answer_that_shows_the_stop_string_or_half_of_it_is_broken() -> None:
    assert outcomes(said("640.", finish_reason="stop"), said("640", finish_reason="stop")) == [
        "broken",
        "broken",
    ]


def test_an_answer_that_stops_for_another_reason_is_broken() -> None:
    assert outcomes(said("64"), BROKE_DOWN) == ["broken", "broken"]


def test_another_answer_at_a_near_tie_tells_nothing() -> None:
    whole = said("60.", [{"6": -0.7, "7": -0.8}, {"0": 0.0}, {".": 0.0}])
    asked = [Stopped("a prompt", "0.", whole, said("712"), said("6", finish_reason="stop"))]
    assert [case.outcome for case in judge(asked, NEAR_TIE)] == ["unclear", "held"]


def test_answers_without_text_tell_nothing() -> None:
    (case,) = judge([], NEAR_TIE)
    assert case.outcome == "unclear"
