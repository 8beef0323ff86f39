"""What a server says becomes an answer, whatever it says."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tests.fake_answers import serving

from trainyard.measure.behaviour.answers import Answer
from trainyard.measure.behaviour.client import Client, Counts, answer_of, counts_of

CHOICE = {
    "text": "64",
    "token_ids": [8, 6],
    "finish_reason": "length",
    "logprobs": {
        "tokens": ["token_id:8", "token_id:6"],
        "top_logprobs": [{"token_id:8": -0.1}, {}],
    },
}


def test_an_answer_has_its_tokens_by_number() -> None:
    found = answer_of([{"choices": [CHOICE]}])
    assert found.tokens == ("token_id:8", "token_id:6")
    assert (found.text, found.finish_reason) == ("64", "length")
    assert found.ranked == ({"token_id:8": -0.1}, {})
    assert found.good


def test_a_server_that_tells_no_tokens_is_compared_by_characters() -> None:
    assert answer_of([{"choices": [{"text": "64"}]}]).tokens == ("6", "4")


def test_pieces_of_a_stream_make_one_answer() -> None:
    pieces = [
        {"choices": [{"text": "6", "token_ids": [8]}]},
        {"choices": []},
        {"choices": [{"text": "4", "token_ids": [6], "finish_reason": "stop"}]},
    ]
    found = answer_of(pieces)
    assert (found.text, found.tokens, found.finish_reason) == (
        "64",
        ("token_id:8", "token_id:6"),
        "stop",
    )


@pytest.mark.parametrize("chunks", [[], [{}], ["text"], [{"choices": None}], [{"choices": [1]}]])
def test_what_is_no_answer_is_not_good(chunks: list[object]) -> None:
    assert not answer_of(chunks).good


METRICS = """\
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_running{engine="1"} 1.0
vllm:num_requests_waiting{engine="0"} 4.0
vllm:prefix_cache_hits_total{engine="0"} 128.0
vllm:request_success_total{finished_reason="stop"} 3.0
vllm:request_success_total{finished_reason="length"} 4.0
vllm:request_success_total{finished_reason="abort"} 5.0
"""


def test_counts_are_those_of_all_engines_without_the_cancelled() -> None:
    assert counts_of(METRICS) == Counts(running=3, waiting=4, finished=7, prefix_hits=128)
    assert counts_of(METRICS).busy == 7


@pytest.mark.parametrize("text", ["", "# nothing\n", "<html>not metrics</html>"])
def test_a_server_that_does_not_count_says_nothing(text: str) -> None:
    assert counts_of(text) == Counts()
    assert Counts().busy is None


def test_errors_are_answers() -> None:
    async def broken(request: Request) -> Response:
        return PlainTextResponse("Internal Server Error", 500)

    async def ask(url: str) -> list[Answer | bool | Counts | int]:
        async with Client(url, "adder") as client:
            return [
                await client.ask("1+1=", 4),
                await client.ask_streaming("1+1=", 4),
                (await client.abandon(["1+1="], 4)).begun,
                await client.healthy(),
                await client.counts(),
            ]

    app = Starlette(routes=[Route("/{path:path}", broken, methods=["GET", "POST"])])
    with serving(app) as url:
        found = asyncio.run(ask(url))
    wrong = Answer(500, error="Internal Server Error")
    assert found == [wrong, wrong, 0, False, Counts()]
    plain, streamed, *others = asyncio.run(ask(url))
    assert isinstance(plain, Answer)
    assert isinstance(streamed, Answer)
    assert (plain.status, streamed.status) == (0, 0)
    assert plain.error.startswith("ConnectError")
    assert others == [0, False, Counts()]
