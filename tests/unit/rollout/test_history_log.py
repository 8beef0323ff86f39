"""What is known of stable before a rollout: found once, kept, and never changed by exposure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tests.rollout_world import MemoryStore
from tests.unit.rollout.machine import NEW, NOW, OLD, make_plan

from trainyard.documents.channel import Rollout, RolloutDriver
from trainyard.documents.evidence import JudgeSpec, default_metrics
from trainyard.documents.look import (
    DeviceCounters,
    Histogram,
    Look,
    PodCounters,
    ReleaseCounters,
    RouteCounters,
    ServerCounters,
    Snapshot,
)
from trainyard.rollout.history_log import HistoryLog
from trainyard.rollout.judge.history import learn
from trainyard.rollout.looks import LookLog
from trainyard.rollout.metrics import Moment
from trainyard.rollout.slices import blocks_from_snapshots
from trainyard.serving.protocol import ServerStatus

MODEL, ENVIRONMENT = "adder", "production"
SERVERS = tuple(
    ServerStatus(f"{release}-0", release, "ready", "", NOW, 0, "") for release in (OLD, NEW)
)


@dataclass
class Memory:
    """A source of metrics that remembers what it is told, and counts how often it was asked."""

    moments: tuple[Moment, ...] | None
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def read(self, environment: str, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        raise AssertionError("history is not read now")

    def devices(self, environment: str, pods: Sequence[PodCounters]) -> tuple[DeviceCounters, ...]:
        raise AssertionError("history has no devices")

    def history(
        self, environment: str, servers: Sequence[ServerStatus], *, until: datetime
    ) -> tuple[Moment, ...] | None:
        self.asked.append(tuple(server.name for server in servers))
        return self.moments


def rollout(number: int = 2, *, exposed: bool = False) -> Rollout:
    return Rollout(
        number=number,
        release_id=NEW,
        reference_id=OLD,
        phase="holding" if exposed else "deploying",
        plan=make_plan(),
        driver=RolloutDriver(run_id="run", attempt=1, epoch=1),
        started_at=NOW,
        phase_since=NOW,
        exposed_since=NOW if exposed else None,
    )


def pod(release: str, count: int) -> PodCounters:
    return PodCounters(
        pod=f"{release}-0",
        release_id=release,
        started_at=NOW,
        ttft=Histogram(count=count, total=float(count)),
    )


def moments(count: int) -> tuple[Moment, ...]:
    return tuple((NOW - timedelta(minutes=n), (pod(OLD, 100 - n),)) for n in range(count, 0, -1))


def gather(
    store: MemoryStore, source: Memory, of: Rollout, servers: Sequence[ServerStatus] = SERVERS
) -> tuple[Snapshot, ...]:
    # A new log each time, as another process would have it.
    return HistoryLog(store).gather(MODEL, ENVIRONMENT, of, source, servers, NOW)


def test_what_the_source_remembers_of_stable_is_kept() -> None:
    store, source = MemoryStore(), Memory(moments(3))
    found = gather(store, source, rollout())
    assert [(shot.at, shot.pods) for shot in found] == list(moments(3))
    assert source.asked == [(f"{OLD}-0",)]
    assert "rollouts/adder/production/2/history.json" in store.keys


def test_it_is_found_once_and_never_changes() -> None:
    store = MemoryStore()
    found = gather(store, Memory(moments(3)), rollout())
    another = Memory(moments(50))
    assert gather(store, another, rollout()) == found
    assert gather(store, another, rollout(exposed=True)) == found
    assert another.asked == []


def test_a_source_that_does_not_answer_is_asked_again() -> None:
    store = MemoryStore()
    assert gather(store, Memory(None), rollout()) == ()
    assert store.keys == {}
    assert len(gather(store, Memory(moments(3)), rollout())) == 3


def test_once_the_candidate_has_traffic_it_is_too_late() -> None:
    store, source = MemoryStore(), Memory(None)
    assert gather(store, source, rollout()) == ()
    assert gather(store, Memory(moments(3)), rollout(exposed=True)) == ()
    assert gather(store, Memory(moments(3)), rollout()) == ()


def test_without_a_server_of_stable_it_waits() -> None:
    store, source = MemoryStore(), Memory(moments(3))
    assert gather(store, source, rollout(), SERVERS[1:]) == ()
    assert (store.keys, source.asked) == ({}, [])


def test_two_drivers_keep_the_same_one() -> None:
    store = MemoryStore()
    first, second = HistoryLog(store), HistoryLog(store)
    found = first.gather(MODEL, ENVIRONMENT, rollout(), Memory(moments(3)), SERVERS, NOW)
    other = second.gather(MODEL, ENVIRONMENT, rollout(), Memory(moments(9)), SERVERS, NOW)
    assert other == found


OLDER = "adder-000000000000"
"""What was stable in the rollout before."""


def looked(
    store: MemoryStore, number: int, minutes_ago: int, route: RouteCounters | None = None
) -> None:
    snapshot = Snapshot(
        at=NOW - timedelta(minutes=minutes_ago),
        phase="baking",
        step_index=1,
        pods=(pod(OLD, 5000 - minutes_ago), pod(OLDER, 5)),
        route=route,
    )
    LookLog(store).write(
        MODEL, ENVIRONMENT, Look(rollout=number, slot=1000 - minutes_ago, snapshot=snapshot)
    )


def test_a_source_without_memory_is_helped_by_the_looks_of_the_rollout_before() -> None:
    store = MemoryStore()
    for minutes in (600, 40, 20):
        looked(store, 1, minutes)
    found = gather(store, Memory(()), rollout(2))
    assert [(NOW - shot.at).total_seconds() / 60 for shot in found] == [40, 20]
    assert {one.release_id for shot in found for one in shot.pods} == {OLD}
    assert all(shot.route is None for shot in found)


def routed(errors: dict[str, int], *, ended: int, epoch: str = "1") -> RouteCounters:
    """Return what a router says of stable's servers, and of the release that was stable before."""
    own = ReleaseCounters(
        arrivals=ended * len(errors),
        errors=sum(errors.values()),
        in_flight=0,
        servers={name: ServerCounters(ended=ended, errors=bad) for name, bad in errors.items()},
    )
    other = ReleaseCounters(arrivals=50, errors=7, in_flight=0)
    return RouteCounters(
        epoch=epoch, weights={OLD: 90, OLDER: 10}, releases={OLD: own, OLDER: other}
    )


