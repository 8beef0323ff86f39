"""Streaming, lengths and cancelled requests."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.measure.behaviour.some_answers import (
    BROKE_DOWN,
    NEAR_TIE,
    NOTHING,
    REFUSED,
    said,
)
from tests.unit.measure.behaviour.test_batching import SETTING

from trainyard.measure.behaviour import cancellation, longest_prompt, streaming
from trainyard.measure.behaviour.answers import Answer
from trainyard.measure.behaviour.batching import Asked
from trainyard.measure.behaviour.cancellation import Cancelled, Left
from trainyard.measure.behaviour.client import Counts
from trainyard.measure.behaviour.longest_prompt import Lengths
from trainyard.measure.behaviour.streaming import Streamed


@pytest.mark.parametrize(
    ("streamed", "outcome"),
    [
        (said("640."), "held"),
        (said("60."), "broken"),
        (replace(said("640."), text="64 0."), "broken"),
        (said("640.", finish_reason="stop"), "broken"),
        (Answer(200, "640.", error="the stream ended without [DONE]"), "broken"),
    ],
)
def test_a_streamed_answer_is_the_same(streamed: Answer, outcome: str) -> None:
    (case,) = streaming.judge([Streamed("a prompt", said("640."), streamed)], NEAR_TIE)
    assert case.outcome == outcome


GOOD = Lengths(said("1"), REFUSED, True, said("1"))


@pytest.mark.parametrize(
    ("lengths", "outcomes"),
    [
        (GOOD, ["held", "held", "held"]),
        (replace(GOOD, longest=REFUSED), ["broken", "held", "held"]),
        (replace(GOOD, over=BROKE_DOWN), ["held", "broken", "held"]),
        (replace(GOOD, over=said("1")), ["held", "broken", "held"]),
        (replace(GOOD, over=Answer(400)), ["held", "broken", "held"]),
        (replace(GOOD, over=NOTHING, healthy=False), ["held", "broken", "broken"]),
        (replace(GOOD, after=BROKE_DOWN), ["held", "held", "broken"]),
    ],
)
def test_a_prompt_that_is_too_long_is_refused_and_nothing_else(
    lengths: Lengths, outcomes: list[str]
) -> None:
    cases = longest_prompt.judge(lengths, SETTING)
    assert [case.outcome for case in cases] == outcomes
    assert cases[1].sent == "a prompt of 16 tokens that asks for 1 (max_model_len is 16)"


def left(**after: int | None) -> Left:
    counts = {"running": 0, "waiting": 0, "finished": 10, **after}
    return Left(8, 8, 60, Counts(running=8, waiting=0, finished=10), Counts(**counts))


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (left(), "held"),
        (left(finished=12), "held"),
        (left(finished=13), "broken"),
        (left(running=1), "broken"),
        (left(waiting=2), "broken"),
        (replace(left(), begun=0), "broken"),
        (left(finished=None), "unclear"),
        (left(running=None, waiting=None), "unclear"),
    ],
)
def test_nothing_runs_on_for_clients_that_are_gone(found: Left, outcome: str) -> None:
    expected = Asked("a prompt", said("640."))
    cases = cancellation.judge(Cancelled(found, True, expected, said("640.")), NEAR_TIE)
    assert [case.outcome for case in cases] == [outcome, "held"]


def test_a_leak_is_told_with_its_figures() -> None:
    expected = Asked("a prompt", said("640."))
    cancelled = Cancelled(left(running=3, finished=14), True, expected, said("640."))
    case, _ = cancellation.judge(cancelled, NEAR_TIE)
    assert case.came == "8 had begun, 3 run or wait 20 s later, 4 were worked on to their end"


@pytest.mark.parametrize(
    ("healthy", "answer"), [(False, said("640.")), (True, said("641.")), (True, NOTHING)]
)
def test_a_server_goes_on_after_clients_have_gone(healthy: bool, answer: Answer) -> None:
    expected = Asked("a prompt", said("640."))
    cases = cancellation.judge(Cancelled(left(), healthy, expected, answer), NEAR_TIE)
    assert [case.outcome for case in cases] == ["held", "broken"]
