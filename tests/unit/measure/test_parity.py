"""A served answer is compared with what the reference would have said after the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.documents.parity import (
    ParityFigures,
    Reference,
    ReferenceAnswer,
    ReferencePosition,
    ReferenceSettings,
    ServedAnswer,
)
from trainyard.errors import Refused
from trainyard.measure import parity as module
from trainyard.measure.parity import Rescore, collect, compare, request_body, served_answer

PROMPT = (7, 8)
SETTINGS = ReferenceSettings(
    dtype="float32", served_dtype="bfloat16", prompts_digest="p", max_tokens=8
)


def position(best: int, *, second: int = 99, gap: float = 4.0) -> ReferencePosition:
    """Return a position whose best token is `gap` nats ahead of the second."""
    return ReferencePosition(tokens=(best, second), logprobs=(-0.1, -0.1 - gap))


def answer(*tokens: int, gap: float = 4.0) -> ReferenceAnswer:
    return ReferenceAnswer(
        prompt_tokens=PROMPT,
        tokens=tokens,
        positions=tuple(position(token, gap=gap) for token in tokens),
    )


def reference(*answers: ReferenceAnswer) -> Reference:
    return Reference(checkpoint_digest="c", settings=SETTINGS, answers=answers)


def served(*tokens: int, prompt: tuple[int, ...] = PROMPT) -> ServedAnswer:
    return ServedAnswer(prompt_tokens=prompt, tokens=tokens)


def knows(*best: int, gap: float = 4.0) -> Rescore:
    """Return a reference that is asked again and would have said `best`."""

    def rescore(prompt: Sequence[int], tokens: Sequence[int]) -> list[ReferencePosition]:
        assert tuple(prompt) == PROMPT
        return [position(each, gap=gap) for each in best]

    return rescore


def figures(
    right: Reference | ReferenceAnswer, *answers: ServedAnswer, rescore: Rescore | None = None
) -> ParityFigures:
    made = right if isinstance(right, Reference) else reference(right)
    return compare(
        made, answers, key="references/c/s.json", near_tie=0.5, top_logprobs=0, rescore=rescore
    ).figures


def test_the_same_answer_agrees_everywhere_and_the_model_is_not_asked() -> None:
    def never(prompt: Sequence[int], tokens: Sequence[int]) -> Sequence[ReferencePosition]:
        raise AssertionError("asked for nothing")

    found = figures(answer(1, 2, 3), served(1, 2, 3), rescore=never)
    assert (found.compared, found.agreed, found.excused) == (3, 3, 0)
    assert (found.agreement, found.exact_answers, found.first_divergence) == (1.0, 1.0, 3)
    assert found.divergences == ()


def test_one_wrong_token_is_one_divergence_if_the_rest_follows_from_it() -> None:
    found = figures(answer(1, 2, 3, 4), served(1, 5, 6, 7), rescore=knows(1, 2, 6, 7))
    assert (found.compared, found.agreed, found.excused) == (4, 3, 0)
    assert found.first_divergence == 1
    (divergence,) = found.divergences
    assert (divergence.position, divergence.served, divergence.expected) == (2, 5, 2)


def test_a_near_tie_excuses_the_second_best_token_and_no_other() -> None:
    close = answer(1, 2, gap=0.4)
    assert figures(close, served(1, 99), rescore=knows(1, 2, gap=0.4)).agreement == 1.0
    found = figures(close, served(1, 98), rescore=knows(1, 2, gap=0.4))
    assert (found.agreed, found.excused, found.agreement) == (1, 0, 0.5)
    assert figures(answer(1, 2), served(1, 99), rescore=knows(1, 2)).agreement == 0.5


def test_the_gap_must_be_below_the_tolerance() -> None:
    at = answer(1, 2, gap=0.5)
    assert figures(at, served(1, 99), rescore=knows(1, 2, gap=0.5)).excused == 0


def test_an_answer_that_ends_too_early_or_goes_on_diverges_there() -> None:
    short = figures(answer(1, 2, 3), served(1, 2))
    assert (short.compared, short.agreed, short.first_divergence) == (3, 2, 2)
    assert short.divergences[0].served is None
    longer = figures(answer(1, 2), served(1, 2, 3, 4), rescore=knows(1, 2, 9, 4))
    assert (longer.compared, longer.agreed, longer.first_divergence) == (4, 3, 2)
    assert longer.divergences[0].expected is None


def test_an_imported_reference_judges_up_to_the_first_divergence() -> None:
    found = figures(answer(1, 2, 3, 4), served(1, 5, 6, 7))
    assert (found.compared, found.agreed, found.uncompared) == (2, 1, 2)
    assert found.excused_share == 0.5


def test_an_answer_to_other_tokens_is_wrong_everywhere() -> None:
    found = figures(answer(1, 2), served(1, 2, prompt=(7, 9)))
    assert (found.prompt_agreement, found.agreement, found.exact_answers) == (0.0, 0.0, 0.0)
    assert found.first_divergence == 0


def test_positions_are_counted_over_all_answers() -> None:
    made = reference(answer(1, 2, 3), answer(4, 5))
    found = figures(made, served(1, 2, 3), served(4, 6), rescore=knows(4, 5))
    assert [(each.compared, each.agreed) for each in found.by_position] == [(2, 2), (2, 1), (1, 1)]
    assert found.exact_answers == 0.5


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
def test_every_position_is_counted_once(right: list[int], tokens: list[int]) -> None:
    def rescore(prompt: Sequence[int], asked: Sequence[int]) -> list[ReferencePosition]:
        return [position(each % 5) for each in asked]

    comparison = compare(
        reference(answer(*right)),
        [served(*tokens)],
        key="k",
        near_tie=0.5,
        top_logprobs=0,
        rescore=rescore,
    )
    found, (one,) = comparison.figures, comparison.answers
    assert found.compared == sum(each.compared for each in found.by_position)
    assert found.agreed == one.agreed
    assert found.compared == one.agreed + one.excused + one.diverged
    assert max(len(tokens), 1) <= found.compared <= max(len(tokens), len(right))
    assert (found.agreement == 1.0) == (not found.divergences)


def with_logprobs(shift: float, *, rounded: float = 0.0) -> tuple[Reference, ServedAnswer]:
    """Return a reference and an answer whose log-probs are all off by `shift`."""
    positions = tuple(
        ReferencePosition(
            tokens=(token, 99), logprobs=(-0.1, -3.0), rounded=(-0.1 + rounded, -3.0 + rounded)
        )
        for token in (1, 2)
    )
    right = ReferenceAnswer(prompt_tokens=PROMPT, tokens=(1, 2), positions=positions)
    top = tuple({token: -0.1 + shift, 99: -3.0 + shift, 5: -4.0} for token in (1, 2))
    return reference(right), ServedAnswer(prompt_tokens=PROMPT, tokens=(1, 2), top=top)


def compared(shift: float, *, rounded: float = 0.0, top_logprobs: int = 3) -> ParityFigures:
    right, seen = with_logprobs(shift, rounded=rounded)
    return compare(
        right, [seen], key="k", near_tie=0.5, top_logprobs=top_logprobs, rescore=None
    ).figures


def test_errors_of_log_probs_are_told_in_nats_and_in_units_of_rounding() -> None:
    found = compared(0.06, rounded=0.03)
    assert found.logprob_error == pytest.approx(0.06)
    assert found.rounding_error == pytest.approx(0.03)
    assert found.error_ratio == pytest.approx(2.0)


def test_without_log_probs_or_rounding_there_is_no_ratio() -> None:
    assert compared(0.06, rounded=0.0).error_ratio is None
    silent = compared(0.06, rounded=0.03, top_logprobs=0)
    assert (silent.logprob_error, silent.error_ratio, silent.top_logprobs) == (None, None, 0)


def test_log_probs_after_a_divergence_are_of_another_text_and_do_not_count() -> None:
    right, seen = with_logprobs(0.0)
    other = seen.model_copy(update={"tokens": (5, 2), "top": ({1: -0.1}, {2: -9.0})})
    found = compare(
        right, [other], key="k", near_tie=0.5, top_logprobs=2, rescore=knows(1, 2)
    ).figures
    assert found.logprob_error == pytest.approx(0.0)


@pytest.mark.parametrize("answers", [(), (served(1), served(1))])
def test_another_number_of_answers_than_prompts_is_no_measurement(
    answers: tuple[ServedAnswer, ...],
) -> None:
    with pytest.raises(Refused, match="answers came back for 1 prompts"):
        figures(answer(1), *answers)


def test_a_request_overrides_what_the_model_s_files_prefer() -> None:
    body = request_body("12+34=", "adder", 8, 0)
    assert (body["temperature"], body["repetition_penalty"], body["top_p"]) == (0, 1, 1)
    assert "logprobs" not in body
    assert request_body("12+34=", "adder", 8, 5)["logprobs"] == 5


RESPONSE: dict[str, Any] = {
    "choices": [
        {
            "prompt_token_ids": [7, 8],
            "token_ids": [1],
            "logprobs": {"top_logprobs": [{"token_id:1": -0.25, "token_id:3": -1.5}]},
        }
    ]
}


def test_a_response_is_read_by_token_ids() -> None:
    found = served_answer(RESPONSE)
    assert (found.prompt_tokens, found.tokens) == ((7, 8), (1,))
    assert found.top == ({1: -0.25, 3: -1.5},)


@pytest.mark.parametrize(
    "response", [{}, {"choices": []}, {"choices": [{"text": "640."}]}], ids=str
)
def test_a_response_without_token_ids_cannot_be_compared(response: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="without token ids"):
        served_answer(response)


@pytest.fixture
def answers_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the server answer in some way."""

    def install(answer: Any) -> None:
        real = httpx.Client
        monkeypatch.setattr(
            module.httpx,
            "Client",
            lambda **options: real(transport=httpx.MockTransport(answer)),
        )

    return install


