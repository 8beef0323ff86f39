"""Everything that reads and writes documents does so in a bucket as in a folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tests.fake_s3 import ENVIRONMENT, FakeS3, fake_s3
from tests.serving_world import ENVIRONMENT as PRODUCTION
from tests.serving_world import MODEL, make_channel
from tests.unit.sources.model_files import write_model
from tests.unit.yard import COMPILE_KEY, Yard, measurement, plan, spec

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest
from trainyard.documents.base import FileEntry
from trainyard.documents.channel import Channel
from trainyard.errors import Busy
from trainyard.materialize import materialize_files
from trainyard.releases import load_release, published_by_plan
from trainyard.serving.guard_loop import ChannelReader
from trainyard.sources.files import read_architecture
from trainyard.sources.local import LocalSource
from trainyard.steps.context import StepContext
from trainyard.steps.download import download
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish
from trainyard.steps.runner import run_step
from trainyard.steps.status import read_status
from trainyard.store.documents import create_document, read_document, update_document
from trainyard.store.layout import (
    bundle_manifest_key,
    channel_key,
    checkpoint_prefix,
)
from trainyard.store.locks import HeldElsewhere, acquire_lock
from trainyard.store.s3 import S3Store

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server() -> Iterator[FakeS3]:
    with fake_s3() as running:
        yield running


@pytest.fixture
def s3(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server.proxy.reset()
    return server


@pytest.fixture
def yard(s3: FakeS3, tmp_path: Path) -> Yard:
    """A yard whose store is a bucket that nobody has probed yet."""
    yard = Yard(tmp_path)
    store = s3.store(tmp_path, probed=False)
    settings = yard.settings.model_copy(update={"store": store.url, "catalogue": tmp_path})
    context = StepContext(settings, store, yard.context.progress, yard.context.work_dir)
    for name, value in (("settings", settings), ("store", store), ("context", context)):
        object.__setattr__(yard, name, value)
    return yard


def test_a_release_from_its_source_to_its_publication(yard: Yard, tmp_path: Path) -> None:
    model = write_model(tmp_path / "models" / "v1")
    source = LocalSource(tmp_path / "models")
    resolved = source.resolve("v1")
    asked = yard.keep_plan(
        plan(model_spec=spec()).model_copy(
            update={
                "source_fingerprint": resolved.fingerprint,
                "architecture_digest": read_architecture(source, resolved).digest,
            }
        )
    )

    def step(name: str, body: object) -> None:
        lines = Console(quiet=True)
        code = run_step(
            name,
            plan_id=asked.plan_id,
            target="" if name == "download" else "cpu",
            body=body,  # type: ignore[arg-type]
            settings=yard.settings,
            store=yard.store,
            console=lines,
        )
        found = read_status(yard.store, asked.plan_id, name, "" if name == "download" else "cpu")
        assert found is not None
        assert (code, found.state) == (0, "done"), found.reason

    step("download", lambda context: download(asked, context))
    checkpoint = read_document(yard.store, asked.checkpoint_key, CheckpointManifest)
    create_document(
        yard.store,
        bundle_manifest_key(COMPILE_KEY),
        BundleManifest(
            compile_key=COMPILE_KEY,
            lane="cpu",
            key_inputs={"lane": "cpu"},
            files=(FileEntry(path="graph", size=1, sha256="0" * 64),),
            digest="bundle",
            toolchain={"vllm": "0.32.0"},
            compile_s=20.0,
        ),
    )
    yard.keep(measurement(checkpoint_digest=checkpoint.digest))
    step("accuracy-gate", lambda context: gate(asked, "cpu", "accuracy", context))
    step("latency-gate", lambda context: gate(asked, "cpu", "latency", context))
    step("publish", lambda context: publish(asked, "cpu", context))

    published = published_by_plan(yard.store, asked, yard.settings)
    release = load_release(yard.store, "adder", published["cpu"], yard.settings)
    assert release.checkpoint_digest == checkpoint.digest
    restored = materialize_files(
        yard.store,
        checkpoint_prefix("adder", "v1"),
        checkpoint.files,
        tmp_path / "restored",
        link=True,
    )
    assert {path.name: path.read_bytes() for path in restored.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


def test_a_step_lock_is_held_by_one(yard: Yard) -> None:
    with acquire_lock(yard.store, "x", work="one", duration_s=30, wait_s=0) as lock:
        with pytest.raises(HeldElsewhere):
            acquire_lock(yard.store, "x", work="two", duration_s=30, wait_s=0)
        lock.ensure_held()
    with acquire_lock(yard.store, "x", work="two", duration_s=30, wait_s=0) as lock:
        assert lock.epoch == 2


def test_a_step_lock_that_was_taken_over_is_noticed(yard: Yard) -> None:
    lost = threading.Event()
    lock = acquire_lock(yard.store, "x", work="one", duration_s=0.3, wait_s=0, on_lost=lost.set)
    yard.store.delete("locks/x.json")
    with acquire_lock(yard.store, "x", work="two", duration_s=30, wait_s=0):
        assert lost.wait(60)
        with pytest.raises(Busy):
            lock.ensure_held()
    lock.release()


def test_the_guard_reads_only_channels_that_changed(yard: Yard, s3: FakeS3) -> None:
    key = channel_key(MODEL, PRODUCTION)
    create_document(yard.store, key, make_channel(weight=0, phase=None))
    reader = ChannelReader(yard.store)
    assert [channel.generation for channel in reader.channels()] == [1]
    s3.proxy.reset()
    reader.channels()
    assert [request.query.get("list-type") for request in s3.proxy.requests] == ["2"]
    update_document(
        yard.store, key, Channel, lambda c: c.model_copy(update={"generation": c.generation + 1})
    )
    assert [channel.generation for channel in reader.channels()] == [2]


def test_two_processes_share_a_store(yard: Yard) -> None:
    assert isinstance(yard.store, S3Store)
    yard.store.create("a", b"one")
    other = S3Store(yard.store._bucket.settings)
    assert other.read("a") == yard.store.read("a")
