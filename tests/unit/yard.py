"""Makes what gates, publication and reports start from: a plan and all that its steps stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

from trainyard.canonical import digest
from trainyard.documents.artifacts import BundleManifest, CheckpointManifest
from trainyard.documents.base import FileEntry
from trainyard.documents.behaviour import Behaviour, BehaviourCase, BehaviourRecord, Capability
from trainyard.documents.measurement import LevelFigures, Measurement, StartFigures, TaskScore
from trainyard.documents.plan import Plan, PlannedTarget, ReleaseRequest
from trainyard.settings import Settings
from trainyard.spec.model import BehaviourName, ModelSpec
from trainyard.steps.context import StepContext
from trainyard.store.documents import create_document
from trainyard.store.factory import open_store
from trainyard.store.folder import FolderStore
from trainyard.store.layout import (
    bundle_manifest_key,
    checkpoint_manifest_key,
    measurement_key,
    plan_key,
)
from trainyard.store.s3 import S3Store

MOMENT = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)

SPEC: dict[str, Any] = {
    "schema": "trainyard/v1",
    "model": "adder",
    "owner": "yard crew",
    "source": {"kind": "local", "path": "models"},
    "targets": [{"name": "cpu", "lane": "cpu"}],
    "gates": {
        "accuracy": {"tasks": [{"name": "sums", "min": 0.9, "max_drop": 0.02}]},
        "latency": {
            "levels": [
                {
                    "name": "busy",
                    "max_concurrency": 8,
                    "num_prompts": 64,
                    "input_len": 16,
                    "output_len": 8,
                    "bounds": {
                        "ttft_p99_ms": {"max": 400},
                        "output_tokens_per_s": {"min": 50, "severity": "warning"},
                        "failed_requests": {"max": 0},
                    },
                    "max_regression": {"ttft_p99_ms": 0.2, "output_tokens_per_s": 0.2},
                }
            ]
        },
    },
}

FIGURES = {"ttft_p99_ms": 210.0, "output_tokens_per_s": 80.0, "failed_requests": 0.0}

COMPILE_KEY = digest("compile key")
SERVING = {"max_num_seqs": 16, "served_model_name": "adder"}


def spec(**changes: Any) -> ModelSpec:
    """Return the spec with some top-level keys changed."""
    return ModelSpec.model_validate({**SPEC, **changes})


def spec_with_tasks(tasks: list[dict[str, Any]]) -> ModelSpec:
    """Return the spec with these accuracy tasks and no other check of accuracy."""
    return spec(gates={**SPEC["gates"], "accuracy": {"tasks": tasks}})


def case(outcome: Literal["held", "broken", "unclear"] = "held") -> BehaviourCase:
    """Return a case of a behaviour check."""
    return BehaviourCase(outcome=outcome, sent="a prompt", came="641", expected="640")


def behaviour(
    cases: Mapping[BehaviourName, tuple[BehaviourCase, ...]] | None = None,
    capabilities: Mapping[BehaviourName, Capability] | None = None,
) -> Behaviour:
    """Return a record of all checks, each of which held unless it has other cases."""
    return Behaviour(
        near_tie=0.5,
        records=tuple(
            BehaviourRecord(
                name=name,
                capability=(capabilities or {}).get(name, Capability()),
                cases=(cases or {}).get(name, (case(),)),
            )
            for name in get_args(BehaviourName)
        ),
        duration_s=4.5,
    )


def measurement(
    measurement_id: str = "candidate",
    *,
    score: float = 0.97,
    figures: Mapping[str, float] = FIGURES,
    completed: int = 64,
    checkpoint_digest: str = digest("checkpoint"),
    **changes: Any,
) -> Measurement:
    """Return a measurement that passes every gate of `SPEC` unless it is changed."""
    values: dict[str, Any] = {
        "created_at": MOMENT,
        "measurement_id": measurement_id,
        "model": "adder",
        "revision": "v1",
        "checkpoint_digest": checkpoint_digest,
        "compile_key": COMPILE_KEY,
        "serving_digest": digest(SERVING),
        "target": "cpu",
        "lane": "cpu",
        "start": StartFigures(ready_s=12.5, engine_init_s=4.25, new_cache_files=()),
        "accuracy": (
            TaskScore(name="sums", metric="exact_match", score=score, stderr=0.01, samples=200),
        ),
        "latency": (
            LevelFigures(name="busy", figures=dict(figures), duration_s=9.0, completed=completed),
        ),
        "behaviour": behaviour(),
        "machine": {"processor": "Test CPU", "cores": 2},
        "toolchain": {"vllm": "0.32.0"},
    }
    return Measurement(**{**values, **changes})


def plan(
    plan_id: str = "adder-plan",
    *,
    model_spec: ModelSpec | None = None,
    environments: tuple[str, ...] = (),
    baselines: Mapping[str, str] | None = None,
    revision: str = "v1",
    measurement_id: str = "candidate",
) -> Plan:
    """Return a plan for the one target of the spec."""
    model_spec = model_spec or spec()
    return Plan(
        created_at=MOMENT,
        plan_id=plan_id,
        request=ReleaseRequest(model="adder", environments=environments),
        spec=model_spec,
        spec_digest=digest(model_spec.model_dump(mode="json", by_alias=True)),
        revision=revision,
        source_fingerprint="listing",
        checkpoint_key=checkpoint_manifest_key("adder", revision),
        architecture_digest="architecture",
        targets=(
            PlannedTarget(
                target=model_spec.targets[0],
                compile_key=COMPILE_KEY,
                key_inputs={"lane": "cpu"},
                toolchain={"vllm": "0.32.0"},
                serving=SERVING,
                serving_digest=digest(SERVING),
                measurement_id=measurement_id,
                baselines=dict(baselines or {}),
            ),
        ),
        steps=(),
    )


class Silent:
    """Progress that is kept and not shown."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def fraction(self, done: float, message: str = "") -> None:
        self.said.append(message)


