from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from tests.unit.store.conformance import StoreConformance
from tests.unprivileged import open_folder, ordinary_user

from trainyard.errors import BadInput, NotFound, StorageFull, Transient
from trainyard.store.folder import FolderStore
from trainyard.store.transfer import CHUNK_BYTES

as_root = os.geteuid() == 0


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "deep" / "store")


class TestConformance(StoreConformance):
    pass


class TestFiles:
    def test_nothing_is_made_before_the_first_write(self, store: FolderStore) -> None:
        assert list(store.list("")) == []
        assert not store.exists("a")
        assert not store.root.exists()

    def test_keys_are_file_names(self, store: FolderStore) -> None:
        store.create("a/b.json", b"one")
        assert (store.root / "a" / "b.json").read_bytes() == b"one"

    def test_temporary_files_are_gone_and_never_listed(self, store: FolderStore) -> None:
        store.create("a", b"one")
        store.put("a", b"two")
        store.upload("b", io.BytesIO(b"three"))
        assert [entry.key for entry in store.list("")] == ["a", "b"]
        assert list((store.root / ".trainyard" / "tmp").iterdir()) == []

    def test_its_own_folder_has_no_keys(self, store: FolderStore) -> None:
        for key in (".trainyard", ".trainyard/tmp/x"):
            with pytest.raises(BadInput, match="store's own folder"):
                store.create(key, b"")

    def test_hidden_names_elsewhere_are_fine(self, store: FolderStore) -> None:
        store.upload("bundles/x/.cache/.y", io.BytesIO(b"1"))
        assert [entry.key for entry in store.list("bundles")] == ["bundles/x/.cache/.y"]

    def test_rights_follow_the_umask_and_artifacts_are_read_only(self, store: FolderStore) -> None:
        before = os.umask(0o027)
        try:
            store.create("document", b"")
            store.upload("artifact", io.BytesIO(b""))
        finally:
            os.umask(before)
        assert (store.root / "document").stat().st_mode & 0o777 == 0o640
        assert (store.root / "artifact").stat().st_mode & 0o777 == 0o440

    def test_a_deleted_file_may_become_a_folder(self, store: FolderStore) -> None:
        store.create("a", b"")
        store.delete("a")
        store.create("a/b/c", b"")
        store.delete("a/b/c")
        store.create("a", b"")

    def test_a_key_below_a_file_says_what_is_in_the_way(self, store: FolderStore) -> None:
        store.create("a", b"")
        with pytest.raises(BadInput, match="in the way"):
            store.create("a/b", b"")
        with pytest.raises(BadInput, match="in the way"):
            store.put("a/b", b"")
        assert not store.exists("a/b")
        with pytest.raises(NotFound):
            store.read("a/b")

    def test_a_key_that_is_a_folder_says_what_is_in_the_way(self, store: FolderStore) -> None:
        store.create("a/b", b"")
        with pytest.raises(BadInput, match="in the way"):
            store.create("a", b"")
        with pytest.raises(BadInput, match="in the way"):
            store.put("a", b"")

    def test_a_name_that_is_too_long(self, store: FolderStore) -> None:
        with pytest.raises(BadInput, match="too long"):
            store.create("x" * 300, b"")

    def test_a_root_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match="in the way"):
            FolderStore(tmp_path / "file").create("a", b"")


