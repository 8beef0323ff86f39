"""The environments file: where releases may go and under which rules."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainyard.spec.kubernetes import KubernetesServing, KubernetesSteps
from trainyard.spec.metrics import MetricsSource
from trainyard.spec.model import Capacity, Name, SpecPart


class Environment(SpecPart):
    """One place that serves models: its own channel per model and its own promote DAG."""

    description: str = ""
    """What it is for, for people."""
    platform: Literal["local", "kubernetes"] = "local"
    """Where its servers run: processes on this machine, or pods."""
    target: Name
    """Which of a model's targets this environment serves."""
    requires: tuple[Name, ...] = ()
    """Environments in which a release must have been promoted before it may come here."""
    soak_s: float = Field(default=0.0, ge=0)
    """Seconds a release must have been stable in each required environment."""
    devices: int = Field(default=2, ge=1)
    """Servers that may run at the same time."""
    capacity: Capacity = "surge"
    """The most generous capacity rule this environment can give."""
    allow_downtime: bool = False
    """May `capacity: single` stop the stable release while the candidate starts?"""
    lease_s: float = Field(default=120.0, ge=120.0)
    """Seconds after which a rollout without a living driver loses its traffic."""
    rollback_window_s: float = Field(default=0.0, ge=0)
    """Seconds after a promotion during which the old servers stay warm."""
    proven_only: bool | None = None
    """Must image, instance and lane of a Neuron target be proven (`trainyard doctor neuron`) before
    a release may come here? Empty: yes for the environment named `production`, no elsewhere."""
    kubernetes: KubernetesServing | None = None
    """Where in the cluster its servers run; only, and always, on platform `kubernetes`."""
    metrics: MetricsSource = MetricsSource()
    """Who reads its servers' counters during a rollout. Empty: each server is asked itself."""

    def takes_only_proven(self, name: str) -> bool:
        """Tell whether the environment, which has this name, takes only what was proven."""
        return name == "production" if self.proven_only is None else self.proven_only


class Environments(SpecPart):
    """All environments, in the order in which releases pass through them."""

    schema_: Literal["trainyard/v1"] = Field(alias="schema")
    """Always `trainyard/v1`."""
    environments: dict[Name, Environment] = Field(min_length=1)
    """The environments by name."""
    steps: KubernetesSteps | None = None
    """Where heavy steps run as pods. Empty: as processes of Airflow's worker."""
