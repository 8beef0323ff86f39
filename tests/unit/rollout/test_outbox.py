"""Events are told at least once, and written down once."""

from __future__ import annotations

import pytest
from tests.rollout_world import ENVIRONMENT, MODEL, MemoryStore
from tests.unit.rollout.machine import NEW, NOW

from trainyard.documents.channel import HistoryEntry
from trainyard.errors import Transient
from trainyard.rollout.events import Notify
from trainyard.rollout.outbox import Outbox, RolloutEvent
from trainyard.store.documents import read_document

ENTRY = HistoryEntry(
    at=NOW, generation=12, event="weights", release_id=NEW, rollout=3, detail={"weight": 10}
)
KEY = f"rollouts/{MODEL}/{ENVIRONMENT}/3/events/rollout-00000012-weights.json"


def deliver(store: MemoryStore, told: list[str]) -> None:
    """Deliver the event as a process that has just begun."""
    Outbox(store, told.append).deliver(MODEL, ENVIRONMENT, Notify(3, ENTRY))


def test_an_event_is_told_and_kept_once() -> None:
    store, told = MemoryStore(), []
    outbox = Outbox(store, told.append)
    for _ in range(3):
        outbox.deliver(MODEL, ENVIRONMENT, Notify(3, ENTRY))
    deliver(store, told)
    assert told == [f"{MODEL}/{ENVIRONMENT}: {NEW} gets 10 % of the traffic"]
    assert read_document(store, KEY, RolloutEvent).entry == ENTRY


def test_who_dies_after_telling_tells_it_again() -> None:
    store, told = MemoryStore(), []

    def tell_and_lose_the_store(line: str) -> None:
        told.append(line)
        store.away = True

    with pytest.raises(Transient):
        Outbox(store, tell_and_lose_the_store).deliver(MODEL, ENVIRONMENT, Notify(3, ENTRY))
    store.away = False
    deliver(store, told)
    assert len(told) == 2
    assert list(store.keys) == [KEY]


def test_a_listener_that_fails_stops_nothing() -> None:
    store = MemoryStore()

    def broken(line: str) -> None:
        raise RuntimeError("no network")

    Outbox(store, broken).deliver(MODEL, ENVIRONMENT, Notify(3, ENTRY))
    assert list(store.keys) == [KEY]


def test_whoever_wants_to_be_notified_gets_each_event_once_and_stops_nothing() -> None:
    store, notified = MemoryStore(), []

    def notify(event: RolloutEvent) -> None:
        notified.append((event.environment, event.rollout, event.entry.event))
        raise RuntimeError("no network")

    for _ in range(2):
        Outbox(store, lambda line: None, notify).deliver(MODEL, ENVIRONMENT, Notify(3, ENTRY))
    assert notified == [(ENVIRONMENT, 3, "weights")]
    assert list(store.keys) == [KEY]
