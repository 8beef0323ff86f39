"""Reads documents for the page: each immutable one once, each channel only when it is old, each
release again when it was signed anew."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from trainyard.documents.base import Document
from trainyard.documents.channel import Channel
from trainyard.documents.release import Release
from trainyard.errors import CorruptFile, NotFound
from trainyard.releases import peek_into
from trainyard.rollout.channel_store import CHANNELS
from trainyard.store.documents import parse_document
from trainyard.store.layout import channel_key, release_key, release_prefix
from trainyard.store.protocol import Entry, Store

DocumentT = TypeVar("DocumentT", bound=Document)
ValueT = TypeVar("ValueT")

FRESH_S = 1.0
"""Seconds for which a channel or a listing need not be read again, however many people look."""

KEPT_BYTES = 64 * 2**20
"""Documents that are kept, counted as they are stored (as objects they are about five times that).
Twice what 2,000 releases of 16 KiB take: of a list longer than this, each look would read all."""

_READERS = 8
"""Documents that are read at the same time: an object store answers each in milliseconds."""


@dataclass(frozen=True)
class Unreadable:
    """A channel whose document cannot be read."""

    model: str
    environment: str
    problem: str


@dataclass(frozen=True)
class _Kept:
    """A document that was read and parsed."""

    document: Document
    size_bytes: int
    version: str
    mark: str = ""
    """What a listing said of it before it was read; see `_mark_of`."""


@dataclass
class _Mutable:
    """A channel as it was last read."""

    version: str
    channel: Channel
    read_at: float


class Reader:
    """Documents of one store, for many requests at once.

    Args:
        store: where they are.
        clock: seconds that only grow; replaced in tests.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._channels: dict[str, _Mutable] = {}
        self._listings: dict[str, tuple[float, tuple[Entry, ...]]] = {}
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="trainyard-page")

    # --- documents that never change ------------------------------------------------------------

    def document(self, key: str, kind: type[DocumentT]) -> DocumentT:
        """Return an immutable document. Raises NotFound, CorruptFile."""
        known = self._known(key)
        if known is not None and isinstance(known.document, kind):
            return known.document
        stored = self.store.read(key)
        document = parse_document(stored.data, key, kind)
        self._keep(key, _Kept(document, len(stored.data), stored.version))
        return document

    def documents(self, keys: Iterable[str], kind: type[DocumentT]) -> list[DocumentT]:
        """Return several immutable documents, in the order of `keys`. Raises as `document`."""
        return self._each(lambda key: self.document(key, kind), list(keys))

    def _known(self, key: str) -> _Kept | None:
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
        return known

    def _keep(self, key: str, kept: _Kept) -> None:
        with self._lock:
            before = self._kept.pop(key, None)
            self._kept[key] = kept
            self._kept_bytes += kept.size_bytes - (before.size_bytes if before else 0)
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.size_bytes

    # --- releases: the same for ever, but for their signature -------------------------------------

    def release(self, model: str, release_id: str) -> Release:
        """Return a release whose signature is not checked. Raises as `peek_release`."""
        return self._release(release_key(model, release_id), "")

    def releases(self, model: str, release_ids: Iterable[str]) -> list[Release]:
        """Return several releases of a model, in their order. Raises as `release`.

        Those that the listing shows unchanged are not read.
        """
        marks = {entry.key: _mark_of(entry) for entry in self._entries(release_prefix(model))}
        keys = [release_key(model, each) for each in release_ids]
        return self._each(lambda key: self._release(key, marks.get(key, "")), keys)

    def _release(self, key: str, mark: str) -> Release:
        known = self._known(key)
        if known is not None and isinstance(known.document, Release):
            if mark and known.mark == mark:
                return known.document
            stored = self.store.read(key)
            if known.version == stored.version:
                self._keep(key, replace(known, mark=mark or known.mark))
                return known.document
        else:
            stored = self.store.read(key)
        release = peek_into(stored.data, key)
        self._keep(key, _Kept(release, len(stored.data), stored.version, mark))
        return release

    # --- what changes ---------------------------------------------------------------------------

    def keys(self, prefix: str) -> tuple[str, ...]:
        """Return the keys below a folder, sorted."""
        return tuple(entry.key for entry in self._entries(prefix))

    def _entries(self, prefix: str) -> tuple[Entry, ...]:
        now = self._clock()
        with self._lock:
            known = self._listings.get(prefix)
        if known is not None and now - known[0] < FRESH_S:
            return known[1]
        entries = tuple(self.store.list(prefix))
        with self._lock:
            # Nothing here is worth keeping for longer than it is fresh.
            self._listings = {
                name: listing for name, listing in self._listings.items() if now - listing[0] < 60
            }
            self._listings[prefix] = (now, entries)
        return entries

    def channel(self, model: str, environment: str) -> Channel:
        """Return a channel. Raises NotFound if nobody has written it yet, BadInput, CorruptFile."""
        return self._channel(channel_key(model, environment))

    def channels(self, *, model: str = "") -> list[Channel | Unreadable]:
        """Return all channels (of one model), sorted by model and environment."""
        prefix = f"{CHANNELS}/{model}" if model else CHANNELS
        keys = [key for key in self.keys(prefix) if key.count("/") == 2 and key.endswith(".json")]
        with self._lock:
            if not model:
                # Channels that were reset are in the store no more.
                self._channels = {
                    key: known for key, known in self._channels.items() if key in set(keys)
                }
        found = self._each(self._channel_or_problem, keys)
        return [each for each in found if each is not None]

    def _channel_or_problem(self, key: str) -> Channel | Unreadable | None:
        try:
            return self._channel(key)
        except NotFound:
            return None
        except CorruptFile as error:
            _, model, name = key.split("/")
            return Unreadable(model, name.removesuffix(".json"), str(error))

    def _channel(self, key: str) -> Channel:
        now = self._clock()
        known = self._channels.get(key)
        if known is not None and now - known.read_at < FRESH_S:
            return known.channel
        stored = self.store.read(key)
        if known is not None and known.version == stored.version:
            channel = known.channel
        else:
            channel = parse_document(stored.data, key, Channel)
        self._channels[key] = _Mutable(stored.version, channel, now)
        return channel

    def _each(self, read: Callable[[str], ValueT], keys: list[str]) -> list[ValueT]:
        if len(keys) < 2:
            return [read(key) for key in keys]
        return list(self._threads.map(read, keys))


def _mark_of(entry: Entry) -> str:
    """Return what changes in a listing when a document does; nothing if the store cannot tell."""
    if entry.version or entry.modified_at is None:
        return entry.version
    return f"{entry.size} bytes of {entry.modified_at.isoformat()}"


def newest_first(documents: Iterable[DocumentT]) -> list[DocumentT]:
    """Return documents by the time they were made, newest first."""
    return sorted(documents, key=lambda each: each.created_at, reverse=True)


def as_json(document: Document) -> dict[str, Any]:
    """Return a document as the JSON object that is stored."""
    return document.model_dump(mode="json", by_alias=True)
