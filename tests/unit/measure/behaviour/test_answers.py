"""Two answers are the same but for near ties; what parts them is told."""

from __future__ import annotations

import pytest
from tests.unit.measure.behaviour.some_answers import NEAR_TIE, NOTHING, said

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import (
    Answer,
    compare,
    describe,
    excused_without_ranks,
    same_case,
)

TIE = {"a": -0.7, "b": -0.9, "c": -4.0}


def case(expected: Answer, found: Answer) -> BehaviourCase:
    return same_case("a prompt", expected, found, near_tie=NEAR_TIE, expectation="the same")


def test_equal_answers_do_not_differ() -> None:
    assert compare(said("640."), said("640."), NEAR_TIE).kind == "none"


def test_another_likely_token_is_a_near_tie() -> None:
    found = compare(said("1a", [{"1": 0.0}, TIE]), said("1b"), NEAR_TIE)
    assert (found.kind, found.position) == ("near tie", 1)
    assert found.gap == pytest.approx(0.2)


def test_an_unlikely_token_is_a_real_difference() -> None:
    found = compare(said("a", [TIE]), said("c"), NEAR_TIE)
    assert found.kind == "real"
    assert found.words == "token 1 is c instead of a, which was 3.3 nats less likely"


def test_a_token_that_was_not_ranked_is_less_likely_than_the_last_that_was() -> None:
    assert compare(said("a", [TIE]), said("z"), NEAR_TIE).kind == "real"
    flat = {"a": -3.0, "b": -3.1, "c": -3.2}
    assert compare(said("a", [flat]), said("z"), NEAR_TIE).kind == "near tie"


def test_nothing_is_excused_without_log_probabilities_or_where_the_lane_is_exact() -> None:
    assert compare(said("a", []), said("b"), NEAR_TIE).kind == "real"
    assert compare(said("a", [TIE]), said("b"), 0.0).kind == "real"


def test_only_the_first_difference_counts() -> None:
    ranked = [TIE, {"x": 0.0}]
    assert compare(said("ax", ranked), said("by"), NEAR_TIE).kind == "near tie"


def test_a_shorter_answer_differs_where_it_ends() -> None:
    found = compare(said("640."), said("64"), NEAR_TIE)
    assert (found.kind, found.position) == ("real", 2)
    assert found.words == "2 tokens instead of 4"


def test_a_case_tells_what_was_sent_came_and_was_expected() -> None:
    found = case(said("640."), said("641."))
    assert found.outcome == "broken"
    assert found.sent == "a prompt"
    assert found.came.startswith("4 tokens, '641.' (length); token 3 is 1 instead of 0")
    assert found.expected == "the same: 4 tokens, '640.' (length)"


def test_a_near_tie_after_some_tokens_has_held_and_at_once_is_unclear() -> None:
    assert case(said("1a", [{"1": 0.0}, TIE]), said("1b")).outcome == "held"
    assert case(said("a", [TIE]), said("b")).outcome == "unclear"
    assert case(said(""), said("")).outcome == "unclear"


def test_no_answer_is_broken() -> None:
    found = case(said("640."), NOTHING)
    assert (found.outcome, found.came) == ("broken", "no answer: ReadTimeout")


@pytest.mark.parametrize(("broken", "excused"), [(1, True), (2, True), (3, False)])
def test_without_log_probabilities_a_quarter_may_differ(broken: int, excused: bool) -> None:
    cases = [case(said("1"), said("2" if number < broken else "1")) for number in range(8)]
    outcomes = [each.outcome for each in excused_without_ranks(cases)]
    assert outcomes[:broken] == ["unclear" if excused else "broken"] * broken
    assert set(outcomes[broken:]) == {"held"}


def test_prompts_are_named_by_their_beginning() -> None:
    assert describe("12+34=") == "the prompt '12+34='"
    assert describe(tuple(range(9))) == ("a prompt of 9 tokens ([0, 1, 2, 3, 4, 5, 6, 7, …])")
    assert len(describe("x" * 5000)) < 200