def ask(*prompts: str) -> list[ServedAnswer]:
    return collect(
        prompts, base_url="http://server", served_model_name="m", max_tokens=4, top_logprobs=2
    )


def test_answers_come_in_the_order_of_the_prompts(answers_with: Any) -> None:
    def answer_one(request: httpx.Request) -> httpx.Response:
        number = int(request.read().decode().split('"prompt":"')[1].split('"')[0])
        choice = {**RESPONSE["choices"][0], "token_ids": [number]}
        return httpx.Response(200, json={"choices": [choice]})

    answers_with(answer_one)
    assert [each.tokens for each in ask("3", "1", "2")] == [(3,), (1,), (2,)]


def test_a_refused_prompt_ends_the_measurement(answers_with: Any) -> None:
    answers_with(lambda request: httpx.Response(400, text="too long"))
    with pytest.raises(Refused, match="400: too long"):
        ask("1")


def test_a_lost_connection_ends_the_measurement(answers_with: Any) -> None:
    def lose(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("gone")

    answers_with(lose)
    with pytest.raises(Refused, match="did not answer"):
        ask("1")


def test_a_single_known_token_is_ahead_of_all_others() -> None:
    assert math.isinf(ReferencePosition(tokens=(1,), logprobs=(0.0,)).gap)
