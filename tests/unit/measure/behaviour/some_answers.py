"""Answers for the judgements: characters are tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainyard.measure.behaviour.answers import Answer

NEAR_TIE = 0.5


def said(
    text: str,
    ranked: Sequence[Mapping[str, float]] | None = None,
    *,
    finish_reason: str = "length",
) -> Answer:
    """Return a good answer; without `ranked` each token was by far the most likely one."""
    if ranked is None:
        ranked = [{token: -0.01, "~": -5.0, "^": -6.0} for token in text]
    return Answer(200, text, tuple(text), finish_reason, tuple(ranked))


REFUSED = Answer(400, error="This model's maximum context length is 64 tokens.")
BROKE_DOWN = Answer(500, error="Internal Server Error")
NOTHING = Answer(0, error="ReadTimeout")
