"""The guard's news from outside the cluster's API, read beside it.

The store and the data plane may be slow or silent for minutes. Both are asked in threads of their
own, and the guard takes what they saw last, so that neither can hold up a withdrawal. Whatever a
look fails with, the next one is made: a thread that has died would be missed by nobody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainyard.errors import TrainyardError
from trainyard.kubernetes.client import Object
from trainyard.serving.guard import Wish
from trainyard.serving.guard_events import GuardEvent, write_event
from trainyard.serving.guard_loop import ChannelName, ChannelReader
from trainyard.serving.kubernetes.arrivals import DataPlane, DataPlaneSight
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """The channels as the store had them."""

    by_channel: Mapping[ChannelName, Wish]
    asked_at: float
    """Monotonic seconds at which the last reading began that reached the store; what was stored
    before is in it."""


class StoreFeed:
    """Reads channels and writes events, in a thread."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        *,
        interval_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the store that `open_store` opens.

        Args:
            open_store: may fail for as long as the store is away.
            interval_s: seconds between two looks.
            monotonic: clock.
        """
        self._open_store = open_store
        self._interval_s = interval_s
        self._monotonic = monotonic
        self._store: Store | None = None
        self._reader: ChannelReader | None = None
        self._guard = threading.Lock()
        self._wishes = Wishes({}, float("-inf"))
        self._waiting: dict[str, GuardEvent] = {}
        self._written: set[str] = set()
        self._stopped = threading.Event()

    @property
    def wishes(self) -> Wishes:
        """The channels as last seen."""
        with self._guard:
            return self._wishes

    def hand_over(self, events: Sequence[GuardEvent]) -> set[str]:
        """Take events that are to be stored; return the keys of those that are by now."""
        with self._guard:
            for event in events:
                if event.key not in self._written:
                    self._waiting[event.key] = event
            return {event.key for event in events if event.key in self._written}

    def start(self) -> StoreFeed:
        """Begin to read, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="store", daemon=True).start()
        return self

    def stop(self) -> None:
        """End the reading; does not wait for a request under way."""
        self._stopped.set()

    def look(self) -> None:
        """Read the channels once, and store the events that wait."""
        asked_at = self._monotonic()
        try:
            if self._store is None or self._reader is None:
                self._store = self._open_store()
                self._reader = ChannelReader(self._store)
            channels = self._reader.channels()
        except (TrainyardError, OSError) as error:
            log.warning("The store cannot be opened: %s", error)
            return
        with self._guard:
            self._wishes = Wishes(
                {(each.environment, each.model): Wish.of(each) for each in channels},
                asked_at if self._reader.reached else self._wishes.asked_at,
            )
        self._write(self._store)

    def _write(self, store: Store) -> None:
        with self._guard:
            waiting = dict(self._waiting)
        for key, event in waiting.items():
            try:
                write_event(store, event)
            except (TrainyardError, OSError) as error:
                log.warning("%s must wait: %s", key, error)
                return
            with self._guard:
                self._written.add(key)
                self._waiting.pop(key, None)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
            except Exception:
                log.exception("The store cannot be read, in a way that nobody foresaw")
            self._stopped.wait(self._interval_s)


@dataclass(frozen=True)
class Watched:
    """A channel whose traffic the guard wants to know."""

    route: Object
    data_plane: DataPlane


class TrafficFeed:
    """Asks data planes for the counts of channels whose candidate has traffic, in a thread."""

    def __init__(self, *, interval_s: float = 1.0) -> None:
        """Ask every `interval_s`."""
        self._interval_s = interval_s
        self._guard = threading.Lock()
        self._wanted: dict[ChannelName, Watched] = {}
        self._sights: dict[ChannelName, DataPlaneSight] = {}
        self._stopped = threading.Event()

    def want(self, wanted: Mapping[ChannelName, Watched]) -> None:
        """Say which channels matter now."""
        with self._guard:
            self._wanted = dict(wanted)
            self._sights = {name: s for name, s in self._sights.items() if name in wanted}

    def sight(self, name: ChannelName) -> DataPlaneSight | None:
        """Return what was seen last of a channel; None if nothing can be told now."""
        with self._guard:
            return self._sights.get(name)

    def start(self) -> TrafficFeed:
        """Begin to ask, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="traffic", daemon=True).start()
        return self

    def stop(self) -> None:
        """End the asking; does not wait for a request under way."""
        self._stopped.set()

    def look(self) -> None:
        """Ask once."""
        with self._guard:
            wanted = dict(self._wanted)
        for (environment, model), watched in wanted.items():
            sight: DataPlaneSight | None = None
            try:
                sight = watched.data_plane.look(environment, model, watched.route)
            except (TrainyardError, ValueError) as error:
                log.warning("The traffic of %s/%s is not known: %s", environment, model, error)
            except Exception:
                log.exception("The traffic of %s/%s: nobody foresaw this", environment, model)
            with self._guard:
                if sight is None:
                    self._sights.pop((environment, model), None)
                else:
                    self._sights[environment, model] = sight

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(self._interval_s)
