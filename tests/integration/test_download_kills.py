"""Downloads that are killed at random moments: nothing wrong is ever reachable, little is lost."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fake_s3 import ENVIRONMENT, FAST, FakeS3, fake_s3
from tests.killed_download import FOLDER_PART_BYTES, PLAN_ID
from tests.kills import attempted, forking
from tests.unit import yard
from tests.unit.sources.model_files import safetensors, write_model

from trainyard.documents.artifacts import CheckpointManifest, files_digest
from trainyard.errors import NotFound
from trainyard.settings import Settings
from trainyard.sources.files import read_architecture
from trainyard.sources.local import LocalSource
from trainyard.store.documents import create_document, read_document
from trainyard.store.factory import open_store
from trainyard.store.layout import checkpoint_manifest_key, plan_key
from trainyard.store.parts import THREADS
from trainyard.store.protocol import Store
from trainyard.store.transfer import pump

pytestmark = pytest.mark.integration

PREFIX = "checkpoints/adder/v1"
KEY = checkpoint_manifest_key("adder", "v1")
WEIGHTS = "model.safetensors"
S3_PART_BYTES = int(FAST["s3_part_bytes"])
SEED = 20261127


@pytest.fixture(scope="module")
def s3() -> Iterator[FakeS3]:
    with fake_s3() as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A revision with one large file whose parts all differ."""
    folder = tmp_path_factory.mktemp("source") / "models"
    model = write_model(folder / "v1")
    whole = safetensors({"w": [5_500, 1_000]})
    header = whole[: 8 + int.from_bytes(whole[:8], "little")]
    data = random.Random(SEED).randbytes(len(whole) - len(header))
    (model / WEIGHTS).write_bytes(header + data)
    return folder


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """The process that forks attempts."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with forking("tests.killed_download") as process:
        yield process


class Site:
    """A home with a plan in its store, and attempts to download it."""

    def __init__(
        self, home: Path, source: Path, process: subprocess.Popen[str], settings: dict[str, Any]
    ) -> None:
        home.mkdir(parents=True)
        (home / "models").symlink_to(source)
        self.process = process
        self.report = home / "report"
        self.values = {"home": str(home), "catalogue": str(home), **settings}
        self.settings = Settings(**self.values)
        self.store: Store = open_store(self.settings)
        self.content = {path.name: path.read_bytes() for path in (source / "v1").iterdir()}
        here = LocalSource(home / "models")
        resolved = here.resolve("v1")
        plan = yard.plan(PLAN_ID).model_copy(
            update={
                "source_fingerprint": resolved.fingerprint,
                "architecture_digest": read_architecture(here, resolved).digest,
            }
        )
        create_document(self.store, plan_key(PLAN_ID), plan)

    def attempt(self, die_at: int) -> int:
        job = {"settings": self.values, "die_at": die_at, "report": str(self.report)}
        return attempted(self.process, job)

    def events(self) -> int:
        return int(self.report.read_text())

    def moved_to_folder(self) -> int:
        """Return the bytes of the large file that were written to the folder."""
        return sum(map(int, Path(f"{self.report}.written").read_text().split()))

    def check(self) -> bool:
        """Look at what is reachable; tell whether the checkpoint is complete."""
        found = {e.key.removeprefix(f"{PREFIX}/"): e.size for e in self.store.list(PREFIX)}
        for name in found:
            if name != "manifest.json":
                with self.store.open(f"{PREFIX}/{name}") as stream:
                    assert stream.read() == self.content[name], f"{name} is stored wrongly"
        try:
            manifest = read_document(self.store, KEY, CheckpointManifest)
        except NotFound:
            return False
        assert {entry.path for entry in manifest.files} == set(self.content)
        for entry in manifest.files:
            with self.store.open(f"{PREFIX}/{entry.path}") as stream:
                content = pump(stream)
            assert (content.size, content.sha256) == (entry.size, entry.sha256)
        assert manifest.digest == files_digest(manifest.files)
        return True


class Yardmaster:
    """Makes sites of one back end and counts what moved into their stores."""

    def __init__(self, kind: str, tmp_path: Path, source: Path, process: Any, s3: FakeS3) -> None:
        self.kind, self.folder, self.source, self.process, self.s3 = (
            kind,
            tmp_path,
            source,
            process,
            s3,
        )
        self.made = 0

    def new_site(self) -> Site:
        self.made += 1
        settings: dict[str, Any] = {}
        if self.kind == "s3":
            url = f"s3://{self.s3.new_bucket()}/yard"
            settings = {"store": url, "s3_endpoint_url": self.s3.proxy.url, **FAST}
        self.s3.proxy.reset()
        return Site(self.folder / str(self.made), self.source, self.process, settings)

    def moved(self, site: Site) -> int:
        if self.kind == "folder":
            return site.moved_to_folder()
        found = self.s3.proxy.part_bytes
        return sum(size for path, size in found.items() if path.endswith(f"/{WEIGHTS}"))

    @property
    def lost_by_a_kill(self) -> int:
        """Bytes that a kill may cost: one part for each worker (in a folder, and the one that is
        being hashed)."""
        return THREADS * S3_PART_BYTES if self.kind == "s3" else (THREADS + 1) * FOLDER_PART_BYTES


def kill_and_resume(yardmaster: Yardmaster, kills: int) -> None:
    rng = random.Random(SEED)
    site = yardmaster.new_site()
    assert site.attempt(die_at=0) == 0
    assert site.check()
    events = site.events()
    killed = 0
    while killed < kills:
        site = yardmaster.new_site()
        of_this_site = 0
        while (code := site.attempt(rng.randint(1, events) if killed < kills else 0)) != 0:
            assert code == -signal.SIGKILL
            killed += 1
            of_this_site += 1
            site.check()
        assert site.check()
        size = len(site.content[WEIGHTS])
        assert size <= yardmaster.moved(site) <= size + of_this_site * yardmaster.lost_by_a_kill


def test_what_a_bucket_has_is_neither_moved_again_nor_read_back(
    tmp_path: Path, source: Path, attempts: subprocess.Popen[str], s3: FakeS3
) -> None:
    """Killed when all files were there, but not the manifest: the store knows what it holds."""
    yardmaster = Yardmaster("s3", tmp_path, source, attempts, s3)
    site = yardmaster.new_site()
    assert site.attempt(die_at=0) == 0
    site.store.delete(KEY)
    s3.proxy.reset()

    assert site.attempt(die_at=0) == 0
    assert yardmaster.moved(site) == 0
    asked = {r.method for r in s3.proxy.requests if r.path.endswith(f"/{WEIGHTS}")}
    assert asked == {"HEAD"}
    assert site.check()


@pytest.fixture(params=["folder", "s3"])
def yardmaster(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    source: Path,
    attempts: subprocess.Popen[str],
    s3: FakeS3,
) -> Yardmaster:
    return Yardmaster(request.param, tmp_path, source, attempts, s3)


def test_killed_downloads_are_completed(yardmaster: Yardmaster) -> None:
    kill_and_resume(yardmaster, kills=20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_downloads_that_are_killed_very_often_are_completed(yardmaster: Yardmaster) -> None:
    kill_and_resume(yardmaster, kills=200)
