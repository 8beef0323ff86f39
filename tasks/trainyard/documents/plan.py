"""The plan: the frozen answer to "what would this release do"."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from trainyard.canonical import digest, short
from trainyard.documents.base import Document, Frozen
from trainyard.documents.forecast import RolloutForecast
from trainyard.spec.model import ModelSpec, Target


def plan_id_of_run(model: str, dag_id: str, run_id: str) -> str:
    """Return the id of the plan that an Airflow run makes; the same for every retry of the run."""
    return f"{model}-{short(digest([dag_id, run_id]))}"


StepName = Literal["download", "tasks", "compile", "measure", "logits", "gate", "publish"]
GateName = Literal["accuracy", "latency"]


class ReleaseRequest(Frozen):
    """What somebody asked for."""

    model: str
    revision: str | None = None
    """Empty: the spec's."""
    targets: tuple[str, ...] = ()
    """Names of targets; empty: all of the spec."""
    environments: tuple[str, ...] = ()
    """Where the release is to be promoted afterwards, in this order."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Settings of a target that this release changes, for example `{"max_num_seqs": 4}`."""
    accept_unproven: bool = False
    """Go on although nobody has proven the image, instance and lane of a target on a device."""


class PlannedStep(Frozen):
    """One step for one target (or for all: `target` is empty)."""

    step: StepName
    target: str = ""
    key: str
    """Key of the document that the step makes."""
    exists: bool
    reason: str
    """Why it will run, or why it need not, in one sentence."""


class EvalAssets(Frozen):
    """A folder of task or prompt files, stored by digest under `evals/<digest>/`."""

    digest: str
    files: tuple[str, ...]


class Price(Frozen):
    """What an hour of an instance costs."""

    instance: str
    usd_per_hour: float
    source: str
    """Who says so and of when, in words."""


class PlannedTarget(Frozen):
    """One target with everything that identifies its outputs."""

    target: Target
    """With the overrides applied."""
    compile_key: str
    key_inputs: dict[str, Any]
    toolchain: dict[str, str]
    serving: dict[str, Any]
    """Serving arguments that are not in the compile key, plus the served model name."""
    serving_digest: str
    measurement_id: str
    baselines: dict[str, str] = Field(default_factory=dict)
    """For each environment asked for: the measurement id of its stable release, if it has one."""
    machine: dict[str, Any] = Field(default_factory=dict)
    """The kind of machine and the driver that it is measured on, as far as the plan can know them
    (`trainyard.documents.measurement.machine_kind`)."""
    price: Price | None = None
    """Of the target's instance; None: nobody said."""
    incomparable: dict[str, str] = Field(default_factory=dict)
    """For each environment asked for whose stable release was never measured: why."""
    warnings: tuple[str, ...] = ()
    """What the lane lets pass but wants people to know."""


class Plan(Document):
    """`plans/<plan id>.json`."""

    plan_id: str
    request: ReleaseRequest
    spec: ModelSpec
    spec_digest: str
    revision: str
    source_fingerprint: str
    """Digest of the source's listing at planning time; download checks that it still holds."""
    checkpoint_key: str
    checkpoint_bytes: int = 0
    """Size of the checkpoint's files; 0: a plan of an earlier version, which did not say."""
    reference_gib: float = 0.0
    """Memory in GiB that the reference of the parity check takes on the machine that measures; 0:
    none is made there, or a plan of an earlier version, which did not say."""
    golden_gib: float = 0.0
    """Memory in GiB that the goldens of AWS's logit validation take; 0: it is not made."""
    architecture_digest: str
    assets: EvalAssets | None = None
    """Task files and prompts of the spec, frozen with the plan."""
    targets: tuple[PlannedTarget, ...]
    steps: tuple[PlannedStep, ...]
    rollouts: tuple[RolloutForecast, ...] = ()
    """What the way into each environment asked for will take, in their order."""

    def gib_beside(self, step: str) -> float:
        """Return the memory in GiB that a step needs for the reference that it compares with."""
        return self.golden_gib if step == "logits" else self.reference_gib

    def target(self, name: str) -> PlannedTarget:
        """Return the planned target of that name; KeyError if there is none."""
        for planned in self.targets:
            if planned.target.name == name:
                return planned
        raise KeyError(name)
