"""Answers of a server, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainyard.documents.behaviour import BehaviourCase

Prompt = str | tuple[int, ...]
"""Text, or token ids."""

_SHOWN = 160
"""Characters of a text that a case quotes."""


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    """Of HTTP; 0: nothing came back."""
    text: str = ""
    tokens: tuple[str, ...] = ()
    """`token_id:<number>`, or characters of the text where the server tells no tokens."""
    finish_reason: str = ""
    ranked: tuple[Mapping[str, float], ...] = ()
    """For each token the log-probabilities of the best ones; empty where the lane gives none."""
    error: str = ""
    """Why nothing came back, or the server's own words."""

    @property
    def good(self) -> bool:
        """Is it an answer at all?"""
        return self.status == 200 and not self.error

    def __str__(self) -> str:
        if self.good:
            ended = f" ({self.finish_reason})" if self.finish_reason else ""
            return f"{len(self.tokens)} tokens, {quote(self.text)}{ended}"
        said = f": {shorten(self.error)}" if self.error else ""
        return f"HTTP {self.status}{said}" if self.status else f"no answer{said}"


@dataclass(frozen=True)
class Difference:
    """Where two answers part for the first time."""

    kind: Literal["none", "near tie", "real"]
    position: int = 0
    """Of the first token that differs, from 0."""
    gap: float | None = None
    """How much less likely the other token was at least, in nats; None: nobody knows."""
    words: str = ""


def compare(expected: Answer, found: Answer, near_tie: float) -> Difference:
    """Return where `found` leaves `expected`, and whether the two best tokens were about as likely.

    After the first difference two answers are of different prompts, so nothing later counts.

    Args:
        expected: with its log-probabilities; without any, no difference can be excused here.
        found: compared with it; a shorter one differs where it ends.
        near_tie: nats; tokens that are closer than this may change places.
    """
    for position, (wanted, came) in enumerate(zip(expected.tokens, found.tokens, strict=False)):
        if wanted != came:
            return _difference(expected, position, wanted, came, near_tie)
    if len(expected.tokens) != len(found.tokens):
        shorter = min(len(expected.tokens), len(found.tokens))
        lengths = f"{len(found.tokens)} tokens instead of {len(expected.tokens)}"
        return Difference("real", shorter, None, lengths)
    return Difference("none", len(expected.tokens))


def _difference(
    expected: Answer, position: int, wanted: str, came: str, near_tie: float
) -> Difference:
    ranked = expected.ranked[position] if position < len(expected.ranked) else {}
    where = f"token {position + 1} is {came} instead of {wanted}"
    if wanted not in ranked:
        return Difference("real", position, None, f"{where}, without log-probabilities")
    told = came in ranked
    # One that is not told is at most as likely as the last that is.
    gap = ranked[wanted] - (ranked[came] if told else min(ranked.values()))
    kind: Literal["near tie", "real"] = "near tie" if gap <= near_tie else "real"
    words = f"{where}, which was {'' if told else 'more than '}{gap:.3g} nats less likely"
    return Difference(kind, position, gap, words)


def same_case(
    sent: str, expected: Answer, found: Answer, *, near_tie: float, expectation: str
) -> BehaviourCase:
    """Return the case of two answers that should be the same but for near ties.

    One that parts at a near tie has held as far as it could be compared, and is unclear if that is
    nowhere.
    """
    if not found.good:
        return BehaviourCase(outcome="broken", sent=sent, came=str(found), expected=expectation)
    difference = compare(expected, found, near_tie)
    came = str(found) if difference.kind == "none" else f"{found}; {difference.words}"
    outcomes: Mapping[str, Literal["held", "broken", "unclear"]] = {
        "none": "held" if expected.tokens else "unclear",
        "near tie": "held" if difference.position else "unclear",
        "real": "broken",
    }
    return BehaviourCase(
        outcome=outcomes[difference.kind],
        sent=sent,
        came=came,
        expected=f"{expectation}: {expected}",
    )


def excused_without_ranks(cases: Sequence[BehaviourCase]) -> tuple[BehaviourCase, ...]:
    """Return the cases of a lane without log-probabilities: a quarter of them may differ.

    What differs then is unclear: rounding moves an answer now and then, and nothing tells whether
    it did. More than a quarter is no rounding.
    """
    broken = sum(case.outcome == "broken" for case in cases)
    if broken > len(cases) / 4:
        return tuple(cases)
    return tuple(
        case.model_copy(update={"outcome": "unclear"}) if case.outcome == "broken" else case
        for case in cases
    )


def quote(text: str) -> str:
    """Return a text in quotes, shortened."""
    return repr(shorten(text))


def shorten(text: str) -> str:
    """Return the beginning of a text that is too long to be shown."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def describe(prompt: Prompt) -> str:
    """Return a prompt as a case names it."""
    if isinstance(prompt, str):
        return f"the prompt {quote(prompt)}"
    first = ", ".join(str(token) for token in prompt[:8])
    return f"a prompt of {len(prompt)} tokens ([{first}{', …' if len(prompt) > 8 else ''}])"
