"""The longest prompt that is allowed, and one that is a token longer."""

from __future__ import annotations

from dataclasses import dataclass

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import Answer
from trainyard.measure.behaviour.client import Client
from trainyard.measure.behaviour.setting import Setting


@dataclass(frozen=True)
class Lengths:
    """What came of both, and of a common request after them."""

    longest: Answer
    over: Answer
    healthy: bool
    after: Answer


async def ask(client: Client, setting: Setting) -> Lengths:
    """Ask with the longest prompt, with one that is too long, and then as usual."""
    longest = await client.ask(setting.tokens(setting.max_model_len - 1, "longest"), 1)
    over = await client.ask(setting.tokens(setting.max_model_len, "longest"), 1)
    after = await client.ask(setting.probes[0], 1)
    return Lengths(longest, over, await client.healthy(), after)


def judge(lengths: Lengths, setting: Setting) -> tuple[BehaviourCase, ...]:
    """Return three cases: the longest is answered, the longer one refused, the server goes on."""
    limit = setting.max_model_len
    refused = 400 <= lengths.over.status < 500 and bool(lengths.over.error.strip())
    return (
        BehaviourCase(
            outcome="held" if lengths.longest.good else "broken",
            sent=f"a prompt of {limit - 1} tokens that asks for 1 (max_model_len is {limit})",
            came=str(lengths.longest),
            expected="an answer of 1 token",
        ),
        BehaviourCase(
            outcome="held" if refused else "broken",
            sent=f"a prompt of {limit} tokens that asks for 1 (max_model_len is {limit})",
            came=str(lengths.over),
            expected="a refusal with a reason: HTTP 400, or another 4xx",
        ),
        BehaviourCase(
            outcome="held" if lengths.healthy and lengths.after.good else "broken",
            sent="a common request after the one that was too long",
            came=f"{lengths.after}; the server is {'' if lengths.healthy else 'not '}healthy",
            expected="an answer, and a healthy server",
        ),
    )
