"""What every back end of the store must do; a test module of a back end inherits from it."""

from __future__ import annotations

import hashlib
import io

import pytest

from trainyard.documents.base import FileEntry
from trainyard.errors import BadInput, Conflict, CorruptFile, NotFound
from trainyard.store.protocol import Entry, Store
from trainyard.store.transfer import CHUNK_BYTES


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class NeverRead(io.BytesIO):
    """A stream that must not be read."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise AssertionError("the source was read")


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
        with pytest.raises(NotFound):
            store.open_range("a/b", 0, 1)
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
        ("start", "size", "wanted"),
        [
            (0, 10, b"0123456789"),
            (3, 4, b"3456"),
            (8, 5, b"89"),
            (9, 1, b"9"),
            (10, 1, b""),
            (11, 5, b""),
        ],
    )
    def test_a_range_ends_where_the_content_ends(
        self, store: Store, start: int, size: int, wanted: bytes
    ) -> None:
        store.upload("a", io.BytesIO(b"0123456789"))
        with store.open_range("a", start, size) as stream:
            assert stream.read() == wanted
            assert stream.read(1) == b""

    def test_a_range_is_read_in_pieces(self, store: Store) -> None:
        data = bytes(range(256)) * 4096
        store.upload("a", io.BytesIO(data))
        pieces = []
        with store.open_range("a", 1000, 500_000) as stream:
            while piece := stream.read(65_536):
                pieces.append(piece)
        assert b"".join(pieces) == data[1000:501_000]

    def test_a_local_path_holds_the_content(self, store: Store) -> None:
        store.upload("a/b", io.BytesIO(b"one"))
        path = store.local_path("a/b")
        assert path is None or path.read_bytes() == b"one"

    def test_the_url_names_the_store(self, store: Store) -> None:
        assert "://" in store.url
