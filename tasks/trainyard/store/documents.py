"""Typed documents in a store: read, create once, change by compare-and-swap."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from trainyard.canonical import canonical_json
from trainyard.documents.base import Document, has_right_checksum
from trainyard.errors import Conflict, CorruptFile, NotFound
from trainyard.store.pausing import spread_s
from trainyard.store.protocol import Store

DocumentT = TypeVar("DocumentT", bound=Document)

_NOT_SUBSTANCE = {"created_at", "provenance"}
_UPDATE_ATTEMPTS = 30
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 1.0


def substance(document: Document) -> bytes:
    """Return what `document` says, without when and by whom it was made, as canonical JSON."""
    value: dict[str, Any] = document.model_dump(mode="json", by_alias=True, exclude=_NOT_SUBSTANCE)
    return canonical_json(value)


def parse_document(data: bytes, key: str, kind: type[DocumentT]) -> DocumentT:
    """Return the document in `data`.

    Raises:
        CorruptFile: it is no document of that kind, or not as it was written; the message names
            `key` and the first problem.
    """
    try:
        document = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise CorruptFile(
            f"{key} is not a valid {kind.__name__}: {where}: {first['msg']}.",
            hint="It was cut off, changed by hand or written by another version of Trainyard. "
            "Bring it back from a backup, or remove it if it can be made again.",
        ) from error
    if not has_right_checksum(data):
        raise CorruptFile(
            f"{key} does not match its checksum: it was changed after it was written.",
            hint="Bring it back from a backup, or remove it and let it be made again.",
        )
    return document


def read_document(store: Store, key: str, kind: type[DocumentT]) -> DocumentT:
    """Return the document at `key`. Raises NotFound, CorruptFile."""
    return parse_document(store.read(key).data, key, kind)


def read_versioned(store: Store, key: str, kind: type[DocumentT]) -> tuple[DocumentT, str]:
    """Return the document at `key` and the version to replace it by. Raises as `read_document`."""
    stored = store.read(key)
    return parse_document(stored.data, key, kind), stored.version


def create_document(store: Store, key: str, document: Document) -> bool:
    """Store `document` under `key` once.

    Returns:
        True if it was stored now, False if one that says the same was there already.

    Raises:
        Conflict: another document is there that says something else, or the store said so of none.
        CorruptFile: what is there cannot be read.
    """
    try:
        store.create(key, document.to_bytes())
    except Conflict as conflict:
        existing = _in_the_way(store, key, type(document), conflict)
        if substance(existing) != substance(document):
            raise Conflict(
                f"{key} exists already in {store.url} and says something else.",
                hint="Documents are written once; look at what is there.",
            ) from conflict
        return False
    return True


def first_document(store: Store, key: str, document: DocumentT) -> DocumentT:
    """Store `document` under `key` unless there is one, and return the one that is there then.

    Raises:
        Conflict: the store takes none although there is none.
        CorruptFile: what is there cannot be read.
    """
    try:
        store.create(key, document.to_bytes())
    except Conflict as conflict:
        return _in_the_way(store, key, type(document), conflict)
    return document


def _in_the_way(store: Store, key: str, kind: type[DocumentT], conflict: Conflict) -> DocumentT:
    """Return what a write had a conflict with; if there is nothing, that conflict may pass."""
    try:
        return read_document(store, key, kind)
    except NotFound:
        raise conflict from None


def update_document(
    store: Store,
    key: str,
    kind: type[DocumentT],
    change: Callable[[DocumentT], DocumentT],
    *,
    absent: Callable[[], DocumentT] | None = None,
) -> DocumentT:
    """Change the document at `key` by compare-and-swap and return what is stored then.

    `change` is called with the newest document, again after each lost race, must be pure, and may
    raise. If it returns an equal document, nothing is written.

    Args:
        store: where it lies.
        key: of the document.
        kind: what it is.
        change: makes the new one of the present one.
        absent: makes what is changed where there is no document yet; None: that is an error.

    Raises:
        NotFound: there is no such document.
        Conflict: others kept changing it.
    """
    for attempt in range(_UPDATE_ATTEMPTS):
        version = ""
        try:
            current, version = read_versioned(store, key, kind)
        except NotFound:
            if absent is None:
                raise
            current = absent()
        changed = change(current)
        if changed == current:
            return current
        # What is stored has passed the document's own rules, whoever put it together.
        data = kind.model_validate(changed.model_dump(by_alias=True)).to_bytes()
        try:
            if version:
                store.replace(key, data, version=version)
            else:
                store.create(key, data)
        except Conflict:
            # Not a wait for anything: spreads competing writers so that each gets its turn.
            time.sleep(spread_s(attempt + 1, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
            continue
        return changed
    raise Conflict(
        f"{key} was changed by others {_UPDATE_ATTEMPTS} times in a row.",
        hint="Try again; if it lasts, find out who keeps writing it.",
    )
