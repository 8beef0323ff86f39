"""A large file of a folder store that grows over several attempts."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.unit.store.conformance import content, sha256

from trainyard.store import partial
from trainyard.store.folder import FolderStore
from trainyard.store.partial import KEPT_S, PartialFile
from trainyard.store.parts import Ranges

PART = 100_000
DATA = content(10 * PART + 7)


class Cut(Exception):
    """The source failed."""


class Source:
    """Remembers what was asked of it, and fails behind `end`."""

    def __init__(self, end: int = len(DATA), data: bytes = DATA, identity: str = "one") -> None:
        self.asked: list[int] = []

        def read(start: int, size: int) -> bytes:
            if start >= end:
                raise Cut
            self.asked.append(start)
            return data[start : start + size]

        self.ranges = Ranges(len(data), identity, read)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "PART_BYTES", PART)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def folder(store: FolderStore) -> Path:
    return store.root / ".trainyard" / "partial"


def cut(store: FolderStore, parts: int) -> None:
    with pytest.raises(Cut):
        store.upload_ranged("a", Source(parts * PART).ranges)


def stored(store: FolderStore, source: Source) -> None:
    assert store.upload_ranged("a", source.ranges).sha256 == sha256(DATA)
    assert store.read("a").data == DATA
    assert list(folder(store).iterdir()) == []
    assert (store.root / "a").stat().st_nlink == 1


def test_what_arrived_is_not_asked_for_again(store: FolderStore) -> None:
    cut(store, 6)
    source = Source()
    stored(store, source)
    assert sorted(source.asked) == [n * PART for n in range(6, 11)]


def test_a_file_of_one_part_leaves_nothing(store: FolderStore) -> None:
    with pytest.raises(Cut):
        store.upload_ranged("a", Source(0, b"x").ranges)
    assert list(folder(store).iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "short", "no record", "bad record", "gone"])
def test_what_is_not_as_recorded_does_not_count(store: FolderStore, damage: str) -> None:
    cut(store, 6)
    (part,) = folder(store).glob("*.part")
    record = part.with_suffix(".json")
    if damage == "flipped":
        part.write_bytes(b"\0" + part.read_bytes()[1:])
    elif damage == "short":
        os.truncate(part, PART)
    elif damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text("{")
    else:
        part.unlink()
    source = Source()
    stored(store, source)
    assert 0 in source.asked


def test_more_than_was_recorded_is_cut_off(store: FolderStore) -> None:
    cut(store, 6)
    (part,) = folder(store).glob("*.part")
    with part.open("ab") as file:
        file.write(b"half of a part")
    stored(store, Source())


def test_another_source_begins_anew(store: FolderStore) -> None:
    cut(store, 6)
    source = Source(identity="two")
    assert store.upload_ranged("a", source.ranges).sha256 == sha256(DATA)
    assert 0 in source.asked


def test_two_at_once_do_not_share_a_file(store: FolderStore) -> None:
    cut(store, 6)
    with PartialFile.of(folder(store), "a", Source().ranges) as other:
        source = Source()
        assert store.upload_ranged("a", source.ranges).sha256 == sha256(DATA)
        assert 0 in source.asked
        assert other.path.exists()


def test_a_stored_file_is_never_written_to(store: FolderStore) -> None:
    """Killed between its link and the removal of its partial name."""
    cut(store, 6)
    (part,) = folder(store).glob("*.part")
    (store.root / "b").hardlink_to(part)
    before = (store.root / "b").read_bytes()
    stored(store, Source())
    assert (store.root / "b").read_bytes() == before


def test_what_nobody_goes_on_with_is_removed(store: FolderStore) -> None:
    cut(store, 6)
    long_ago = time.time() - KEPT_S - 60
    for path in folder(store).iterdir():
        os.utime(path, (long_ago, long_ago))
    store.upload_ranged("b", Source().ranges)
    assert list(folder(store).iterdir()) == []
