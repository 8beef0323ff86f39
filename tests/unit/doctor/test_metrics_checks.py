"""What the doctor says of the source of an environment's metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.fake_prometheus import FakePrometheus, fake_prometheus

from trainyard.doctor.metrics_checks import metrics_checks
from trainyard.doctor.report import Check, guarded
from trainyard.spec.metrics import MetricsSource

RUNNING = "vllm:num_requests_running"


@pytest.fixture
def fake() -> Iterator[FakePrometheus]:
    with fake_prometheus() as served:
        yield served


def checked(fake: FakePrometheus, **source: Any) -> Check:
    values = {"source": "prometheus", "url": fake.url, "timeout_s": 2.0, **source}
    made = MetricsSource.model_validate(values)
    (check,) = guarded("metrics", lambda: metrics_checks(made))
    return check


def test_servers_that_are_scraped_are_counted(fake: FakePrometheus) -> None:
    now = time.time()
    for pod in ("a-0", "a-1"):
        for engine in ("0", "1"):
            fake.add(now - 5, RUNNING, 1, pod=pod, release="a", engine=engine)
    fake.add(now - 500, RUNNING, 1, pod="b-0", release="b")
    check = checked(fake)
    assert (check.state, check.found) == ("ok", f"{fake.url} has fresh figures of 2 servers.")


def test_series_without_our_labels_are_none(fake: FakePrometheus) -> None:
    fake.add(time.time() - 5, RUNNING, 1, instance="10.0.0.1:8000")
    check = checked(fake)
    assert check.state == "warn"
    assert "no figures of any server from the last 45 s" in check.found
    assert "labels release and pod" in check.remedy


@pytest.mark.parametrize("status", [401, 403])
def test_a_source_that_refuses_us_is_told_with_what_to_look_at(
    fake: FakePrometheus, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_METRICS_TOKEN", "stale")
    fake.status = status
    check = checked(fake, auth="bearer")
    assert (check.state, check.retryable) == ("fail", False)
    assert check.found == f"{fake.url} refuses us (status {status})."
    assert "metrics.auth (bearer)" in check.remedy
    assert "stale" not in check.found + check.remedy


def test_a_source_without_a_token_is_told(
    fake: FakePrometheus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRAINYARD_METRICS_TOKEN", raising=False)
    check = checked(fake, auth="bearer")
    assert check.state == "fail"
    assert "TRAINYARD_METRICS_TOKEN" in check.found
    assert not fake.asked


def test_a_source_that_does_not_answer_may_answer_later(fake: FakePrometheus) -> None:
    fake.status = 503
    check = checked(fake)
    assert (check.state, check.retryable) == ("fail", True)
    assert "cannot be asked" in check.found


def test_servers_that_are_asked_themselves_need_no_source() -> None:
    (check,) = metrics_checks(MetricsSource())
    assert check.state == "ok"


def test_on_neuron_somebody_must_see_the_errors_of_devices(fake: FakePrometheus) -> None:
    good, warned = metrics_checks(MetricsSource(), on_neuron=True)
    assert (good.state, warned.state) == ("ok", "warn")
    assert warned.found.endswith("blow no fuse.")
    assert warned.remedy.startswith("Let a Prometheus scrape neuron-monitor")
    source = MetricsSource.model_validate({"source": "prometheus", "url": fake.url})
    assert not any("fuse" in check.found for check in metrics_checks(source, on_neuron=True))
