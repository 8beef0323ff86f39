"""Reads a store: what lies in it, and what its documents say about each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TypeVar

from trainyard.care.facts import (
    Facts,
    channel_facts,
    evidence_of,
    lock_facts,
    plan_facts,
    release_facts,
)
from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.base import Document
from trainyard.documents.channel import Channel
from trainyard.documents.plan import Plan
from trainyard.documents.release import Attestation, Release
from trainyard.errors import NotFound, Transient
from trainyard.releases import list_attestations, list_releases
from trainyard.store.documents import read_document
from trainyard.store.layout import attestation_prefix
from trainyard.store.locks import StepLock
from trainyard.store.objects import Kind, StoredObject, group
from trainyard.store.protocol import Entry, Store

T = TypeVar("T")
DocumentT = TypeVar("DocumentT", bound=Document)

THREADS = 8
"""Documents that are read at the same time."""

_ATTEMPTS = 5
"""Tries to read a list of documents while others publish and withdraw."""


_Seen = tuple[str, int, datetime]
"""A key as it was listed: size and time tell it from another document that took its place."""


class Reader:
    """Reads the facts of a store, again and again; what never changes is read once."""

    def __init__(self, store: Store) -> None:
        """Read nothing yet."""
        self._store = store
        self._once: dict[_Seen, Document] = {}
        self._attested: dict[frozenset[_Seen], tuple[Attestation, ...]] = {}

    def facts(self, now: datetime) -> Facts:
        """Return what is stored now, and who needs it.

        What is committed before this call is seen. Something that vanishes meanwhile is left out.

        Args:
            now: the time in UTC, by which locks are held or not.

        Raises:
            CorruptFile: a document that says what is needed cannot be read.
            Transient: the store fails now.
        """
        objects = group(self._store.list(""))
        with ThreadPoolExecutor(THREADS, thread_name_prefix="inventory") as pool:
            channels = self._read(pool, _entries(objects, "channel"), Channel)
            locks = self._read(pool, _entries(objects, "lock"), StepLock)
            plans = self._read(pool, _entries(objects, "plan"), Plan, once=True)
            folders = [each for each in objects.values() if each.kind == "attestations"]
            attested = dict(
                zip(
                    (each.prefix for each in folders),
                    pool.map(self._attestations, folders),
                    strict=True,
                )
            )
            models = {each.place.model for each in objects.values() if each.kind == "release"}
            releases = [each for found in pool.map(self._list_releases, models) for each in found]
            checkpoints = self._read(pool, _manifests(objects), CheckpointManifest, once=True)
        held, locked = lock_facts(locks, now)
        return Facts(
            objects=objects,
            channels=tuple(channel_facts(each) for each in channels.values()),
            releases=tuple(
                release_facts(
                    each,
                    attested.get(attestation_prefix(each.model, each.release_id), ()),
                    plans,
                )
                for each in releases
            ),
            plans=tuple(plan_facts(each, checkpoints) for each in plans.values()),
            held=held,
            locked=locked,
            evidence=evidence_of(each for found in attested.values() for each in found),
        )

    def _read(
        self,
        pool: ThreadPoolExecutor,
        entries: Iterable[Entry],
        kind: type[DocumentT],
        *,
        once: bool = False,
    ) -> dict[str, DocumentT]:
        """Return the documents by key, those that are gone left out."""

        def read(entry: Entry) -> DocumentT | None:
            seen = _seen(entry)
            known = self._once.get(seen) if once and seen else None
            if isinstance(known, kind):
                return known
            try:
                document = read_document(self._store, entry.key, kind)
            except NotFound:
                return None
            if once and seen:
                self._once[seen] = document
            return document

        entries = list(entries)
        found = zip(entries, pool.map(read, entries), strict=True)
        return {entry.key: document for entry, document in found if document is not None}

    def _attestations(self, folder: StoredObject) -> tuple[Attestation, ...]:
        """Return what was found out about one release; read again only if something was added."""
        seen = [_seen(entry) for entry in folder.entries]
        listing = frozenset(each for each in seen if each)
        known = self._attested.get(listing) if all(seen) else None
        if known is None:
            _, model, release_id = folder.prefix.split("/")
            known = _again(lambda: list_attestations(self._store, model, release_id))
            self._attested[listing] = known
        return known

    def _list_releases(self, model: str) -> tuple[Release, ...]:
        return _again(lambda: list_releases(self._store, model))


def _again(read: Callable[[], T]) -> T:
    """Return what `read` returns, called again while documents vanish between list and read."""
    for _ in range(_ATTEMPTS):
        try:
            return read()
        except NotFound:
            continue
    raise Transient("The store changes too fast to be read.", hint="Try again later.")


def _seen(entry: Entry) -> _Seen | None:
    return (entry.key, entry.size, entry.modified_at) if entry.modified_at else None


def _entries(objects: Mapping[str, StoredObject], kind: Kind) -> Iterator[Entry]:
    return (entry for each in objects.values() if each.kind == kind for entry in each.entries)


def _manifests(objects: Mapping[str, StoredObject]) -> Iterator[Entry]:
    """Yield the manifests of all checkpoints."""
    for each in objects.values():
        if each.kind == "checkpoint" and (key := each.manifest):
            yield from (entry for entry in each.entries if entry.key == key)
