"""The watch: objectives, windows, burn rates, and what was not seen."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.unit.rollout.machine import NEW, NOW, OLD, make_plan, requested, used_channel

from trainyard.documents.channel import Channel, Track
from trainyard.documents.look import Histogram, PodCounters, ReleaseCounters, RouteCounters
from trainyard.documents.watch import Reading, WatchState
from trainyard.rollout.events import ObjectiveMet, ObjectiveMissed, RolloutRequested
from trainyard.rollout.state_machine import NOTABLE, open_alerts, step
from trainyard.rollout.watch import (
    RULES,
    Judged,
    begin,
    compacted,
    count,
    go_on,
    judge_watch,
    rollback_run_id,
    rollback_target,
    window,
)
from trainyard.spec.model import LatencyObjective, Slo

SLO = Slo(availability=0.999, ttft=LatencyObjective(within_s=0.9, share=0.95))


def promoted(*, warm_s: float = 7200.0) -> Channel:
    """Return a channel in which NEW was promoted over OLD just now."""
    channel = requested(used_channel(), make_plan(keep_warm_s=warm_s))
    assert channel.rollout is not None
    rollout = channel.rollout.model_copy(update={"outcome": "promoted", "phase": "idle"})
    until = NOW + timedelta(seconds=warm_s) if warm_s else None
    return channel.model_copy(
        update={
            "stable": Track(release_id=NEW, since=NOW),
            "candidate": None,
            "previous": (Track(release_id=OLD, since=NOW, warm_until=until),),
            "rollout": rollout,
        }
    )


class Service:
    """Counters that go on as they are told."""

    def __init__(self) -> None:
        self.now = NOW
        self.arrivals = self.errors = self.count = self.late = 0
        self.epoch, self.started = "1", NOW - timedelta(days=1)
        self.route, self.pods = True, True
        self.channel = promoted()
        self.state: WatchState | None = None
        self.slot = 0

    def reading(self) -> Reading:
        buckets = {"0.5": self.count - self.late, "1.0": self.count - self.late, "+Inf": self.count}
        pod = PodCounters(
            pod=f"{NEW}-0",
            release_id=NEW,
            started_at=self.started,
            ttft=Histogram(count=self.count, total=float(self.count), buckets=buckets),
        )
        traffic = ReleaseCounters(arrivals=self.arrivals, errors=self.errors, in_flight=0)
        route = RouteCounters(epoch=self.epoch, weights={NEW: 100}, releases={NEW: traffic})
        return Reading(
            at=self.now,
            pods=(pod,) if self.pods else (),
            route=route if self.route else None,
        )

    def look(self) -> Judged:
        self.slot += 1
        self.state = go_on(self.state, self.channel, self.reading(), self.slot, SLO)
        return judge_watch(self.state, SLO)

    def serve(
        self,
        minutes: float,
        *,
        errors: float = 0.0,
        late: float = 0.0,
        rate: int = 1000,
        every: float = 1.0,
    ) -> Judged:
        """Serve so many requests a minute, and look `every` so many minutes."""
        judged = self.look() if self.state is None else Judged((), ())
        for _ in range(round(minutes / every)):
            requests = round(rate * every)
            self.now += timedelta(minutes=every)
            self.arrivals += requests
            self.errors += round(requests * errors)
            self.count += requests
            self.late += round(requests * late)
            judged = self.look()
        return judged

    def names(self, judged: Judged) -> list[str]:
        return [alert.name for alert in judged.alerts]


# --- burning --------------------------------------------------------------------------------------


def test_rates_are_those_of_the_workbook() -> None:
    rates = [round(rule.rate(30 * 86400.0), 6) for rule in RULES]
    assert rates == [14.4, 6.0, 1.0]


def test_a_good_release_raises_nothing_for_days() -> None:
    service = Service()
    for _ in range(8):
        service.now += timedelta(hours=9)
        assert service.serve(20, errors=0.0005, late=0.02, every=2).alerts == ()


def test_failures_that_burn_the_month_in_two_days_are_worth_a_rollback() -> None:
    service = Service()
    service.serve(10)
    judged = service.serve(30, errors=0.03)
    (alert,) = judged.alerts
    assert (alert.name, alert.rolls_back) == ("errors-page", True)
    assert "allowed are 0.10%" in alert.message
    assert "the limit is 14.4" in alert.message


def test_slow_answers_count_as_failed_ones_do() -> None:
    service = Service()
    assert service.serve(45, late=0.9, every=2.5).alerts == ()
    (alert,) = service.serve(5, late=0.9).alerts
    assert (alert.name, "in 1 h" in alert.message) == ("ttft-page", True)
    steady = Service()
    (alert,) = steady.serve(280, late=0.4, every=10).alerts
    assert (alert.name, "in 6 h" in alert.message) == ("ttft-page", True)


def test_a_slow_burn_is_an_alarm_only() -> None:
    service = Service()
    assert service.serve(35 * 60, errors=0.002, every=60).alerts == ()
    (alert,) = service.serve(2 * 60, errors=0.002, every=60).alerts
    assert (alert.name, alert.rolls_back) == ("errors-ticket", False)


def test_what_is_over_does_not_go_on_raising_an_alarm() -> None:
    service = Service()
    assert service.serve(20, errors=0.05).alerts
    assert service.serve(8).alerts == ()


def test_a_young_release_is_judged_as_if_it_had_burned_nothing_before() -> None:
    service = Service()
    assert service.serve(20, errors=0.03).alerts == ()
    assert service.serve(10, errors=0.03).alerts
    dead = Service()
    assert dead.serve(2, errors=1.0).alerts


def test_a_short_burst_that_costs_little_is_no_alarm() -> None:
    service = Service()
    service.serve(55)
    assert service.serve(3, errors=0.05).alerts == ()


def test_few_requests_say_nothing_and_that_is_told() -> None:
    service = Service()
    judged = service.serve(10, rate=5, errors=0.4)
    assert judged.alerts == ()
    assert "errors, fast: 50 requests are too few to tell." in judged.notes


# --- what was not seen ----------------------------------------------------------------------------


def test_what_was_not_seen_is_neither_good_nor_bad() -> None:
    service = Service()
    service.serve(10)
    service.route = service.pods = False
    judged = service.serve(6, errors=0.5, late=0.9)
    assert judged.alerts == ()
    assert any(note.startswith("errors, fast: figures for 0 s") for note in judged.notes)
    assert any(note.startswith("ttft, fast: figures for 0 s") for note in judged.notes)


def test_blindness_is_an_alarm_of_its_own() -> None:
    service = Service()
    service.serve(5)
    service.pods = False
    assert service.names(service.serve(14)) == []
    judged = service.serve(1)
    assert service.names(judged) == ["ttft-blind"]
    assert not judged.alerts[0].rolls_back
    service.pods = True
    assert service.serve(2).alerts == ()


def test_counters_go_on_through_a_gap() -> None:
    """Nobody looked for a while: the counters know what happened all the same."""
    service = Service()
    service.serve(5)
    service.now += timedelta(minutes=20)
    service.arrivals += 20_000
    service.errors += 2_000
    judged = service.serve(5)
    assert service.state is not None
    assert window(service.state, "errors", 3600).bad == 2_000
    assert judged.alerts == (), "the last five minutes were good"


@pytest.mark.parametrize("what", ["router", "counters"])
def test_counters_that_begin_anew_are_not_compared(what: str) -> None:
    service = Service()
    service.serve(3)
    if what == "router":
        service.epoch, service.arrivals, service.errors = "2", 0, 0
    else:
        service.arrivals, service.errors = 10, 5
    service.look()
    assert service.state is not None
    assert service.state.samples[-1].errors is None


def test_a_server_that_started_since_counts_from_zero() -> None:
    service = Service()
    service.serve(2)
    before = service.reading()
    service.now += timedelta(minutes=1)
    service.started, service.count, service.late = service.now, 40, 10
    sample = count(before, service.reading(), NEW, SLO)
    assert sample.ttft is not None
    assert (sample.ttft.total, sample.ttft.bad) == (40, 10)


def test_a_server_of_unknown_age_is_not_counted() -> None:
    service = Service()
    before = service.reading().model_copy(update={"pods": ()})
    service.serve(1)
    assert count(before, service.reading(), NEW, SLO).ttft is None


def test_an_objective_beyond_all_edges_cannot_be_told() -> None:
    service = Service()
    service.serve(1)
    slo = Slo(ttft=LatencyObjective(within_s=30.0))
    before = service.reading()
    service.now += timedelta(minutes=1)
    service.count += 10
    assert count(before, service.reading(), NEW, slo).ttft is None


def test_the_next_edge_above_the_objective_counts() -> None:
    pod: dict[str, Any] = {"pod": "p", "release_id": NEW, "started_at": NOW}

    def reading(at: datetime, count_: int, half: int, one: int) -> Reading:
        buckets = {"0.5": half, "1.0": one, "+Inf": count_}
        ttft = Histogram(count=count_, total=1.0, buckets=buckets)
        return Reading(at=at, pods=(PodCounters(**pod, ttft=ttft),), route=None)

    later = NOW + timedelta(minutes=1)
    sample = count(reading(NOW, 0, 0, 0), reading(later, 10, 4, 9), NEW, SLO)
    assert sample.ttft is not None
    assert (sample.ttft.total, sample.ttft.bad) == (10, 1)


# --- its state ------------------------------------------------------------------------------------


def test_the_state_stays_small_and_loses_no_request() -> None:
    service = Service()
    service.serve(96 * 60, every=30)
    service.serve(5 * 60, every=4)
    service.serve(60)
    assert service.state is not None
    assert len(service.state.samples) < 250
    assert len(service.state.to_bytes()) < 150_000
    assert WatchState.model_validate_json(service.state.to_bytes()) == service.state
    within = window(service.state, "errors", 3 * 86400.0)
    assert 1.0 <= within.total / (3 * 1440 * 1000) <= 1.1
    assert window(service.state, "errors", 3600.0).total in range(60_000, 66_001)


def test_merging_keeps_sums_and_what_was_covered() -> None:
    service = Service()
    service.serve(30, errors=0.01)
    assert service.state is not None
    samples = service.state.samples
    merged = compacted(samples, service.now + timedelta(hours=2))
    assert merged == compacted(merged, service.now + timedelta(hours=2))
    assert len(merged) < len(samples)
    for name in ("total", "bad", "covered_s"):
        sums = [sum(getattr(s.errors, name) for s in each) for each in (samples, merged)]
        assert sums[0] == sums[1]
    assert compacted(samples, service.now + timedelta(days=4)) == ()


def test_another_release_begins_anew() -> None:
    service = Service()
    service.serve(5, errors=0.5)
    service.channel = service.channel.model_copy(
        update={"stable": Track(release_id=OLD, since=service.now)}
    )
    service.look()
    assert service.state == begin(service.channel, service.reading(), service.slot).model_copy(
        update={"created_at": service.state.created_at if service.state else NOW}
    )


# --- what follows ---------------------------------------------------------------------------------


def test_it_goes_back_only_while_the_old_servers_are_warm() -> None:
    channel = promoted()
    assert rollback_target(channel, NOW + timedelta(hours=1)) == OLD
    assert rollback_target(channel, NOW + timedelta(hours=2)) is None
    assert rollback_target(promoted(warm_s=0.0), NOW) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": None},
        {"outcome": "withdrawn"},
        {"plan": make_plan(kind="rollback")},
        {"plan": make_plan(kind="bootstrap")},
        {"reference_id": "another"},
    ],
)
def test_it_undoes_nothing_but_a_promotion(changes: dict[str, Any]) -> None:
    channel = promoted()
    assert channel.rollout is not None
    rollout = channel.rollout.model_copy(update=changes)
    channel = channel.model_copy(update={"rollout": rollout})
    assert rollback_target(channel, NOW) is None
    assert rollback_target(used_channel(), NOW) is None


def test_its_run_is_the_same_for_the_same_rollout() -> None:
    channel = promoted()
    assert rollback_run_id(channel) == rollback_run_id(
        channel.model_copy(update={"generation": channel.generation + 5})
    )


def test_an_alarm_is_noted_once_until_it_is_over() -> None:
    channel = promoted()
    missed = ObjectiveMissed("errors-page", "Too many fail.")
    noted = step(channel, missed, NOW)[0]
    assert open_alerts(noted) == {"errors-page"}
    assert noted.history[-1].event in NOTABLE
    assert step(noted, missed, NOW)[0] == noted
    over = step(noted, ObjectiveMet("errors-page"), NOW)[0]
    assert open_alerts(over) == frozenset()
    assert step(over, ObjectiveMet("errors-page"), NOW)[0] == over
    assert open_alerts(step(over, missed, NOW)[0]) == {"errors-page"}


def test_nothing_is_noted_of_a_rollout_under_way_or_of_nothing() -> None:
    missed = ObjectiveMissed("errors-page", "Too many fail.")
    empty = used_channel().model_copy(update={"stable": None})
    busy = step(
        promoted(), RolloutRequested(2, OLD, make_plan(kind="rollback"), run_id="back"), NOW
    )[0]
    for channel in (empty, busy):
        assert step(channel, missed, NOW)[0] == channel
        assert open_alerts(channel) == frozenset()
