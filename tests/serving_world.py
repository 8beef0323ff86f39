"""What tests of serving start from: channels, releases that can really be materialised, servers."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tests.unit.yard import SPEC

from trainyard.canonical import digest
from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.channel import (
    Channel,
    Phase,
    Rollout,
    RolloutDriver,
    RolloutPlan,
    Track,
    Weights,
)
from trainyard.documents.evidence import JudgeSpec, default_metrics
from trainyard.documents.release import Release
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.protocol import ServerCommand, StartProof
from trainyard.releases import release_id_of, store_release
from trainyard.serving.process import ServerProcess
from trainyard.serving.records import (
    ObservedServer,
    ServingPaths,
    choose_port,
    server_name,
    write_record,
)
from trainyard.settings import Settings
from trainyard.signing.keys import signing_key
from trainyard.spec.model import ModelSpec
from trainyard.store.documents import create_document
from trainyard.store.layout import (
    bundle_manifest_key,
    bundle_prefix,
    channel_key,
    checkpoint_manifest_key,
    checkpoint_prefix,
    release_key,
)
from trainyard.store.protocol import Store

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
MODEL = "adder"
ENVIRONMENT = "staging"
FAKE_VLLM = Path(__file__).with_name("fake_vllm.py")
PATIENCE_S = 120.0
"""Seconds to wait for what must happen, and for an answer: a machine may be busy."""

T = TypeVar("T")


def some_id(name: str, model: str = MODEL) -> str:
    """Return a valid release id for a short name."""
    return f"{model}-{digest(name)[:12]}"


OLD, NEW = some_id("old"), some_id("new")


def make_channel(
    *,
    stable: str | None = OLD,
    candidate: str | None = NEW,
    weight: int = 10,
    phase: Phase | None = "shifting",
    number: int = 1,
    ended: bool = False,
    stable_replicas: int = 1,
    generation: int = 1,
    model: str = MODEL,
    environment: str = ENVIRONMENT,
) -> Channel:
    """Return a channel in the middle of a rollout, or without one (`phase=None`)."""
    rollout = None
    if phase is not None:
        plan = RolloutPlan(
            kind="canary" if stable else "bootstrap",
            capacity="surge",
            replicas=1,
            stable_replicas=stable_replicas if stable else 0,
            steps=(),
            bake_s=10,
            holdback_weight=10,
            max_duration_s=600,
            on_undecided="hold",
            max_hold_s=600,
            warm_up_requests=0,
            deploy_timeout_s=60,
            drain_timeout_s=10,
            lease_s=120,
            judge=JudgeSpec(metrics=default_metrics(), max_duration_s=600),
        )
        rollout = Rollout(
            number=number,
            release_id=candidate or "",
            phase=phase,
            plan=plan,
            driver=RolloutDriver(run_id="run", attempt=1, epoch=1),
            started_at=NOW,
            phase_since=NOW,
            outcome="promoted" if ended else None,
        )
    return Channel(
        model=model,
        environment=environment,
        generation=generation,
        stable=Track(release_id=stable, since=NOW) if stable else None,
        candidate=Track(release_id=candidate, since=NOW) if candidate else None,
        weights=Weights(stable=100 - weight, candidate=weight),
        rollout=rollout,
    )


def put_channel(store: Store, channel: Channel) -> None:
    """Store a channel, whatever was there."""
    store.put(channel_key(channel.model, channel.environment), channel.to_bytes())


def make_release(
    settings: Settings,
    store: Store,
    revision: str = "v1",
    *,
    signed: bool = True,
    **changes: Any,
) -> Release:
    """Publish a release whose checkpoint and bundle can be restored; `changes` are of its spec."""
    spec = ModelSpec.model_validate({**SPEC, **changes})
    compile_key, serving = digest("code"), {"max_num_seqs": 16}
    weights = store.upload(
        f"{checkpoint_prefix(MODEL, revision)}/weights", io.BytesIO(revision.encode() * 9)
    )
    code = store.upload(f"{bundle_prefix(compile_key)}/code.so", io.BytesIO(b"code"))
    weights = weights.model_copy(update={"path": "weights"})
    code = code.model_copy(update={"path": "code.so"})
    checkpoint = CheckpointManifest(
        model=MODEL,
        revision=revision,
        source="file:models",
        files=(weights,),
        digest=files_digest([weights]),
        architecture_digest="architecture",
        parameters=100,
    )
    bundle = BundleManifest(
        compile_key=compile_key,
        lane="cpu",
        key_inputs={},
        files=(code,),
        digest=files_digest([code]),
        toolchain={},
        compile_s=1.0,
    )
    create_document(store, checkpoint_manifest_key(MODEL, revision), checkpoint)
    create_document(store, bundle_manifest_key(compile_key), bundle)
    serving_digest = digest([serving, revision])
    release = Release(
        created_at=NOW,
        release_id=release_id_of(
            MODEL,
            checkpoint_digest=checkpoint.digest,
            compile_key=compile_key,
            serving_digest=serving_digest,
        ),
        model=MODEL,
        target=spec.targets[0],
        lane="cpu",
        checkpoint_key=checkpoint_manifest_key(MODEL, revision),
        checkpoint_digest=checkpoint.digest,
        revision=revision,
        compile_key=compile_key,
        bundle_digest=bundle.digest,
        serving=serving,
        serving_digest=serving_digest,
        served_model_name=MODEL,
        toolchain={},
        measurement_id="measurement",
        spec=spec,
    )
    if signed:
        return store_release(store, release, signing_key(settings))[0]
    store.create(release_key(MODEL, release.release_id), release.to_bytes())
    return release


class FakeLane(CpuLane):
    """Starts the fake server with `arguments`; its start counts as cached if no file is new."""

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self.arguments = list(arguments)

    def command(self, target: Any, *, cache_dir: Path, port: int, **others: Any) -> ServerCommand:
        argv = (sys.executable, str(FAKE_VLLM), f"--port={port}", *self.arguments)
        return ServerCommand(argv, {"FAKE": "1"})

    def snapshot(self, cache_dir: Path) -> frozenset[str]:
        return frozenset(path.name for path in cache_dir.iterdir())

    def prove_start(
        self,
        *,
        log: str,
        before: frozenset[str],
        after: frozenset[str],
        bundle: BundleManifest | None,
    ) -> StartProof:
        assert "starts" in log
        assert bundle is not None
        made = tuple(sorted(after - before))
        reason = f"New files: {', '.join(made)}." if made else "No file is new."
        return StartProof(not made, reason, None, made)


@dataclass(frozen=True)
class FakeServer:
    """A running fake server with its record."""

    process: ServerProcess
    record: ObservedServer

    @property
    def url(self) -> str:
        return self.record.url


def start_fake(
    settings: Settings, release_id: str, index: int = 0, *, model: str = MODEL
) -> FakeServer:
    """Start a fake server on record as ready; the caller stops it."""
    paths = ServingPaths.of(settings)
    port, name = choose_port(), server_name(release_id, index)
    process = ServerProcess.start(
        (sys.executable, str(FAKE_VLLM), f"--port={port}", f"--name={name}"),
        {},
        port=port,
        log_path=paths.server_log(ENVIRONMENT, name),
    )
    process.wait_healthy(PATIENCE_S)
    record = observed(release_id, index, process=process, model=model)
    write_record(paths.observed(ENVIRONMENT, name), record)
    return FakeServer(process, record)


def observed(
    release_id: str,
    index: int = 0,
    *,
    process: ServerProcess | None = None,
    model: str = MODEL,
    **changes: Any,
) -> ObservedServer:
    """Return the record of a ready server."""
    values: dict[str, Any] = {
        "name": server_name(release_id, index),
        "environment": ENVIRONMENT,
        "model": model,
        "release_id": release_id,
        "state": "ready",
    }
    if process is not None:
        identity = process.identity
        values |= {
            "pid": identity.pid,
            "process_started": identity.started_at,
            "port": identity.port,
            "log_path": identity.log_path,
            "started_at": datetime.fromtimestamp(identity.started_at, tz=UTC),
        }
    return ObservedServer(**{**values, **changes})


def eventually(what: Callable[[], T | None], *, timeout_s: float = PATIENCE_S, why: str = "") -> T:
    """Return what `what` returns once that is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {why or what}"
        time.sleep(0.05)


def environment_of(settings: Settings) -> Mapping[str, str]:
    """Return the variables with which a process of ours uses the same home."""
    return {"TRAINYARD_HOME": str(settings.home), "TRAINYARD_GUARD_INTERVAL_S": "0.1"}
