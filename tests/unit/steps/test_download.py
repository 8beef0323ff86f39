from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from tests.unit import yard
from tests.unit.sources.model_files import CONFIG, safetensors, write_model

from trainyard.documents.artifacts import CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.documents.plan import Plan
from trainyard.errors import BadInput, Busy, NotFound, StorageFull, Transient
from trainyard.settings import Settings
from trainyard.sources.files import read_architecture
from trainyard.sources.local import LocalSource
from trainyard.steps.context import StepContext
from trainyard.steps.download import download
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import checkpoint_manifest_key, plan_key
from trainyard.store.parts import Ranges
from trainyard.store.transfer import hash_file

PREFIX = "checkpoints/adder/v1"
KEY = checkpoint_manifest_key("adder", "v1")


class CountingStore(FolderStore):
    """Counts what is really written, and may fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.uploaded: list[str] = []
        self.before_upload: dict[str, Exception] = {}

    def upload_ranged(
        self, key: str, source: Ranges, *, sha256: str | None = None, new: bool = False
    ) -> FileEntry:
        assert not (new and self.exists(key)), f"{key} was there at the beginning"
        if (error := self.before_upload.get(key)) is not None:
            raise error
        if not self.exists(key):
            self.uploaded.append(key)
        return super().upload_ranged(key, source, sha256=sha256, new=new)


class Site:
    """A source with one revision, a store, and the plan that goes with them."""

    def __init__(self, home: Path) -> None:
        self.source = home / "models"
        self.model = write_model(self.source / "v1")
        self.settings = Settings(home=home, catalogue=home)
        self.store = CountingStore(self.settings.store_root)
        self.progress = yard.Silent()
        self.context = StepContext(self.settings, self.store, self.progress, home / "work")

    def plan(self) -> Plan:
        source = LocalSource(self.source)
        resolved = source.resolve("v1")
        return yard.plan("p1").model_copy(
            update={
                "source_fingerprint": resolved.fingerprint,
                "architecture_digest": read_architecture(source, resolved).digest,
            }
        )

    def stored(self) -> dict[str, bytes]:
        return {
            entry.key.removeprefix(f"{PREFIX}/"): self.store.read(entry.key).data
            for entry in self.store.list(PREFIX)
        }

    def manifest(self) -> CheckpointManifest:
        return read_document(self.store, KEY, CheckpointManifest)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestFirstTime:
    def test_files_and_manifest_are_stored(self, site: Site) -> None:
        result = download(site.plan(), site.context)
        assert result.key == KEY
        assert not result.reused
        assert result.detail["files"] == 3
        assert result.detail["parameters"] == 12
        stored = site.stored()
        del stored["manifest.json"]
        assert stored == files_of(site.model)
        manifest = site.manifest()
        assert [entry.path for entry in manifest.files] == sorted(stored)
        for entry in manifest.files:
            content = hash_file(site.model / entry.path)
            assert (entry.size, entry.sha256) == (content.size, content.sha256)
        assert manifest.digest == files_digest(manifest.files)
        assert manifest.architecture_digest == site.plan().architecture_digest
        assert manifest.parameters == 12
        assert manifest.source == site.model.as_uri()
        assert manifest.provenance.inputs == (plan_key("p1"),)

    def test_the_manifest_comes_last(self, site: Site) -> None:
        seen: list[set[str]] = []
        really = site.store.create

        def create(key: str, data: bytes) -> str:
            seen.append(set(site.stored()))
            return really(key, data)

        site.store.create = create  # type: ignore[method-assign]
        download(site.plan(), site.context)
        assert seen == [{"config.json", "tokenizer.json", "model.safetensors"}]

    def test_progress_counts_bytes(self, site: Site) -> None:
        download(site.plan(), site.context)
        total = sum(len(data) for data in files_of(site.model).values())
        assert site.progress.said[-1] == f"{total} bytes of {total} bytes done"
        assert len(site.progress.said) == 3

    def test_a_file_with_our_own_name_is_left_out(self, site: Site) -> None:
        (site.model / "manifest.json").write_text("{}")
        download(site.plan(), site.context)
        assert site.manifest().model == "adder"

    def test_many_files(self, site: Site) -> None:
        names = {f"t{n}": f"model-{n:05}.safetensors" for n in range(40)}
        (site.model / "model.safetensors").unlink()
        for tensor, name in names.items():
            (site.model / name).write_bytes(safetensors({tensor: [8]}, fill=len(tensor)))
        index = json.dumps({"weight_map": names})
        (site.model / "model.safetensors.index.json").write_text(index)
        result = download(site.plan(), site.context)
        assert result.detail["files"] == 43
        assert result.detail["parameters"] == 320


class TestAgain:
    def test_a_stored_checkpoint_is_reused_without_the_source(self, site: Site) -> None:
        plan = site.plan()
        download(plan, site.context)
        before = site.store.read(KEY).data
        shutil.rmtree(site.source)
        result = download(plan, site.context)
        assert result.reused
        assert result.key == KEY
        assert site.store.read(KEY).data == before
        assert len(site.store.uploaded) == 3

    def test_a_source_that_was_only_touched_is_compared(self, site: Site) -> None:
        large = safetensors({"w": [1 << 18]})
        (site.model / "model.safetensors").write_bytes(large)
        download(site.plan(), site.context)
        (site.model / "model.safetensors").write_bytes(large)
        os.utime(site.model / "model.safetensors", ns=(1, 1))
        result = download(site.plan(), site.context)
        assert result.reused
        assert "same content" in result.message
        assert len(site.store.uploaded) == 3

    def test_other_weights_under_the_same_name_are_refused(self, site: Site) -> None:
        download(site.plan(), site.context)
        before = site.stored()
        write_model(site.model, fill=1)
        with pytest.raises(BadInput, match=r"model\.safetensors in the source differs.*immutable"):
            download(site.plan(), site.context)
        assert site.stored() == before

    def test_other_files_under_the_same_name_are_refused(self, site: Site) -> None:
        download(site.plan(), site.context)
        (site.model / "generation_config.json").write_text("{}")
        with pytest.raises(BadInput, match="other files or sizes"):
            download(site.plan(), site.context)

    def test_another_architecture_under_the_same_name_is_refused(self, site: Site) -> None:
        download(site.plan(), site.context)
        write_model(site.model, config={**CONFIG, "hidden_size": 5})
        with pytest.raises(BadInput, match="architecture differs"):
            download(site.plan(), site.context)

    @pytest.mark.parametrize("damage", ["missing", "short"])
    def test_lost_files_are_restored(self, site: Site, damage: str) -> None:
        download(site.plan(), site.context)
        whole = site.stored()
        path = site.store.root / PREFIX / "model.safetensors"
        path.unlink()
        if damage == "short":
            path.write_bytes(b"short")
        result = download(site.plan(), site.context)
        assert not result.reused
        assert "1 files were restored" in result.message
        assert site.stored() == whole

    def test_lost_files_need_the_source(self, site: Site) -> None:
        plan = site.plan()
        download(plan, site.context)
        (site.store.root / PREFIX / "model.safetensors").unlink()
        shutil.rmtree(site.source / "v1")
        with pytest.raises(NotFound, match="no revision 'v1'"):
            download(plan, site.context)

    def test_force_looks_into_the_stored_files(self, site: Site) -> None:
        download(site.plan(), site.context)
        whole = site.stored()
        path = site.store.root / PREFIX / "model.safetensors"
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        assert download(site.plan(), site.context).reused
        assert site.stored() != whole
        assert not download(site.plan(), replace(site.context, force=True)).reused
        assert site.stored() == whole


class TestCut:
    def test_an_error_keeps_what_arrived_and_commits_nothing(self, site: Site) -> None:
        site.store.before_upload[f"{PREFIX}/config.json"] = StorageFull("full")
        with pytest.raises(StorageFull):
            download(site.plan(), site.context)
        assert not site.store.exists(KEY)
        site.store.before_upload.clear()
        arrived = {
            entry.key: (site.store.root / entry.key).stat().st_ino
            for entry in site.store.list(PREFIX)
        }
        assert not download(site.plan(), site.context).reused
        assert len(site.manifest().files) == 3
        for key, inode in arrived.items():
            assert (site.store.root / key).stat().st_ino == inode

    def test_what_arrived_earlier_is_not_stored_again(self, site: Site) -> None:
        key = f"{PREFIX}/model.safetensors"
        with (site.model / "model.safetensors").open("rb") as stream:
            site.store.upload(key, stream)
        site.store.uploaded.clear()
        download(site.plan(), site.context)
        assert sorted(site.store.uploaded) == [
            f"{PREFIX}/config.json",
            f"{PREFIX}/tokenizer.json",
        ]

    def test_left_overs_of_another_content_are_replaced(self, site: Site) -> None:
        site.store.upload(f"{PREFIX}/model.safetensors", io.BytesIO(b"other"))
        site.store.upload(f"{PREFIX}/model-2.safetensors", io.BytesIO(b"stranger"))
        download(site.plan(), site.context)
        stored = site.stored()
        del stored["manifest.json"]
        assert stored == files_of(site.model)

    def test_an_error_in_one_file_ends_the_others(self, site: Site) -> None:
        reading = threading.Event()
        cancelled = threading.Event()
        really = site.store.upload_ranged

        def upload(key: str, source: Ranges, **options: Any) -> FileEntry:
            if key.endswith("model.safetensors"):
                reading.set()
                try:
                    while True:
                        source.read(0, 1)
                except Exception:
                    cancelled.set()
                    raise
            assert reading.wait(60)
            if key.endswith("config.json"):
                raise Transient("cut")
            return really(key, source, **options)

        site.store.upload_ranged = upload  # type: ignore[method-assign]
        with pytest.raises(Transient, match="cut"):
            download(site.plan(), site.context)
        assert cancelled.is_set()
        assert not site.store.exists(KEY)

    def test_and_no_source_waits_before_it_asks_again(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A wait that is not ended takes longer than a test may."""
        waiting = threading.Event()

        class Patient(LocalSource):
            sleep: Callable[[float], object]

            def open_range(self, resolved: Any, path: str, start: int, size: int) -> BinaryIO:
                transferring = threading.current_thread().name.startswith("part")
                if transferring and path == "model.safetensors":
                    waiting.set()
                    self.sleep(86_400.0)
                if transferring and path == "config.json":
                    assert waiting.wait(60)
                    raise NotFound("It is gone.")
                return super().open_range(resolved, path, start, size)

        def open_patient(source: Any, *, sleep: Callable[[float], object], **_: Any) -> Patient:
            opened = Patient(site.source)
            opened.sleep = sleep
            return opened

        plan = site.plan()
        monkeypatch.setattr("trainyard.steps.download.open_source", open_patient)
        with pytest.raises(NotFound, match="gone"):
            download(plan, site.context)

    def test_a_lost_lock_commits_nothing(self, site: Site) -> None:
        def lost() -> None:
            raise Busy("lost")

        with pytest.raises(Busy):
            download(site.plan(), replace(site.context, ensure_held=lost))
        assert not site.store.exists(KEY)


