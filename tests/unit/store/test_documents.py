from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trainyard.documents.base import Document, Provenance
from trainyard.errors import Conflict, CorruptFile, NotFound
from trainyard.store.documents import (
    create_document,
    first_document,
    read_document,
    read_versioned,
    substance,
    update_document,
)
from trainyard.store.folder import FolderStore


class Counter(Document):
    value: int
    names: tuple[str, ...] = ()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def test_what_was_created_is_read(store: FolderStore) -> None:
    document = Counter(value=1, names=("ä",))
    assert create_document(store, "c", document)
    assert read_document(store, "c", Counter) == document
    read, version = read_versioned(store, "c", Counter)
    assert read == document
    assert version == store.read("c").version


def test_the_same_again_is_no_conflict(store: FolderStore) -> None:
    first = Counter(value=1, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    again = Counter(value=1, provenance=Provenance(requested_by="somebody else"))
    assert substance(first) == substance(again)
    assert create_document(store, "c", first)
    assert not create_document(store, "c", again)
    assert read_document(store, "c", Counter) == first


def test_something_else_is_one(store: FolderStore) -> None:
    create_document(store, "c", Counter(value=1))
    with pytest.raises(Conflict, match=r"c exists already .* says something else"):
        create_document(store, "c", Counter(value=2))
    assert read_document(store, "c", Counter).value == 1


def test_creating_over_rubbish_says_so(store: FolderStore) -> None:
    store.create("c", b"{")
    with pytest.raises(CorruptFile):
        create_document(store, "c", Counter(value=1))
    assert store.read("c").data == b"{"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"{", "c is not a valid Counter: the document: Invalid JSON"),
        (b"", "c is not a valid Counter"),
        (b"\xff", "c is not a valid Counter"),
        (b'{"schema": "trainyard/v1"}', "c is not a valid Counter: value: Field required"),
        (b'{"schema": "trainyard/v9", "value": 1}', "schema: Input should be 'trainyard/v1'"),
        (b'{"value": 1, "extra": 2}', "extra: Extra inputs are not permitted"),
    ],
)
def test_a_broken_document_is_named(store: FolderStore, data: bytes, complaint: str) -> None:
    store.create("c", data)
    with pytest.raises(CorruptFile, match=complaint):
        read_document(store, "c", Counter)


def test_absent_documents(store: FolderStore) -> None:
    with pytest.raises(NotFound):
        read_document(store, "c", Counter)
    with pytest.raises(NotFound):
        update_document(store, "c", Counter, lambda counter: counter)


def test_update_changes_what_is_newest(store: FolderStore) -> None:
    create_document(store, "c", Counter(value=1))
    calls = []

    def change(counter: Counter) -> Counter:
        calls.append(counter.value)
        if len(calls) == 1:
            store.put("c", Counter(value=10).to_bytes())
        return counter.model_copy(update={"value": counter.value + 1})

    assert update_document(store, "c", Counter, change).value == 11
    assert read_document(store, "c", Counter).value == 11
    assert calls == [1, 10]


def test_an_update_that_changes_nothing_writes_nothing(store: FolderStore) -> None:
    create_document(store, "c", Counter(value=1))
    before = (store.root / "c").stat().st_ino
    assert update_document(store, "c", Counter, lambda counter: counter).value == 1
    assert (store.root / "c").stat().st_ino == before


def test_an_update_that_always_loses_gives_up(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainyard.store.documents._LONGEST_PAUSE_S", 0.0)
    create_document(store, "c", Counter(value=0))

    def change(counter: Counter) -> Counter:
        store.put("c", Counter(value=counter.value + 1).to_bytes())
        return counter.model_copy(update={"value": -1})

    with pytest.raises(Conflict, match="changed by others 30 times"):
        update_document(store, "c", Counter, change)
    assert read_document(store, "c", Counter).value == 30


def test_updates_of_many_threads_all_count(store: FolderStore) -> None:
    create_document(store, "c", Counter(value=0))

    def work() -> None:
        for _ in range(20):
            update_document(
                store, "c", Counter, lambda c: c.model_copy(update={"value": c.value + 1})
            )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_document(store, "c", Counter).value == 80


def test_of_two_documents_the_first_counts(store: FolderStore) -> None:
    first, second = Counter(value=1), Counter(value=2)
    assert first_document(store, "c", first) == first
    assert first_document(store, "c", second) == first


@pytest.mark.parametrize("write", [create_document, first_document])
def test_a_conflict_with_nothing_may_pass(
    store: FolderStore,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[FolderStore, str, Counter], object],
) -> None:
    """As a store answers two writers of one key at the same moment, of whom none has written."""

    def busy(*_: object, **__: object) -> str:
        raise Conflict("status 409")

    monkeypatch.setattr(store, "create", busy)
    with pytest.raises(Conflict, match="status 409"):
        write(store, "c", Counter(value=1))
