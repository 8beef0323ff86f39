"""Reads what the metrics are made of, again and again; what did not change is not read twice."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Generic, TypeVar

from trainyard.documents.base import Document
from trainyard.documents.channel import Channel
from trainyard.documents.look import History, Look
from trainyard.documents.measurement import GateVerdict
from trainyard.documents.status import StepStatus
from trainyard.errors import CorruptFile, NotFound
from trainyard.metrics.figures import Published, RolloutTrace, Seen
from trainyard.store.documents import parse_document
from trainyard.store.layout import rollout_prefix
from trainyard.store.protocol import Entry, Store

log = logging.getLogger(__name__)

DocumentT = TypeVar("DocumentT", bound=Document)

THREADS = 8
"""Documents that are read at the same time."""

_GUARD = "guard-"
"""What the names of the guard's events begin with; `following` ends the others."""


class _Folder(Generic[DocumentT]):
    """The documents of one folder, each parsed once for each time that it changed."""

    def __init__(self, store: Store, name: str, kind: type[DocumentT]) -> None:
        self.name = name
        self._store = store
        self._kind = kind
        self._known: dict[str, tuple[object, DocumentT | None]] = {}

    def read(self, pool: ThreadPoolExecutor) -> tuple[DocumentT, ...]:
        """Return what is there now; what cannot be parsed is left out. Raises Transient."""
        entries = [entry for entry in self._store.list(self.name) if _is_document(entry.key)]
        found = zip(entries, pool.map(self._read_one, entries), strict=True)
        self._known = {entry.key: (_mark(entry), document) for entry, document in found}
        return tuple(document for _, document in self._known.values() if document is not None)

    @property
    def unreadable(self) -> int:
        """How many documents could not be parsed."""
        return sum(document is None for _, document in self._known.values())

    def _read_one(self, entry: Entry) -> DocumentT | None:
        mark, document = self._known.get(entry.key, (None, None))
        if mark is not None and mark == _mark(entry):
            return document
        try:
            return parse_document(self._store.read(entry.key).data, entry.key, self._kind)
        except NotFound:
            return None
        except CorruptFile as error:
            log.warning("%s", error.message)
            return None


class _Evidence:
    """What drivers read of the rollouts under way, each document once; kept is only if it parses.

    Of a rollout that is over nothing more is read, but what was found unreadable is watched on.
    """

    name = "rollouts"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[object, bool]] = {}

    def check(self, entries: Iterable[Entry], *, under_way: bool) -> int:
        """Return how many looks and histories among `entries` cannot be parsed. Raises Transient.

        Several threads may do so at once, each for a rollout of its own.
        """
        return sum(self._is_unreadable(entry, under_way) for entry in entries)

    def forget(self, prefixes: Iterable[str]) -> None:
        """Keep nothing but what is known of these rollouts."""
        kept = tuple(f"{prefix}/" for prefix in prefixes)
        self._known = {key: each for key, each in self._known.items() if key.startswith(kept)}

    def _is_unreadable(self, entry: Entry, under_way: bool) -> bool:
        kind = _kind_of_evidence(entry.key)
        mark, unreadable = self._known.get(entry.key, (None, False))
        if kind is None or not (under_way or unreadable):
            return unreadable
        if mark is not None and mark == _mark(entry):
            return unreadable
        try:
            parse_document(self._store.read(entry.key).data, entry.key, kind)
            unreadable = False
        except NotFound:
            return False
        except CorruptFile as error:
            log.warning("%s", error.message)
            unreadable = True
        self._known[entry.key] = (_mark(entry), unreadable)
        return unreadable


class MetricsReader:
    """Reads a store for its metrics."""

    def __init__(
        self, store: Store, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Read nothing yet."""
        self._store = store
        self._now = now
        self._channels = _Folder(store, "channels", Channel)
        self._statuses = _Folder(store, "status", StepStatus)
        self._verdicts = _Folder(store, "verdicts", GateVerdict)
        self._evidence = _Evidence(store)

    def look(self) -> Seen:
        """Return what is stored now.

        Raises:
            TrainyardError: the store fails now.
        """
        at = self._now()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="metrics") as pool:
            channels = self._channels.read(pool)
            statuses = self._statuses.read(pool)
            verdicts = self._verdicts.read(pool)
            traces = list(pool.map(self._trace, channels))
        self._evidence.forget(_folder_of(each) for each in channels if each.rollout is not None)
        folders: tuple[_Folder[Channel] | _Folder[StepStatus] | _Folder[GateVerdict], ...] = (
            self._channels,
            self._statuses,
            self._verdicts,
        )
        return Seen(
            at=at,
            channels=channels,
            traces={
                (channel.environment, channel.model): trace
                for channel, trace in zip(channels, traces, strict=True)
            },
            releases=_published(self._store.list("releases")),
            statuses=statuses,
            verdicts=verdicts,
            unreadable={
                **{folder.name: folder.unreadable for folder in folders},
                self._evidence.name: sum(trace.unreadable for trace in traces),
            },
        )

    def _trace(self, channel: Channel) -> RolloutTrace:
        """Look into the folder of the channel's last rollout."""
        if channel.rollout is None:
            return RolloutTrace()
        folder = _folder_of(channel)
        entries = list(self._store.list(folder))
        looks = [entry for entry in entries if entry.key.startswith(f"{folder}/looks/")]
        times = [entry.modified_at for entry in looks if entry.modified_at is not None]
        told = [entry.key for entry in entries if entry.key.startswith(f"{folder}/events/{_GUARD}")]
        events = Counter(_guard_event(key.rsplit("/", 1)[1]) for key in told)
        events.pop("following", None)
        unreadable = self._evidence.check(entries, under_way=channel.in_progress)
        return RolloutTrace(len(looks), max(times, default=None), events, unreadable)


def _folder_of(channel: Channel) -> str:
    """Return the folder of the channel's last rollout, which it must have."""
    assert channel.rollout is not None
    return rollout_prefix(channel.model, channel.environment, channel.rollout.number)


def _kind_of_evidence(key: str) -> type[Look] | type[History] | None:
    """Return what a document of a rollout must be for its driver to see; None: it may be anything.

    Events are told once and read by nobody who drives.
    """
    parts = key.split("/")
    if parts[-1] == "history.json":
        return History
    return Look if parts[-2] == "looks" else None


def _guard_event(name: str) -> str:
    """Return what `guard-<time>-<event>.json` tells of."""
    return name.removesuffix(".json").split("-", 2)[-1].replace("-", "_")


def _is_document(key: str) -> bool:
    """Beside a verdict lies what Great Expectations said, which is no document of ours."""
    return key.endswith(".json") and not key.endswith(".expectations.json")


def _mark(entry: Entry) -> object:
    """Return what changes when the document does; None if the store cannot tell."""
    if entry.version:
        return entry.version
    return (entry.size, entry.modified_at) if entry.modified_at else None


def _published(entries: Iterable[Entry]) -> dict[str, Published]:
    by_model: dict[str, list[datetime | None]] = {}
    for entry in entries:
        parts = entry.key.split("/")
        if len(parts) == 3 and entry.key.endswith(".json"):
            by_model.setdefault(parts[1], []).append(entry.modified_at)
    return {
        model: Published(len(times), max((each for each in times if each), default=None))
        for model, times in by_model.items()
    }
