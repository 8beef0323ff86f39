"""How garbage collection and those who use what is stored keep out of each other's way.

Before something is collected, its lock (`collection_lock`) is taken, then everything is marked
again, then it is deleted, then the lock is freed. The lock of a checkpoint, bundle or measurement
is that of the step which makes it, so such a step never runs beside the deletion of what it makes.

Who commits a document that names others (a release, a channel) looks afterwards whether all of them
are there and none is being collected (`taken_keys`, `demand_not_collected`). Each side writes first
and looks second, so at least one sees the other: either the collection finds the new document and
keeps what it names, or the one who committed it finds the lock, or nothing, and does not go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from trainyard.errors import NotFound, Transient
from trainyard.store.documents import read_document
from trainyard.store.layout import MANIFEST_NAME, lock_key
from trainyard.store.locks import StepLock
from trainyard.store.objects import Place, place_of
from trainyard.store.protocol import Store

COLLECTING = "garbage collection"
"""What a lock that garbage collection holds says about the work."""


def collection_lock(place: Place) -> str:
    """Return the name of the lock under which an object is deleted."""
    if place.kind in {"checkpoint", "bundle"}:
        return f"{place.prefix}/{MANIFEST_NAME}"
    return place.prefix


def being_collected(store: Store, key: str) -> bool:
    """Tell whether garbage collection has the lock of what `key` belongs to."""
    try:
        lock = read_document(store, lock_key(collection_lock(place_of(key))), StepLock)
    except NotFound:
        return False
    if lock.holder is None or lock.holder.work != COLLECTING:
        return False
    return not lock.is_free(datetime.now(UTC))


def taken_keys(store: Store, keys: Iterable[str]) -> list[str]:
    """Return those of `keys` that are gone or are being collected."""
    # The lock first: what has been collected since the look at the lock is missing afterwards.
    return [key for key in keys if being_collected(store, key) or not store.exists(key)]


def demand_not_collected(store: Store, key: str) -> None:
    """Raise Transient if garbage collection is about to remove what `key` belongs to."""
    if being_collected(store, key):
        raise Transient(
            f"{key} is being looked at by garbage collection.",
            hint="It is kept if a channel has named it in time; try again in a moment.",
        )
