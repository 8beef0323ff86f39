"""Silence is not peace: whether a look has seen the releases."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.rollout.machine import NEW, NOW, OLD

from trainyard.documents.look import (
    Histogram,
    PodCounters,
    ReleaseCounters,
    RouteCounters,
    Snapshot,
)
from trainyard.rollout.sight import unseen
from trainyard.serving.protocol import ServerStatus


def server(number: int = 0, release: str = NEW) -> ServerStatus:
    return ServerStatus(f"{release}-{number}", release, "ready", "", NOW, 0, "")


def pod(count: int, number: int = 0, **changes: Any) -> PodCounters:
    made = PodCounters(
        pod=f"{NEW}-{number}",
        release_id=NEW,
        started_at=NOW,
        ttft=Histogram(count=count, total=0.1 * count),
        tpot=Histogram(count=count, total=0.01 * count),
    )
    return made.model_copy(update=changes)


def look(seconds: float, *pods: PodCounters, arrivals: int = 0, epoch: str = "1") -> Snapshot:
    counters = ReleaseCounters(arrivals=arrivals, errors=0, in_flight=0)
    return Snapshot(
        at=NOW + timedelta(seconds=seconds),
        phase="holding",
        step_index=0,
        pods=pods,
        route=RouteCounters(epoch=epoch, weights={OLD: 50, NEW: 50}, releases={NEW: counters}),
    )


def seen(before: Snapshot | None, after: Snapshot, servers: int = 1) -> str:
    past = [before] if before is not None else []
    return unseen(past, after, NEW, [server(number) for number in range(servers)])


def test_a_server_that_goes_on_is_seen() -> None:
    assert seen(look(0, pod(100), arrivals=100), look(30, pod(150), arrivals=150)) == ""


def test_quiet_is_not_blind() -> None:
    assert seen(look(0, pod(100), arrivals=100), look(30, pod(100), arrivals=100)) == ""


def test_a_few_requests_that_no_server_counted_yet_are_not_blind() -> None:
    assert seen(look(0, pod(100), arrivals=100), look(30, pod(100), arrivals=110)) == ""


def test_a_source_that_is_gone_is_blind() -> None:
    assert f"no counters of {NEW}-0" in seen(look(0, pod(1)), look(30))


def test_a_source_that_is_half_gone_is_blind() -> None:
    both = look(0, pod(100), pod(100, 1), arrivals=200)
    half = look(30, pod(150), arrivals=300)
    assert seen(both, half, servers=2) == f"no counters of {NEW}-1"


def test_counters_that_stand_still_under_requests_are_blind() -> None:
    said = seen(look(0, pod(100), arrivals=100), look(30, pod(100), arrivals=150))
    assert said == f"the counters of {NEW}-0 stand still"


def test_few_requests_show_it_too_in_time() -> None:
    past = [look(30.0 * n, pod(100), arrivals=100 + 4 * n) for n in range(6)]
    said = [unseen(past[:n], past[n], NEW, [server()]) for n in range(1, 6)]
    assert [bool(one) for one in said] == [False, False, False, False, True]


def test_one_of_two_that_stands_still_is_blind() -> None:
    before = look(0, pod(100), pod(100, 1), arrivals=200)
    after = look(30, pod(150), pod(100, 1), arrivals=300)
    assert "stand still" in seen(before, after, servers=2)


def test_a_sample_that_is_not_due_yet_does_not_stand_still() -> None:
    """A Prometheus that scrapes every minute, and looks every half one."""
    same = pod(100, read_at=NOW)
    assert seen(look(0, same, arrivals=100), look(30, same, arrivals=150)) == ""


def test_counters_that_go_backwards_are_blind() -> None:
    assert "went backwards" in seen(look(0, pod(100)), look(30, pod(40)))


@pytest.mark.parametrize(
    "changes", [{"started_at": NOW + timedelta(seconds=20)}, {"process_started_s": 5.0}]
)
def test_a_server_that_starts_anew_at_every_look_is_never_seen(changes: dict[str, Any]) -> None:
    assert "was there before" in seen(look(0, pod(100)), look(30, pod(140, **changes)))


def test_a_server_more_does_not_hide_the_others() -> None:
    assert seen(look(0, pod(100)), look(30, pod(150), pod(3, 1)), servers=2) == ""


@pytest.mark.parametrize("figure", ["ttft", "tpot"])
def test_a_release_without_a_judged_series_is_blind(figure: str) -> None:
    bare = pod(150, **{figure: None})
    assert "no counters" in seen(look(0, pod(100)), look(30, bare))


def test_without_the_router_nothing_is_seen() -> None:
    mute = look(30, pod(150)).model_copy(update={"route": None})
    assert "router" in seen(look(0, pod(100)), mute)
    assert "router" in seen(look(0, pod(100), epoch="1"), look(30, pod(150), epoch="2"))
    assert "router" in seen(None, look(30, pod(150)))


def test_a_release_without_servers_is_not_seen() -> None:
    assert seen(look(0, pod(100)), look(30, pod(150)), servers=0) != ""
