"""The clients of the demonstration: they ask what can be checked, and count whatever happens."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving_world import eventually

from trainyard.demo.traffic import (
    KEPT_ERRORS,
    LONG_TOKENS,
    SEED,
    Question,
    Statistics,
    ask,
    make_question,
    read_statistics,
    write_statistics,
)
from trainyard.demo.training import answer

SUM = Question("12+34=", 6, "640")
Handler = Callable[[httpx.Request], httpx.Response]


def stream(*texts: str, end: str = "data: [DONE]\n\n") -> bytes:
    chunks = [json.dumps({"choices": [{"text": text}]}) for text in texts]
    return "".join(f"data: {chunk}\n\n" for chunk in chunks).encode() + end.encode()


def heard(handler: Handler, question: Question = SUM) -> Statistics:
    """Return what the clients noted about one question."""
    statistics = Statistics(started_at=0.0)

    async def ask_once() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
            await ask(client, "http://proxy/production/adder", "adder", question, statistics)

    asyncio.run(ask_once())
    return statistics


def answered(*texts: str, **more: Any) -> Handler:
    headers = {"x-trainyard-release": "adder-0123456789ab"}
    return lambda request: httpx.Response(200, headers=headers, content=stream(*texts, **more))


class TestQuestions:
    def test_sums_have_the_answers_of_the_training(self) -> None:
        chance = random.Random(1)
        sums = [q for q in (make_question(chance) for _ in range(400)) if q.answer is not None]
        for question in sums:
            left, right = question.prompt.removesuffix("=").split("+")
            assert question.answer == answer(int(left), int(right)).removesuffix(".")
            assert question.max_tokens >= len(question.answer) + 1

    def test_most_of_them_keep_a_slot_of_the_server_busy(self) -> None:
        chance = random.Random(2)
        questions = [make_question(chance) for _ in range(2000)]
        long = [question for question in questions if question.answer is None]
        assert 0.7 < len(long) / len(questions) < 0.8
        assert {min(LONG_TOKENS), max(LONG_TOKENS)} <= {q.max_tokens for q in long}
        assert all(LONG_TOKENS[0] <= q.max_tokens <= LONG_TOKENS[1] for q in long)

    def test_they_are_the_same_in_every_run(self) -> None:
        first, second = random.Random(SEED), random.Random(SEED)
        assert [make_question(first) for _ in range(50)] == [
            make_question(second) for _ in range(50)
        ]

    def test_a_sum_ends_at_its_full_stop_and_a_long_answer_does_not(self) -> None:
        assert SUM.body("adder") == {
            "model": "adder",
            "prompt": "12+34=",
            "max_tokens": 6,
            "temperature": 0.0,
            "stream": True,
            "stop": ["."],
        }
        long = Question("12+34=", 100, None).body("adder")
        assert long["ignore_eos"] is True
        assert "stop" not in long


class TestAnswers:
    def test_a_right_sum(self) -> None:
        found = heard(answered("6", "4", "0"))
        assert (found.sent, found.answered, found.errors) == (1, 1, 0)
        assert (found.sums, found.right) == (1, 1)
        assert found.by_release == {"adder-0123456789ab": 1}

    def test_a_wrong_sum_is_an_answer(self) -> None:
        found = heard(answered("6", "4", "1"))
        assert (found.answered, found.errors, found.sums, found.right) == (1, 0, 1, 0)

    def test_a_long_answer_is_neither_right_nor_wrong(self) -> None:
        found = heard(answered("6", "4", "0", ".", "6"), Question("12+34=", 100, None))
        assert (found.answered, found.sums, found.right) == (1, 0, 0)

    def test_it_asks_the_channel_for_a_stream(self) -> None:
        asked: list[httpx.Request] = []

        def handle(request: httpx.Request) -> httpx.Response:
            asked.append(request)
            return answered("6")(request)

        heard(handle)
        assert asked[0].url == "http://proxy/production/adder/v1/completions"
        assert json.loads(asked[0].content)["stream"] is True


class TestErrors:
    @pytest.mark.parametrize(
        ("handler", "words"),
        [
            (lambda request: httpx.Response(503, text="no ready server"), "status 503: no ready"),
            (answered("6", end=""), "the stream ended before its end"),
            (
                answered("6", end='data: {"error": {"message": "engine died"}}\n\n'),
                'no token: data: {"error": {"message": "engine died"}}',
            ),
            (answered("6", end='data: {"choices": []}\n\n'), "no token: "),
            (answered("6", end="data: {half"), "no token: data: {half"),
        ],
    )
    def test_every_failure_is_counted_once_with_its_reason(
        self, handler: Handler, words: str
    ) -> None:
        found = heard(handler)
        assert (found.sent, found.answered, found.errors) == (1, 0, 1)
        assert words in found.error_examples[0]
        assert found.by_release == {}

    @pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadTimeout, httpx.ReadError])
    def test_a_broken_connection_is_named(self, error: type[httpx.TransportError]) -> None:
        def fail(request: httpx.Request) -> httpx.Response:
            raise error("no way", request=request)

        found = heard(fail)
        assert (found.sent, found.errors) == (1, 1)
        assert f"{error.__name__}: no way" in found.error_examples[0]

    def test_only_the_first_examples_are_kept(self) -> None:
        statistics = Statistics(started_at=0.0)
        for number in range(KEPT_ERRORS + 5):
            statistics.note_error(f"error {number}.")
        assert statistics.errors == KEPT_ERRORS + 5
        assert len(statistics.error_examples) == KEPT_ERRORS
        assert "error 0." in statistics.error_examples[0]


class TestFile:
    def test_statistics_come_back_as_they_were_written(self, tmp_path: Path) -> None:
        path = tmp_path / "traffic.json"
        statistics = Statistics(1.5, sent=3, answered=2, by_release={"adder-0123456789ab": 2})
        statistics.note_error("status 503")
        write_statistics(path, statistics)
        assert read_statistics(path) == statistics
        assert [file.name for file in tmp_path.iterdir()] == ["traffic.json"]

    def test_before_the_first_request_there_are_none(self, tmp_path: Path) -> None:
        assert read_statistics(tmp_path / "traffic.json") is None


ECHO = """
import asyncio, json, sys
from pathlib import Path
import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

