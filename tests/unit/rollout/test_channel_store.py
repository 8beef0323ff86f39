"""Channels in a folder store."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tests.rollout_world import ENVIRONMENT, MODEL
from tests.unit.rollout.machine import make_plan, requested, used_channel

from trainyard.documents.channel import Channel, Track, Weights
from trainyard.errors import BadInput, Busy, Conflict, CorruptFile
from trainyard.rollout.channel_store import (
    change_channel,
    list_channels,
    read_channel,
    read_for_change,
    reset_channel,
    write_channel,
)
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import channel_key


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def counted(channel: Channel) -> Channel:
    return channel.model_copy(update={"generation": channel.generation + 1})


def test_a_channel_that_nobody_wrote_is_empty(store: FolderStore) -> None:
    channel = read_channel(store, MODEL, ENVIRONMENT)
    assert (channel.generation, channel.stable, channel.in_progress) == (0, None, False)
    assert not store.exists(channel_key(MODEL, ENVIRONMENT))


def test_names_from_outside_are_checked(store: FolderStore) -> None:
    with pytest.raises(BadInput):
        read_channel(store, "../etc", ENVIRONMENT)


def test_a_change_is_stored_and_read_again(store: FolderStore) -> None:
    written = change_channel(store, MODEL, ENVIRONMENT, counted)
    assert written.generation == 1
    again = change_channel(store, MODEL, ENVIRONMENT, counted)
    assert read_channel(store, MODEL, ENVIRONMENT) == again
    assert again.generation == 2


def test_no_change_writes_nothing(store: FolderStore) -> None:
    change_channel(store, MODEL, ENVIRONMENT, lambda channel: channel)
    assert not store.exists(channel_key(MODEL, ENVIRONMENT))


def test_a_lost_race_is_run_again_on_what_is_there_then(store: FolderStore) -> None:
    seen: list[int] = []

    def change(channel: Channel) -> Channel:
        if not seen:
            change_channel(store, MODEL, ENVIRONMENT, counted)
        seen.append(channel.generation)
        return counted(channel)

    assert change_channel(store, MODEL, ENVIRONMENT, change).generation == 2
    assert seen == [0, 1]


def test_a_race_that_is_always_lost_is_a_conflict(store: FolderStore) -> None:
    def change(channel: Channel) -> Channel:
        found, version = read_for_change(store, MODEL, ENVIRONMENT)
        write_channel(store, counted(found), version=version)
        return channel.model_copy(update={"generation": -1})

    with pytest.raises(Conflict, match="30 times in a row"):
        change_channel(store, MODEL, ENVIRONMENT, change)


def test_what_breaks_the_rules_of_the_document_is_not_stored(store: FolderStore) -> None:
    weights = Weights.model_construct(stable=60, candidate=60)
    broken = read_channel(store, MODEL, ENVIRONMENT).model_copy(update={"weights": weights})
    with pytest.raises(ValueError, match="are not 100"):
        write_channel(store, broken, version=None)
    assert not store.exists(channel_key(MODEL, ENVIRONMENT))


def test_a_broken_channel_is_named(store: FolderStore) -> None:
    store.put(channel_key(MODEL, ENVIRONMENT), b"{}")
    with pytest.raises(CorruptFile, match=f"channels/{MODEL}/{ENVIRONMENT}.json"):
        read_channel(store, MODEL, ENVIRONMENT)


def test_channels_are_listed_by_model_and_environment(store: FolderStore) -> None:
    for model, environment in (("b", "two"), ("a", "two"), ("a", "one")):
        change_channel(store, model, environment, counted)
    assert [(c.model, c.environment) for c in list_channels(store).channels] == [
        ("a", "one"),
        ("a", "two"),
        ("b", "two"),
    ]
    assert [c.environment for c in list_channels(store, model="b").channels] == ["two"]


def test_a_damaged_channel_hides_no_other(store: FolderStore) -> None:
    change_channel(store, "b", "two", counted)
    key = channel_key("a", "two")
    store.put(key, b'{"model"')
    listed = list_channels(store)
    assert [c.model for c in listed.channels] == ["b"]
    assert key in listed.unreadable[key].message


def test_a_reset_archives_the_channel_where_no_router_looks(store: FolderStore) -> None:
    before = change_channel(store, MODEL, ENVIRONMENT, partial(occupied_by, "adder-0123456789ab"))
    key = reset_channel(store, MODEL, ENVIRONMENT)
    assert read_document(store, key, Channel) == before
    assert [entry.key for entry in store.list("channels")] == [channel_key(MODEL, ENVIRONMENT)]
    after = read_channel(store, MODEL, ENVIRONMENT)
    assert (after.stable, after.rollout, after.history) == (None, None, ())
    assert reset_channel(store, MODEL, ENVIRONMENT) == ""


def occupied_by(name: str, channel: Channel) -> Channel:
    stable = Track(release_id=name, since=channel.created_at)
    return counted(channel).model_copy(update={"stable": stable})


def test_generations_go_on_after_a_reset(store: FolderStore) -> None:
    """Airflow's runs are named after them; a name that comes again would find the old run."""
    before = change_channel(store, MODEL, ENVIRONMENT, partial(occupied_by, "adder-0123456789ab"))
    reset_channel(store, MODEL, ENVIRONMENT)
    assert read_channel(store, MODEL, ENVIRONMENT).generation == before.generation + 1


def test_a_reset_that_was_killed_half_way_is_finished_by_the_next(store: FolderStore) -> None:
    channel = change_channel(store, MODEL, ENVIRONMENT, partial(occupied_by, "adder-0123456789ab"))
    key = reset_channel(store, MODEL, ENVIRONMENT)
    _, version = read_for_change(store, MODEL, ENVIRONMENT)
    write_channel(store, channel, version=version)
    assert reset_channel(store, MODEL, ENVIRONMENT) == key


def test_two_resets_of_one_generation_keep_both(store: FolderStore) -> None:
    keys = set()
    for name in ("adder-0123456789ab", "adder-ba9876543210"):
        change_channel(store, MODEL, ENVIRONMENT, partial(occupied_by, name))
        keys.add(reset_channel(store, MODEL, ENVIRONMENT))
    assert len(keys) == 2


def test_a_channel_with_a_rollout_is_not_reset(store: FolderStore) -> None:
    change_channel(store, MODEL, ENVIRONMENT, lambda _: requested(used_channel(), make_plan()))
    with pytest.raises(Busy, match=r"Rollout 1 of .* is under way"):
        reset_channel(store, MODEL, ENVIRONMENT)
