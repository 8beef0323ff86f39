"""Which token a penalty must bring follows from the log-probabilities without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.unit.measure.behaviour.some_answers import BROKE_DOWN, NEAR_TIE, said

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import Answer
from trainyard.measure.behaviour.penalties import Penalised, judge

CLOSE = {"5": -0.2, "6": -1.2, "7": -4.0}
"""After one 5, a penalty of 2 makes 6 the best."""
FAR = {"5": -0.001, "6": -7.0, "7": -9.0}
"""It takes four of them under the frequency penalty, and none is enough for the other one."""


def verdict(
    penalty: str, plain: str, ranked: Mapping[str, float] | None, found: Answer
) -> BehaviourCase:
    answer = said(plain, [ranked] * len(plain) if ranked else [])
    (case,) = judge([Penalised("a prompt", penalty, answer, found)], NEAR_TIE)
    return case


def test_a_penalty_that_brings_the_next_best_token_holds() -> None:
    case = verdict("presence_penalty", "555", CLOSE, said("566"))
    assert case.outcome == "held"
    assert case.expected == "another token than without it, at the latest at token 2"


def test_a_penalty_that_changes_nothing_is_broken() -> None:
    case = verdict("presence_penalty", "555", CLOSE, said("555"))
    assert case.outcome == "broken"
    assert case.came.endswith("as without it")
    assert case.sent == "the prompt 'a prompt' with presence_penalty 2.0"


def test_a_penalty_that_changes_too_late_is_broken() -> None:
    assert verdict("frequency_penalty", "5555", CLOSE, said("5556")).outcome == "broken"


def test_a_penalty_that_brings_a_bad_token_is_broken() -> None:
    assert verdict("presence_penalty", "555", CLOSE, said("577")).outcome == "broken"


def test_a_change_before_anything_was_repeated_is_broken() -> None:
    assert verdict("presence_penalty", "555", CLOSE, said("655")).outcome == "broken"


def test_the_frequency_penalty_grows_with_each_repetition() -> None:
    assert verdict("frequency_penalty", "55555", FAR, said("55556")).outcome == "held"
    assert verdict("frequency_penalty", "55555", FAR, said("55555")).outcome == "broken"


def test_a_penalty_that_need_not_change_anything_tells_nothing() -> None:
    assert verdict("presence_penalty", "55555", FAR, said("55555")).outcome == "unclear"


def test_without_log_probabilities_only_many_repetitions_tell() -> None:
    assert verdict("frequency_penalty", "5" * 12, None, said("5" * 12)).outcome == "broken"
    assert verdict("frequency_penalty", "5" * 12, None, said("556" * 4)).outcome == "held"
    assert verdict("frequency_penalty", "555", None, said("555")).outcome == "unclear"
    assert verdict("presence_penalty", "5" * 12, None, said("5" * 12)).outcome == "unclear"


def test_a_refused_penalty_is_broken() -> None:
    assert verdict("frequency_penalty", "555", CLOSE, BROKE_DOWN).outcome == "broken"


def repetition(*answers: tuple[Answer, Answer]) -> BehaviourCase:
    asked: Sequence[Penalised] = [
        Penalised("a prompt", "repetition_penalty", plain, found) for plain, found in answers
    ]
    (case,) = judge(asked, NEAR_TIE)
    return case


def test_a_repetition_penalty_changes_at_least_one_answer_that_repeats() -> None:
    same, other = (said("1212"), said("1212")), (said("1313"), said("1345"))
    assert repetition(same, other).outcome == "held"
    assert repetition(same, same).outcome == "broken"
    assert repetition((said("1234"), said("1234"))).outcome == "unclear"
    assert repetition(other, (said("11"), BROKE_DOWN)).outcome == "broken"
