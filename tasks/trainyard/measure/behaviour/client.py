"""Requests to the server's own HTTP interface; whatever goes wrong is an answer, not an error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from trainyard.measure.behaviour.answers import Answer, Prompt

REQUEST_TIMEOUT_S = 120.0
"""Seconds that one answer may take; a full batch on a slow machine needs many."""
RANKS = 5
"""Log-probabilities asked for with each token: the most that OpenAI's interface promises."""
_SEED = 20261127


@dataclass(frozen=True)
class Counts:
    """What the server counts of itself; None where it does not say."""

    running: int | None = None
    waiting: int | None = None
    finished: int | None = None
    """Requests that came to their end, so far."""
    prefix_hits: int | None = None
    """Tokens that came out of the prefix cache, so far."""

    @property
    def busy(self) -> int | None:
        """Requests that run or wait."""
        known = [each for each in (self.running, self.waiting) if each is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class Abandoned:
    """Streamed answers that nobody listens to any more."""

    begun: int
    counts: Counts
    """When all had begun, before the first client went away."""


class Client:
    """Asks one server; an async context manager."""

    def __init__(self, base_url: str, model: str, *, ranks: bool = True) -> None:
        """Ask the server at `base_url` for `model`, with log-probabilities if `ranks`."""
        self._model = model
        # The server may have been asked before, by another run of the same checks.
        self._run = secrets.token_hex(4)
        self._asked = 0
        self.ranks = ranks
        self._http = httpx.AsyncClient(
            base_url=base_url,
            trust_env=False,
            timeout=REQUEST_TIMEOUT_S,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> Client:
        """Nothing to do: connections are made when they are needed."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ask(
        self, prompt: Prompt, max_tokens: int, *, salt: str = "", **parameters: Any
    ) -> Answer:
        """Return the most likely answer of exactly `max_tokens` tokens, unless `parameters` end it.

        Without `salt` nothing of the prompt comes out of the prefix cache; requests of one `salt`
        share theirs.
        """
        body = self._body(prompt, max_tokens, salt, parameters)
        try:
            response = await self._http.post("/v1/completions", json=body)
            found = _json(response.content)
        except httpx.HTTPError as error:
            return Answer(0, error=_words(error))
        if response.status_code != 200:
            return Answer(response.status_code, error=_error_of(found))
        return answer_of([found])

    async def ask_streaming(self, prompt: Prompt, max_tokens: int, **parameters: Any) -> Answer:
        """Return the same as `ask`, from a streamed answer."""
        body = {**self._body(prompt, max_tokens, "", parameters), "stream": True}
        chunks: list[Any] = []
        ended = False
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    return Answer(
                        response.status_code, error=_error_of(_json(await response.aread()))
                    )
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    ended = ended or data == "[DONE]"
                    if line.startswith("data:") and data != "[DONE]":
                        chunks.append(_json(data.encode()))
        except httpx.HTTPError as error:
            return Answer(0, error=_words(error))
        answer = answer_of(chunks)
        if ended or not answer.good:
            return answer
        return Answer(200, answer.text, error="the stream ended without [DONE]")

    async def abandon(self, prompts: Sequence[Prompt], max_tokens: int) -> Abandoned:
        """Begin streamed answers, and go away from all of them once each has its first token."""
        async with contextlib.AsyncExitStack() as streams:
            begun = await asyncio.gather(
                *(self._begin(streams, prompt, max_tokens) for prompt in prompts)
            )
            # Whatever is finished here was so before anybody went away.
            counts = await self.counts()
        return Abandoned(sum(begun), counts)

    async def _begin(
        self, streams: contextlib.AsyncExitStack, prompt: Prompt, max_tokens: int
    ) -> bool:
        body = {**self._body(prompt, max_tokens, "", {}), "stream": True}
        try:
            response = await streams.enter_async_context(
                self._http.stream("POST", "/v1/completions", json=body)
            )
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    return response.status_code == 200
        except httpx.HTTPError:
            return False
        return False

    async def healthy(self) -> bool:
        """Tell whether the server says that it is."""
        with contextlib.suppress(httpx.HTTPError):
            return (await self._http.get("/health")).status_code == 200
        return False

    async def counts(self) -> Counts:
        """Return what the server counts now."""
        try:
            response = await self._http.get("/metrics")
        except httpx.HTTPError:
            return Counts()
        return counts_of(response.text) if response.status_code == 200 else Counts()

    async def idle(self, within_s: float) -> Counts:
        """Wait until nothing runs and return the last counts."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while True:
            counts = await self.counts()
            if not counts.busy or loop.time() >= until:
                return counts
            await asyncio.sleep(0.1)

    def _body(
        self, prompt: Prompt, max_tokens: int, salt: str, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        self._asked += 1
        body = {
            "model": self._model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": _SEED,
            "ignore_eos": True,
            # Of vLLM: tokens by number, because several may look the same; and who shares the
            # prefix cache with whom.
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "cache_salt": f"{self._run}-{salt or self._asked}",
        }
        if self.ranks:
            body["logprobs"] = RANKS
        return {**body, **parameters}


def answer_of(chunks: list[Any]) -> Answer:
    """Return the answer that these pieces of JSON make up: one, or those of a stream."""
    text, reason = "", ""
    tokens: list[str] = []
    ids: list[str] = []
    ranked: list[Mapping[str, float]] = []
    for choice in _choices(chunks):
        if choice is None:
            return Answer(200, text, error="the answer is not what OpenAI's interface promises")
        text += str(choice.get("text") or "")
        reason = str(choice.get("finish_reason") or reason)
        ids += [f"token_id:{number}" for number in choice.get("token_ids") or ()]
        told = choice.get("logprobs") or {}
        tokens += [str(token) for token in told.get("tokens") or ()]
        ranked += [dict(each or {}) for each in told.get("top_logprobs") or ()]
    if not chunks:
        return Answer(200, error="the answer is empty")
    return Answer(200, text, tuple(ids or tokens or text), reason, tuple(ranked))


def _choices(chunks: list[Any]) -> Iterator[dict[str, Any] | None]:
    """Yield the first choice of each piece; None for a piece that is no answer."""
    for chunk in chunks:
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not isinstance(choices, list):
            yield None
        elif choices:
            yield choices[0] if isinstance(choices[0], dict) else None


def counts_of(text: str) -> Counts:
    """Return what vLLM's metrics say, all engines and models of the server together."""
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    except ValueError:
        return Counts()

    def count(name: str) -> int | None:
        return round(sums[name]) if name in sums else None

    return Counts(
        running=count("vllm:num_requests_running"),
        waiting=count("vllm:num_requests_waiting"),
        finished=_finished(text),
        prefix_hits=count("vllm:prefix_cache_hits_total"),
    )


def _finished(text: str) -> int | None:
    """Return how many requests came to their own end, not those that were cancelled."""
    found = None
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:request_success_total":
                ended = sample.labels.get("finished_reason") in ("stop", "length")
                found = (found or 0) + (round(sample.value) if ended else 0)
    return found


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


def _error_of(found: Any) -> str:
    """Return the server's own words."""
    if isinstance(found, dict):
        error = found.get("error", found)
        message = error.get("message") if isinstance(error, dict) else None
        return str(message or error)
    return str(found)


def _words(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