class TestChanges:
    def test_a_source_that_changed_since_the_plan(self, site: Site) -> None:
        plan = site.plan()
        write_model(site.model, fill=1)
        with pytest.raises(BadInput, match=r"changed since the plan was made.*Plan again"):
            download(plan, site.context)
        assert site.stored() == {}

    @pytest.mark.parametrize("how", ["same size", "longer"])
    def test_a_source_that_changes_while_it_is_read(self, site: Site, how: str) -> None:
        plan = site.plan()
        really = site.store.upload_ranged
        done = threading.Event()

        def upload(key: str, source: Ranges, **options: Any) -> FileEntry:
            entry = really(key, source, **options)
            if not done.is_set():
                done.set()
                text = json.dumps({"version": "1.1" if how == "same size" else "longer"})
                (site.model / "tokenizer.json").write_text(text)
            return entry

        site.store.upload_ranged = upload  # type: ignore[method-assign]
        with pytest.raises(BadInput, match="changed while it was read"):
            download(plan, site.context)
        assert not site.store.exists(KEY)

    def test_somebody_else_who_stored_other_content_first(self, site: Site) -> None:
        really = site.store.create
        other = CheckpointManifest(
            model="adder",
            revision="v1",
            source="elsewhere",
            files=(),
            digest="0",
            architecture_digest="0",
            parameters=0,
        )

        def create(key: str, data: bytes) -> str:
            really(key, other.to_bytes())
            return really(key, data)

        site.store.create = create  # type: ignore[method-assign]
        with pytest.raises(BadInput, match="immutable"):
            download(site.plan(), site.context)
        assert site.manifest() == other


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.steps.test_download import Site
from trainyard.documents.plan import Plan
from trainyard.steps.download import download

site = Site(Path(sys.argv[1]))
calls = 0
really = os.fsync

def fsync(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    really(descriptor)

os.fsync = fsync
download(site.plan(), site.context)
print(calls)
"""


def run_and_kill(home: Path, at: int) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(home), str(at)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )


def test_a_download_that_is_killed_is_completed_by_the_next(tmp_path: Path) -> None:
    finished = run_and_kill(tmp_path / "whole", 0)
    calls = int(finished.stdout)
    for at in range(1, calls, 3):
        home = tmp_path / str(at)
        assert run_and_kill(home, at).returncode == -signal.SIGKILL
        site = Site(home)
        download(site.plan(), site.context)
        stored = site.stored()
        del stored["manifest.json"]
        assert stored == files_of(site.model)
        assert len(site.manifest().files) == 3
