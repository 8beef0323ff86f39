"""The same prompt alone and in a full batch, and with more requests than fit into one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import Answer, Prompt, describe, same_case
from trainyard.measure.behaviour.client import Client
from trainyard.measure.behaviour.setting import Setting


@dataclass(frozen=True)
class Asked:
    """A prompt with its answer."""

    prompt: Prompt
    answer: Answer


async def ask_alone(client: Client, setting: Setting) -> tuple[Asked, ...]:
    """Ask the probes while the server does nothing else, up to the first one that fails."""
    asked: list[Asked] = []
    for prompt in setting.probes:
        asked.append(Asked(prompt, await client.ask(prompt, setting.answer_tokens)))
        if not asked[-1].answer.good:
            break
    return tuple(asked)


async def ask_together(client: Client, setting: Setting, requests: int) -> tuple[Asked, ...]:
    """Ask that many requests at once: the probes, and random ones of other lengths beside them."""
    prompts = list(setting.probes[:requests])
    for number in range(requests - len(prompts)):
        length = 1 + number % max(1, setting.max_model_len // 2)
        prompts.append(setting.tokens(length, f"beside {number}"))
    answers = await asyncio.gather(
        *(client.ask(prompt, setting.answer_tokens) for prompt in prompts)
    )
    return tuple(Asked(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))


def over_batch(setting: Setting) -> int:
    """Return how many requests are more than the server runs at once."""
    return setting.batch + max(2, setting.batch // 2)


def judge_batching(
    alone: Sequence[Asked], together: Sequence[Asked], near_tie: float
) -> tuple[BehaviourCase, ...]:
    """Return a case for each probe: in the batch it is answered as alone."""
    return tuple(
        same_case(
            f"{describe(single.prompt)}, among {len(together)} requests at once",
            single.answer,
            among.answer,
            near_tie=near_tie,
            expectation="the same as alone",
        )
        for single, among in zip(alone, together, strict=False)
    )


def judge_concurrency(
    alone: Sequence[Asked], together: Sequence[Asked], setting: Setting, near_tie: float
) -> tuple[BehaviourCase, ...]:
    """Return whether more requests than fit at once are all answered, the probes as alone."""
    wanted = setting.answer_tokens
    wrong = [
        each
        for each in together
        if not each.answer.good or len(each.answer.tokens) not in (0, wanted)
    ]
    came = f"{len(together) - len(wrong)} whole answers"
    if wrong:
        came += f"; {describe(wrong[0].prompt)} got {wrong[0].answer}"
    complete = BehaviourCase(
        outcome="broken" if wrong else "held",
        sent=f"{len(together)} requests at once to a server that runs {setting.max_num_seqs}",
        came=came,
        expected=f"{len(together)} whole answers: the rest waits for its turn",
    )
    answered = [each for each in together if each.answer.good]
    if len(answered) < len(together):
        return (complete,)
    return (complete, *judge_batching(alone, together, near_tie))
