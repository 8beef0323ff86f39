"""An answer ends before a stop string, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import (
    Answer,
    Prompt,
    compare,
    describe,
    quote,
)
from trainyard.measure.behaviour.batching import Asked
from trainyard.measure.behaviour.client import Client
from trainyard.measure.behaviour.setting import Setting

_LENGTH = 2
"""Characters of a stop string: with small tokens it lies across two of them."""


@dataclass(frozen=True)
class Stopped:
    """A prompt that was asked with a stop string."""

    prompt: Prompt
    stop: str
    whole: Answer
    """Without the stop string."""
    plain: Answer
    streamed: Answer


def stop_of(text: str) -> str:
    """Return a part of an answer to stop it at: not its beginning if that can be, seen in full.

    Empty if the answer has none.
    """
    for start in (*range(1, len(text) - _LENGTH + 1), 0):
        stop = text[start : start + _LENGTH]
        usable = len(stop) == _LENGTH and "\ufffd" not in stop and not stop.isspace()
        if usable and text.find(stop) == start:
            return stop
    return ""


async def ask(client: Client, setting: Setting, alone: Sequence[Asked]) -> tuple[Stopped, ...]:
    """Ask the probes again, each with a stop string out of its own answer."""
    asked = []
    for each in alone:
        stop = stop_of(each.answer.text)
        if not stop:
            continue
        tokens = setting.answer_tokens
        plain = await client.ask(each.prompt, tokens, stop=[stop])
        streamed = await client.ask_streaming(each.prompt, tokens, stop=[stop])
        asked.append(Stopped(each.prompt, stop, each.answer, plain, streamed))
    return tuple(asked)


def judge(asked: Sequence[Stopped], near_tie: float) -> tuple[BehaviourCase, ...]:
    """Return two cases for each prompt: the answer and the streamed one stop where they should.

    Where no answer had any text to stop at, nothing can be told.
    """
    if asked:
        return tuple(_cases(asked, near_tie))
    return (
        BehaviourCase(
            outcome="unclear",
            sent="no request with a stop string",
            came="answers with less than two characters of text",
            expected="an answer with text to stop at",
        ),
    )


def _cases(asked: Sequence[Stopped], near_tie: float) -> Iterator[BehaviourCase]:
    for each in asked:
        for way, found in (("", each.plain), (", streamed", each.streamed)):
            yield _case(each, f"{describe(each.prompt)} with stop {each.stop!r}{way}", found,
                        near_tie)  # fmt: skip


def _case(each: Stopped, sent: str, found: Answer, near_tie: float) -> BehaviourCase:
    wanted = each.whole.text[: each.whole.text.index(each.stop)]
    case = BehaviourCase(
        outcome="held",
        sent=sent,
        came=str(found),
        expected=f"{quote(wanted)} (stop): the answer without it was {quote(each.whole.text)}",
    )
    if found.good and found.text == wanted and found.finish_reason == "stop":
        return case
    # Another answer for another reason: this one was at a near tie before it came to the stop.
    length = min(len(each.whole.tokens), len(found.tokens))
    cut = replace(each.whole, tokens=each.whole.tokens[:length])
    parted = compare(cut, replace(found, tokens=found.tokens[:length]), near_tie)
    unclear = found.good and each.stop not in found.text and parted.kind == "near tie"
    return case.model_copy(update={"outcome": "unclear" if unclear else "broken"})
