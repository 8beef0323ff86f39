"""One request of a probe to one server, straight to its address."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx

from trainyard.rollout.probes.answers import Answer
from trainyard.spec.model import Probes

log = logging.getLogger(__name__)


async def ask(
    client: httpx.AsyncClient,
    url: str,
    model: str,
    prompt: str,
    settings: Probes,
    *,
    salt: str,
    monotonic: Callable[[], float] = time.monotonic,
) -> Answer | None:
    """Return a server's answer, greedy and streamed; None if it has none in time.

    Args:
        client: without a limit of its own on time.
        url: of the server.
        model: the name that clients use.
        prompt: its text.
        settings: of the rollout's probes.
        salt: makes the prompt one that no prefix cache has, without a change to its text.
        monotonic: a clock in seconds.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": settings.max_tokens,
        "temperature": 0,
        "stop": list(settings.stop),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "cache_salt": salt,
    }
    reading = _Reading(monotonic)
    try:
        async with (
            asyncio.timeout(settings.timeout_s),
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            if response.status_code != httpx.codes.OK:
                return None
            async for line in response.aiter_lines():
                reading.take(line)
    except Exception as error:
        # No address, no connection, no time, nonsense: in any case there is no answer.
        log.debug("%s has no answer to a probe: %r", url, error)
        return None
    return reading.answer()


class _Reading:
    """A stream of events, as far as it has come."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._started = monotonic()
        self._first = self._last = 0.0
        self._text = ""
        self._tokens: list[int] | None = []
        self._chunks = 0
        self._counted: int | None = None
        self._finished = self._done = False

    def take(self, line: str) -> None:
        """Take one line. Whatever it raises says that the line is no event."""
        if not line.startswith("data:"):
            return
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self._done = True
            return
        event: dict[str, Any] = json.loads(data)
        if event.get("usage"):
            self._counted = int(event["usage"]["completion_tokens"])
        if not event["choices"]:
            return
        choice = event["choices"][0]
        self._last = self._monotonic()
        if not self._chunks:
            self._first = self._last
        self._chunks += 1
        self._text += choice["text"]
        ids = choice.get("token_ids")
        if ids is None or self._tokens is None:
            self._tokens = None
        else:
            self._tokens.extend(int(token) for token in ids)
        self._finished = self._finished or choice.get("finish_reason") is not None

    def answer(self) -> Answer | None:
        """Return the answer; None if it was cut short."""
        if not (self._done and self._finished):
            return None
        count = self._counted if self._counted is not None else self._chunks
        tpot_s = (self._last - self._first) / (count - 1) if count > 1 else None
        return Answer(
            text=self._text,
            tokens=tuple(self._tokens) if self._tokens else None,
            ttft_s=self._first - self._started,
            tpot_s=tpot_s,
        )
