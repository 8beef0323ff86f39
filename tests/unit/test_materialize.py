from __future__ import annotations

import errno
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pytest
from tests.fake_neuron import NativeCache
from tests.unit import yard

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.documents.release import Release
from trainyard.errors import BadInput, CorruptFile, NotFound, StorageFull
from trainyard.materialize import (
    Materialized,
    Means,
    materialize_bundle,
    materialize_files,
    materialize_release,
)
from trainyard.store.documents import create_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import bundle_manifest_key, checkpoint_manifest_key

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tasks")])

CONTENT = {"config.json": b"{}", "model.safetensors": b"x" * 5000, "a/b/c": b"", "a/d": b"d"}


class RemoteStore(FolderStore):
    """A store without files of its own, such as an object store."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: list[str] = []

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        self.opened.append(key)
        return super().open_range(key, start, size)

    def local_path(self, key: str) -> Any:
        return None


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "servers" / "one" / "model"


def put_files(
    store: FolderStore, content: dict[str, bytes] = CONTENT, prefix: str = "p"
) -> tuple[FileEntry, ...]:
    return tuple(
        store.upload(f"{prefix}/{path}", io.BytesIO(data)).model_copy(update={"path": path})
        for path, data in sorted(content.items())
    )


def found(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestFiles:
    @pytest.mark.parametrize("link", [True, False])
    @pytest.mark.parametrize("kind", [FolderStore, RemoteStore])
    def test_restores_exactly_the_files(
        self, tmp_path: Path, dest: Path, kind: type[FolderStore], link: bool
    ) -> None:
        store = kind(tmp_path / "store")
        sizes: list[int] = []
        means = Means(on_bytes=sizes.append)
        restored = materialize_files(store, "p", put_files(store), dest, link=link, means=means)
        assert restored == dest
        assert found(dest) == CONTENT
        assert sum(sizes) == sum(map(len, CONTENT.values()))
        assert not list(dest.parent.glob("*.part"))

    def test_links_cost_no_space_and_copies_are_private(
        self, store: FolderStore, dest: Path, tmp_path: Path
    ) -> None:
        files = put_files(store)
        stored = (store.root / "p" / "model.safetensors").stat()
        materialize_files(store, "p", files, dest, link=True)
        assert (dest / "model.safetensors").stat().st_ino == stored.st_ino
        copy = materialize_files(store, "p", files, tmp_path / "copy", link=False)
        assert (copy / "model.safetensors").stat().st_ino != stored.st_ino
        (copy / "model.safetensors").write_bytes(b"a server writes here")
        assert store.read("p/model.safetensors").data == CONTENT["model.safetensors"]

    def test_where_links_are_impossible_files_are_copied(
        self, store: FolderStore, dest: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = put_files(store)

        def fail(*_: object, **__: object) -> NoReturn:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "link", fail)
        materialize_files(store, "p", files, dest, link=True)
        assert found(dest) == CONTENT

    def test_an_intact_folder_is_used_again(self, tmp_path: Path, dest: Path) -> None:
        store = RemoteStore(tmp_path / "store")
        files = put_files(store)
        for link in (True, False):
            materialize_files(store, "p", files, dest, link=link)
            store.opened.clear()
            materialize_files(store, "p", files, dest, link=link)
            assert store.opened == []

    @pytest.mark.parametrize("link", [True, False])
    @pytest.mark.parametrize("damage", ["content", "short", "missing", "folder", "symlink"])
    def test_a_damaged_file_is_restored(
        self, tmp_path: Path, dest: Path, link: bool, damage: str
    ) -> None:
        store = RemoteStore(tmp_path / "store")
        files = put_files(store)
        materialize_files(store, "p", files, dest, link=link)
        victim = dest / "model.safetensors"
        if damage == "content":
            victim.write_bytes(b"y" * 5000)
        else:
            victim.unlink()
        if damage == "short":
            victim.write_bytes(b"x")
        elif damage == "folder":
            (victim / "deep").mkdir(parents=True)
        elif damage == "symlink":
            victim.symlink_to("config.json")
        store.opened.clear()
        materialize_files(store, "p", files, dest, link=link)
        assert found(dest) == CONTENT
        assert store.opened == ["p/model.safetensors"]

    def test_a_copy_is_hashed_even_if_its_size_and_time_are_right(
        self, store: FolderStore, dest: Path
    ) -> None:
        files = put_files(store)
        materialize_files(store, "p", files, dest, link=False)
        victim = dest / "model.safetensors"
        before = victim.stat()
        with victim.open("r+b") as file:
            file.write(b"y")
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
        materialize_files(store, "p", files, dest, link=False)
        assert found(dest) == CONTENT

    def test_strangers_are_removed_and_never_followed(
        self, store: FolderStore, dest: Path, tmp_path: Path
    ) -> None:
        files = put_files(store)
        materialize_files(store, "p", files, dest, link=False)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "kept").write_text("kept")
        (dest / "pytorch_model.bin").write_bytes(b"")
        (dest / "a" / "half.lock").write_bytes(b"")
        (dest / "new" / "folder").mkdir(parents=True)
        (dest / "a" / "link").symlink_to(tmp_path / "elsewhere")
        (dest / "dangling").symlink_to("nowhere")
        materialize_files(store, "p", files, dest, link=False)
        assert found(dest) == CONTENT
        assert sorted(p.name for p in dest.rglob("*") if p.is_dir()) == ["a", "b"]
        assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"

    def test_a_file_where_a_folder_should_be(self, store: FolderStore, dest: Path) -> None:
        dest.mkdir(parents=True)
        (dest / "a").write_text("in the way")
        materialize_files(store, "p", put_files(store), dest, link=False)
        assert found(dest) == CONTENT

    def test_another_set_of_files_replaces_the_first(self, store: FolderStore, dest: Path) -> None:
        materialize_files(store, "p", put_files(store), dest, link=True)
        other = {"config.json": b"{ }", "model.safetensors": b"z" * 5000}
        materialize_files(store, "q", put_files(store, other, "q"), dest, link=True)
        assert found(dest) == other

    def test_a_broken_marker_is_no_marker(self, store: FolderStore, dest: Path) -> None:
        files = put_files(store)
        materialize_files(store, "p", files, dest, link=True)
        for text in ("", "{", '{"digest": "x"}', "\xff"):
            dest.with_name("model.restored.json").write_text(text)
            materialize_files(store, "p", files, dest, link=True)
            assert found(dest) == CONTENT

    @pytest.mark.parametrize("link", [True, False])
    def test_a_damaged_stored_file_is_never_used(
        self, store: FolderStore, dest: Path, link: bool
    ) -> None:
        files = put_files(store)
        stored = store.root / "p" / "model.safetensors"
        stored.chmod(0o644)
        stored.write_bytes(b"y" * 5000)
        with pytest.raises(CorruptFile, match=r"p/model.safetensors in file:.* is damaged"):
            materialize_files(store, "p", files, dest, link=link)
        assert not (dest / "model.safetensors").exists()
        assert not dest.with_name("model.restored.json").exists()

    @pytest.mark.parametrize("link", [True, False])
    def test_a_missing_stored_file(self, store: FolderStore, dest: Path, link: bool) -> None:
        files = put_files(store)
        store.delete("p/a/d")
        with pytest.raises(NotFound, match="p/a/d does not exist"):
            materialize_files(store, "p", files, dest, link=link)

    @pytest.mark.parametrize("path", ["../x", "/x", "a/../../x"])
    def test_paths_cannot_leave_the_folder(self, store: FolderStore, dest: Path, path: str) -> None:
        entry = FileEntry(path=path, size=0, sha256="0")
        with pytest.raises(BadInput, match="would leave its folder"):
            materialize_files(store, "p", [entry], dest, link=False)
        assert not dest.exists()

    def test_a_full_disk(
        self, store: FolderStore, dest: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = put_files(store)

        def full(*_: object) -> NoReturn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(StorageFull):
            materialize_files(store, "p", files, dest, link=False)
        monkeypatch.undo()
        assert not list(dest.parent.glob("*.part/*"))
        assert not dest.with_name("model.restored.json").exists()
        materialize_files(store, "p", files, dest, link=False)
        assert found(dest) == CONTENT


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from tests.unit.test_materialize import RemoteStore, put_files
from trainyard.materialize import materialize_files

store = RemoteStore(Path(sys.argv[1]))
files = put_files(store)
for number in itertools.count():
    dest = Path(sys.argv[2]) / str(number) / "model"
    pid = os.fork()
    if pid == 0:
        left = itertools.count(number, -1)
        def dying(call):
            def wrapped(*args, **kwargs):
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapped
        for name in ("open", "pwrite", "ftruncate", "replace", "unlink", "mkdir", "close", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        materialize_files(store, "p", files, dest, link=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
print(number)
"""


