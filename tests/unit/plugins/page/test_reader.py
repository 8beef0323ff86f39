"""What the page reads, and how often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.rollout_world import MODEL, START, MemoryStore, make_release, release_id

from trainyard.documents.channel import Channel
from trainyard.documents.look import Look, Snapshot
from trainyard.documents.statement import payload_of_release
from trainyard.errors import CorruptFile, NotFound
from trainyard.rollout.looks import look_key
from trainyard.settings import Settings
from trainyard.signing.envelope import seal
from trainyard.signing.keys import SigningKey, signing_key
from trainyard.store.layout import channel_key, release_key
from trainyard_airflow.page import reader as module
from trainyard_airflow.page.reader import FRESH_S, KEPT_BYTES, Reader, Unreadable

SNAPSHOT = Snapshot(at=START, phase="holding", step_index=0, pods=(), route=None)


class CountingStore(MemoryStore):
    """Counts what is read."""

    def __init__(self, signer: SigningKey) -> None:
        super().__init__()
        self.signer = signer
        self.reads: Counter[str] = Counter()
        self.tells = "version"
        """What its listings tell beside the names: `version`, `time` or `nothing`."""

    def read(self, key: str) -> Any:
        self.reads[key] += 1
        return super().read(key)

    def list(self, prefix: str) -> Any:
        self.reads[f"list {prefix}"] += 1
        for entry in super().list(prefix):
            version = self.keys[entry.key].version
            if self.tells == "version":
                yield replace(entry, version=version)
            elif self.tells == "time":
                yield replace(entry, modified_at=START + timedelta(seconds=int(version)))
            else:
                yield entry


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    made = CountingStore(signing_key(Settings(home=tmp_path)))
    for name in "abc":
        look = Look(rollout=1, slot=ord(name), snapshot=SNAPSHOT)
        made.put(look_key(MODEL, "staging", 1, look.slot), look.to_bytes())
    for environment in ("staging", "production"):
        put(made, environment)
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reader(store: CountingStore, clock: Clock) -> Reader:
    return Reader(store, clock=clock)


def put(store: MemoryStore, environment: str, generation: int = 1) -> None:
    channel = Channel(model=MODEL, environment=environment, generation=generation)
    store.put(channel_key(MODEL, environment), channel.to_bytes())


def releases(store: CountingStore, *names: str, **changes: Any) -> dict[str, str]:
    """Store releases, signed; return their keys by name."""
    keys = {}
    for name in names:
        release = make_release(name).model_copy(update={"created_at": START, **changes})
        keys[name] = release_key(MODEL, release.release_id)
        store.put(keys[name], seal(payload_of_release(release), store.signer))
    return keys


def keys_of(store: CountingStore) -> list[str]:
    return [key for key in store.keys if key.startswith("rollouts/")]


def test_what_never_changes_is_read_once(reader: Reader, store: CountingStore) -> None:
    keys = keys_of(store)
    for _ in range(3):
        found = reader.documents(keys, Look)
        assert [look_key(MODEL, "staging", 1, each.slot) for each in found] == keys
    assert {store.reads[key] for key in keys} == {1}


def test_only_so_much_is_kept(
    reader: Reader, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(store)
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * len(store.keys[keys[0]].data) + 10)
    for key in keys:
        reader.document(key, Look)
    reader.document(keys[-1], Look)
    reader.document(keys[0], Look)
    assert [store.reads[key] for key in keys] == [2, 1, 1]


def test_what_was_looked_at_lately_is_kept(
    reader: Reader, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = releases(store, "a", "b", "c")
    sizes = [len(store.keys[key].data) for key in made.values()]
    monkeypatch.setattr(module, "KEPT_BYTES", sum(sizes) - 1)
    for name in "abac":
        reader.releases(MODEL, [release_id(name)])
    store.reads.clear()
    reader.releases(MODEL, [release_id("a")])
    assert store.reads[made["a"]] == 0
    reader.releases(MODEL, [release_id("b")])
    assert store.reads[made["b"]] == 1


def test_all_releases_of_a_busy_yard_are_kept() -> None:
    assert KEPT_BYTES / 2 >= 2000 * 16 * 2**10


@pytest.mark.parametrize(("tells", "reads"), [("version", 1), ("time", 1), ("nothing", 3)])
def test_a_release_is_read_again_only_where_the_listing_cannot_tell(
    reader: Reader, store: CountingStore, clock: Clock, tells: str, reads: int
) -> None:
    store.tells = tells
    made = releases(store, "a", "b")
    found = []
    for _ in range(3):
        found += reader.releases(MODEL, [release_id("a"), release_id("b")])
        clock.now += FRESH_S
    assert {id(each) for each in found} == {id(found[0]), id(found[1])}
    assert [store.reads[key] for key in made.values()] == [reads, reads]


@pytest.mark.parametrize("tells", ["version", "time", "nothing"])
def test_a_release_that_was_signed_anew_is_shown_as_it_is_now(
    reader: Reader, store: CountingStore, clock: Clock, tells: str
) -> None:
    store.tells = tells
    releases(store, "a")
    before = reader.release(MODEL, release_id("a"))
    assert reader.releases(MODEL, [release_id("a")]) == [before]
    releases(store, "a", created_at=START + timedelta(days=1))
    clock.now += FRESH_S
    (listed,) = reader.releases(MODEL, [release_id("a")])
    assert listed.created_at == before.created_at + timedelta(days=1)
    assert reader.release(MODEL, release_id("a")) is listed


def test_a_single_release_is_never_an_old_one(reader: Reader, store: CountingStore) -> None:
    releases(store, "a")
    before = reader.release(MODEL, release_id("a"))
    assert reader.release(MODEL, release_id("a")) is before
    releases(store, "a", created_at=START + timedelta(days=1))
    assert reader.release(MODEL, release_id("a")).created_at > before.created_at


def test_a_channel_is_read_again_when_it_is_old(
    reader: Reader, store: CountingStore, clock: Clock
) -> None:
    key = channel_key(MODEL, "staging")
    assert reader.channel(MODEL, "staging").generation == 1
    put(store, "staging", generation=2)
    assert reader.channel(MODEL, "staging").generation == 1
    clock.now += FRESH_S
    assert reader.channel(MODEL, "staging").generation == 2
    assert store.reads[key] == 2


def test_an_unchanged_channel_is_not_parsed_again(reader: Reader, clock: Clock) -> None:
    before = reader.channel(MODEL, "staging")
    clock.now += FRESH_S
    assert reader.channel(MODEL, "staging") is before


def test_all_channels_are_found_and_a_new_one_soon(
    reader: Reader, store: CountingStore, clock: Clock
) -> None:
    assert [each.environment for each in reader.channels()] == ["production", "staging"]
    put(store, "canary")
    clock.now += FRESH_S
    assert [each.environment for each in reader.channels()] == ["canary", "production", "staging"]
    assert store.reads["list channels"] == 2


def test_a_channel_that_was_reset_is_gone(
    reader: Reader, store: CountingStore, clock: Clock
) -> None:
    reader.channels()
    store.delete(channel_key(MODEL, "staging"))
    clock.now += FRESH_S
    assert [each.environment for each in reader.channels()] == ["production"]
    with pytest.raises(NotFound):
        reader.channel(MODEL, "staging")


def test_a_broken_channel_is_told_beside_the_others(reader: Reader, store: CountingStore) -> None:
    store.put(channel_key("broken", "staging"), b"{")
    found = [each for each in reader.channels() if isinstance(each, Unreadable)]
    assert [(each.model, each.environment) for each in found] == [("broken", "staging")]
    assert "not a valid Channel" in found[0].problem


def test_a_document_of_another_kind_is_refused(reader: Reader, store: CountingStore) -> None:
    with pytest.raises(CorruptFile):
        reader.document(keys_of(store)[0], Channel)
