"""What came of a request, and which of two answers is wrong. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass

from trainyard.documents.evidence import Comparing
from trainyard.spec.model import Scoring


@dataclass(frozen=True)
class Prompt:
    """One line of the set."""

    text: str
    answer: str | None
    """The reference."""


@dataclass(frozen=True)
class Answer:
    """A complete answer of one server."""

    text: str
    tokens: tuple[int, ...] | None
    """Ids of its tokens; None where the server does not tell them."""
    ttft_s: float
    tpot_s: float | None
    """None of an answer with one token."""


def parse_prompts(text: str) -> tuple[Prompt, ...]:
    """Return the prompts of a file that was checked with its spec (JSON lines)."""
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return tuple(Prompt(row["prompt"], row.get("answer")) for row in rows)


def is_right(answer: str, reference: str, scoring: Scoring) -> bool:
    """Tell whether an answer is right; white space around it does not matter."""
    given, wanted = answer.strip(), reference.strip()
    if scoring == "exact":
        return given == wanted
    return given.startswith(wanted) if scoring == "starts_with" else wanted in given


def are_same(one: Answer, other: Answer) -> bool:
    """Tell whether two answers have the same tokens; by their text where a server hides them."""
    if one.tokens is not None and other.tokens is not None:
        return one.tokens == other.tokens
    return one.text == other.text


def compare(
    prompt: Prompt,
    stable: Answer,
    candidate: Answer,
    *,
    comparing: Comparing | None,
    scoring: Scoring,
) -> tuple[bool, bool] | None:
    """Return whether only stable's answer is wrong, and whether only the candidate's is.

    Both right or both wrong says nothing about which release is better. Of tokens, stable's are
    the measure. None: the answers cannot be compared.
    """
    if comparing == "tokens":
        return False, not are_same(stable, candidate)
    if comparing is None or scoring == "none" or prompt.answer is None:
        return None
    right = [is_right(one.text, prompt.answer, scoring) for one in (stable, candidate)]
    return right[1] and not right[0], right[0] and not right[1]
