"""A server that looks like vLLM to clients, the proxy and the agent, and answers as it is asked.

    python tests/fake_vllm.py --port 20001 --name adder-0123456789ab-0 [--compile CACHE_DIR]
                              [--start-s 0.5] [--exit-code 3] [--first-s 0.01]

A request's JSON says how to answer: `tokens`, `delay_s` between them, `stream`, and `fault`: `500`,
`cut` (breaks off after the first token), `hang` (a stream with a head and without a token). With
`told`, each token of a stream but the first waits until somebody posts to `/go-on`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

EDGES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)


@dataclass
class FakeHistogram:
    """A histogram as servers print it."""

    family: str
    count: int = 0
    total: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * len(EDGES))

    def observe(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        for index, edge in enumerate(EDGES):
            self.buckets[index] += seconds <= edge

    def page(self) -> str:
        lines = [f"# TYPE {self.family} histogram"]
        edges = [*map(str, EDGES), "+Inf"]
        for edge, value in zip(edges, [*self.buckets, self.count], strict=True):
            lines.append(f'{self.family}_bucket{{le="{edge}"}} {value}')
        lines += [f"{self.family}_count {self.count}", f"{self.family}_sum {self.total}"]
        return "\n".join(lines) + "\n"


@dataclass
class FakeEngine:
    """What the server did so far, and its pages."""

    name: str
    first_s: float = 0.0
    """Seconds until the first token of a stream."""
    ttft: FakeHistogram = field(
        default_factory=lambda: FakeHistogram("vllm:time_to_first_token_seconds")
    )
    tpot: FakeHistogram = field(
        default_factory=lambda: FakeHistogram("vllm:request_time_per_output_token_seconds")
    )
    running: int = 0
    served: int = 0
    aborted: int = 0
    healthy: bool = True
    go_ons: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Tokens that may be made of streams that wait to be told."""

    def app(self) -> Starlette:
        """Return the application."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/sick", self.sick, methods=["POST"]),
                Route("/go-on", self.go_on, methods=["POST"]),
                Route("/metrics", self.metrics),
                Route("/v1/told", self.told),
                Route("/v1/echo/{rest:path}", self.echo, methods=["GET", "POST", "PUT"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
            ]
        )

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.healthy else 503)

    async def sick(self, request: Request) -> Response:
        self.healthy = False
        return Response()

    async def go_on(self, request: Request) -> Response:
        self.go_ons.release()
        return Response()

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            f'vllm:num_requests_running{{model_name="m"}} {self.running}\n'
            'vllm:num_requests_waiting{model_name="m"} 0\n' + self.ttft.page() + self.tpot.page()
        )

    async def told(self, request: Request) -> Response:
        counts = {"running": self.running, "served": self.served, "aborted": self.aborted}
        who = {"name": self.name, "healthy": self.healthy, "pid": os.getpid()}
        return JSONResponse({**who, **counts, "environment": dict(os.environ)})

    async def echo(self, request: Request) -> Response:
        return JSONResponse(
            {
                "method": request.method,
                "target": request.scope["raw_path"].decode(),
                "query": request.url.query,
                "headers": dict(request.headers),
                "length": len(await request.body()),
            }
        )

    async def complete(self, request: Request) -> Response:
        asked = json.loads(await request.body())
        if asked.get("fault") == "500":
            return JSONResponse({"error": {"message": "asked for"}}, status_code=500)
        if asked.get("stream"):
            return StreamingResponse(self.tokens(asked), media_type="text/event-stream")
        self.running += 1
        try:
            await asyncio.sleep(asked.get("delay_s", 0.0) * asked.get("tokens", 1))
        finally:
            self.running -= 1
        self.served += 1
        text = "x" * asked.get("tokens", 1)
        return JSONResponse({"server": self.name, "text": text, "choices": [{"text": text}]})

    async def tokens(self, asked: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        finished = False
        tokens, delay_s = asked.get("tokens", 1), asked.get("delay_s", 0.0)
        try:
            await asyncio.sleep(3600 if asked.get("fault") == "hang" else self.first_s)
            # What it meant to take: a busy machine is nothing that a judge is to see here.
            self.ttft.observe(self.first_s)
            for number in range(tokens):
                if number and asked.get("told"):
                    await self.go_ons.acquire()
                elif number:
                    await asyncio.sleep(delay_s)
                yield f"data: {json.dumps({'token': number})}\n\n".encode()
                if asked.get("fault") == "cut":
                    raise RuntimeError("asked to break off")
            if tokens > 1:
                self.tpot.observe(delay_s)
            yield b"data: [DONE]\n\n"
            finished = True
        finally:
            self.running -= 1
            self.served += finished
            self.aborted += not finished


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--name", default="fake")
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument(
        "--compile", type=Path, help="add a file to this cache, as a compiler would"
    )
    parser.add_argument("--exit-code", type=int, help="end at once")
    parser.add_argument("--first-s", type=float, default=0.0, help="before a stream's first token")
    args = parser.parse_args()
    print(f"{args.name} starts", flush=True)
    if args.exit_code is not None:
        print("ValueError: told to end", flush=True)
        return int(args.exit_code)
    if args.compile is not None:
        args.compile.joinpath("made-now.so").write_text("code")
    time.sleep(args.start_s)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    engine = FakeEngine(args.name, args.first_s)
    uvicorn.run(engine.app(), host=args.host, port=args.port, access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
