"""A route in memory: servers, stand-ins, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from tests.serving_world import ENVIRONMENT, MODEL, NEW, NOW, OLD, make_channel, observed

from trainyard.serving.guard import FIRST_ANSWERS, Wish, decide
from trainyard.serving.protocol import ReleaseTraffic, ServerTraffic
from trainyard.serving.route import GONE_KEPT_S, SHUN_S, Endpoint, Outcome, Route, Traffic


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def server(release_id: str, index: int = 0, pid: int = 10) -> Endpoint:
    record = observed(release_id, index, pid=pid + index, process_started=1.0, port=20000 + index)
    return Endpoint.of_server(record)


def make_route(servers: Sequence[Endpoint], *, weight: int = 50) -> Route:
    route = Route(ENVIRONMENT, MODEL, clock=Clock())
    wish = Wish.of(make_channel(weight=weight))
    route.update(wish, servers)
    route.decision = decide(wish, "alive", route.health(), None, NOW)
    return route


def test_the_server_with_the_fewest_requests_comes_next() -> None:
    route = make_route([server(OLD, 0), server(OLD, 1), server(NEW)])
    busy, idle = route.upstreams[OLD]
    busy.in_flight = 1
    assert {route.server_of(OLD) for _ in range(3)} == {idle}
    idle.in_flight = 1
    assert [route.server_of(OLD) for _ in range(2)] == [busy, idle]


def test_a_server_that_stays_keeps_its_connections() -> None:
    route = make_route([server(OLD, 0), server(OLD, 1)])
    kept, gone = route.upstreams[OLD]
    kept.in_flight = 3
    unused = route.update(Wish.of(make_channel()), [server(OLD, 0)])
    assert route.upstreams[OLD] == [kept]
    assert (kept.in_flight, unused) == (3, [gone])


def test_a_restarted_server_is_another_one() -> None:
    route = make_route([server(OLD)])
    before = route.upstreams[OLD][0]
    assert route.update(Wish.of(make_channel()), [server(OLD, pid=99)]) == [before]


def test_a_stand_in_is_of_the_same_release_if_there_is_one() -> None:
    route = make_route([server(OLD, 0), server(NEW, 0), server(NEW, 1)])
    first, second = route.upstreams[NEW]
    assert route.stand_in(NEW, first) is second
    route.update(Wish.of(make_channel()), [server(OLD, 0), server(NEW, 0)])
    assert route.stand_in(NEW, route.upstreams[NEW][0]) is route.upstreams[OLD][0]


def test_a_release_without_traffic_does_not_stand_in() -> None:
    route = make_route([server(OLD), server(NEW)], weight=0)
    assert route.stand_in(OLD, route.upstreams[OLD][0]) is None


def test_a_server_that_refused_is_the_last_choice_for_a_while() -> None:
    route = make_route([server(OLD, 0), server(OLD, 1)])
    refused, other = route.upstreams[OLD]
    other.in_flight = 5
    route.stand_in(OLD, refused)
    assert route.server_of(OLD) is other
    assert isinstance(route.clock, Clock)
    route.clock.now = SHUN_S + 0.1
    assert route.server_of(OLD) is refused


def test_failures_are_counted_for_the_judge_and_for_the_fuse() -> None:
    traffic = Traffic()
    for _ in range(FIRST_ANSWERS - 1):
        traffic.note("error")
    traffic.note("cancelled")
    traffic.note("unanswered")
    assert (traffic.answers, traffic.failures, traffic.errors) == (9, 9, 9)
    traffic.note("ok")
    traffic.note("error")
    assert (traffic.answers, traffic.failures, traffic.errors) == (11, 9, 10)


@pytest.mark.parametrize("outcome", ["unanswered", "cancelled", "busy", "refused"])
def test_nothing_but_failed_requests_blows_the_fuse(outcome: Outcome) -> None:
    """Clients leave for reasons of their own, many at once, and send what no server can take."""
    route = make_route([server(OLD), server(NEW)])
    for _ in range(10 * FIRST_ANSWERS):
        route.traffic_of(NEW).note(outcome, f"{NEW}-0")
    seen = route.health()[NEW]
    assert (seen.failures, seen.connection_failures) == (0, 0)


@pytest.mark.parametrize("outcome", ["ok", "error"])
def test_a_working_connection_ends_a_row_of_failed_ones(outcome: str) -> None:
    traffic = Traffic()
    traffic.note("unreachable")
    traffic.note("unreachable")
    assert traffic.connection_failures == 2
    traffic.note(outcome)  # type: ignore[arg-type]
    assert traffic.connection_failures == 0


def test_the_fuses_counts_begin_with_the_exposure_and_the_judges_do_not() -> None:
    route = make_route([server(OLD), server(NEW)])
    for _ in range(20):
        route.traffic_of(NEW).arrivals += 1
        route.traffic_of(NEW).note("unreachable")
    assert route.health()[NEW].connection_failures == 20
    route.update(Wish.of(make_channel(number=2)), [server(OLD), server(NEW)])
    assert route.health()[NEW].connection_failures == 0
    assert route.status("epoch").traffic[NEW] == ReleaseTraffic(20, 20, 0)


def test_each_server_has_its_own_counts_within_its_release() -> None:
    route = make_route([server(OLD, 0), server(OLD, 1)])
    traffic = route.traffic_of(OLD)
    for outcome, name in (
        ("ok", f"{OLD}-0"),
        ("cancelled", f"{OLD}-0"),
        ("unanswered", f"{OLD}-0"),
        ("busy", f"{OLD}-0"),
        ("refused", f"{OLD}-0"),
        ("error", f"{OLD}-1"),
        ("unreachable", f"{OLD}-1"),
        ("unreachable", ""),
    ):
        traffic.arrivals += 1
        if name:
            traffic.sent_to(name)
        traffic.note(outcome, name)  # type: ignore[arg-type]
    traffic.arrivals += 1
    traffic.sent_to(f"{OLD}-1")
    assert route.status("epoch").traffic[OLD] == ReleaseTraffic(
        9,
        3,
        0,
        {
            f"{OLD}-0": ServerTraffic(5, 0, arrivals=5, unanswered=2, refused=1),
            f"{OLD}-1": ServerTraffic(2, 2, arrivals=3, unanswered=0, refused=0),
        },
    )


def test_the_first_answers_count_for_the_fuse_whichever_server_gave_them() -> None:
    route = make_route([server(NEW, 0), server(NEW, 1)])
    for number in range(FIRST_ANSWERS):
        route.traffic_of(NEW).note("error", f"{NEW}-{number % 2}")
    assert route.health()[NEW].failures == FIRST_ANSWERS


def test_a_restarted_server_goes_on_with_its_counts() -> None:
    route = make_route([server(OLD)])
    route.traffic_of(OLD).note("ok", f"{OLD}-0")
    route.update(Wish.of(make_channel()), [server(OLD, pid=99)])
    route.traffic_of(OLD).note("error", f"{OLD}-0")
    assert servers_of(route) == {f"{OLD}-0": ServerTraffic(2, 1, 0, 0, 0)}


def test_the_counts_of_a_server_that_left_are_kept_for_a_while() -> None:
    route = make_route([server(OLD, 0), server(OLD, 1)])
    assert isinstance(route.clock, Clock)
    for index in (0, 1):
        route.traffic_of(OLD).note("ok", f"{OLD}-{index}")
    both = servers_of(route)
    looks = (
        (0.0, [server(OLD, 0)], both),
        (GONE_KEPT_S, [server(OLD, 0)], both),
        # It came back in between, so it left anew.
        (GONE_KEPT_S + 1, [server(OLD, 0), server(OLD, 1)], both),
        (GONE_KEPT_S + 2, [server(OLD, 0)], both),
        (2 * GONE_KEPT_S + 3, [server(OLD, 0)], {f"{OLD}-0": ServerTraffic(1, 0, 0, 0, 0)}),
    )
    for now, ready, kept in looks:
        route.clock.now = now
        route.update(Wish.of(make_channel()), ready)
        assert servers_of(route) == kept
    # A last request that it still had begins its counts anew.
    route.traffic_of(OLD).note("error", f"{OLD}-1")
    assert servers_of(route) == {**both, f"{OLD}-1": ServerTraffic(1, 1, 0, 0, 0)}


def servers_of(route: Route) -> Mapping[str, ServerTraffic]:
    return route.status("epoch").traffic[OLD].servers


def test_the_status_names_both_tracks_before_any_traffic() -> None:
    status = make_route([server(OLD), server(NEW)], weight=25).status("epoch")
    assert status.weights == {OLD: 75, NEW: 25}
    assert status.traffic == {OLD: ReleaseTraffic(0, 0, 0), NEW: ReleaseTraffic(0, 0, 0)}
    assert (status.guard, status.channel_generation, status.epoch) == ("following", 1, "epoch")
