"""A streamed answer is the same as one that comes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import Answer, Prompt, describe, same_case
from trainyard.measure.behaviour.batching import Asked
from trainyard.measure.behaviour.client import Client
from trainyard.measure.behaviour.setting import Setting


@dataclass(frozen=True)
class Streamed:
    """A prompt that was asked both ways."""

    prompt: Prompt
    plain: Answer
    streamed: Answer


async def ask(client: Client, setting: Setting, alone: Sequence[Asked]) -> tuple[Streamed, ...]:
    """Ask the probes again, streamed."""
    return tuple(
        [
            Streamed(
                each.prompt,
                each.answer,
                await client.ask_streaming(each.prompt, setting.answer_tokens),
            )
            for each in alone
        ]
    )


def judge(asked: Sequence[Streamed], near_tie: float) -> tuple[BehaviourCase, ...]:
    """Return a case for each prompt."""
    return tuple(_case(each, near_tie) for each in asked)


def _case(each: Streamed, near_tie: float) -> BehaviourCase:
    case = same_case(
        f"{describe(each.prompt)}, streamed",
        each.plain,
        each.streamed,
        near_tie=near_tie,
        expectation="the same as not streamed",
    )
    same_tokens = each.plain.tokens == each.streamed.tokens
    same = (each.plain.text, each.plain.finish_reason) == (
        each.streamed.text,
        each.streamed.finish_reason,
    )
    if case.outcome == "held" and same_tokens and not same:
        return case.model_copy(update={"outcome": "broken"})
    return case