def test_a_restore_that_is_killed_is_completed_by_the_next(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(tmp_path / "restored")],
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    store = FolderStore(tmp_path / "store")
    files = put_files(store)
    assert int(done.stdout) > 20
    for number in range(int(done.stdout)):
        dest = tmp_path / "restored" / str(number) / "model"
        if dest.with_name("model.restored.json").exists():
            assert found(dest) == CONTENT
        materialize_files(store, "p", files, dest, link=True)
        assert found(dest) == CONTENT


TURNS = """
import sys
from pathlib import Path
from tests.unit.test_materialize import OTHER, RemoteStore, put_files
from trainyard.materialize import materialize_files

store = RemoteStore(Path(sys.argv[1]))
prefix = sys.argv[3]
files = put_files(store, OTHER, "q") if prefix == "q" else put_files(store)
sys.stdin.read()
for _ in range(30):
    materialize_files(store, prefix, files, Path(sys.argv[2]), link=False)
"""

OTHER = {"config.json": b"{ }", "a": b"a file where the first set has a folder"}


def test_two_restores_of_one_folder_take_turns(tmp_path: Path) -> None:
    store = RemoteStore(tmp_path / "store")
    dest = tmp_path / "servers" / "model"
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TURNS, str(store.root), str(dest), prefix],
            env=env,
            stdin=subprocess.PIPE,
        )
        for prefix in ("p", "q")
    ]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    assert found(dest) in (CONTENT, OTHER)


