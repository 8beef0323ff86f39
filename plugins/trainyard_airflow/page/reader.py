"""Reads documents for the page: each immutable one once, each channel only when it is old."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from trainyard.documents.base import Document
from trainyard.documents.channel import Channel
from trainyard.documents.release import Release
from trainyard.errors import CorruptFile, NotFound
from trainyard.releases import peek_release
from trainyard.rollout.channel_store import CHANNELS
from trainyard.store.documents import parse_document
from trainyard.store.layout import channel_key, release_key
from trainyard.store.protocol import Store

DocumentT = TypeVar("DocumentT", bound=Document)
ValueT = TypeVar("ValueT")

FRESH_S = 1.0
"""Seconds for which a channel or a listing need not be read again, however many people look."""

KEPT_BYTES = 32 * 2**20
"""Immutable documents that are kept, counted as they are stored (as objects they are larger)."""

_RELEASE_BYTES = 16 * 2**10
"""About what a release takes in the store."""

_READERS = 8
"""Documents that are read at the same time: an object store answers each in milliseconds."""


@dataclass(frozen=True)
class Unreadable:
    """A channel whose document cannot be read."""

    model: str
    environment: str
    problem: str


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
        self._kept: OrderedDict[str, tuple[Document, int]] = OrderedDict()
        self._kept_bytes = 0
        self._channels: dict[str, _Mutable] = {}
        self._listings: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="trainyard-page")

    # --- documents that never change ------------------------------------------------------------

    def document(self, key: str, kind: type[DocumentT]) -> DocumentT:
        """Return an immutable document. Raises NotFound, CorruptFile."""
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
        if known is not None and isinstance(known[0], kind):
            return known[0]
        data = self.store.read(key).data
        document = parse_document(data, key, kind)
        self._keep(key, document, len(data))
        return document

    def documents(self, keys: Iterable[str], kind: type[DocumentT]) -> list[DocumentT]:
        """Return several immutable documents, in the order of `keys`. Raises as `document`."""
        return self._each(lambda key: self.document(key, kind), list(keys))

    def release(self, model: str, release_id: str) -> Release:
        """Return a release whose signature is not checked. Raises as `peek_release`."""
        key = release_key(model, release_id)
        with self._lock:
            known = self._kept.get(key)
        if known is not None and isinstance(known[0], Release):
            return known[0]
        release = peek_release(self.store, model, release_id)
        self._keep(key, release, _RELEASE_BYTES)
        return release

    def releases(self, model: str, release_ids: Iterable[str]) -> list[Release]:
        """Return several releases of a model, in their order. Raises as `release`."""
        return self._each(lambda each: self.release(model, each), list(release_ids))

    def _keep(self, key: str, document: Document, size: int) -> None:
        with self._lock:
            before = self._kept.pop(key, None)
            self._kept[key] = (document, size)
            self._kept_bytes += size - (before[1] if before else 0)
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                _, (_, oldest) = self._kept.popitem(last=False)
                self._kept_bytes -= oldest

    # --- what changes ---------------------------------------------------------------------------

    def keys(self, prefix: str) -> tuple[str, ...]:
        """Return the keys below a folder, sorted."""
        now = self._clock()
        with self._lock:
            known = self._listings.get(prefix)
        if known is not None and now - known[0] < FRESH_S:
            return known[1]
        keys = tuple(entry.key for entry in self.store.list(prefix))
        with self._lock:
            # Nothing here is worth keeping for longer than it is fresh.
            self._listings = {
                name: listing for name, listing in self._listings.items() if now - listing[0] < 60
            }
            self._listings[prefix] = (now, keys)
        return keys

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


def newest_first(documents: Iterable[DocumentT]) -> list[DocumentT]:
    """Return documents by the time they were made, newest first."""
    return sorted(documents, key=lambda each: each.created_at, reverse=True)


def as_json(document: Document) -> dict[str, Any]:
    """Return a document as the JSON object that is stored."""
    return document.model_dump(mode="json", by_alias=True)