@dataclass(frozen=True)
class Yard:
    """A store with everything that a gate and a publication read."""

    home: Path
    place: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a store in a bucket; without any it is in a folder of the home."""
    settings: Settings = field(init=False)
    store: FolderStore = field(init=False)
    context: StepContext = field(init=False)

    def __post_init__(self) -> None:
        settings = Settings(home=self.home, **self.place)
        # Most tests have it in a folder, and look into that.
        store = cast(FolderStore, open_store(settings))
        context = StepContext(settings, store, Silent(), self.home / "work")
        for name, value in (("settings", settings), ("store", store), ("context", context)):
            object.__setattr__(self, name, value)

    def use_client(self, client: Any) -> None:
        """Speak to the bucket through a client that is there already: making one takes long."""
        bucket = cast(S3Store, self.store)._bucket
        bucket._client, bucket._quick = client, None

    def keep(self, *measurements: Measurement) -> None:
        """Store measurements."""
        for each in measurements:
            create_document(self.store, measurement_key(each.measurement_id), each)

    def keep_plan(self, made: Plan) -> Plan:
        """Store a plan and return it."""
        create_document(self.store, plan_key(made.plan_id), made)
        return made

    def keep_artifacts(
        self,
        *,
        revision: str = "v1",
        checkpoint_digest: str = digest("checkpoint"),
        bundle_digest: str = digest("bundle"),
    ) -> None:
        """Store the manifests of a checkpoint and of the bundle."""
        files = (FileEntry(path="model.safetensors", size=8, sha256=digest("file")),)
        create_document(
            self.store,
            checkpoint_manifest_key("adder", revision),
            CheckpointManifest(
                model="adder",
                revision=revision,
                source="file:models",
                files=files,
                digest=checkpoint_digest,
                architecture_digest="architecture",
                parameters=12,
            ),
        )
        create_document(
            self.store,
            bundle_manifest_key(COMPILE_KEY),
            BundleManifest(
                compile_key=COMPILE_KEY,
                lane="cpu",
                key_inputs={"lane": "cpu"},
                files=files,
                digest=bundle_digest,
                toolchain={"vllm": "0.32.0"},
                compile_s=20.0,
            ),
        )