class TestNeuronBundle:
    def test_one_flipped_byte_in_any_file_is_found_and_named(
        self, store: FolderStore, tmp_path: Path
    ) -> None:
        cache = NativeCache(tmp_path / "cache")
        for number in range(2):
            cache.compile(number)
        cache.kernel()
        # Of files with the same content one is read, and serves for all.
        first_with = {data: path for path, data in found(cache.root).items() if data}
        content = {path: data for data, path in first_with.items()}
        files = put_files(store, content, "bundles/key")
        manifest = BundleManifest(
            compile_key="key",
            lane="neuron-native",
            key_inputs={},
            files=files,
            digest=files_digest(files),
            toolchain={},
            compile_s=1.0,
        )
        assert found(materialize_bundle(store, manifest, tmp_path / "whole")) == content
        chance = random.Random(7)
        for path, data in content.items():
            stored = store.root / "bundles" / "key" / path
            stored.chmod(0o644)
            # In a NEFF: once in the header, once in what the header says nothing about.
            for part in (range(min(556, len(data))), range(len(data))):
                damaged = bytearray(data)
                damaged[chance.choice(part)] ^= 1 << chance.randrange(8)
                stored.write_bytes(damaged)
                # An empty folder: a file that was restored whole before would not be read again.
                shutil.rmtree(tmp_path / "server", ignore_errors=True)
                with pytest.raises(CorruptFile, match=f"bundles/key/{re.escape(path)} in file:"):
                    materialize_bundle(store, manifest, tmp_path / "server" / "cache")
                assert not (tmp_path / "server" / "cache.restored.json").exists()
            stored.write_bytes(data)
        assert found(materialize_bundle(store, manifest, tmp_path / "server" / "cache")) == content


