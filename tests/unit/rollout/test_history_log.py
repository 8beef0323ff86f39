"""What is known of stable before a rollout: found once, kept, and never changed by exposure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tests.rollout_world import MemoryStore
from tests.unit.rollout.machine import NEW, NOW, OLD, make_plan

from trainyard.documents.channel import Rollout, RolloutDriver
from trainyard.documents.look import DeviceCounters, Histogram, Look, PodCounters, Snapshot
from trainyard.rollout.history_log import HistoryLog
from trainyard.rollout.looks import LookLog
from trainyard.rollout.metrics import Moment
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


def looked(store: MemoryStore, number: int, minutes_ago: int) -> None:
    snapshot = Snapshot(
        at=NOW - timedelta(minutes=minutes_ago),
        phase="baking",
        step_index=1,
        pods=(pod(OLD, 5000 - minutes_ago), pod("adder-000000000000", 5)),
        route=None,
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


def test_nothing_is_known_before_the_first_rollout() -> None:
    store = MemoryStore()
    assert gather(store, Memory(()), rollout(1)) == ()
    history = HistoryLog(store).read(MODEL, ENVIRONMENT, 1)
    assert history is not None
    assert history.source == "none"
