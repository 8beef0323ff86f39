"""A checkpoint from the Hub and from S3: complete and checked, or not there at all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.hub_server import HubServer
from tests.unit import yard
from tests.unit.sources.hub_world import REPO, model, settings
from tests.unit.sources.model_files import safetensors

from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.plan import Plan
from trainyard.errors import BadInput, CorruptFile, Transient
from trainyard.sources import retrying
from trainyard.sources.factory import open_source
from trainyard.sources.files import read_architecture
from trainyard.steps.context import StepContext
from trainyard.steps.download import download
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import checkpoint_manifest_key

pytestmark = pytest.mark.integration

SHARDS = {f"model-{n}.safetensors": safetensors({f"t{n}": [300, 400]}, fill=n) for n in range(3)}
FILES = {k: v for k, v in model().items() if k != "model.safetensors"} | SHARDS


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(retrying, "LONGEST_WAIT_S", 0.01)
    with HubServer() as running:
        yield running


class Site:
    """A store, and a plan for the model on the server."""

    def __init__(self, server: HubServer, home: Path, **source: Any) -> None:
        self.settings = settings(server, home=home, catalogue=home)
        self.store = FolderStore(self.settings.store_root)
        self.context = StepContext(self.settings, self.store, yard.Silent(), home / "work")
        self.spec = yard.spec(source={"kind": "huggingface", "repo": REPO, **source})

    def plan(self) -> Plan:
        source = open_source(self.spec.source, base=Path(), settings=self.settings)
        resolved = source.resolve(None)
        return yard.plan("p1", model_spec=self.spec, revision=resolved.revision).model_copy(
            update={
                "source_fingerprint": resolved.fingerprint,
                "architecture_digest": read_architecture(source, resolved).digest,
            }
        )

    def stored(self, commit: str) -> dict[str, bytes]:
        prefix = f"checkpoints/adder/{commit}/"
        return {
            entry.key.removeprefix(prefix): self.store.read(entry.key).data
            for entry in self.store.list(prefix)
        }

    def manifest(self, commit: str) -> CheckpointManifest:
        return read_document(
            self.store, checkpoint_manifest_key("adder", commit), CheckpointManifest
        )


def test_a_checkpoint_is_the_commit(server: HubServer, tmp_path: Path) -> None:
    commit = server.add(REPO, FILES | {"README.md": b"hello", "modeling_x.py": b"x = 1"})
    site = Site(server, tmp_path, allow_files=["modeling_x.py"])
    plan = site.plan()
    server.add(REPO, model(fill=9))  # nobody asked for that one

    download(plan, site.context)

    stored = site.stored(commit)
    del stored["manifest.json"]
    assert stored == FILES | {"modeling_x.py": b"x = 1"}
    manifest = site.manifest(commit)
    assert manifest.allowed_files == ("modeling_x.py",)
    assert manifest.source == f"{server.url}/{REPO}/tree/{commit}"
    assert {entry.path: entry.sha256 for entry in manifest.files} == {
        path: hashlib.sha256(content).hexdigest() for path, content in stored.items()
    }
    assert download(plan, site.context).reused


def test_a_file_that_is_not_its_hash_leaves_nothing_reachable(
    server: HubServer, tmp_path: Path
) -> None:
    commit = server.add(REPO, FILES)
    site = Site(server, tmp_path)
    plan = site.plan()
    shard = SHARDS["model-1.safetensors"]
    server.wrong_bytes["model-1.safetensors"] = shard[:-1] + b"\xff"

    with pytest.raises(CorruptFile, match=r"model-1\.safetensors"):
        download(plan, site.context)

    assert "manifest.json" not in site.stored(commit)
    assert "model-1.safetensors" not in site.stored(commit)
    server.wrong_bytes.clear()
    download(plan, site.context)
    assert site.stored(commit)["model-1.safetensors"] == shard


def test_a_text_file_that_is_not_its_blob_leaves_nothing_reachable(
    server: HubServer, tmp_path: Path
) -> None:
    commit = server.add(REPO, FILES | {"vocab.txt": b"one two"})
    site = Site(server, tmp_path)
    plan = site.plan()
    server.wrong_bytes["vocab.txt"] = b"one wto"

    with pytest.raises(CorruptFile, match=r"vocab\.txt has the git object id"):
        download(plan, site.context)

    assert "manifest.json" not in site.stored(commit)
    assert "vocab.txt" not in site.stored(commit)


def test_a_download_goes_on_where_it_ended(server: HubServer, tmp_path: Path) -> None:
    commit = server.add(REPO, FILES)
    site = Site(server, tmp_path)
    plan = site.plan()
    server.fail("model-0.*Signature", times=99, cut_after=0)
    with pytest.raises(Transient):
        download(plan, site.context)
    assert "manifest.json" not in site.stored(commit)
    server.faults.clear()
    kept = [path for path in SHARDS if path in site.stored(commit)]
    server.seen.clear()

    download(plan, site.context)

    # What has a sha256 on the Hub and is in the store is not fetched again: only headers are.
    whole = [s.path for s in server.requests("Signature") if s.range != "bytes=0-131071"]
    assert not any(path in seen for path in kept for seen in whole)
    assert set(site.stored(commit)) == {*FILES, "manifest.json"}


def test_a_storm_during_the_download_is_weathered(server: HubServer, tmp_path: Path) -> None:
    commit = server.add(REPO, FILES)
    site = Site(server, tmp_path)
    plan = site.plan()
    server.fail("/resolve/", times=2, status=503)
    server.fail("Signature", times=2, cut_after=100_000)
    server.fail("Signature", times=1, status=500)

    download(plan, site.context)

    assert set(site.stored(commit)) == {*FILES, "manifest.json"}


def test_a_commit_that_was_removed_from_the_hub(server: HubServer, tmp_path: Path) -> None:
    server.add(REPO, FILES)
    site = Site(server, tmp_path)
    plan = site.plan()
    server.repos[REPO].commits.clear()

    with pytest.raises(BadInput, match="There is no revision"):
        download(plan, site.context)


def test_two_hundred_models_are_looked_at_with_one_request_each(server: HubServer) -> None:
    for number in range(200):
        server.add(f"yard/model-{number}", model())
    found = settings(server)
    sources = [
        open_source(
            yard.spec(source={"kind": "huggingface", "repo": f"yard/model-{number}"}).source,
            base=Path(),
            settings=found,
        )
        for number in range(200)
    ]
    before = threading.active_count()
    with ThreadPoolExecutor(16) as pool:
        peeked = list(pool.map(lambda source: source.peek(None), sources))

    assert len({revision for revision, _ in peeked}) == 200
    assert len(server.seen) == 200
    assert threading.active_count() <= before + 32
