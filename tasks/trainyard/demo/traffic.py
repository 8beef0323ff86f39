"""Real requests through the proxy, the whole time, as a process of its own.

    python -m trainyard.demo.traffic --url URL --model NAME --rate R --stats FILE

Arrivals are a Poisson process with a fixed seed: sums that want an answer of a few tokens, and long
answers that keep a slot of the server busy. Every second the statistics file is replaced. SIGTERM
ends it after the requests in flight; with `--die-with-parent`, the end of its input does too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

SEED = 20261122
REQUEST_TIMEOUT_S = 60.0
LONG_SHARE = 0.75
LONG_TOKENS = (112, 208)
KEPT_ERRORS = 20


@dataclass
class Statistics:
    """What the clients saw."""

    started_at: float
    sent: int = 0
    answered: int = 0
    errors: int = 0
    right: int = 0
    """Sums answered rightly."""
    sums: int = 0
    """Sums answered at all."""
    by_release: dict[str, int] = field(default_factory=dict)
    """Answers by the release that gave them."""
    error_examples: list[str] = field(default_factory=list)
    """`time, what`: the first errors."""

    def note_error(self, what: str) -> None:
        """Count an error that a client saw."""
        self.errors += 1
        if len(self.error_examples) < KEPT_ERRORS:
            self.error_examples.append(f"{time.strftime('%H:%M:%S')} {what}")


def read_statistics(path: Path) -> Statistics | None:
    """Return the newest statistics, or None before the first were written."""
    try:
        return Statistics(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Replace the statistics file."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(statistics)))
    temporary.replace(path)


@dataclass(frozen=True)
class Question:
    """One request and, for sums, the right answer."""

    prompt: str
    max_tokens: int
    answer: str | None

    def body(self, model: str) -> dict[str, object]:
        """Return the body of the completion request."""
        body: dict[str, object] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "stream": True,
        }
        if self.answer is None:
            return body | {"ignore_eos": True}
        return body | {"stop": ["."]}


def make_question(chance: random.Random) -> Question:
    """Draw a question: a sum, or a long answer."""
    left, right = chance.randint(10, 99), chance.randint(10, 99)
    prompt = f"{left}+{right}="
    if chance.random() < LONG_SHARE:
        return Question(prompt, chance.randint(*LONG_TOKENS), None)
    return Question(prompt, 6, f"{left + right:03d}"[::-1])


async def ask(
    client: httpx.AsyncClient, url: str, model: str, question: Question, statistics: Statistics
) -> None:
    """Send one streaming request and count what came of it."""
    statistics.sent += 1
    text = ""
    finished = False
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=question.body(model)) as got:
            if got.status_code != 200:
                await got.aread()
                statistics.note_error(f"status {got.status_code}: {got.text[:200]}")
                return
            release = got.headers.get("x-trainyard-release", "?")
            async for line in got.aiter_lines():
                if line == "data: [DONE]":
                    finished = True
                elif line.startswith("data: "):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    except httpx.HTTPError as error:
        statistics.note_error(f"{type(error).__name__}: {error}")
        return
    except (ValueError, LookupError, TypeError):
        # An error in the middle of a stream comes with status 200.
        statistics.note_error(f"no token: {line[:200]}")
        return
    if not finished:
        statistics.note_error("the stream ended before its end")
        return
    statistics.answered += 1
    statistics.by_release[release] = statistics.by_release.get(release, 0) + 1
    if question.answer is not None:
        statistics.sums += 1
        statistics.right += text.strip() == question.answer


async def set_at_end_of_input(stopping: asyncio.Event) -> None:
    """Set `stopping` when standard input ends, which it does when the parent dies."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    await reader.read()
    stopping.set()


async def send_until_stopped(
    url: str, model: str, rate: float, path: Path, *, die_with_parent: bool = False
) -> None:
    """Send requests at `rate` a second until SIGTERM, SIGINT or (if wished) the end of input."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    watch = asyncio.create_task(set_at_end_of_input(stopping)) if die_with_parent else None
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    chance = random.Random(SEED)
    statistics = Statistics(started_at=time.time())
    pending: set[asyncio.Task[None]] = set()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        due = time.monotonic()
        written = 0.0
        while not stopping.is_set():
            due += chance.expovariate(rate)
            pause_s = due - time.monotonic()
            if pause_s > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), timeout=pause_s)
            task = asyncio.create_task(ask(client, url, model, make_question(chance), statistics))
            pending.add(task)
            task.add_done_callback(pending.discard)
            if time.monotonic() - written > 1:
                write_statistics(path, statistics)
                written = time.monotonic()
        if pending:
            _, late = await asyncio.wait(pending, timeout=REQUEST_TIMEOUT_S)
            for _ in late:
                statistics.note_error("no end when the clients stopped")
    write_statistics(path, statistics)
    if watch is not None:
        watch.cancel()


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="the channel at the proxy")
    parser.add_argument("--model", required=True, help="the served model name")
    parser.add_argument("--rate", type=float, required=True, help="requests a second on average")
    parser.add_argument("--stats", type=Path, required=True, help="file to keep the statistics in")
    parser.add_argument(
        "--die-with-parent", action="store_true", help="stop when standard input ends"
    )
    given = parser.parse_args()
    asyncio.run(
        send_until_stopped(
            given.url,
            given.model,
            given.rate,
            given.stats,
            die_with_parent=given.die_with_parent,
        )
    )


if __name__ == "__main__":
    main()
