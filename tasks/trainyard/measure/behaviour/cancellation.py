"""Clients that go away: the server stops working for them, and goes on with the others."""

from __future__ import annotations

from dataclasses import dataclass

from trainyard.documents.behaviour import BehaviourCase
from trainyard.measure.behaviour.answers import Answer, describe, same_case
from trainyard.measure.behaviour.batching import Asked
from trainyard.measure.behaviour.client import Client, Counts
from trainyard.measure.behaviour.setting import Setting

GRACE_S = 20.0
"""Seconds that a server may take to notice that nobody listens any more."""
REQUESTS = 8
"""Requests that are cancelled, fewer where a batch has less room."""
ATTEMPTS = 3
_PROMPT_TOKENS = 4


@dataclass(frozen=True)
class Left:
    """What was left after clients had gone away."""

    sent: int
    begun: int
    """Those whose answer had begun."""
    tokens: int
    """That each of them asked for."""
    before: Counts
    """When all had begun."""
    after: Counts

    @property
    def finished(self) -> int | None:
        """Those that were worked on to their end although nobody listened."""
        before, after = self.before.finished, self.after.finished
        return None if before is None or after is None else after - before

    @property
    def leaks(self) -> bool:
        """Does the server go on for nobody? One in four may have come to its end meanwhile."""
        return bool(self.after.busy) or (self.finished or 0) > self.sent / 4


@dataclass(frozen=True)
class Cancelled:
    """What happened after clients had gone away."""

    left: Left
    healthy: bool
    expected: Asked
    answer: Answer
    """To the same prompt, afterwards."""


async def ask(client: Client, setting: Setting, expected: Asked) -> Cancelled:
    """Begin long answers, go away after their first tokens, and look what is left running.

    A client that is slower than a short answer sees one end that it meant to cancel: so a server
    that seems to go on is asked again, and only one that always does has a leak.
    """
    requests = min(setting.batch, REQUESTS)
    tokens = max(1, setting.max_model_len - _PROMPT_TOKENS)
    for attempt in range(ATTEMPTS):
        prompts = [
            setting.tokens(_PROMPT_TOKENS, f"abandoned {attempt} {number}")
            for number in range(requests)
        ]
        await client.idle(GRACE_S)
        abandoned = await client.abandon(prompts, tokens)
        after = await client.idle(GRACE_S)
        left = Left(requests, abandoned.begun, tokens, abandoned.counts, after)
        if not left.leaks:
            break
    answer = await client.ask(expected.prompt, setting.answer_tokens)
    return Cancelled(left, await client.healthy(), expected, answer)


def judge(cancelled: Cancelled, near_tie: float) -> tuple[BehaviourCase, ...]:
    """Return two cases: nothing is left running, and the server answers as before."""
    went_on = same_case(
        f"{describe(cancelled.expected.prompt)} after {cancelled.left.sent} clients had gone away",
        cancelled.expected.answer,
        cancelled.answer,
        near_tie=near_tie,
        expectation="the same as before, from a healthy server",
    )
    if not cancelled.healthy:
        came = f"{cancelled.answer}; the server is not healthy"
        went_on = went_on.model_copy(update={"outcome": "broken", "came": came})
    return (_left(cancelled.left), went_on)


def _left(left: Left) -> BehaviourCase:
    busy, finished = left.after.busy, left.finished
    came = [f"{left.begun} had begun"]
    if busy is not None:
        came.append(f"{busy} run or wait {GRACE_S:.0f} s later" if busy else "none runs on")
    if finished is not None:
        came.append(f"{finished} were worked on to their end")
    case = BehaviourCase(
        outcome="held",
        sent=f"{left.sent} streamed requests for {left.tokens} tokens each, all of them cancelled "
        "after the first token",
        came=", ".join(came),
        expected="none runs on, none is worked on to its end",
    )
    if left.leaks or not left.begun:
        return case.model_copy(update={"outcome": "broken"})
    if busy is None or finished is None:
        return case.model_copy(update={"outcome": "unclear"})
    return case
