"""What every back end of the store must do; a test module of a back end inherits from it."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from trainyard.documents.base import FileEntry
from trainyard.documents.channel import Channel
from trainyard.errors import BadInput, Conflict, CorruptFile, NotFound
from trainyard.rollout.channel_store import change_channel, read_channel
from trainyard.store.parts import Ranges
from trainyard.store.protocol import Entry, Store
from trainyard.store.transfer import CHUNK_BYTES


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class NeverRead(io.BytesIO):
    """A stream that must not be read."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise AssertionError("the source was read")


def ranges(data: bytes, identity: str = "one") -> Ranges:
    """Return a file that can be read in ranges."""
    return Ranges(len(data), identity, lambda start, size: data[start : start + size])


def never_read(start: int, size: int) -> bytes:
    """Stand for a source that must not be read."""
    raise AssertionError("the source was read")


def content(size: int, seed: int = 0) -> bytes:
    """Return bytes that look like nothing else."""
    return random.Random(seed).randbytes(size)


PART = 5 << 20
"""Bytes of a part in these tests, as small as S3 allows."""


class StoreConformance:
    """Inherit and provide the fixture `store`, which is empty."""

    def test_what_was_created_is_read(self, store: Store) -> None:
        version = store.create("a/b.json", b"one")
        stored = store.read("a/b.json")
        assert stored.data == b"one"
        assert stored.version == version
        assert store.exists("a/b.json")

    def test_empty_content_is_content(self, store: Store) -> None:
        store.create("empty", b"")
        assert store.read("empty").data == b""

    def test_absent_keys(self, store: Store) -> None:
        assert not store.exists("a")
        with pytest.raises(NotFound, match="a/b does not exist"):
            store.read("a/b")
        with pytest.raises(NotFound):
            store.open("a/b")
        with pytest.raises(Conflict, match="is gone"):
            store.replace("a", b"x", version="whatever")
        store.delete("a")
        with pytest.raises(Conflict):
            store.delete("a", version="whatever")

    def test_a_folder_is_no_key(self, store: Store) -> None:
        store.create("a/b", b"x")
        assert not store.exists("a")
        with pytest.raises(NotFound):
            store.read("a")

    def test_create_never_replaces(self, store: Store) -> None:
        store.create("a", b"one")
        for data in (b"two", b"one"):
            with pytest.raises(Conflict, match="a exists already"):
                store.create("a", data)
        assert store.read("a").data == b"one"

    def test_replace_needs_the_version(self, store: Store) -> None:
        first = store.create("a", b"one")
        second = store.replace("a", b"two", version=first)
        assert store.read("a").version == second != first
        with pytest.raises(Conflict, match="changed by somebody else"):
            store.replace("a", b"three", version=first)
        assert store.read("a").data == b"two"

    def test_put_does_not_ask(self, store: Store) -> None:
        store.put("a", b"one")
        version = store.put("a", b"two")
        assert store.read("a").data == b"two"
        store.replace("a", b"three", version=version)

    def test_delete(self, store: Store) -> None:
        version = store.create("a/b", b"one")
        store.put("a/b", b"two")
        with pytest.raises(Conflict):
            store.delete("a/b", version=version)
        assert store.exists("a/b")
        store.delete("a/b", version=store.read("a/b").version)
        assert not store.exists("a/b")
        store.create("a/b", b"three")
        store.delete("a/b")
        assert list(store.list("")) == []

    def test_list_is_sorted_and_stays_in_its_folder(self, store: Store) -> None:
        for key in ("p/b", "p/a/z", "p/a-b", "p/a.b", "p2/x", "p.json", "p/B"):
            store.create(key, b"12")
        expected = [Entry(key, 2) for key in ("p/B", "p/a-b", "p/a.b", "p/a/z", "p/b")]
        assert list(store.list("p")) == expected
        assert list(store.list("p/")) == expected
        assert [entry.key for entry in store.list("")] == sorted(
            ["p/b", "p/a/z", "p/a-b", "p/a.b", "p2/x", "p.json", "p/B"]
        )
        assert list(store.list("p/a")) == [Entry("p/a/z", 2)]
        assert list(store.list("nothing")) == []

    def test_a_listing_tells_when_a_key_was_written(self, store: Store) -> None:
        before = datetime.now(UTC) - timedelta(hours=1)
        store.create("a", b"")
        (entry,) = store.list("")
        assert entry.modified_at is not None
        assert before < entry.modified_at < datetime.now(UTC) + timedelta(hours=1)

    @pytest.mark.parametrize(
        "key", ["", "/", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\0b"]
    )
    def test_keys_cannot_leave_the_store(self, store: Store, key: str) -> None:
        for call in (
            lambda: store.read(key),
            lambda: store.exists(key),
            lambda: store.create(key, b""),
            lambda: store.replace(key, b"", version=""),
            lambda: store.put(key, b""),
            lambda: store.delete(key),
            lambda: store.open(key),
            lambda: store.open_range(key, 0, 1),
            lambda: store.upload(key, NeverRead()),
            lambda: store.upload_ranged(key, ranges(b"x")),
            lambda: store.local_path(key),
        ):
            with pytest.raises(BadInput, match="would leave its folder"):
                call()

    @pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 17])
    def test_upload_hashes_what_it_stores(self, store: Store, size: int) -> None:
        data = bytes(range(256)) * (size // 256 + 1)
        data = data[:size]
        entry = store.upload("c/m.safetensors", io.BytesIO(data))
        assert entry == FileEntry(path="c/m.safetensors", size=size, sha256=sha256(data))
        with store.open("c/m.safetensors") as stream:
            assert stream.read() == data

    def test_upload_twice_keeps_the_first(self, store: Store) -> None:
        first = store.upload("a", io.BytesIO(b"one"))
        assert store.upload("a", io.BytesIO(b"one")) == first
        assert store.upload("a", NeverRead(), sha256=sha256(b"one")) == first

    def test_upload_never_replaces(self, store: Store) -> None:
        store.upload("a", io.BytesIO(b"one"))
        with pytest.raises(Conflict, match="other content"):
            store.upload("a", io.BytesIO(b"two"))
        with pytest.raises(Conflict, match="other content"):
            store.upload("a", io.BytesIO(b"two"), sha256=sha256(b"two"))
        assert store.read("a").data == b"one"

    def test_an_upload_with_the_wrong_hash_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(CorruptFile, match=sha256(b"two")):
            store.upload("a", io.BytesIO(b"one"), sha256=sha256(b"two"))
        assert list(store.list("")) == []

    def test_an_upload_whose_source_fails_leaves_nothing(self, store: Store) -> None:
        class Breaks(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                if self.tell():
                    raise ConnectionResetError
                return super().read(size)

        with pytest.raises(ConnectionResetError):
            store.upload("a", Breaks(b"x" * (CHUNK_BYTES + 1)))
        assert list(store.list("")) == []

    @pytest.mark.parametrize(
        ("start", "size", "expected"),
        [
            (0, 10, b"0123456789"),
            (0, 4, b"0123"),
            (3, 4, b"3456"),
            (8, 10, b"89"),
            (10, 5, b""),
            (20, 5, b""),
            (2, 0, b""),
        ],
    )
    def test_a_range(self, store: Store, start: int, size: int, expected: bytes) -> None:
        store.upload("a/b", io.BytesIO(b"0123456789"))
        with store.open_range("a/b", start, size) as stream:
            assert stream.read() == expected
            assert stream.read(5) == b""

    def test_a_range_is_read_in_pieces(self, store: Store) -> None:
        store.upload("a", io.BytesIO(b"0123456789"))
        with store.open_range("a", 2, 7) as stream:
            assert [stream.read(3), stream.read(3), stream.read(3)] == [b"234", b"567", b"8"]

    def test_ranges_that_cannot_be(self, store: Store) -> None:
        for size in (0, 1):
            with pytest.raises(NotFound):
                store.open_range("a", 0, size)
        store.create("a", b"x")
        for start, size in ((-1, 1), (0, -1)):
            with pytest.raises(ValueError, match="no range"):
                store.open_range("a", start, size)

    @pytest.mark.parametrize("size", [0, 1, PART, 2 * PART + 17])
    def test_a_ranged_upload_hashes_what_it_stores(self, store: Store, size: int) -> None:
        data = content(size)
        entry = store.upload_ranged("c/m.safetensors", ranges(data))
        assert entry == FileEntry(path="c/m.safetensors", size=size, sha256=sha256(data))
        with store.open("c/m.safetensors") as stream:
            assert stream.read() == data
        assert [found.key for found in store.list("")] == ["c/m.safetensors"]

    @pytest.mark.parametrize("size", [3, PART + 3])
    def test_a_ranged_upload_never_replaces(self, store: Store, size: int) -> None:
        data = content(size)
        first = store.upload_ranged("a", ranges(data))
        assert store.upload_ranged("a", ranges(data)) == first
        known = Ranges(size, "one", never_read)
        assert store.upload_ranged("a", known, sha256=sha256(data)) == first
        for other in (content(size, seed=1), content(size + 1)):
            with pytest.raises(Conflict, match="other content"):
                store.upload_ranged("a", ranges(other, "another"))
        with pytest.raises(Conflict, match="other content"):
            store.upload_ranged("a", known, sha256=sha256(b"two"))
        assert store.read("a").data == data

    @pytest.mark.parametrize("size", [3, PART + 3])
    def test_a_ranged_upload_with_the_wrong_hash_leaves_nothing(
        self, store: Store, size: int
    ) -> None:
        with pytest.raises(CorruptFile, match=sha256(b"two")):
            store.upload_ranged("a", ranges(content(size)), sha256=sha256(b"two"))
        assert list(store.list("")) == []

    def test_a_ranged_upload_that_failed_goes_on_where_it_was(self, store: Store) -> None:
        data = content(8 * PART)
        asked: list[int] = []
        limit = 5 * PART

        def read(start: int, size: int) -> bytes:
            if start + size > limit:
                raise ConnectionResetError
            asked.append(start)
            return data[start : start + size]

        with pytest.raises(ConnectionResetError):
            store.upload_ranged("a", Ranges(len(data), "one", read))
        assert list(store.list("")) == []
        limit = len(data)
        assert store.upload_ranged("a", Ranges(len(data), "one", read)).sha256 == sha256(data)
        assert store.read("a").data == data

    def test_what_was_left_of_other_content_does_not_count(self, store: Store) -> None:
        old, new = content(4 * PART), content(4 * PART, seed=1)

        def read(start: int, size: int) -> bytes:
            if start >= 3 * PART:
                raise ConnectionResetError
            return old[start : start + size]

        with pytest.raises(ConnectionResetError):
            store.upload_ranged("a", Ranges(len(old), "old", read))
        assert store.upload_ranged("a", ranges(new, "new")).sha256 == sha256(new)
        assert store.read("a").data == new

    def test_of_64_writers_of_one_document_one_wins(self, store: Store) -> None:
        outcomes: list[str] = []

        def work(number: int) -> None:
            try:
                store.create("a", b"%d" % number)
                outcomes.append(str(number))
            except Conflict:
                outcomes.append("")

        together(64, work)
        winners = [each for each in outcomes if each]
        assert len(outcomes) == 64
        assert len(winners) == 1
        assert store.read("a").data == winners[0].encode()

    def test_of_64_replacers_of_one_version_one_wins(self, store: Store) -> None:
        version = store.create("a", b"first")
        outcomes: list[str] = []

        def work(number: int) -> None:
            try:
                store.replace("a", b"%d" % number, version=version)
                outcomes.append(str(number))
            except Conflict:
                outcomes.append("")

        together(64, work)
        winners = [each for each in outcomes if each]
        assert len(outcomes) == 64
        assert len(winners) == 1
        assert store.read("a").data == winners[0].encode()

    def test_32_writers_of_a_channel_lose_no_update(self, store: Store) -> None:
        """The first of them makes the channel."""

        def counted(channel: Channel) -> Channel:
            return channel.model_copy(update={"generation": channel.generation + 1})

        def work(number: int) -> None:
            for _ in range(20):
                try:
                    change_channel(store, "adder", "production", counted)
                    return
                except Conflict:
                    continue

        together(32, work)
        assert read_channel(store, "adder", "production").generation == 32

    def test_a_local_path_holds_the_content(self, store: Store) -> None:
        store.upload("a/b", io.BytesIO(b"one"))
        path = store.local_path("a/b")
        assert path is None or path.read_bytes() == b"one"

    def test_the_url_names_the_store(self, store: Store) -> None:
        assert "://" in store.url


def together(count: int, work: Callable[[int], None]) -> None:
    """Do `work` in threads that begin at the same moment."""
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