def test_of_the_routers_counters_in_looks_those_of_stable_are_kept() -> None:
    store = MemoryStore()
    seen = routed({"a": 3, "b": 0}, ended=100)
    looked(store, 1, 40, seen)
    looked(store, 1, 30, seen.model_copy(update={"releases": {OLDER: seen.releases[OLDER]}}))
    looked(store, 1, 20)
    assert [shot.route for shot in gather(store, Memory(()), rollout(2))] == [
        RouteCounters(epoch="1", weights={OLD: 90}, releases={OLD: seen.releases[OLD]}),
        None,
        None,
    ]
    kept = HistoryLog(store).read(MODEL, ENVIRONMENT, 2)
    assert kept is not None
    assert kept.snapshots == gather(store, Memory(()), rollout(2))


SPEC = JudgeSpec(
    metrics=tuple(one for one in default_metrics() if one.name == "errors"), max_duration_s=1800
)


def learned_dispersion(bad: Callable[[int, int], int], *, epochs: int = 1) -> float:
    """Return the dispersion of errors that is learned from looks of the rollout before.

    Args:
        bad: failures of a server's 300 requests in a minute, by the minute and the server's number.
        epochs: how often the router was started, at equal distances.
    """
    store = MemoryStore()
    minutes, errors, since = 120, [0, 0, 0, 0], 0
    for minute in range(minutes):
        epoch = minute * epochs // minutes
        if epoch != max(0, minute - 1) * epochs // minutes:
            errors, since = [0, 0, 0, 0], minute
        errors = [before + bad(minute, number) for number, before in enumerate(errors)]
        seen = {f"{OLD}-{number}": count for number, count in enumerate(errors)}
        ended = 300 * (minute - since + 1)
        looked(store, 1, minutes - minute, routed(seen, ended=ended, epoch=str(epoch)))
    history = gather(store, Memory(()), rollout(2))
    blocks = blocks_from_snapshots(history, exposed_since=NOW, candidate=NEW, stable=OLD)
    (errors_learned,) = learn(blocks, SPEC).metrics
    return errors_learned.dispersion


def steady(minute: int, number: int) -> int:
    return int(minute % 4 == number)


def sick(minute: int, number: int) -> int:
    """For 20 minutes in a row one server fails, then the next."""
    return 6 if minute // 20 % 4 == number else 0


def test_how_errors_gather_on_servers_is_learned_from_looks_of_the_rollout_before() -> None:
    assert learned_dispersion(steady) == 1.0
    assert learned_dispersion(sick) > 3.0


def test_a_router_that_was_restarted_is_not_taken_for_errors_or_for_none() -> None:
    assert learned_dispersion(steady, epochs=5) == 1.0
    assert learned_dispersion(sick, epochs=5) > 3.0


def test_nothing_is_known_before_the_first_rollout() -> None:
    store = MemoryStore()
    assert gather(store, Memory(()), rollout(1)) == ()
    history = HistoryLog(store).read(MODEL, ENVIRONMENT, 1)
    assert history is not None
    assert history.source == "none"
