"""A store with whole releases in it, made without any server, for tests of its care."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch

from tests.unit.yard import Yard, measurement, plan

from trainyard.canonical import digest, short
from trainyard.care.decide import Policy
from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.documents.channel import Channel, Track
from trainyard.documents.measurement import GateVerdict
from trainyard.documents.parity import Reference, ReferenceSettings, Samples, reference_digest
from trainyard.documents.plan import EvalAssets, GateName, Plan
from trainyard.gates.verdict import Derived
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish
from trainyard.store.documents import create_document, substance
from trainyard.store.layout import (
    bundle_manifest_key,
    bundle_prefix,
    channel_key,
    checkpoint_manifest_key,
    checkpoint_prefix,
    evals_prefix,
    reference_key,
    samples_key,
)
from trainyard.store.protocol import Store

POLICY = Policy(
    grace_s=86400.0,
    keep_releases_s=10 * 86400.0,
    keep_plans_s=5 * 86400.0,
    keep_rollouts_s=20 * 86400.0,
    keep_previous=1,
)

AT_ONCE = Policy(
    grace_s=0.0, keep_releases_s=0.0, keep_plans_s=0.0, keep_rollouts_s=0.0, keep_previous=1
)
"""Nothing is kept for its age."""

LATER = timedelta(days=100)


def in_100_days() -> datetime:
    """Return a time at which everything is old that is stored now."""
    return datetime.now(UTC) + LATER


def store_files(store: Store, prefix: str, files: dict[str, bytes]) -> tuple[FileEntry, ...]:
    """Store files below a prefix and return their entries."""
    for name, data in files.items():
        store.upload(f"{prefix}/{name}", io.BytesIO(data))
    return tuple(
        FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in sorted(files.items())
    )


def store_checkpoint(store: Store, revision: str) -> CheckpointManifest:
    """Store a checkpoint of two files, or find it stored."""
    files = {"config.json": b"{}", "model.safetensors": f"weights of {revision}".encode() * 9}
    entries = store_files(store, checkpoint_prefix("adder", revision), files)
    manifest = CheckpointManifest(
        model="adder",
        revision=revision,
        source="file:models",
        files=entries,
        digest=files_digest(entries),
        architecture_digest="architecture",
        parameters=12,
    )
    create_document(store, checkpoint_manifest_key("adder", revision), manifest)
    return manifest


def store_bundle(store: Store, compile_key: str) -> BundleManifest:
    """Store a bundle of two files, or find it stored."""
    files = {"a/graph.bin": compile_key.encode() * 3, "b.bin": b"code"}
    entries = store_files(store, bundle_prefix(compile_key), files)
    manifest = BundleManifest(
        compile_key=compile_key,
        lane="cpu",
        key_inputs={"lane": "cpu"},
        files=entries,
        digest=files_digest(entries),
        toolchain={"vllm": "0.32.0"},
        compile_s=20.0,
    )
    create_document(store, bundle_manifest_key(compile_key), manifest)
    return manifest


def make_plan(revision: str, *, plan_id: str = "", assets: EvalAssets | None = None) -> Plan:
    """Return a plan of its own revision, bundle and measurement."""
    made = plan(plan_id or f"adder-{revision}", revision=revision, measurement_id=f"m-{revision}")
    (target,) = made.targets
    own = target.model_copy(update={"compile_key": digest(["bundle of", revision])})
    return made.model_copy(update={"targets": (own,), "assets": assets})


def store_assets(store: Store, name: str) -> EvalAssets:
    """Store one file of prompts by its digest."""
    data = f'{{"prompt": "{name}"}}\n'.encode()
    listing = [["prompts.jsonl", len(data), hashlib.sha256(data).hexdigest()]]
    assets = EvalAssets(digest=digest(listing), files=("prompts.jsonl",))
    store_files(store, evals_prefix(assets.digest), {"prompts.jsonl": data})
    return assets


def store_samples(store: Store, measurement_id: str) -> str:
    """Store the samples of a measurement and return their key."""
    samples = Samples(measurement_id=measurement_id)
    content = short(hashlib.sha256(substance(samples)).hexdigest())
    create_document(store, samples_key(measurement_id, content), samples)
    return samples_key(measurement_id, content)


def store_reference(store: Store, checkpoint_digest: str) -> None:
    """Store a parity reference of a checkpoint."""
    settings = ReferenceSettings(
        dtype="float32", served_dtype="bfloat16", prompts_digest="prompts", max_tokens=8
    )
    reference = Reference(checkpoint_digest=checkpoint_digest, settings=settings, answers=())
    key = reference_key(checkpoint_digest, reference_digest(settings))
    create_document(store, key, reference)


def release(yard: Yard, revision: str) -> str:
    """Take a revision through all steps and return the id of its release."""
    made = make_plan(revision, assets=store_assets(yard.store, revision))
    create_document(yard.store, f"plans/{made.plan_id}.json", made)
    checkpoint = store_checkpoint(yard.store, revision)
    compile_key = made.targets[0].compile_key
    store_bundle(yard.store, compile_key)
    yard.keep(
        measurement(
            f"m-{revision}",
            revision=revision,
            checkpoint_digest=checkpoint.digest,
            compile_key=compile_key,
            samples=store_samples(yard.store, f"m-{revision}"),
        )
    )
    store_reference(yard.store, checkpoint.digest)
    with quick_gates():
        for name in ("accuracy", "latency"):
            gate(made, "cpu", name, yard.context)
        return str(publish(made, "cpu", yard.context).detail["release_id"])


@contextmanager
def quick_gates() -> Iterator[None]:
    """Let every gate say pass at once, without asking Great Expectations."""

    def pass_(
        gate: GateName, gates: Any, *, plan_id: str, target: str, measurement: Any, **others: Any
    ) -> Derived:
        verdict = GateVerdict(
            gate=gate,
            plan_id=plan_id,
            target=target,
            measurement_id=measurement.measurement_id,
            outcome="pass",
            checks=(),
            summary="It passes.",
        )
        return Derived(verdict, {})

    with patch("trainyard.steps.gate.derive_verdict", pass_):
        yield


def serve(yard: Yard, stable: str, *previous: str, environment: str = "staging") -> Channel:
    """Write a channel that serves a release, and remembers earlier ones."""
    now = datetime.now(UTC)
    channel = Channel(
        model="adder",
        environment=environment,
        generation=1,
        stable=Track(release_id=stable, since=now),
        previous=tuple(Track(release_id=each, since=now) for each in previous),
    )
    yard.store.put(channel_key("adder", environment), channel.to_bytes())
    return channel


def keys(store: Store, prefix: str = "") -> set[str]:
    """Return all keys but those of locks."""
    return {entry.key for entry in store.list(prefix) if not entry.key.startswith("locks/")}
