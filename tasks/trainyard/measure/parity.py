"""Parity of the served graph: greedy answers of the server against a reference's.

A served answer is compared token by token with what the reference would have said *after the same
tokens*, so that one divergence does not count as many. Where the answer is the reference's own so
far, the reference knows; after a divergence it is asked again, about the served answer, in one
forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from trainyard.documents.parity import (
    SHOWN_DIVERGENCES,
    AnswerFigures,
    Divergence,
    ParityFigures,
    PositionCounts,
    Reference,
    ReferenceAnswer,
    ReferencePosition,
    ServedAnswer,
)
from trainyard.errors import Refused

CONCURRENCY = 8
"""Requests in flight."""

REQUEST_TIMEOUT_S = 300.0

_UNLIKELY = -100.0
"""Log-probs below are placeholders of the engine for nothing."""

Verdict = Literal["agreed", "excused", "diverged", "uncompared"]
Rescore = Callable[[Sequence[int], Sequence[int]], Sequence[ReferencePosition]]
"""Asks the reference about an answer that is not its own: (prompt tokens, answer) -> positions."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison found."""

    figures: ParityFigures
    answers: tuple[AnswerFigures, ...]


def collect(
    prompts: Sequence[str],
    *,
    base_url: str,
    served_model_name: str,
    max_tokens: int,
    top_logprobs: int,
) -> list[ServedAnswer]:
    """Ask the server for its greedy answers, as clients ask: with text.

    Args:
        prompts: in any order; the answers come in the same.
        base_url: of the server.
        served_model_name: the name requests ask for.
        max_tokens: of an answer.
        top_logprobs: tokens whose log-probs are wanted at each position; 0: none.

    Raises:
        Refused: the server did not answer one of them, or not with token ids.
    """
    limits = httpx.Timeout(REQUEST_TIMEOUT_S)
    with (
        httpx.Client(trust_env=False, timeout=limits) as client,
        ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="parity") as pool,
    ):

        def ask(prompt: str) -> ServedAnswer:
            body = request_body(prompt, served_model_name, max_tokens, top_logprobs)
            try:
                response = client.post(f"{base_url}/v1/completions", json=body)
            except httpx.HTTPError as error:
                raise Refused(
                    f"The server did not answer a prompt of the parity check: {error!r}.",
                    hint="Look at the end of the server's log.",
                ) from error
            if response.status_code != 200:
                raise Refused(
                    f"The server answered a prompt of the parity check with "
                    f"{response.status_code}: {response.text[:200]}",
                    hint="Prompt and answer must fit into max_model_len.",
                )
            return served_answer(response.json())

        return list(pool.map(ask, prompts))


def request_body(
    prompt: str, served_model_name: str, max_tokens: int, top_logprobs: int
) -> dict[str, Any]:
    """Return a request for one greedy answer, whatever sampling the model's files prefer."""
    body: dict[str, Any] = {
        "model": served_model_name,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "top_p": 1,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "return_token_ids": True,
    }
    if top_logprobs:
        body |= {"logprobs": top_logprobs, "return_tokens_as_token_ids": True}
    return body


def served_answer(response: dict[str, Any]) -> ServedAnswer:
    """Return the answer in a response of `/v1/completions`.

    Raises:
        Refused: it has no token ids.
    """
    choices = response.get("choices") or [{}]
    prompt, tokens = choices[0].get("prompt_token_ids"), choices[0].get("token_ids")
    if not prompt or not tokens:
        raise Refused(
            "The server answered without token ids, so that its answers cannot be compared.",
            hint="Parity needs `return_token_ids` of vLLM 0.10.2 or later.",
        )
    top = (choices[0].get("logprobs") or {}).get("top_logprobs") or ()
    return ServedAnswer(
        prompt_tokens=prompt, tokens=tokens, top=tuple(_by_id(each or {}) for each in top)
    )


def _by_id(top: dict[str, float]) -> dict[int, float]:
    found = {}
    for name, value in top.items():
        token = name.removeprefix("token_id:")
        if token.isdecimal() and value is not None:
            found[int(token)] = float(value)
    return found


def compare(
    reference: Reference,
    served: Sequence[ServedAnswer],
    *,
    key: str,
    near_tie: float,
    top_logprobs: int,
    rescore: Rescore | None,
    reused: bool = False,
) -> Comparison:
    """Compare served answers with a reference.

    Args:
        reference: it has an answer to each prompt.
        served: the server's answers, in the same order.
        key: of the reference.
        near_tie: nats; where the reference's two best tokens are closer, either of them is right.
        top_logprobs: log-probs that the lane returns at each position.
        rescore: asks the reference about other answers than its own; None: nobody can.
        reused: was the reference there already?

    Raises:
        Refused: there are not as many answers as prompts.
    """
    if len(served) != len(reference.answers) or not served:
        raise Refused(
            f"{len(served)} answers came back for {len(reference.answers)} prompts of the parity "
            "check.",
            hint="Look at the server's log.",
        )
    judged = [
        list(_judge(number, right, answer, near_tie, rescore))
        for number, (right, answer) in enumerate(zip(reference.answers, served, strict=True))
    ]
    every = [each for positions in judged for each in positions]
    errors = _errors(reference.answers, served) if top_logprobs else []
    figures = ParityFigures(
        reference=key,
        reference_reused=reused,
        prompts=len(served),
        prompt_agreement=_share(
            right.prompt_tokens == answer.prompt_tokens
            for right, answer in zip(reference.answers, served, strict=True)
        ),
        compared=sum(each.verdict != "uncompared" for each in every),
        agreed=sum(each.verdict == "agreed" for each in every),
        excused=sum(each.verdict == "excused" for each in every),
        uncompared=sum(each.verdict == "uncompared" for each in every),
        first_divergence=min(
            (each.detail.position - 1 for each in every if each.verdict == "diverged"),
            default=max(len(positions) for positions in judged),
        ),
        exact_answers=_share(
            right.prompt_tokens == answer.prompt_tokens and right.tokens == answer.tokens
            for right, answer in zip(reference.answers, served, strict=True)
        ),
        top_logprobs=top_logprobs,
        logprob_error=_rms([seen - right for seen, right, _ in errors]),
        rounding_error=_rms(
            [rounded - right for _, right, rounded in errors if rounded is not None]
        ),
        by_position=_by_position(judged),
        divergences=tuple(each.detail for each in every if each.verdict == "diverged")[
            :SHOWN_DIVERGENCES
        ],
    )
    return Comparison(
        figures, tuple(_answer(answer, found) for answer, found in zip(served, judged, strict=True))
    )