async def tokens():
    for text in "640":
        yield "data: " + json.dumps({"choices": [{"text": text}]}) + "\\n\\n"
        await asyncio.sleep(0.05)
    yield "data: [DONE]\\n\\n"

async def complete(request):
    headers = {"x-trainyard-release": "adder-0123456789ab"}
    return StreamingResponse(tokens(), headers=headers)

app = Starlette(routes=[Route("/c/v1/completions", complete, methods=["POST"])])
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))

async def main():
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    Path(sys.argv[1]).write_text(str(port))
    await serving

asyncio.run(main())
"""


def test_the_process_sends_at_its_rate_and_ends_after_what_is_in_flight(tmp_path: Path) -> None:
    port_file, stats = tmp_path / "port", tmp_path / "traffic.json"
    server = subprocess.Popen([sys.executable, "-c", ECHO, str(port_file)])
    clients = None
    try:
        port = eventually(lambda: port_file.exists() and port_file.read_text(), why="it listens")
        clients = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "trainyard.demo.traffic",
                f"--url=http://127.0.0.1:{port}/c",
                "--model=adder",
                "--rate=50",
                f"--stats={stats}",
            ],
            env={"PATH": os.environ["PATH"]},
        )

        def enough() -> bool:
            found = read_statistics(stats)
            return found is not None and found.answered >= 60

        eventually(enough, why="answers come")
        clients.send_signal(signal.SIGTERM)
        assert clients.wait(timeout=600) == 0
    finally:
        for process in (clients, server):
            if process is not None:
                process.kill()
                process.wait()
    found = read_statistics(stats)
    assert found is not None
    assert found.errors == 0, found.error_examples
    assert found.sent == found.answered == Counter(found.by_release).total()
    assert found.right <= found.sums <= found.answered
