"""Shared prefixes with the prefix cache cold and warm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import Answer, Prompt, describe, same_case
from trainyard.measure.behaviour.client import Client
from trainyard.measure.behaviour.setting import Setting

PREFIXES = 2
TAILS = 3
"""Prompts that share a prefix."""
_TAIL_TOKENS = 24


@dataclass(frozen=True)
class Shared:
    """A prompt that was asked twice."""

    prompt: Prompt
    cold: Answer
    """Nothing of the prompt was in the cache."""
    warm: Answer
    """Its prefix was, or all of it."""


@dataclass(frozen=True)
class Warmed:
    """All such prompts."""

    shared: tuple[Shared, ...]
    hits: int | None
    """Tokens that came out of the cache, as the server counts them; None: it does not say."""


def prompts_of(setting: Setting) -> list[list[tuple[int, ...]]]:
    """Return for each prefix the prompts that share it: over a block long, with unlike tails.

    Random tokens: an answer that belongs to another tail must be another one, also from a model
    that looks at the last words only, or at the first.
    """
    tail = max(1, min(_TAIL_TOKENS, setting.max_model_len // 8))
    room = setting.max_model_len - setting.answer_tokens - tail
    length = max(1, min(3 * setting.block_size, room))
    return [
        [
            setting.tokens(length, f"prefix {number}")
            + setting.tokens(tail, f"tail {number} {each}")
            for each in range(TAILS)
        ]
        for number in range(PREFIXES)
    ]


async def ask(client: Client, setting: Setting) -> Warmed:
    """Ask each prompt cold, then again where the others, and it itself, left the prefix."""
    before = await client.counts()
    shared = []
    for number, prompts in enumerate(prompts_of(setting)):
        tokens = setting.answer_tokens
        cold = [await client.ask(prompt, tokens) for prompt in prompts]
        salt = f"shared-{number}"
        await client.ask(prompts[0], tokens, salt=salt)
        # The first one last: by then the whole prompt is there, and not only its prefix.
        for index in (*range(1, len(prompts)), 0):
            warm = await client.ask(prompts[index], tokens, salt=salt)
            shared.append(Shared(prompts[index], cold[index], warm))
    after = await client.counts()
    known_hits = before.prefix_hits is not None and after.prefix_hits is not None
    hits = (after.prefix_hits or 0) - (before.prefix_hits or 0) if known_hits else None
    return Warmed(tuple(shared), hits)


def judge(warmed: Warmed, near_tie: float) -> tuple[BehaviourCase, ...]:
    """Return a case for each prompt: out of the cache or not, the answer is the same."""
    return tuple(_cases(warmed, near_tie))


def _cases(warmed: Warmed, near_tie: float) -> Iterator[BehaviourCase]:
    for each in warmed.shared:
        yield same_case(
            f"{describe(each.prompt)} whose beginning was asked before",
            each.cold,
            each.warm,
            near_tie=near_tie,
            expectation="the same as without the cache",
        )


def remark(warmed: Warmed, setting: Setting) -> str:
    """Return what the server's counters say about the cache."""
    if not setting.prefix_caching:
        return "Prefix caching is off in this target."
    if warmed.hits is None:
        return "The server does not count what came out of the cache."
    if not warmed.hits:
        return "Prefix caching is on, but the server counted nothing that came out of the cache."
    return f"{warmed.hits} tokens came out of the cache."
