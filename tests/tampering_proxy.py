"""A proxy before a server with vLLM's interface that spoils one thing, as a broken server would.

`TamperingProxy(upstream, fault)`; faults:

    none      nothing is spoiled
    batching  answers differ as soon as another request runs
    prefix    a prompt whose beginning was asked before (with the same salt) is answered as the
              earlier one was
    penalties penalties are left out without a word
    stop      stop strings are left out without a word
    stream    streamed answers lose a token
    too_long  a refusal becomes a breakdown (HTTP 500)
    busy      more than `limit` requests at once are turned away (HTTP 503)
    leak      requests go on although their clients are gone
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Fault = Literal[
    "none",
    "batching",
    "prefix",
    "penalties",
    "stop",
    "stream",
    "too_long",
    "busy",
    "leak",
]
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_LEFT_OUT = {"penalties": _PENALTIES, "stop": ("stop",)}
_PREFIX_TOKENS = 8
"""Tokens that two prompts must share before the broken cache takes one for the other."""


@dataclass
class TamperingProxy:
    """Passes requests on to `upstream`, but for `fault`."""

    upstream: str
    fault: Fault
    limit: int = 0
    _running: int = 0
    _cached: dict[tuple[str, tuple[int, ...]], Any] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def app(self) -> Starlette:
        """Return the application."""
        return Starlette(
            routes=[
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/{path:path}", self.get),
            ],
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self.upstream, timeout=120, trust_env=False, limits=limits
        ) as self._http:
            yield

    async def get(self, request: Request) -> Response:
        found = await self._http.get(request.url.path)
        return Response(found.content, found.status_code)

    async def complete(self, request: Request) -> Response:
        asked = json.loads(await request.body())
        for name in _LEFT_OUT.get(self.fault, ()):
            asked.pop(name, None)
        if self.fault == "prefix":
            asked = self.mistaken(asked)
        if self.fault == "busy" and self._running >= self.limit:
            return JSONResponse({"error": {"message": "too many requests"}}, status_code=503)
        if asked.get("stream"):
            return await self.stream(asked)
        self._running += 1
        try:
            found = await self._http.post("/v1/completions", json=asked)
            beside = self._running > 1
        finally:
            self._running -= 1
        if self.fault == "too_long" and found.status_code == 400:
            return Response("Internal Server Error", 500)
        if self.fault == "batching" and beside and found.status_code == 200:
            return JSONResponse(other(found.json()))
        return Response(found.content, found.status_code, media_type="application/json")

    def mistaken(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the request that a cache which looks at the beginning only takes it for."""
        prompt = asked["prompt"]
        if isinstance(prompt, str) or len(prompt) < 2 * _PREFIX_TOKENS:
            return asked
        key = (asked["cache_salt"], tuple(prompt[:_PREFIX_TOKENS]))
        return {**asked, "prompt": self._cached.setdefault(key, prompt)}

    async def stream(self, asked: dict[str, Any]) -> Response:
        self._running += 1
        lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        reading = asyncio.create_task(self.read(asked, lines))
        self._tasks.add(reading)
        reading.add_done_callback(self._tasks.discard)

        async def told() -> AsyncIterator[bytes]:
            number = 0
            try:
                while (line := await lines.get()) is not None:
                    number += line.startswith(b"data: {")
                    if self.fault != "stream" or number != 2:
                        yield line + b"\n\n"
            finally:
                if self.fault != "leak":
                    reading.cancel()

        return StreamingResponse(told(), media_type="text/event-stream")

    async def read(self, asked: dict[str, Any], lines: asyncio.Queue[bytes | None]) -> None:
        """Read the server's answer to its end, unless somebody ends this."""
        try:
            async with self._http.stream("POST", "/v1/completions", json=asked) as response:
                async for line in response.aiter_lines():
                    if line:
                        lines.put_nowait(line.encode())
        finally:
            self._running -= 1
            lines.put_nowait(None)


def other(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer in which one token is another one."""
    choice = answer["choices"][0]
    ids = choice["token_ids"]
    middle = len(ids) // 2
    ids[middle] = ids[middle] + 1 if ids[middle] < 10 else ids[middle] - 1
    return answer
