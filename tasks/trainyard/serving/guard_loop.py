"""The guard's shell: reads channels, leases and servers, and makes the proxy's routes follow.

It needs the store only for news. While the store does not answer, the channels as last seen hold,
and leases still run out; events wait in the home until they can be stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from trainyard.documents.channel import Channel
from trainyard.errors import TrainyardError
from trainyard.serving.guard import Wish, decide, wish_to_follow
from trainyard.serving.guard_events import GuardMemory, remember, write_event
from trainyard.serving.lease import FileLease, LeaseState
from trainyard.serving.records import (
    ObservedServer,
    ServingPaths,
    observed_servers,
    read_record,
    write_record,
)
from trainyard.serving.route import Endpoint, Route, Upstream, take_idle
from trainyard.settings import Settings
from trainyard.store.documents import parse_document
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)

ChannelName = tuple[str, str]
"""Environment and model."""


@dataclass(frozen=True)
class Sight:
    """What the guard saw of one channel at one moment."""

    channel: Channel
    lease: LeaseState
    servers: Sequence[ObservedServer]
    """Those that are ready."""
    lease_age_s: float | None = None
    """Seconds since the lease was renewed; None: there is none."""


class LocalMemory(GuardMemory):
    """What the guard of this machine must know of a channel after a restart."""

    followed: Wish | None = None
    """The newest wish that was ever followed."""


class ChannelReader:
    """Reads all channels of a store again and again, and parses only those that changed."""

    def __init__(self, store: Store) -> None:
        """Read channels of `store`."""
        self._store = store
        self._seen: dict[str, tuple[object, Channel]] = {}
        self.reached = False
        """Did the last look see the store as it was?"""

    def channels(self) -> list[Channel]:
        """Return the channels; one that cannot be read now is returned as it was last seen."""
        self.reached = True
        try:
            found = {
                entry.key: entry.version
                for entry in self._store.list("channels")
                if entry.key.endswith(".json")
            }
        except (TrainyardError, OSError) as error:
            log.warning("The store cannot list its channels: %s", error)
            self.reached = False
            found = dict.fromkeys(self._seen, "")
        self._seen = {key: seen for key, seen in self._seen.items() if key in found}
        for key, version in found.items():
            try:
                self._look_at(key, version)
            except (TrainyardError, OSError) as error:
                log.warning("%s cannot be read: %s", key, error)
                self.reached = False
        return [channel for _, channel in self._seen.values()]

    def _look_at(self, key: str, listed_version: str) -> None:
        mark = listed_version or self._mark(key)
        known = self._seen.get(key)
        if known is not None and mark is not None and known[0] == mark:
            return
        stored = self._store.read(key)
        if known is None or known[0] != stored.version:
            channel = parse_document(stored.data, key, Channel)
            # The mark is older than what was read: a change in between is seen next time.
            self._seen[key] = (mark or stored.version, channel)

    def _mark(self, key: str) -> object | None:
        """Return what changes with the content, without reading it; None if nothing can tell."""
        path: Path | None = self._store.local_path(key)
        if path is None:
            return None
        found = path.stat()
        return (found.st_ino, found.st_mtime_ns, found.st_size)


@dataclass
class Guard:
    """Keeps the routes of a proxy in line with the channels."""

    settings: Settings
    store: Store
    elsewhere: frozenset[str] = frozenset()
    """Environments whose servers are not on this machine; others guard them."""
    routes: dict[ChannelName, Route] = field(default_factory=dict)
    retired: list[Upstream] = field(default_factory=list)
    """Upstreams that get no new requests; to be closed once they have none."""
    _memory: dict[ChannelName, LocalMemory] = field(default_factory=dict)
    _stored_memory: dict[ChannelName, LocalMemory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open what it reads from."""
        self._paths = ServingPaths.of(self.settings)
        self._lease = FileLease(self.settings)
        self._channels = ChannelReader(self.store)
        self._seen: dict[ChannelName, Channel] = {}

    def look(self) -> dict[ChannelName, Sight]:
        """Read everything the decisions need. Waits for files: not for the event loop."""
        # Channels first: servers are ready before a channel wishes traffic for them.
        channels = {
            (channel.environment, channel.model): channel
            for channel in self._channels.channels()
            if channel.environment not in self.elsewhere
        }
        ready: dict[ChannelName, list[ObservedServer]] = {}
        for server in observed_servers(self._paths):
            if server.state == "ready" and server.alive:
                ready.setdefault((server.environment, server.model), []).append(server)
        # A channel that is gone keeps its route as long as it has servers: an empty store, such as
        # one that is just being restored, must take no model off the air.
        gone = {name: each for name, each in self._seen.items() if name in ready.keys() - channels}
        self._seen = {**gone, **channels}
        sights = {}
        for name, channel in self._seen.items():
            self._recall(name)
            sights[name] = Sight(
                channel=channel,
                lease=self._lease.state(*name),
                servers=ready.get(name, []),
                lease_age_s=self._lease.age_s(*name),
            )
        return sights

    def apply(self, sights: Mapping[ChannelName, Sight], now: datetime | None = None) -> None:
        """Change all routes to what was seen. Never waits: for the event loop."""
        now = now or datetime.now(UTC)
        for name in set(self.routes) - set(sights):
            gone = self.routes.pop(name)
            self.retired += [up for ups in gone.upstreams.values() for up in ups]
        for name, sight in sights.items():
            route = self.routes.setdefault(name, Route(*name))
            memory = self._memory[name]
            wish, endpoints = self._wish(sight, memory), map(Endpoint.of_server, sight.servers)
            self.retired += route.update(wish, list(endpoints))
            decision = decide(wish, sight.lease, route.health(), memory.fuse, now)
            route.decision, route.lease_age_s = decision, sight.lease_age_s
            kept = remember(memory, wish, decision, now)
            followed = max(
                (each for each in (memory.followed, wish) if each), key=lambda each: each.generation
            )
            self._memory[name] = LocalMemory(**dict(kept), followed=followed)

    def _wish(self, sight: Sight, memory: LocalMemory) -> Wish:
        ready = {server.release_id for server in sight.servers}
        stored = Wish.of(sight.channel)
        wish = wish_to_follow(stored, memory.followed, ready.__contains__)
        if wish is not stored:
            log.warning(
                "%s/%s: the store is at generation %s, older than %s, which is followed; it was "
                "restored from a copy, and its stable release has no server",
                stored.environment,
                stored.model,
                stored.generation,
                wish.generation,
            )
        return wish

    def persist(self) -> None:
        """Write down what happened. Waits for files: not for the event loop."""
        for name, memory in list(self._memory.items()):
            self._store_memory(name, memory)
            if not memory.unwritten:
                continue
            try:
                for event in memory.unwritten:
                    write_event(self.store, event)
            except (TrainyardError, OSError) as error:
                log.warning("An event of %s/%s must wait: %s", *name, error)
                continue
            self._memory[name] = memory.model_copy(update={"unwritten": ()})
            self._store_memory(name, self._memory[name])

    def closable(self) -> list[Upstream]:
        """Take out and return the retired upstreams without requests."""
        return take_idle(self.retired)

    def _recall(self, name: ChannelName) -> None:
        if name not in self._memory:
            found = read_record(self._paths.guard(*name), LocalMemory) or LocalMemory()
            self._memory[name] = self._stored_memory[name] = found

    def _store_memory(self, name: ChannelName, memory: LocalMemory) -> None:
        if self._stored_memory.get(name) != memory:
            write_record(self._paths.guard(*name), memory)
            self._stored_memory[name] = memory
