"""The guard's shell: news from the store, leases, memory, events."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from tests.serving_world import (
    ENVIRONMENT,
    MODEL,
    NEW,
    NOW,
    OLD,
    make_channel,
    observed,
    put_channel,
)

from trainyard.errors import Transient
from trainyard.serving.guard_events import guard_events
from trainyard.serving.guard_loop import Guard
from trainyard.serving.lease import FileLease
from trainyard.serving.records import ServingPaths, write_record
from trainyard.settings import Settings
from trainyard.store.folder import FolderStore
from trainyard.store.layout import channel_key
from trainyard.store.protocol import Entry

NAME = (ENVIRONMENT, MODEL)


class MoodyStore(FolderStore):
    """A store that can be down."""

    down = False
    reads = 0

    def list(self, prefix: str) -> Iterator[Entry]:
        self._demand_up()
        return super().list(prefix)

    def create(self, key: str, data: bytes) -> str:
        self._demand_up()
        return super().create(key, data)

    def read(self, key: str):  # type: ignore[no-untyped-def]
        self._demand_up()
        self.reads += 1
        return super().read(key)

    def local_path(self, key: str) -> Path | None:
        self._demand_up()
        return super().local_path(key)

    def _demand_up(self) -> None:
        if self.down:
            raise Transient("The store is down.")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def store(settings: Settings) -> MoodyStore:
    return MoodyStore(settings.store_root)


@pytest.fixture
def guard(settings: Settings, store: MoodyStore) -> Guard:
    """A guard of a channel whose releases have a ready server each; this process is the server."""
    for release_id, port in ((OLD, 20001), (NEW, 20002)):
        me = {"pid": os.getpid(), "process_started": psutil.Process().create_time(), "port": port}
        record = observed(release_id, **me)
        write_record(ServingPaths.of(settings).observed(ENVIRONMENT, record.name), record)
    FileLease(settings).renew(ENVIRONMENT, MODEL, holder="run", duration_s=120)
    return Guard(settings, store)


def tick(guard: Guard, after_s: float = 0) -> None:
    guard.apply(guard.look(), NOW + timedelta(seconds=after_s))
    guard.persist()


def weights(guard: Guard) -> dict[str, int]:
    return dict(guard.routes[NAME].decision.weights)


def test_follows_each_change_of_a_channel_and_reads_it_only_then(
    guard: Guard, store: MoodyStore
) -> None:
    put_channel(store, make_channel(weight=10))
    tick(guard)
    tick(guard)
    assert (weights(guard), store.reads) == ({OLD: 90, NEW: 10}, 1)
    put_channel(store, make_channel(weight=50, generation=2))
    tick(guard)
    assert (weights(guard), store.reads) == ({OLD: 50, NEW: 50}, 2)
    assert guard.routes[NAME].status("").channel_generation == 2


def test_a_channel_that_is_gone_is_served_as_long_as_it_has_servers(
    guard: Guard, settings: Settings, store: MoodyStore
) -> None:
    put_channel(store, make_channel())
    tick(guard)
    store.delete(channel_key(MODEL, ENVIRONMENT))
    tick(guard)
    assert weights(guard) == {OLD: 90, NEW: 10}
    for release_id in (OLD, NEW):
        ServingPaths.of(settings).observed(ENVIRONMENT, observed(release_id).name).unlink()
    tick(guard)
    assert guard.routes == {}
    assert len(guard.closable()) == 2


def test_channels_of_environments_elsewhere_are_not_its_own(
    settings: Settings, store: MoodyStore
) -> None:
    put_channel(store, make_channel(weight=10))
    guard = Guard(settings, store, elsewhere=frozenset({ENVIRONMENT}))
    tick(guard)
    assert guard.routes == {}
    assert guard_events(store, MODEL, ENVIRONMENT, 1) == []


def test_a_broken_channel_leaves_the_route_as_it_was(
    guard: Guard, store: MoodyStore, caplog: pytest.LogCaptureFixture
) -> None:
    put_channel(store, make_channel(weight=10))
    tick(guard)
    store.put(channel_key(MODEL, ENVIRONMENT), b"{}")
    tick(guard)
    assert weights(guard) == {OLD: 90, NEW: 10}
    assert "cannot be read" in caplog.text


def test_leases_run_out_while_the_store_is_down_and_the_event_follows_later(
    guard: Guard, settings: Settings, store: MoodyStore
) -> None:
    put_channel(store, make_channel(weight=10))
    tick(guard)
    store.down = True
    FileLease(settings).release(ENVIRONMENT, MODEL, holder="run")
    tick(guard, 1)
    assert weights(guard) == {OLD: 100, NEW: 0}
    store.down = False
    assert guard_events(store, MODEL, ENVIRONMENT, 1) == []
    tick(guard, 2)
    tick(guard, 3)
    (event,) = guard_events(store, MODEL, ENVIRONMENT, 1)
    assert (event.event, event.release_id, event.at) == (
        "lease_expired",
        NEW,
        NOW + timedelta(seconds=1),
    )


def test_a_bake_that_nobody_drives_goes_to_the_old_release_as_long_as_all_its_servers_are_ready(
    guard: Guard, settings: Settings, store: MoodyStore
) -> None:
    baking = {"stable": NEW, "candidate": OLD, "phase": "baking"}
    put_channel(store, make_channel(**baking))  # type: ignore[arg-type]
    tick(guard)
    assert weights(guard) == {NEW: 90, OLD: 10}
    FileLease(settings).release(ENVIRONMENT, MODEL, holder="run")
    tick(guard, 1)
    assert weights(guard) == {NEW: 0, OLD: 100}
    (event,) = guard_events(store, MODEL, ENVIRONMENT, 1)
    assert (event.event, event.weights) == ("lease_expired", {NEW: 0, OLD: 100})
    put_channel(store, make_channel(**baking, stable_replicas=2, generation=2))  # type: ignore[arg-type]
    tick(guard, 2)
    assert weights(guard) == {NEW: 100, OLD: 0}


def test_a_fuse_outlives_the_proxy_and_is_told_once(
    guard: Guard, settings: Settings, store: MoodyStore
) -> None:
    put_channel(store, make_channel(weight=10))
    tick(guard)
    for _ in range(10):
        guard.routes[NAME].traffic_of(NEW).note("error")
    tick(guard, 1)
    assert weights(guard) == {OLD: 100, NEW: 0}
    another = Guard(settings, store)
    tick(another, 2)
    assert weights(another) == {OLD: 100, NEW: 0}
    assert another.routes[NAME].decision.guard == "fuse"
    assert [e.event for e in guard_events(store, MODEL, ENVIRONMENT, 1)] == ["fuse"]


def test_a_server_whose_process_is_gone_is_not_ready(
    guard: Guard, settings: Settings, store: MoodyStore
) -> None:
    put_channel(store, make_channel(weight=10))
    gone = observed(NEW, pid=os.getpid(), process_started=1.0, port=20002)
    write_record(ServingPaths.of(settings).observed(ENVIRONMENT, gone.name), gone)
    tick(guard)
    assert guard.routes[NAME].decision.guard == "fuse"


def test_each_change_of_mind_is_an_event(
    guard: Guard, settings: Settings, store: MoodyStore
) -> None:
    lease = FileLease(settings)
    put_channel(store, make_channel(weight=10))
    tick(guard, 1)
    lease.release(ENVIRONMENT, MODEL, holder="run")
    tick(guard, 2)
    lease.renew(ENVIRONMENT, MODEL, holder="run", duration_s=120)
    tick(guard, 3)
    put_channel(store, make_channel(weight=10, number=2, generation=2))
    tick(guard, 4)
    events = guard_events(store, MODEL, ENVIRONMENT, 1)
    assert [event.event for event in events] == ["lease_expired", "following"]
    assert events[0].weights == {OLD: 100, NEW: 0}
    assert guard_events(store, MODEL, ENVIRONMENT, 2) == []


@pytest.mark.parametrize("restarted", [False, True])
def test_a_store_restored_from_an_old_copy_takes_nothing_off_the_air(
    guard: Guard,
    settings: Settings,
    store: MoodyStore,
    caplog: pytest.LogCaptureFixture,
    restarted: bool,
) -> None:
    gone = "adder-0123456789ab"
    promoted = make_channel(stable=NEW, candidate=None, weight=0, phase=None, generation=9)
    put_channel(store, promoted)
    tick(guard)
    put_channel(store, promoted.model_copy(update={"generation": 4, "stable": None}))
    old = make_channel(stable=gone, candidate=None, weight=0, phase=None, generation=4)
    put_channel(store, old)
    guard = Guard(settings, store) if restarted else guard
    tick(guard)

    assert weights(guard) == {NEW: 100}
    assert "restored from a copy" in caplog.text
    # As soon as what the store calls stable serves, the store is the truth again.
    put_channel(store, make_channel(stable=OLD, candidate=None, weight=0, phase=None, generation=5))
    tick(guard)
    assert weights(guard) == {OLD: 100}


def test_how_old_the_lease_is_can_be_seen(guard: Guard, store: MoodyStore) -> None:
    put_channel(store, make_channel(weight=10))
    tick(guard)
    age = guard.routes[NAME].lease_age_s
    assert age is not None
    assert 0 <= age < 60
    FileLease(guard.settings).release(ENVIRONMENT, MODEL, holder="run")
    tick(guard)
    assert guard.routes[NAME].lease_age_s is None


def test_prometheus_finds_the_ready_servers_of_a_route(guard: Guard, store: MoodyStore) -> None:
    put_channel(store, make_channel(weight=10))
    tick(guard)
    targets = guard.routes[NAME].targets()

    assert {target["labels"]["release"]: target["targets"] for target in targets} == {  # type: ignore[index]
        OLD: ["127.0.0.1:20001"],
        NEW: ["127.0.0.1:20002"],
    }
    (one,) = (each for each in targets if each["labels"]["release"] == OLD)  # type: ignore[index]
    assert one["labels"] == {
        "environment": ENVIRONMENT,
        "model": MODEL,
        "release": OLD,
        "pod": f"{OLD}-0",
    }
