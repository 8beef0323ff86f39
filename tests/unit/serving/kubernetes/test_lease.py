"""Leases in a cluster: the driver's, how they are judged, and the election."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster, Fault
from tests.serving_world import ENVIRONMENT, MODEL

from trainyard.errors import Transient
from trainyard.kubernetes.kinds import LEASE
from trainyard.kubernetes.labels import route_name
from trainyard.serving.kubernetes.lease import (
    SKEW_S,
    Election,
    KubernetesLease,
    LeaseClock,
    micro_time,
)

NAME = route_name(MODEL, ENVIRONMENT)
START = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)


class Clock:
    """Both clocks of a machine; the wall clock may be wrong."""

    def __init__(self, wrong_by_s: float = 0.0) -> None:
        self.at = 1000.0
        self.wrong = timedelta(seconds=wrong_by_s)

    def monotonic(self) -> float:
        return self.at

    def wall(self) -> datetime:
        return START + timedelta(seconds=self.at - 1000.0) + self.wrong

    def judge(self) -> LeaseClock:
        return LeaseClock(monotonic=self.monotonic, wall=self.wall)


@pytest.fixture
def fake() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        yield fake


def spec(renewed: datetime, *, holder: str = "run#1", duration_s: int = 120) -> dict[str, Any]:
    return {
        "spec": {
            "holderIdentity": holder,
            "leaseDurationSeconds": duration_s,
            "renewTime": micro_time(renewed),
        }
    }


# --- the driver's ---------------------------------------------------------------------------------


def test_the_last_to_renew_has_the_lease(fake: FakeCluster) -> None:
    lease = KubernetesLease(fake.client(), NS, now=lambda: START)
    lease.renew(ENVIRONMENT, MODEL, holder="run#1", duration_s=120.4)
    lease.renew(ENVIRONMENT, MODEL, holder="run#2", duration_s=120.4)
    stored = fake.get(LEASE, NAME)
    assert stored is not None
    assert stored["spec"] == {
        "holderIdentity": "run#2",
        "leaseDurationSeconds": 121,
        "renewTime": "2026-11-27T12:00:00.000000Z",
    }


def test_only_the_holder_ends_a_lease(fake: FakeCluster) -> None:
    lease = KubernetesLease(fake.client(), NS)
    lease.release(ENVIRONMENT, MODEL, holder="run#1")
    lease.renew(ENVIRONMENT, MODEL, holder="run#2", duration_s=120)
    judge = Clock().judge()
    lease.release(ENVIRONMENT, MODEL, holder="run#1")
    assert fake.get(LEASE, NAME)["spec"]["holderIdentity"] == "run#2"  # type: ignore[index]
    lease.release(ENVIRONMENT, MODEL, holder="run#2")
    assert judge.state(NAME, fake.get(LEASE, NAME)) == "absent"


def test_a_look_tells_who_holds_it_by_the_wall_clock(fake: FakeCluster) -> None:
    moments = [START]
    lease = KubernetesLease(fake.client(), NS, now=lambda: moments[-1])
    assert lease.look(ENVIRONMENT, MODEL).state == "absent"
    lease.renew(ENVIRONMENT, MODEL, holder="run#1", duration_s=120)
    first = lease.look(ENVIRONMENT, MODEL)
    assert (first.state, first.holder) == ("alive", "run#1")
    moments.append(START + timedelta(seconds=60))
    assert lease.look(ENVIRONMENT, MODEL) == first
    lease.renew(ENVIRONMENT, MODEL, holder="run#1", duration_s=120)
    assert lease.look(ENVIRONMENT, MODEL).mark != first.mark
    # The clocks of two machines may differ by ten seconds.
    moments.append(START + timedelta(seconds=189))
    assert lease.look(ENVIRONMENT, MODEL).state == "alive"
    moments.append(START + timedelta(seconds=191))
    assert lease.look(ENVIRONMENT, MODEL).state == "expired"


def test_who_renews_while_another_ends_it_keeps_it(fake: FakeCluster) -> None:
    lease = KubernetesLease(fake.client(), NS)
    lease.renew(ENVIRONMENT, MODEL, holder="run#1", duration_s=120)
    fake.faults.append(Fault("update", "leases", 409, "Conflict"))
    lease.release(ENVIRONMENT, MODEL, holder="run#1")
    assert fake.get(LEASE, NAME)["spec"]["holderIdentity"] == "run#1"  # type: ignore[index]


def test_an_api_that_is_away_is_transient(fake: FakeCluster) -> None:
    fake.down = True
    with pytest.raises(Transient):
        KubernetesLease(fake.client(), NS).renew(ENVIRONMENT, MODEL, holder="r", duration_s=120)


# --- judging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lease", [None, {"spec": {}}, spec(START, holder="")])
def test_without_a_holder_there_is_no_lease(lease: dict[str, Any] | None) -> None:
    assert Clock().judge().state(NAME, lease) == "absent"


@pytest.mark.parametrize("wrong_by_s", [-3600.0, 0.0, 3600.0])
def test_a_renewal_that_was_seen_counts_from_then_whatever_the_clocks_say(
    wrong_by_s: float,
) -> None:
    clock = Clock(wrong_by_s)
    judge = clock.judge()
    judge.state(NAME, spec(START))
    clock.at += 40
    renewed = spec(START + timedelta(seconds=40))
    assert judge.state(NAME, renewed) == "alive"
    clock.at += 119
    assert judge.state(NAME, renewed) == "alive"
    clock.at += 2
    assert judge.state(NAME, renewed) == "expired"


@pytest.mark.parametrize(
    ("age_s", "state"), [(0, "alive"), (120, "alive"), (120 + SKEW_S + 1, "expired")]
)
def test_what_the_first_look_finds_is_judged_by_the_wall_clock(age_s: float, state: str) -> None:
    found = spec(START - timedelta(seconds=age_s))
    assert Clock().judge().state(NAME, found) == state


def test_the_first_look_gives_no_more_than_the_duration() -> None:
    clock = Clock()
    judge = clock.judge()
    ahead = spec(START + timedelta(hours=1))
    assert judge.state(NAME, ahead) == "alive"
    clock.at += 121
    assert judge.state(NAME, ahead) == "expired"


# --- the election ---------------------------------------------------------------------------------


def elector(fake: FakeCluster, name: str, clock: Clock) -> Election:
    return Election(fake.client(), NS, "guard", name, monotonic=clock.monotonic, wall=clock.wall)


def test_one_leads_and_another_takes_over_in_fifteen_seconds(fake: FakeCluster) -> None:
    clock = Clock()
    first, second = elector(fake, "first", clock), elector(fake, "second", clock)
    assert first.take_part()
    assert not second.take_part()
    for _ in range(10):
        clock.at += 2
        assert first.take_part()
        assert not second.take_part()
    killed_at = clock.at
    while not second.take_part():
        clock.at += 0.5
    assert clock.at - killed_at <= 13
    assert not first.leads


def test_a_leader_that_cannot_renew_stops_before_anybody_else_begins(fake: FakeCluster) -> None:
    clock = Clock()
    first, second = elector(fake, "first", clock), elector(fake, "second", clock)
    first.take_part()
    second.take_part()
    stopped = None
    while not second.leads:
        clock.at += 0.5
        fake.down = True
        with suppress(Transient):
            first.take_part()
        stopped = stopped or (None if first.leads else clock.at)
        fake.down = False
        second.take_part()
        assert not (first.leads and second.leads)
    assert stopped is not None
    assert stopped < clock.at


def test_a_stolen_lease_ends_leadership(fake: FakeCluster) -> None:
    clock = Clock()
    first = elector(fake, "first", clock)
    first.take_part()
    fake.edit(LEASE, "guard", lambda body: body["spec"].update(holderIdentity="thief"))
    clock.at += 2
    assert not first.take_part()


def test_two_that_see_no_leader_do_not_both_become_it(fake: FakeCluster) -> None:
    clock = Clock()
    first, second = elector(fake, "first", clock), elector(fake, "second", clock)
    fake.faults.append(Fault("get", "leases", 404, "NotFound", details={"name": "guard"}, times=2))
    assert [first.take_part(), second.take_part()] == [True, False]


def test_who_resigns_lets_another_lead_at_once(fake: FakeCluster) -> None:
    clock = Clock()
    first, second = elector(fake, "first", clock), elector(fake, "second", clock)
    first.take_part()
    first.resign()
    assert second.take_part()
    lease = fake.get(LEASE, "guard")
    assert lease is not None
    assert lease["spec"]["leaseTransitions"] == 1
