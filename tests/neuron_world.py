"""A catalogue with one Neuron target, a store, and a serving environment of fakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from tests.fake_neuron_server import FakeServing
from tests.unit.lanes.neuron_targets import NATIVE, NXDI, TOOLCHAINS
from tests.unit.sources.model_files import CONFIG, write_model
from tests.unit.yard import SPEC, Silent

from trainyard.documents.plan import Plan, PlannedTarget, ReleaseRequest
from trainyard.settings import Settings
from trainyard.spec.model import BehaviourName, ModelSpec
from trainyard.steps.compile import compile_bundle
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.download import download
from trainyard.steps.measure import measure
from trainyard.steps.plan import plan as make_plan
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore

MODEL_CONFIG = {
    **CONFIG,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
TARGETS: Mapping[str, dict[str, Any]] = {
    "neuron-native": {
        **NATIVE,
        "neuron": {"sdk": "2.32.0", "num_gpu_blocks": 256},
        "native": {
            "neuron_config": {
                "num_batched_tokens_buckets": [512, 2048],
                "num_seqs_buckets": [1, 8],
            }
        },
    },
    "neuron-nxdi": {
        **NXDI,
        "neuron": {"sdk": "2.28.1", "num_gpu_blocks": 512},
    },
}


WAIVED = {
    name: {"severity": "skip", "reason": "The fake server computes no answers."}
    for name in get_args(BehaviourName)
}


@dataclass
class NeuronWorld:
    """Everything that a release of one target needs, in one folder."""

    root: Path
    lane: str = "neuron-native"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the target that differ."""

    def __post_init__(self) -> None:
        """Write model, spec and serving environment."""
        target = {**TARGETS[self.lane], **self.changes}
        catalogue = self.root / "dags" / "models"
        catalogue.mkdir(parents=True)
        spec = {**SPEC, "targets": [target]}
        spec["source"] = {"kind": "local", "path": str(self.root / "source")}
        spec["gates"] = {**SPEC["gates"], "behaviour": {"waivers": WAIVED}}
        spec = ModelSpec.model_validate(spec).model_dump(mode="json", by_alias=True)
        (catalogue / "adder.yaml").write_text(yaml.safe_dump(spec))
        (self.root / "dags" / "environments.yaml").write_text(
            yaml.safe_dump(
                {
                    "schema": "trainyard/v1",
                    "environments": {
                        name: {"target": target["name"]} for name in ("staging", "production")
                    },
                }
            )
        )
        write_model(self.root / "source" / "r1", config=MODEL_CONFIG)
        self.serving = FakeServing.make(self.root / "image", TOOLCHAINS[self.lane])
        self.target = str(target["name"])
        self.settings = Settings(
            home=self.root / "home",
            catalogue=catalogue,
            environments=self.root / "dags" / "environments.yaml",
            serve_python=self.serving.python,
            requested_by="somebody",
        )
        self.store = FolderStore(self.settings.store_root)

    def context(self, name: str) -> StepContext:
        """Return the surroundings of one run of a step, with a scratch folder of that name."""
        folder = self.root / "work" / name
        folder.mkdir(parents=True, exist_ok=True)
        return StepContext(self.settings, self.store, Silent(), folder)

    def plan(self, **request: Any) -> Plan:
        """Plan a release."""
        wanted = ReleaseRequest(model="adder", **request)
        key = make_plan(wanted, self.context("plan")).key
        return read_document(self.store, key, Plan)

    def stored(self) -> Plan:
        """Plan a release and download its checkpoint."""
        made = self.plan()
        download(made, self.context("download"))
        return made

    def compile(self, plan: Plan, context: StepContext | None = None) -> StepResult:
        """Compile."""
        return compile_bundle(plan, self.target, context or self.context("compile"))

    def measure(self, plan: Plan, context: StepContext | None = None) -> StepResult:
        """Measure."""
        return measure(plan, self.target, context or self.context("measure"))

    def planned(self, plan: Plan) -> PlannedTarget:
        """Return the one target of a plan."""
        return plan.target(self.target)


def said(context: StepContext) -> str:
    """Return all that a step reported."""
    progress = context.progress
    assert isinstance(progress, Silent)
    return "\n".join(progress.said)
