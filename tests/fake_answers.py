"""A server with vLLM's interface whose answers a few lines of arithmetic make: always the same.

It is what the behaviour checks ask where a real model would take too long. Characters are tokens;
the likelihood of the next one follows from the last two. Requests beyond `max_num_seqs` wait, those
that are too long are refused, penalties and stop strings count, cancelled requests end.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

CHARACTERS = "0123456789+=.abcdefgh"
_TOKEN_S = 0.001


@lru_cache(maxsize=10_000)
def likelihoods(last: tuple[int, ...]) -> tuple[float, ...]:
    """Return the log-probability of each token after these."""
    chosen = random.Random(repr(last))
    logits = [chosen.gauss(0, 3) for _ in CHARACTERS]
    # One token is liked after any other, so that answers repeat it.
    logits[5] += 4
    total = math.log(sum(math.exp(each) for each in logits))
    return tuple(each - total for each in logits)


@dataclass
class AnsweringEngine:
    """What runs, and the pages."""

    max_model_len: int = 64
    max_num_seqs: int = 4
    ranks: bool = True
    """False: it knows no log-probabilities, and says so."""
    running: int = 0
    waiting: int = 0
    finished: Counter[str] = field(default_factory=Counter)

    def app(self) -> Starlette:
        """Return the application."""
        self._places = asyncio.Semaphore(self.max_num_seqs)
        return Starlette(
            routes=[
                Route("/health", lambda request: Response()),
                Route("/metrics", self.metrics),
                Route("/v1/completions", self.complete, methods=["POST"]),
            ]
        )

    async def metrics(self, request: Request) -> Response:
        lines = [
            f'vllm:num_requests_running{{engine="0"}} {self.running}',
            f'vllm:num_requests_waiting{{engine="0"}} {self.waiting}',
            'vllm:prefix_cache_hits_total{engine="0"} 0',
        ]
        for reason in ("stop", "length", "abort"):
            count = self.finished[reason]
            lines.append(f'vllm:request_success_total{{finished_reason="{reason}"}} {count}')
        return PlainTextResponse("\n".join(lines) + "\n")

    async def complete(self, request: Request) -> Response:
        asked = json.loads(await request.body())
        prompt = asked["prompt"]
        ids = [CHARACTERS.index(each) for each in prompt] if isinstance(prompt, str) else prompt
        problem = ""
        if len(ids) + asked["max_tokens"] > self.max_model_len:
            problem = f"This model's maximum context length is {self.max_model_len} tokens."
        elif asked.get("logprobs") and not self.ranks:
            problem = "logprobs are not supported"
        if problem:
            return JSONResponse({"error": {"message": problem}}, status_code=400)
        if asked.get("stream"):
            return StreamingResponse(self.stream(ids, asked), media_type="text/event-stream")
        pieces = [piece async for piece in self.pieces(ids, asked)]
        merged = {
            "text": "".join(piece["text"] for piece in pieces),
            "token_ids": [each for piece in pieces for each in piece["token_ids"]],
            "prompt_token_ids": ids,
            "finish_reason": pieces[-1]["finish_reason"],
        }
        if asked.get("logprobs"):
            merged["logprobs"] = {
                "tokens": [each for piece in pieces for each in piece["logprobs"]["tokens"]],
                "top_logprobs": [
                    each for piece in pieces for each in piece["logprobs"]["top_logprobs"]
                ],
            }
        # A client that is gone gets nothing, and what ran for it has ended all the same.
        return JSONResponse({"choices": [merged]})

    async def stream(self, ids: list[int], asked: dict[str, Any]) -> AsyncIterator[bytes]:
        async for piece in self.pieces(ids, asked):
            yield f"data: {json.dumps({'choices': [piece]})}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def pieces(self, ids: list[int], asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the answer token by token; text that may begin a stop string is held back."""
        reason = "abort"
        try:
            async with self.place():
                told, text = 0, ""
                stops = tuple(asked.get("stop") or ())
                for number, (token, ranked) in enumerate(answer(ids, asked), start=1):
                    await asyncio.sleep(_TOKEN_S)
                    text += CHARACTERS[token]
                    stop = next((each for each in stops if each in text), "")
                    last = number == asked["max_tokens"]
                    upto = text.index(stop) if stop else len(text)
                    if stops and not stop and not last:
                        upto -= max(len(each) for each in stops) - 1
                    new, told = text[told : max(told, upto)], max(told, upto)
                    ended = "stop" if stop else "length" if last else None
                    piece: dict[str, Any] = {
                        "text": new,
                        "token_ids": [token],
                        "finish_reason": ended,
                    }
                    if asked.get("logprobs"):
                        piece["logprobs"] = {
                            "tokens": [f"token_id:{token}"],
                            "top_logprobs": [ranked],
                        }
                    if ended:
                        reason = ended
                    yield piece
                    if ended:
                        return
        finally:
            self.finished[reason] += 1

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for one of the places of a batch."""
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()


def answer(ids: list[int], asked: dict[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the tokens of an answer, each with the log-probabilities of the best ones."""
    came: list[int] = []
    for _ in range(asked["max_tokens"]):
        raw = likelihoods(tuple([*ids, *came][-2:]))
        often = Counter(came)
        scores = [
            value
            - asked.get("frequency_penalty", 0.0) * often[token]
            - asked.get("presence_penalty", 0.0) * bool(often[token])
            - 4.0 * (asked.get("repetition_penalty", 1.0) - 1) * (token in came or token in ids)
            for token, value in enumerate(raw)
        ]
        best = max(range(len(scores)), key=scores.__getitem__)
        top = sorted(range(len(raw)), key=lambda token: -raw[token])[: asked.get("logprobs") or 0]
        yield best, {f"token_id:{token}": raw[token] for token in {*top, best}}
        came.append(best)


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """Serve an application on loopback in a thread; yields its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
    (listening,) = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
