"""Counters from Prometheus pages in vLLM's form."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from tests.unit.rollout.loopback import serving
from tests.unit.rollout.machine import NEW, NOW

from trainyard.rollout.readers.scrape import HttpMetricReader, parse_counters
from trainyard.serving.protocol import ServerStatus

TTFT = "vllm:time_to_first_token_seconds"
TPOT_PER_REQUEST = "vllm:request_time_per_output_token_seconds"
TPOT_PER_EVENT = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
FINISHED = "vllm:request_success"
ENGINES = ("0", "1")
LABELS = ("model_name", "engine")


def server(url: str = "", *, name: str = f"{NEW}-0") -> ServerStatus:
    return ServerStatus(
        name=name,
        release_id=NEW,
        state="ready",
        url=url,
        started_at=NOW,
        restarts=0,
        message="",
    )


def page(*histograms: str, finished: dict[str, int] | None = None) -> str:
    """Return what a server of two engines prints: 0.05 s and 0.3 s observed by each."""
    registry = CollectorRegistry()
    for name in histograms:
        made = Histogram(name, "help", LABELS, buckets=(0.1, 0.25, 1.0), registry=registry)
        for engine in ENGINES:
            made.labels("adder", engine).observe(0.05)
            made.labels("adder", engine).observe(0.3)
    if finished is not None:
        counter = Counter(FINISHED, "help", (*LABELS, "finished_reason"), registry=registry)
        for reason, number in finished.items():
            counter.labels("adder", "0", reason).inc(number)
    return generate_latest(registry).decode()


def test_histograms_are_summed_over_engines() -> None:
    found = parse_counters(page(TTFT, TPOT_PER_REQUEST), server())
    assert (found.pod, found.release_id, found.started_at) == (f"{NEW}-0", NEW, NOW)
    assert found.ttft is not None
    assert (found.ttft.count, found.ttft.total) == (4, pytest.approx(0.7))
    assert found.ttft.buckets == {"0.1": 2, "0.25": 2, "1.0": 4, "+Inf": 4}
    assert found.tpot is not None
    assert found.tpot.count == 4
    assert found.tpot_requests is None


@pytest.mark.parametrize("name", TPOT_PER_EVENT)
def test_output_events_come_with_the_number_of_requests(name: str) -> None:
    found = parse_counters(page(TTFT, name, finished={"stop": 3, "length": 4}), server())
    assert found.tpot is not None
    assert found.tpot_requests == 7


def test_the_figure_of_requests_is_preferred() -> None:
    text = page(TPOT_PER_REQUEST, *TPOT_PER_EVENT, finished={"stop": 3})
    assert parse_counters(text, server()).tpot_requests is None


def test_output_events_without_a_number_of_requests_are_not_used() -> None:
    assert parse_counters(page(TTFT, TPOT_PER_EVENT[0]), server()).tpot is None


def test_requests_in_hand_run_or_wait_and_prompts_have_their_edges() -> None:
    gauges = "".join(
        f'vllm:num_requests_{state}{{model_name="m",engine="{engine}"}} {number}.0\n'
        for state, number in (("running", 3), ("waiting", 2))
        for engine in ENGINES
    )
    prompts = "vllm:request_prompt_tokens"
    found = parse_counters(gauges + page(prompts), server())
    assert found.in_flight == 10
    assert found.prompts is not None
    assert found.prompts.buckets == {"0.1": 2, "0.25": 2, "1.0": 4, "+Inf": 4}
    (running, _) = gauges.split("vllm:num_requests_waiting", 1)
    assert parse_counters(running, server()).in_flight is None


RECORDED = Path(__file__).parents[1] / "deploy" / "pages" / "vllm.txt"
"""The page of vLLM 0.32.0."""


def test_a_real_page_tells_how_requests_ended() -> None:
    found = parse_counters(RECORDED.read_text(), server(), version="0.32.0")
    assert found.ended == {"stop": 8, "length": 121, "abort": 0, "error": 0, "repetition": 0}
    assert found.short == 2
    assert found.ttft is not None


def test_reasons_are_summed_over_engines_each_by_itself() -> None:
    lines = [
        f'{FINISHED}_total{{model_name="m",engine="{engine}",finished_reason="{reason}"}} {number}'
        for engine in ENGINES
        for reason, number in (("stop", 5), ("length", 2), ("abort", 0))
    ]
    found = parse_counters("\n".join(lines) + "\n", server())
    assert found.ended == {"stop": 10, "length": 4, "abort": 0}


def test_how_requests_ended_is_missing_where_the_server_does_not_say() -> None:
    bare = parse_counters(page(TTFT) + f"{FINISHED}_total 3\n", server())
    assert (bare.ended, bare.short) == (None, None)
    tokens = page("vllm:request_generation_tokens")
    assert parse_counters(tokens, server()).short == 4
    without_one = tokens.replace('le="1.0"', 'le="2.0"')
    assert parse_counters(without_one, server()).short is None


def test_what_is_not_there_is_missing() -> None:
    found = parse_counters(page(), server())
    assert (found.ttft, found.tpot, found.in_flight, found.prompts) == (None,) * 4


@pytest.mark.parametrize(
    "text",
    [
        "this is {not} a page",
        f"{TTFT}_count NaN\n{TTFT}_sum 1.0",
        f"{TTFT}_count Inf\n{TTFT}_sum 1.0",
        f"{TTFT}_count 1\n{TTFT}_sum Inf",
        f"{TTFT}_count -1\n{TTFT}_sum 1.0",
        f"{TTFT}_bucket 1\n{TTFT}_count 1\n{TTFT}_sum 1.0",
    ],
    ids=["no page", "no number", "infinite count", "infinite sum", "negative", "no edge"],
)
def test_a_broken_page_is_missing(text: str) -> None:
    broken = f"# TYPE {TTFT} histogram\n{text}\n".encode()
    with serving(lambda path, body: (200, broken)) as url:
        assert HttpMetricReader().read("production", [server(url)]) == ()


def test_readable_servers_are_read_and_others_are_missing() -> None:
    def answers(status: int, text: str) -> Callable[[str, bytes], tuple[int, bytes]]:
        return lambda path, body: (status if path == "/metrics" else 404, text.encode())

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with (
            serving(answers(200, page(TTFT))) as good,
            serving(answers(500, page(TTFT))) as failing,
            serving(answers(200, "this is {not} a page")) as odd,
        ):
            urls = {"good": good, "failing": failing, "odd": odd, "nobody": nobody, "new": ""}
            asked = [server(url, name=name) for name, url in urls.items()]
            found = HttpMetricReader(timeout_s=5.0).read("production", asked)
    assert [pod.pod for pod in found] == ["good"]


def test_no_servers_need_no_reading() -> None:
    assert HttpMetricReader().read("production", ()) == ()
