"""The search closes in on the highest rate, whatever the server can do, and ends in time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.documents.measurement import RateFound, RateProbe
from trainyard.measure.rate_search import find_rate
from trainyard.spec.model import RateSearch


class FakeServer:
    """Meets the SLO up to its capacity; each attempt takes as long as its requests."""

    def __init__(self, capacity: float, *, probe_s: float = 10.0) -> None:
        self.capacity = capacity
        self.probe_s = probe_s
        self.now = 0.0
        self.tried: list[float] = []

    def attempt(self, rate: float, number: int) -> RateProbe:
        assert number == len(self.tried)
        self.tried.append(rate)
        self.now += max(self.probe_s, 20 / rate)
        meets = rate <= self.capacity
        return RateProbe(
            rate_per_s=rate,
            requests=20,
            completed=20,
            attainment=1.0 if meets else 0.5,
            meets=meets,
            figures={},
            duration_s=self.probe_s,
        )


def found_on(server: FakeServer, **changes: Any) -> RateFound:
    values = {"level": "busy", "min_rate": 1.0, "max_rate": 64.0, "probe_s": 10.0, **changes}
    return find_rate(RateSearch(**values), server.attempt, clock=lambda: server.now)


def test_the_rate_is_bracketed_by_doubling_and_bisection() -> None:
    server = FakeServer(capacity=11.0)

    found = found_on(server)

    assert server.tried[:5] == [1, 2, 4, 8, 16]
    assert found.rate_per_s is not None
    assert found.failing_rate_per_s is not None
    assert found.rate_per_s <= 11.0 < found.failing_rate_per_s <= found.rate_per_s * 1.1
    assert found.complete
    assert found.reason == f"{found.failing_rate_per_s:g} a second does not meet the SLO any more."
    assert found.best is not None
    assert found.best.meets


def test_a_server_that_is_too_slow_for_anything_is_tried_once() -> None:
    found = found_on(FakeServer(capacity=0.1))

    assert (found.rate_per_s, found.failing_rate_per_s, found.complete) == (None, 1.0, True)
    assert found.reason == "Not even 1 a second meets the SLO."
    assert found.best is None
    assert len(found.probes) == 1


def test_no_rate_above_the_highest_is_tried() -> None:
    server = FakeServer(capacity=1000.0)

    found = found_on(server, max_rate=40.0)

    assert server.tried == [1, 2, 4, 8, 16, 32, 40]
    assert (found.rate_per_s, found.failing_rate_per_s, found.complete) == (40.0, None, True)
    assert found.reason == "It was not looked for above 40 a second."


def test_no_attempt_begins_that_would_not_end_in_time() -> None:
    server = FakeServer(capacity=11.0)

    found = found_on(server, max_duration_s=69.0)

    assert server.now <= 69.0
    assert (found.rate_per_s, found.failing_rate_per_s, found.complete) == (8.0, 16.0, False)
    assert found.reason == "No time was left to try 11.31 a second (69 s)."


def test_the_first_attempt_is_made_though_time_is_short() -> None:
    assert len(found_on(FakeServer(capacity=5.0), max_duration_s=1.0).probes) == 1


@given(st.floats(0.5, 100.0), st.sampled_from([0.05, 0.1, 0.3]))
def test_it_ends_for_every_capacity(capacity: float, precision: float) -> None:
    found = found_on(FakeServer(capacity), precision=precision, max_duration_s=1e6)

    assert found.complete
    assert len(found.probes) < 16
    if found.rate_per_s is not None:
        assert found.rate_per_s <= max(capacity, 1.0)
    if found.failing_rate_per_s is not None:
        assert found.failing_rate_per_s > capacity


@pytest.mark.parametrize("kept", [1, 2])
def test_what_the_benchmark_raises_ends_the_search(kept: int) -> None:
    server = FakeServer(capacity=100.0)

    def attempt(rate: float, number: int) -> RateProbe:
        if number == kept:
            raise RuntimeError("the server is gone")
        return server.attempt(rate, number)

    with pytest.raises(RuntimeError, match="gone"):
        find_rate(RateSearch(level="busy"), attempt, clock=lambda: server.now)
