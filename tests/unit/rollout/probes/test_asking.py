"""One request of a probe, against real sockets."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from typing import Any

import httpx
import pytest
from tests.unit.rollout.loopback import serving
from tests.unit.rollout.probes.completions import completions, events

from trainyard.rollout.probes.answers import Answer
from trainyard.rollout.probes.asking import ask
from trainyard.spec.model import Probes

SETTINGS = Probes(prompts="p.jsonl", max_tokens=8, stop=(".",), timeout_s=20)


def asked(url: str, settings: Probes = SETTINGS) -> Answer | None:
    clock = itertools.count()

    async def one() -> Answer | None:
        async with httpx.AsyncClient(trust_env=False, timeout=None) as client:
            return await ask(
                client, url, "adder", "1+1=", settings, salt="s1", monotonic=lambda: next(clock)
            )

    return asyncio.run(one())


def stream(lines: list[str], status: int = 200) -> Answer | None:
    text = "".join(f"data: {line}\n\n" for line in lines).encode()
    with serving(lambda path, body: (status, text)) as url:
        return asked(url)


def test_a_probe_is_a_greedy_streamed_completion_that_no_cache_has() -> None:
    bodies: list[dict[str, Any]] = []
    with completions(lambda body: bodies.append(body) or ["2"]) as url:
        found = asked(url)
    assert found is not None
    (body,) = bodies
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("adder", "1+1=", 8)
    assert (body["temperature"], body["stop"], body["stream"]) == (0, ["."], True)
    assert body["cache_salt"] == "s1"


def test_times_are_to_the_first_token_and_per_token_after_it() -> None:
    # The clock goes on by one at each look: at the start, and at each of three tokens.
    found = stream(events(["6", "4", "0"]))
    assert found == Answer("640", (54, 52, 48), ttft_s=1.0, tpot_s=1.0)
    assert stream(events(["6"])) == Answer("6", (54,), ttft_s=1.0, tpot_s=None)


def test_several_tokens_of_one_event_are_several() -> None:
    lines = events(["64", "0"], usage=False)
    lines.insert(-1, json.dumps({"choices": [], "usage": {"completion_tokens": 3}}))
    found = stream(lines)
    assert found is not None
    assert found.tpot_s == 0.5


def test_a_server_may_hide_its_tokens_and_their_number() -> None:
    found = stream(events(["6", "4"], ids=False, usage=False))
    assert found == Answer("64", None, ttft_s=1.0, tpot_s=1.0)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["[DONE]"], 200),
        (events(["6", "4"])[:1], 200),
        (events(["6", "4"])[:-1], 200),
        (["nonsense"], 200),
        (['{"error": "no memory"}'], 200),
        (['{"choices": [{}]}', "[DONE]"], 200),
        (events(["6"]), 500),
        (events(["6"]), 404),
    ],
    ids=["empty", "cut", "not done", "no JSON", "error", "no text", "500", "404"],
)
def test_what_is_no_whole_answer_is_none(lines: list[str], status: int) -> None:
    assert stream(lines, status) is None


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[nonsense", ""])
def test_without_a_server_there_is_no_answer(url: str) -> None:
    assert asked(url) is None


def test_an_answer_that_takes_too_long_is_none() -> None:
    release = threading.Event()

    def wait(body: dict[str, Any]) -> list[str]:
        release.wait(30)
        return ["6"]

    with completions(wait) as url:
        try:
            assert asked(url, SETTINGS.model_copy(update={"timeout_s": 0.2})) is None
        finally:
            release.set()