@dataclass(frozen=True)
class _Judged:
    """One position of one answer."""

    verdict: Verdict
    detail: Divergence


def _judge(
    number: int,
    right: ReferenceAnswer,
    answer: ServedAnswer,
    near_tie: float,
    rescore: Rescore | None,
) -> Iterator[_Judged]:
    """Yield what each position of an answer is."""
    if right.prompt_tokens != answer.prompt_tokens:
        # Answers to different prompts: nothing that the server said can be called right.
        for index, token in enumerate(right.tokens):
            served = answer.tokens[index] if index < len(answer.tokens) else None
            yield _Judged("diverged", _detail(number, index, served, token, None))
        return
    shared = _shared(right.tokens, answer.tokens)
    for index in range(shared):
        token = answer.tokens[index]
        yield _Judged("agreed", _detail(number, index, token, token, None))
    if shared == len(answer.tokens):
        if shared < len(right.tokens):  # it ended too early
            expected = right.tokens[shared]
            yield _Judged("diverged", _detail(number, shared, None, expected, None))
        return
    if shared == len(right.tokens):  # it should have ended
        yield _Judged("diverged", _detail(number, shared, answer.tokens[shared], None, None))
        shared += 1
    yield from _rest(number, shared, right, answer, near_tie, rescore)


def _rest(
    number: int,
    start: int,
    right: ReferenceAnswer,
    answer: ServedAnswer,
    near_tie: float,
    rescore: Rescore | None,
) -> Iterator[_Judged]:
    """Yield what the positions of an answer are from the first on that is not the reference's."""
    known: Sequence[ReferencePosition] = right.positions[: start + 1]
    if rescore is not None and start < len(answer.tokens):
        known = rescore(right.prompt_tokens, answer.tokens)
    for index in range(start, len(answer.tokens)):
        token = answer.tokens[index]
        if index >= len(known):
            yield _Judged("uncompared", _detail(number, index, token, None, None))
            continue
        position = known[index]
        yield _Judged(
            _verdict(token, position, near_tie),
            _detail(number, index, token, position.tokens[0], position.gap),
        )


def _verdict(token: int, position: ReferencePosition, near_tie: float) -> Verdict:
    if token == position.tokens[0]:
        return "agreed"
    return "excused" if token in position.tokens[:2] and position.gap < near_tie else "diverged"


def _detail(
    number: int, index: int, served: int | None, expected: int | None, gap: float | None
) -> Divergence:
    return Divergence(prompt=number, position=index + 1, served=served, expected=expected, gap=gap)


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two answers begin with alike."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def _errors(
    answers: Sequence[ReferenceAnswer], served: Sequence[ServedAnswer]
) -> list[tuple[float, float, float | None]]:
    """Return log-probs of the server, of the reference, and of the reference when it rounds.

    Only where both were asked about the same tokens before; of all returned tokens that the
    reference kept.
    """
    found: list[tuple[float, float, float | None]] = []
    for right, answer in zip(answers, served, strict=True):
        if right.prompt_tokens != answer.prompt_tokens:
            continue
        reach = min(_shared(right.tokens, answer.tokens) + 1, len(right.positions))
        for position, top in zip(right.positions[:reach], answer.top, strict=False):
            rounded: Sequence[float | None] = position.rounded or [None] * len(position.tokens)
            for token, exact, coarse in zip(
                position.tokens, position.logprobs, rounded, strict=True
            ):
                if top.get(token, -math.inf) > _UNLIKELY:
                    found.append((top[token], exact, coarse))
    return found


def _by_position(judged: Sequence[Sequence[_Judged]]) -> tuple[PositionCounts, ...]:
    longest = max(len(positions) for positions in judged)
    counts = []
    for index in range(longest):
        here = [positions[index].verdict for positions in judged if index < len(positions)]
        counts.append(
            PositionCounts(
                compared=len(here) - here.count("uncompared"),
                agreed=here.count("agreed"),
                excused=here.count("excused"),
            )
        )
    return tuple(counts)


def _answer(answer: ServedAnswer, judged: Sequence[_Judged]) -> AnswerFigures:
    verdicts = [each.verdict for each in judged]
    return AnswerFigures(
        tokens=answer.tokens,
        agreed=verdicts.count("agreed"),
        excused=verdicts.count("excused"),
        diverged=verdicts.count("diverged"),
    )


def _share(which: Iterator[bool]) -> float:
    values = list(which)
    return sum(values) / len(values)


def _rms(values: Sequence[float]) -> float | None:
    return math.sqrt(sum(each * each for each in values) / len(values)) if values else None
