"""Presence, frequency and repetition penalties do what they say.

For the first two it can be worked out from the log-probabilities of the answer without them which
token must come instead, and where. A repetition penalty works on numbers that no server returns;
it must change at least one of the answers that repeat something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import Answer, Prompt, compare, describe
from trainyard.measure.behaviour.batching import Asked
from trainyard.measure.behaviour.client import Client
from trainyard.measure.behaviour.setting import Setting

STRENGTH: Mapping[str, float] = {
    "presence_penalty": 2.0,
    "frequency_penalty": 2.0,
    "repetition_penalty": 2.0,
}
"""As strong as OpenAI's interface allows the first two."""
_SURELY = 8
"""A token that came so often is too unlikely by 16 nats under the frequency penalty: the answer
must change, also where no log-probabilities say so."""


@dataclass(frozen=True)
class Penalised:
    """A prompt that was asked with one penalty."""

    prompt: Prompt
    penalty: str
    plain: Answer
    """Without it."""
    found: Answer


async def ask(client: Client, setting: Setting, alone: Sequence[Asked]) -> tuple[Penalised, ...]:
    """Ask the probes again with each penalty."""
    asked = []
    for penalty, strength in STRENGTH.items():
        parameters: dict[str, Any] = {penalty: strength}
        for each in alone:
            answer = await client.ask(each.prompt, setting.answer_tokens, **parameters)
            asked.append(Penalised(each.prompt, penalty, each.answer, answer))
    return tuple(asked)


def judge(asked: Sequence[Penalised], near_tie: float) -> tuple[BehaviourCase, ...]:
    """Return a case for each prompt and penalty, and one for the repetition penalty as a whole."""
    return tuple(_cases(asked, near_tie))


def _cases(asked: Sequence[Penalised], near_tie: float) -> Iterator[BehaviourCase]:
    repetition = [each for each in asked if each.penalty == "repetition_penalty"]
    for each in asked:
        if each not in repetition:
            yield _case(each, near_tie)
    if repetition:
        yield _repetition(repetition, near_tie)


def _case(each: Penalised, near_tie: float) -> BehaviourCase:
    strength = STRENGTH[each.penalty]
    must = _must_part(each, near_tie)
    case = BehaviourCase(
        outcome="held",
        sent=f"{describe(each.prompt)} with {each.penalty} {strength}",
        came=str(each.found),
        expected=f"another token than without it, at the latest at token {must + 1}"
        if must is not None
        else "the answer without it, or one that repeats less",
    )
    if not each.found.good:
        return case.model_copy(update={"outcome": "broken"})
    parted = compare(each.plain, each.found, near_tie)
    if parted.kind == "none" or (must is not None and parted.position > must):
        outcome = "unclear" if must is None else "broken"
        return case.model_copy(update={"outcome": outcome, "came": f"{case.came}, as without it"})
    if _right_choice(each, parted.position, near_tie):
        return case
    return case.model_copy(update={"outcome": "broken", "came": f"{case.came}; {parted.words}"})


def _must_part(each: Penalised, near_tie: float) -> int | None:
    """Return the first position at which the penalty makes another token clearly the best."""
    for position, token in enumerate(each.plain.tokens):
        if not each.plain.ranked:
            if _frequent(each, position) >= _SURELY:
                return position
            continue
        scores = _scores(each, position)
        if token in scores and max(scores.values()) - scores[token] > near_tie:
            return position
    return None


def _frequent(each: Penalised, position: int) -> int:
    """Return how often the token at `position` came before, if the penalty counts that."""
    if each.penalty != "frequency_penalty":
        return 0
    return each.plain.tokens[:position].count(each.plain.tokens[position])


def _scores(each: Penalised, position: int) -> dict[str, float]:
    """Return the best tokens of a position with their penalised log-probabilities."""
    if position >= len(each.plain.ranked):
        return {}
    strength, came = STRENGTH[each.penalty], Counter(each.plain.tokens[:position])
    often = each.penalty == "frequency_penalty"
    return {
        token: value - strength * (came[token] if often else min(1, came[token]))
        for token, value in each.plain.ranked[position].items()
    }


def _right_choice(each: Penalised, position: int, near_tie: float) -> bool:
    """Tell whether the token at which the answers part is one that the penalty makes the best."""
    scores = _scores(each, position)
    if not scores or position >= len(each.found.tokens):
        return not each.plain.ranked
    best = max(scores.values())
    chosen = scores.get(each.found.tokens[position])
    # One that is not told is at most as likely as the last that is.
    return (min(each.plain.ranked[position].values()) if chosen is None else chosen) >= (
        best - near_tie
    )


def _repetition(asked: Sequence[Penalised], near_tie: float) -> BehaviourCase:
    strength = STRENGTH["repetition_penalty"]
    repeating = [each for each in asked if len(set(each.plain.tokens)) < len(each.plain.tokens)]
    changed = [
        each
        for each in repeating
        if each.found.good and compare(each.plain, each.found, near_tie).kind == "real"
    ]
    bad = [each.found for each in asked if not each.found.good]
    case = BehaviourCase(
        outcome="held",
        sent=f"{len(asked)} prompts with repetition_penalty {strength}",
        came=str(bad[0])
        if bad
        else f"{len(changed)} of {len(repeating)} answers that repeat something are others",
        expected="other answers than without it, at least one",
    )
    if bad or (repeating and not changed):
        return case.model_copy(update={"outcome": "broken"})
    return case if changed else case.model_copy(update={"outcome": "unclear"})
