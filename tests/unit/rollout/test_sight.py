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
    ServerCounters,
    Snapshot,
)
from trainyard.rollout.sight import unseen
from trainyard.rollout.slices import comparable_pods
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


def look(
    seconds: float,
    *pods: PodCounters,
    arrivals: int = 0,
    epoch: str = "1",
    **servers: ServerCounters,
) -> Snapshot:
    named = {f"{NEW}-{name[1:]}": one for name, one in servers.items()}
    counters = ReleaseCounters(arrivals=arrivals, errors=0, in_flight=0, servers=named)
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


def ended(requests: int, sent: int | None = None) -> ServerCounters:
    return ServerCounters(ended=requests, errors=0, arrivals=sent)


@pytest.mark.parametrize(
    ("before", "after", "in_flight", "still"),
    [
        (ended(70, 70), ended(70, 70), None, False),
        (ended(70), ended(70), 0, False),
        (None, None, 0, False),
        # It was sent requests, and ended them.
        (ended(70, 70), ended(95, 95), 0, True),
        (ended(70), ended(71), 0, True),
        # It was sent requests, and hangs.
        (ended(70, 70), ended(70, 90), 0, True),
        (ended(70, 75), ended(70, 75), 0, True),
        (ended(70), ended(70), 5, True),
        (None, None, 5, True),
        # Nobody says what is under way there.
        (ended(70), ended(70), None, True),
    ],
)
def test_a_server_that_was_sent_nothing_is_idle_and_not_blind(
    before: ServerCounters | None, after: ServerCounters | None, in_flight: int | None, still: bool
) -> None:
    """Where sessions or prefixes choose the server, some get nothing for minutes."""
    one, other = pod(70, 0, in_flight=in_flight), pod(100, 1)
    told = (before or after) and (before or after).arrivals is not None
    busy = [ended(n, n if told else None) for n in (100, 150)]
    first = {"s1": busy[0], **({"s0": before} if before else {})}
    second = {"s1": busy[1], **({"s0": after} if after else {})}
    past = look(0, one, other, arrivals=170, **first)
    now = look(30, one, pod(150, 1), arrivals=270, **second)
    expected = f"the counters of {NEW}-0 stand still" if still else ""
    assert seen(past, now, servers=2) == expected
    assert bool([p for p, _ in comparable_pods(past, now, NEW) if p.pod == one.pod]) != still


def test_where_the_router_counts_arrivals_a_server_that_it_does_not_name_got_nothing() -> None:
    past = look(0, pod(70, 0), pod(100, 1), arrivals=100, s1=ended(100, 100))
    now = look(30, pod(70, 0), pod(150, 1), arrivals=200, s1=ended(150, 150))
    assert seen(past, now, servers=2) == ""


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