class TestLinks:
    def test_no_link_is_followed(self, store: FolderStore, tmp_path: Path) -> None:
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "file").write_text("secret")
        store.create("a", b"")
        (store.root / "folder").symlink_to(tmp_path / "secret")
        (store.root / "file").symlink_to(tmp_path / "secret" / "file")
        for key in ("folder/file", "file", "folder/new"):
            with pytest.raises(BadInput, match="symbolic link"):
                store.read(key)
            with pytest.raises(BadInput, match="symbolic link"):
                store.put(key, b"")
            with pytest.raises(BadInput, match="symbolic link"):
                store.local_path(key)
        with pytest.raises(BadInput, match="symbolic link"):
            list(store.list("folder"))
        assert [entry.key for entry in store.list("")] == ["a"]
        assert (tmp_path / "secret" / "file").read_text() == "secret"

    def test_the_root_itself_may_be_one(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        FolderStore(tmp_path / "link").create("a", b"1")
        assert FolderStore(tmp_path / "real").read("a").data == b"1"


class TestLeftOvers:
    def test_of_the_dead_are_removed_and_of_the_living_kept(self, store: FolderStore) -> None:
        store.create("a", b"")
        temporary = store.root / ".trainyard" / "tmp"
        (temporary / "of-the-dead").write_bytes(b"half")
        living = store._staged(0o666)
        _, path = living.__enter__()
        FolderStore(store.root).create("b", b"")
        assert list(temporary.iterdir()) == [path]
        living.__exit__(None, None, None)
        assert list(temporary.iterdir()) == []


class TestFullDisk:
    def test_a_write_that_fails_half_way_leaves_nothing(
        self, store: FolderStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version = store.create("old", b"old")
        really = os.write
        written = 0

        def write(descriptor: int, data: memoryview) -> int:
            nonlocal written
            if written >= 1000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written += really(descriptor, data[:700])
            return min(len(data), 700)

        monkeypatch.setattr(os, "write", write)
        for call in (
            lambda: store.create("a", b"x" * 5000),
            lambda: store.put("a", b"x" * 5000),
            lambda: store.upload("a", io.BytesIO(b"x" * 5000)),
            lambda: store.replace("old", b"x" * 5000, version=version),
        ):
            written = 0
            with pytest.raises(StorageFull, match=r"Cannot write .*No space left.*Free space"):
                call()
        monkeypatch.undo()
        assert [entry.key for entry in store.list("")] == ["old"]
        assert store.read("old").data == b"old"
        assert list((store.root / ".trainyard" / "tmp").iterdir()) == []

    @pytest.mark.parametrize("failing", ["fsync", "link"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_later_failures_leave_nothing_either(
        self, store: FolderStore, monkeypatch: pytest.MonkeyPatch, failing: str, number: int
    ) -> None:
        store.create("old", b"old")

        def fail(*_: object, **__: object) -> NoReturn:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, failing, fail)
        with pytest.raises(StorageFull):
            store.create("a", b"x")
        with pytest.raises(StorageFull):
            store.upload("b", io.BytesIO(b"x"))
        monkeypatch.undo()
        assert [entry.key for entry in store.list("")] == ["old"]

    def test_a_limit_on_file_size(self, store: FolderStore) -> None:
        store.create("a", b"")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(StorageFull, match="file size limit"):
                store.upload("b", io.BytesIO(b"x" * 200_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not store.exists("b")

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A file system of 1 MiB."""
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        if not as_root or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("may not mount a file system here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    def test_a_disk_that_is_really_full(self, small_disk: Path) -> None:
        store = FolderStore(small_disk / "store")
        version = store.create("channel", b"v1")
        store.upload("weights", io.BytesIO(b"x" * 500_000))
        with pytest.raises(StorageFull):
            store.upload("more", io.BytesIO(b"x" * 900_000))
        store.replace("channel", b"v2", version=version)
        assert [entry.key for entry in store.list("")] == ["channel", "weights"]
        store.delete("weights")
        store.upload("more", io.BytesIO(b"x" * 700_000))


class TestRights:
    def test_a_folder_that_must_not_be_written(self) -> None:
        with open_folder() as folder:
            (folder / "store").mkdir(mode=0o555)
            with ordinary_user(), pytest.raises(BadInput, match="right to read and write"):
                FolderStore(folder / "store").create("a", b"")

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
    def test_refusals_of_the_system_are_bad_input(
        self, store: FolderStore, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        store.create("a", b"")

        def fail(*_: object, **__: object) -> NoReturn:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", fail)
        with pytest.raises(BadInput, match="right to read and write"):
            store.create("b", b"")

    def test_a_folder_that_cannot_be_listed_does_not_look_empty(
        self, store: FolderStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.create("a/b", b"")
        really = os.scandir

        def scandir(path: str) -> object:
            if str(path).endswith("/a"):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return really(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(BadInput, match="Cannot list"):
            list(store.list(""))

    def test_other_failures_are_transient(
        self, store: FolderStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.create("a", b"")

        def fail(*_: object, **__: object) -> NoReturn:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(Transient, match="Input/output error"):
            store.put("a", b"x")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    script = f"""
import io, resource, sys
from pathlib import Path
from trainyard.store.folder import FolderStore

class Zeros(io.RawIOBase):
    left = 400 << 20
    def read(self, size=-1):
        size = min(size, self.left)
        self.left -= size
        return bytes(size)

store = FolderStore(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert store.upload("a", Zeros()).size == 400 << 20
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown * 1024 < {4 * CHUNK_BYTES}, grown
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "store")], check=True, timeout=600)
