"""Counters from a Prometheus: as scraped, or not at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.fake_prometheus import FakePrometheus, fake_prometheus
from tests.unit.rollout.machine import NEW, NOW, OLD

from trainyard.documents.look import PodCounters
from trainyard.rollout.readers.prometheus import BadAnswer, PrometheusReader, parse_matrix
from trainyard.rollout.readers.scrape import parse_counters
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.metrics import MetricsSource

NOW_S = NOW.timestamp()
TTFT = "vllm:time_to_first_token_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"


@pytest.fixture
def fake() -> Iterator[FakePrometheus]:
    with fake_prometheus() as served:
        yield served


def reader(fake: FakePrometheus, **source: Any) -> PrometheusReader:
    values = {"source": "prometheus", "url": fake.url, "timeout_s": 5.0, **source}
    return PrometheusReader(
        MetricsSource.model_validate(values), version_of=lambda _: "0.13.0", now=lambda: NOW
    )


def server(release: str = OLD, number: int = 0, *, start_s: float = -3600.0) -> ServerStatus:
    return ServerStatus(
        name=f"{release}-{number}",
        release_id=release,
        state="ready",
        url="http://unused",
        started_at=NOW + timedelta(seconds=start_s),
        restarts=0,
        message="",
    )


def page(times: int) -> str:
    """Return the page of a server of two engines that answered `times` requests each."""
    registry = CollectorRegistry()
    ttft = Histogram(TTFT, "help", ("engine",), buckets=(0.1, 0.25, 1.0), registry=registry)
    tpot = Histogram(TPOT, "help", ("engine",), buckets=(0.01, 0.1), registry=registry)
    outputs = Histogram(
        "vllm:request_generation_tokens", "help", ("engine",), buckets=(1, 2, 5), registry=registry
    )
    finished = Counter("vllm:request_success", "help", ("finished_reason",), registry=registry)
    for engine in ("0", "1"):
        for index in range(times):
            ttft.labels(engine).observe(0.05 + 0.3 * (index % 2))
            tpot.labels(engine).observe(0.02)
            finished.labels("length" if index % 2 else "stop").inc()
            outputs.labels(engine).observe(1 + index % 2)
    return generate_latest(registry).decode()


def scraped(
    fake: FakePrometheus, at_s: float, text: str, target: ServerStatus, **labels: str
) -> None:
    """Let the fake have scraped a page at a moment, as a Prometheus would store it."""
    outer = {"pod": target.name, "release": target.release_id, "node": "node-1", **labels}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            fake.add(at_s, sample.name, sample.value, **{**sample.labels, **outer})


def read(fake: FakePrometheus, *servers: ServerStatus, **source: Any) -> dict[str, PodCounters]:
    found = reader(fake, **source).read("production", servers)
    return {pod.pod: pod for pod in found}


def test_the_counters_are_those_that_scraping_gives(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 20, page(3), server())
    scraped(fake, NOW_S - 10, page(5), server())
    (pod,) = reader(fake).read("production", [server()])
    direct = parse_counters(page(5), server(), version="0.13.0")
    assert pod.read_at == NOW - timedelta(seconds=10)
    assert pod.node == "node-1"
    assert pod.model_copy(update={"read_at": None, "node": ""}) == direct
    assert direct.ttft is not None
    assert direct.ttft.count == 10
    assert pod.ended == {"stop": 6, "length": 4}
    assert pod.short == 6


def test_each_server_has_its_own_counters(fake: FakePrometheus) -> None:
    for target, times in ((server(OLD, 0), 1), (server(OLD, 1), 2), (server(NEW), 3)):
        scraped(fake, NOW_S - 5, page(times), target)
    found = read(fake, server(OLD, 0), server(OLD, 1), server(NEW))
    counts = {name: pod.ttft.count for name, pod in found.items() if pod.ttft}
    assert counts == {f"{OLD}-0": 2, f"{OLD}-1": 4, f"{NEW}-0": 6}


def test_what_is_too_old_is_missing(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 50, page(3), server(OLD))
    scraped(fake, NOW_S - 40, page(3), server(NEW))
    assert set(read(fake, server(OLD), server(NEW), freshness_s=45)) == {f"{NEW}-0"}


def test_a_source_may_be_told_to_be_late(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 90, page(3), server())
    assert read(fake, server(), freshness_s=45) == {}
    (pod,) = read(fake, server(), freshness_s=45, delay_s=60).values()
    assert pod.read_at == NOW - timedelta(seconds=90)


def test_a_release_without_series_is_missing_never_zero(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 5, page(3), server(OLD))
    assert set(read(fake, server(OLD), server(NEW))) == {f"{OLD}-0"}


def test_a_family_without_series_is_missing_never_zero(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 5, page(3), server())
    fake.series = {key: v for key, v in fake.series.items() if TPOT not in dict(key)["__name__"]}
    (pod,) = read(fake, server()).values()
    assert pod.ttft is not None
    assert pod.tpot is None


@pytest.mark.parametrize("edge", ["0,25", "abc", "", "NaN"])
def test_a_server_with_an_edge_that_is_no_number_is_missing(
    fake: FakePrometheus, edge: str
) -> None:
    scraped(fake, NOW_S - 5, page(3), server(OLD))
    scraped(fake, NOW_S - 5, page(3).replace('le="0.25"', f'le="{edge}"'), server(NEW))
    assert set(read(fake, server(OLD), server(NEW))) == {f"{OLD}-0"}
    with pytest.raises(ValueError, match=r"le=.* is no number"):
        parse_counters(page(3).replace('le="0.25"', f'le="{edge}"'), server())


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1"])
@pytest.mark.parametrize("end", ["_count", "_sum", "_bucket"])
def test_a_server_with_a_number_that_is_none_is_missing(
    fake: FakePrometheus, value: str, end: str
) -> None:
    scraped(fake, NOW_S - 5, page(3), server(OLD))
    scraped(fake, NOW_S - 5, page(3), server(NEW))
    spoilt = next(
        key
        for key in fake.series
        if dict(key)["__name__"] == f"{TTFT}{end}" and dict(key)["release"] == OLD
    )
    fake.series[spoilt] = {NOW_S - 5: value}
    assert set(read(fake, server(OLD), server(NEW))) == {f"{NEW}-0"}


def test_samples_of_one_scrape_are_taken_while_the_next_is_half_there(
    fake: FakePrometheus,
) -> None:
    scraped(fake, NOW_S - 20, page(3), server())
    whole = dict.fromkeys(fake.series)
    scraped(fake, NOW_S - 10, page(5), server())
    for key in list(whole)[::2]:
        fake.series[key].pop(NOW_S - 10)
    (pod,) = read(fake, server()).values()
    assert pod.read_at == NOW - timedelta(seconds=20)
    assert pod.ttft is not None
    assert pod.ttft.count == 6


def test_two_prometheus_that_scrape_the_same_pods_are_not_added_up(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 8, page(3), server(), prometheus_replica="a")
    scraped(fake, NOW_S - 4, page(5), server(), prometheus_replica="b")
    (pod,) = read(fake, server()).values()
    assert pod.ttft is not None
    assert (pod.ttft.count, pod.read_at) == (10, NOW - timedelta(seconds=4))


def test_samples_from_before_the_servers_start_are_another_servers(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 20, page(3), server())
    assert read(fake, server(start_s=-10)) == {}


def test_labels_and_more_conditions_are_the_environments(fake: FakePrometheus) -> None:
    for cluster, times in (("ours", 2), ("theirs", 7)):
        outer = {"kubernetes_pod": f"{OLD}-0", "version": OLD, "cluster": cluster}
        for family in text_string_to_metric_families(page(times)):
            for sample in family.samples:
                fake.add(NOW_S - 5, sample.name, sample.value, **{**sample.labels, **outer})
    labels = {"pod": "kubernetes_pod", "release": "version"}
    (pod,) = read(fake, server(), labels=labels, match={"cluster": "ours"}).values()
    assert pod.ttft is not None
    assert pod.ttft.count == 4
    assert 'cluster="ours"' in fake.asked[-1].form["query"]


def test_the_question_is_for_samples_and_nothing_is_computed_there(fake: FakePrometheus) -> None:
    read(fake, server())
    (asked,) = fake.asked
    assert asked.path == "/api/v1/query"
    assert asked.form["time"] == f"{NOW_S:.3f}"
    assert asked.form["query"].endswith("}[45s]")
    assert "rate(" not in asked.form["query"]
    assert "quantile" not in asked.form["query"]


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 409, 422, 429, 500, 502, 503, 504])
def test_a_bad_status_is_missing(fake: FakePrometheus, status: int) -> None:
    scraped(fake, NOW_S - 5, page(3), server())
    fake.status = status
    assert reader(fake).read("production", [server()]) == ()
    assert reader(fake).history("production", [server()], until=NOW) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b'{"status": "success"}',
        b'{"status": "error", "errorType": "timeout", "error": "query timed out"}',
        b'{"status": "success", "data": {"resultType": "vector", "result": []}}',
        b'{"status": "success", "data": {"resultType": "matrix", "result": [{"metric": 5}]}}',
        b'{"status": "success", "data": {"resultType": "matrix", "result": [{"metric": {}, '
        b'"values": [["x", "y"]]}]}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_nonsense_is_missing(fake: FakePrometheus, body: bytes) -> None:
    fake.body = body
    assert reader(fake).read("production", [server()]) == ()
    with pytest.raises(BadAnswer):
        parse_matrix(body)


def test_a_server_that_is_not_there_is_missing(fake: FakePrometheus) -> None:
    gone = reader(fake, url="http://127.0.0.1:9", timeout_s=1.0)
    assert gone.read("production", [server()]) == ()
    assert gone.history("production", [server()], until=NOW) is None


def test_an_answer_that_trickles_in_is_too_late(fake: FakePrometheus) -> None:
    fake.trickle = lambda: time.sleep(0.02)
    scraped(fake, NOW_S - 5, page(3), server())
    assert reader(fake, timeout_s=0.2).read("production", [server()]) == ()


@pytest.mark.parametrize("jump_s", [-600, 600])
def test_a_server_with_another_clock_is_not_believed(
    fake: FakePrometheus, jump_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    scraped(fake, NOW_S - 5, page(3), server())
    fake.clock_s = NOW_S + 1
    assert len(read(fake, server())) == 1
    fake.clock_s = NOW_S + jump_s
    with caplog.at_level(logging.WARNING):
        assert read(fake, server()) == {}
    assert "600 s apart" in caplog.text


def test_samples_from_the_future_are_missing(fake: FakePrometheus) -> None:
    """Whatever the server was asked: a broken one may answer anything."""
    late = f'[[{NOW_S + 300}, "5"]]'
    fake.body = (
        '{"status": "success", "data": {"resultType": "matrix", "result": [{"metric": '
        f'{{"__name__": "{TTFT}_count", "pod": "{OLD}-0", "release": "{OLD}"}}, "values": {late}'
        "}]}}"
    ).encode()
    assert reader(fake).read("production", [server()]) == ()


def test_no_servers_ask_nothing(fake: FakePrometheus) -> None:
    assert reader(fake).read("production", ()) == ()
    assert reader(fake).devices("production", ()) == ()
    assert fake.asked == []


# --- history --------------------------------------------------------------------------------------


def test_history_is_what_the_counters_were_minute_by_minute(fake: FakePrometheus) -> None:
    for minute in range(60):
        scraped(fake, NOW_S - 60.0 * minute, page(60 - minute), server())
    moments = reader(fake).history("production", [server(start_s=-86400)], until=NOW)
    assert moments is not None
    ats = [at for at, _ in moments]
    assert ats == sorted(ats)
    assert {(later - at).total_seconds() for at, later in pairwise(ats)} == {60}
    counts = [pod.ttft.count for _, (pod,) in moments if pod.ttft]
    assert counts[-60:] == [2 * (n + 1) for n in range(60)]
    (asked,) = fake.asked
    assert asked.path == "/api/v1/query_range"
    assert float(asked.form["end"]) - float(asked.form["start"]) == 8 * 3600


def test_history_keeps_only_the_edges_that_a_tail_may_have(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S, page(10), server())
    moments = reader(fake).history("production", [server()], until=NOW)
    assert moments is not None
    (pod,) = moments[-1][1]
    assert pod.ttft is not None
    assert set(pod.ttft.buckets) == {"1.0", "+Inf"}


def test_history_of_another_process_is_none(fake: FakePrometheus) -> None:
    for minute in range(30):
        scraped(fake, NOW_S - 60.0 * minute, page(2), server())
    moments = reader(fake).history("production", [server(start_s=-600)], until=NOW)
    assert moments is not None
    assert min(at for at, _ in moments) >= NOW - timedelta(seconds=600)


def test_a_wish_for_no_history_asks_nothing(fake: FakePrometheus) -> None:
    assert reader(fake, history_s=0).history("production", [server()], until=NOW) == ()
    assert fake.asked == []


def test_moments_are_in_utc(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 5, page(3), server())
    (pod,) = read(fake, server()).values()
    assert pod.read_at is not None
    assert pod.read_at.tzinfo is UTC
    assert isinstance(pod.read_at, datetime)


# --- devices --------------------------------------------------------------------------------------


def test_errors_of_devices_come_from_the_nodes_of_the_servers(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 5, page(3), server(NEW))
    pods = reader(fake).read("production", [server(NEW)])
    for node in ("node-1", "node-2"):
        for device in ("0", "1"):
            fake.add(
                NOW_S - 5,
                "hardware_ecc_events_total",
                2,
                node=node,
                event_type="mem_ecc_uncorrected",
                neuron_device_index=device,
            )
    fake.add(
        NOW_S - 5, "execution_errors_total", 7, node="node-1", release=NEW, error_type="numerical"
    )
    fake.add(
        NOW_S - 5, "execution_errors_total", 9, node="node-1", runtime_tag="x", error_type="generic"
    )
    (device, process) = reader(fake).devices("production", pods)
    assert (device.place, device.release_id, device.errors) == (
        "node-1",
        "",
        {"ecc/mem_ecc_uncorrected": 4},
    )
    assert (process.release_id, process.errors) == (NEW, {"execution/numerical": 7})


def test_devices_that_nobody_counts_are_no_data(fake: FakePrometheus) -> None:
    scraped(fake, NOW_S - 5, page(3), server())
    pods = reader(fake).read("production", [server()])
    assert reader(fake).devices("production", pods) == ()
    assert (
        reader(fake).devices("production", [pod.model_copy(update={"node": ""}) for pod in pods])
        == ()
    )
