"""A batch and a queue change no answer."""

from __future__ import annotations

from collections.abc import Sequence

from tests.unit.measure.behaviour.some_answers import NEAR_TIE, NOTHING, said

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import Answer
from trainyard.measure.behaviour.batching import (
    Asked,
    judge_batching,
    judge_concurrency,
    over_batch,
)
from trainyard.measure.behaviour.setting import Setting

SETTING = Setting(
    max_model_len=16,
    max_num_seqs=2,
    block_size=8,
    prefix_caching=True,
    near_tie=NEAR_TIE,
    vocabulary=(0, 1),
    probes=("a", "b"),
)
ALONE = (Asked("a", said("1234")), Asked("b", said("5678")))


def together(*answers: Answer) -> list[Asked]:
    return [Asked(f"prompt {number}", answer) for number, answer in enumerate(answers)]


def outcomes(cases: Sequence[BehaviourCase]) -> list[str]:
    return [case.outcome for case in cases]


def test_the_same_answers_in_a_batch_hold() -> None:
    cases = judge_batching(ALONE, together(said("1234"), said("5678"), said("9")), NEAR_TIE)
    assert outcomes(cases) == ["held", "held"]
    assert cases[0].sent == "the prompt 'a', among 3 requests at once"


def test_another_answer_in_a_batch_is_broken() -> None:
    cases = judge_batching(ALONE, together(said("1234"), said("5000")), NEAR_TIE)
    assert outcomes(cases) == ["held", "broken"]


def test_the_queue_is_longer_than_the_batch() -> None:
    assert over_batch(SETTING) == 4


def test_all_answers_of_a_queue_hold() -> None:
    answers = together(said("1234"), said("5678"), said("abcd"))
    assert outcomes(judge_concurrency(ALONE, answers, SETTING, NEAR_TIE)) == ["held"] * 3


def test_a_request_that_is_lost_in_the_queue_is_named() -> None:
    answers = together(said("1234"), said("5678"), NOTHING)
    (case,) = judge_concurrency(ALONE, answers, SETTING, NEAR_TIE)
    assert case.outcome == "broken"
    assert case.came == "2 whole answers; the prompt 'prompt 2' got no answer: ReadTimeout"


def test_half_an_answer_is_no_answer() -> None:
    answers = together(said("1234"), said("5678"), said("ab"))
    assert outcomes(judge_concurrency(ALONE, answers, SETTING, NEAR_TIE))[0] == "broken"
