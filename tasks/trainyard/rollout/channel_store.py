"""Channels in the store: read, change by compare-and-swap, list, reset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainyard.canonical import digest, short
from trainyard.documents.channel import Channel
from trainyard.errors import Busy, CorruptFile, NotFound, Transient
from trainyard.names import check_name
from trainyard.store.documents import (
    create_document,
    read_document,
    read_versioned,
    update_document,
)
from trainyard.store.layout import channel_key
from trainyard.store.protocol import Store

CHANNELS = "channels"

ARCHIVE = "archive/channels"
"""Channels that were reset. Not below `channels`, where routers look for channels to follow."""


def read_channel(store: Store, model: str, environment: str) -> Channel:
    """Return the channel; one that nobody has written yet is empty, with generation 0.

    Raises:
        BadInput: the names are not valid.
        CorruptFile: it cannot be read.
    """
    try:
        return read_document(store, channel_key(model, environment), Channel)
    except NotFound:
        return Channel(model=model, environment=environment)


def demand_written(store: Store, channel: Channel) -> Channel:
    """Return a channel that was written before, and must be there.

    Once it was written it always has a document, also after a reset. One that is missing is in a
    store that is away, such as a network folder that is not mounted: that tells nothing.

    Raises:
        Transient: nobody has written it, by what is seen now.
    """
    if channel.generation:
        return channel
    raise Transient(
        f"{channel_key(channel.model, channel.environment)} is gone from {store.url}.",
        hint="If that folder is on another machine, is it mounted? If the file was removed, bring "
        "it back from a backup.",
    )


def change_channel(
    store: Store, model: str, environment: str, change: Callable[[Channel], Channel]
) -> Channel:
    """Change the channel by compare-and-swap, from what is stored now, and return it.

    `change` may be called several times, must be pure, and may raise; if it returns an equal
    channel, nothing is written.

    Raises:
        Conflict: others kept changing it.
    """
    return update_document(
        store,
        channel_key(model, environment),
        Channel,
        change,
        absent=lambda: Channel(model=model, environment=environment),
    )


def read_for_change(store: Store, model: str, environment: str) -> tuple[Channel, str | None]:
    """Return the channel and its version, None if nobody has written it yet. Raises CorruptFile."""
    try:
        return read_versioned(store, channel_key(model, environment), Channel)
    except NotFound:
        return Channel(model=model, environment=environment), None


def write_channel(store: Store, channel: Channel, *, version: str | None) -> str:
    """Store a channel if it still is the one that was read, and return its version.

    Raises:
        Conflict: somebody else was first.
    """
    key = channel_key(channel.model, channel.environment)
    # What is stored has passed the document's own rules, whoever put it together.
    data = Channel.model_validate(channel.model_dump(by_alias=True)).to_bytes()
    if version is None:
        return store.create(key, data)
    return store.replace(key, data, version=version)


@dataclass(frozen=True)
class ChannelList:
    """The channels of a store."""

    channels: tuple[Channel, ...]
    """Those that can be read, sorted by model and environment."""
    unreadable: Mapping[str, CorruptFile]
    """What is wrong with the others, by key."""


def list_channels(store: Store, *, model: str = "") -> ChannelList:
    """Return all channels (of one model). One that is damaged hides no other."""
    channels: list[Channel] = []
    unreadable: dict[str, CorruptFile] = {}
    for key in channel_keys(store, model=model):
        try:
            channels.append(read_document(store, key, Channel))
        except NotFound:
            continue
        except CorruptFile as error:
            unreadable[key] = error
    return ChannelList(tuple(channels), unreadable)


def channel_keys(store: Store, *, model: str = "") -> tuple[str, ...]:
    """Return the keys of all channels (of one model), sorted by model and environment."""
    prefix = f"{CHANNELS}/{check_name(model, 'Model')}" if model else CHANNELS
    return tuple(entry.key for entry in store.list(prefix) if entry.key.count("/") == 2)


def reset_channel(store: Store, model: str, environment: str) -> str:
    """Copy the channel to the archive and empty it, so that the next rollout is a first one.

    Its generation goes on counting: ids of runs are made of it and must not come again. Its servers
    are not touched. Doing it twice is the same as once.

    Returns:
        The key in the archive; empty if there was nothing in the channel.

    Raises:
        Busy: a rollout is under way.
    """
    channel, version = read_for_change(store, model, environment)
    if version is None or (channel.stable is None and channel.rollout is None):
        return ""
    if channel.in_progress:
        assert channel.rollout is not None
        raise Busy(
            f"Rollout {channel.rollout.number} of {channel.rollout.release_id} is under way in "
            f"{environment}.",
            hint=f"End it first: `trainyard abort {model} {environment}`.",
        )
    content = short(digest(channel.model_dump(mode="json", by_alias=True)))
    key = f"{ARCHIVE}/{model}/{environment}/{channel.generation:06d}-{content}.json"
    create_document(store, key, channel)
    empty = Channel(model=model, environment=environment, generation=channel.generation + 1)
    write_channel(store, empty, version=version)
    return key
