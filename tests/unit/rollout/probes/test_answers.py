"""Which of two answers is wrong."""

from __future__ import annotations

import pytest

from trainyard.rollout.probes.answers import Answer, Prompt, compare, is_right, parse_prompts
from trainyard.spec.model import Scoring


def answer(text: str, tokens: tuple[int, ...] | None = None) -> Answer:
    return Answer(text=text, tokens=tokens, ttft_s=0.1, tpot_s=0.01)


@pytest.mark.parametrize(
    ("given", "scoring", "right"),
    [
        ("640", "exact", True),
        (" 640\n", "exact", True),
        ("640.", "exact", False),
        ("", "exact", False),
        ("640.", "starts_with", True),
        ("It is 640.", "starts_with", False),
        ("It is 640.", "contains", True),
        ("It is 046.", "contains", False),
    ],
)
def test_an_answer_is_right_by_its_reference(given: str, scoring: Scoring, right: bool) -> None:
    assert is_right(given, "640", scoring) is right


@pytest.mark.parametrize(
    ("stable", "candidate", "worse"),
    [
        ("1", "1", (False, False)),
        ("1", "2", (False, True)),
        ("2", "1", (True, False)),
        ("2", "3", (False, False)),
    ],
)
def test_only_pairs_with_one_right_answer_speak(
    stable: str, candidate: str, worse: tuple[bool, bool]
) -> None:
    prompt = Prompt("0+1=", "1")
    found = compare(prompt, answer(stable), answer(candidate), comparing="answers", scoring="exact")
    assert found == worse


def test_of_one_checkpoint_the_tokens_must_be_the_same_whatever_the_reference_says() -> None:
    prompt = Prompt("0+1=", "1")

    def found(stable: Answer, candidate: Answer) -> tuple[bool, bool] | None:
        return compare(prompt, stable, candidate, comparing="tokens", scoring="exact")

    assert found(answer("9", (5, 6)), answer("9", (5, 6))) == (False, False)
    assert found(answer("9", (5, 6)), answer("9", (5, 7))) == (False, True)
    assert found(answer("9", (5, 6)), answer("9", (5,))) == (False, True)


def test_where_a_server_hides_its_tokens_the_text_counts() -> None:
    for comparing_to, worse in (("ab", False), ("ac", True)):
        found = compare(
            Prompt("x", None),
            answer("ab", (1, 2)),
            answer(comparing_to),
            comparing="tokens",
            scoring="none",
        )
        assert found == (False, worse)


@pytest.mark.parametrize("prompt", [Prompt("x", None), Prompt("x", "y")])
def test_without_references_another_checkpoint_is_not_compared(prompt: Prompt) -> None:
    assert compare(prompt, answer("y"), answer("z"), comparing=None, scoring="none") is None


def test_a_set_is_a_line_a_prompt() -> None:
    text = '{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "x"}\n'
    assert parse_prompts(text) == (Prompt("1+1=", "2"), Prompt("x", None))