BUNDLE = {"inductor/code.so": b"code", "inductor/.hidden": b"h"}


@pytest.fixture
def release(store: FolderStore) -> Release:
    model = put_files(store, CONTENT, "checkpoints/adder/v1")
    bundle = put_files(store, BUNDLE, "bundles/key")
    create_document(
        store,
        checkpoint_manifest_key("adder", "v1"),
        CheckpointManifest(
            model="adder",
            revision="v1",
            source="models",
            files=model,
            digest=files_digest(model),
            architecture_digest="0",
            parameters=1,
        ),
    )
    create_document(
        store,
        bundle_manifest_key("key"),
        BundleManifest(
            compile_key="key",
            lane="cpu",
            key_inputs={},
            files=bundle,
            digest=files_digest(bundle),
            toolchain={},
            compile_s=1.0,
        ),
    )
    spec = yard.spec()
    return Release(
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        release_id="adder-0123456789ab",
        model="adder",
        target=spec.targets[0],
        lane="cpu",
        checkpoint_key=checkpoint_manifest_key("adder", "v1"),
        checkpoint_digest=files_digest(model),
        revision="v1",
        compile_key="key",
        bundle_digest=files_digest(bundle),
        serving={},
        serving_digest="0",
        served_model_name="adder",
        toolchain={},
        measurement_id="m",
        spec=spec,
    )


class TestRelease:
    def test_model_and_cache_lie_beside_each_other(
        self, store: FolderStore, release: Release, tmp_path: Path
    ) -> None:
        dest = tmp_path / "server"
        restored = materialize_release(store, release, dest)
        assert restored == Materialized(model_dir=dest / "model", cache_dir=dest / "cache")
        assert found(restored.model_dir) == CONTENT
        assert found(restored.cache_dir) == BUNDLE
        assert os.access(restored.cache_dir / "inductor" / "code.so", os.W_OK)
        assert (restored.cache_dir / "inductor" / "code.so").stat().st_mode & 0o200

    def test_what_a_server_left_in_its_cache_is_gone_at_the_next_start(
        self, store: FolderStore, release: Release, tmp_path: Path
    ) -> None:
        cache = materialize_release(store, release, tmp_path).cache_dir
        (cache / "inductor" / "code.so").write_bytes(b"half-written")
        (cache / "inductor" / "code.so.lock").write_bytes(b"")
        assert found(materialize_release(store, release, tmp_path).cache_dir) == BUNDLE
        assert store.read("bundles/key/inductor/code.so").data == b"code"

    @pytest.mark.parametrize("what", ["checkpoint", "bundle"])
    def test_files_of_another_release_are_refused(
        self, store: FolderStore, release: Release, tmp_path: Path, what: str
    ) -> None:
        other = release.model_copy(update={f"{what}_digest": "0" * 64})
        with pytest.raises(CorruptFile, match=f"stored {what} of adder-0123456789ab"):
            materialize_release(store, other, tmp_path / "server")
        assert not (tmp_path / "server").exists()

    def test_a_manifest_that_contradicts_itself(
        self, store: FolderStore, release: Release, tmp_path: Path
    ) -> None:
        key = bundle_manifest_key("key")
        text = store.read(key).data.decode()
        store.put(key, text.replace("inductor/code.so", "inductor/evil.so").encode())
        with pytest.raises(CorruptFile, match="does not match its checksum"):
            materialize_release(store, release, tmp_path / "server")

    def test_a_release_whose_files_are_not_here(self, release: Release, tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            materialize_release(FolderStore(tmp_path / "empty"), release, tmp_path / "server")
