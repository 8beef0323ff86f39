"""A server's pod ends when its requests have."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from trainyard.serving.kubernetes.drain import asked, drain

METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="adder"} 2.0
vllm:num_requests_running{engine="1",model_name="adder"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="adder"} 3.0
"""


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def drained(*answers: int | None, timeout_s: float = 60.0) -> tuple[bool, float]:
    """Drain a server that gives these answers, the last one for ever."""
    clock, left = Clock(), list(answers)
    done = drain(
        lambda: left.pop(0) if len(left) > 1 else left[0],
        timeout_s=timeout_s,
        monotonic=clock,
        sleep=clock.sleep,
    )
    return done, clock.now


def test_it_waits_until_the_last_request_has_ended() -> None:
    assert drained(3, 2, 1, 0) == (True, 4.0)


def test_one_look_without_a_request_is_not_enough() -> None:
    assert drained(0, 1, 0) == (True, 3.0)


def test_it_ends_with_its_time() -> None:
    assert drained(1, timeout_s=5.0) == (False, 5.0)


def test_a_server_that_says_nothing_may_have_requests() -> None:
    assert drained(None, timeout_s=3.0) == (False, 3.0)


@pytest.fixture
def port() -> Iterator[int]:
    """A server with three requests that run and three that wait."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_all_engines_of_a_server_count(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert asked(port) == 6


def test_a_server_that_is_gone_says_nothing() -> None:
    assert asked(1) is None
