"""The environments file: where releases may go and under which rules."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from trainyard.spec.kubernetes import KubernetesServing, KubernetesSteps
from trainyard.spec.metrics import MetricsSource
from trainyard.spec.model import Capacity, Name, SpecPart
from trainyard.spec.ways import Allowed, Approval, Notify, Permissions, Person
from trainyard.spec.windows import Closure, FreezeWindow, QuietHours, closure_at


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
    concurrent_requests: Literal["refuse", "queue"] = "refuse"
    """What happens to a promotion that is asked for while another rollout is under way: it is
    refused, or it waits for its turn (`queue_timeout_s`). A rollback never waits: it ends a
    promotion under way."""
    queue_timeout_s: float = Field(default=4 * 3600.0, gt=0)
    """Seconds that a promotion waits for its turn before it is refused."""
    proven_only: bool | None = None
    """Must image, instance and lane of a Neuron target be proven (`trainyard doctor neuron`) before
    a release may come here? Empty: yes for the environment named `production`, no elsewhere."""
    freeze: tuple[FreezeWindow, ...] = ()
    """Times in which no promotion begins here, unless it is forced. Rollbacks are never held."""
    quiet_hours: tuple[QuietHours, ...] = ()
    """Hours of the week in which no promotion begins here, unless it is forced."""
    kubernetes: KubernetesServing | None = None
    """Where in the cluster its servers run; only, and always, on platform `kubernetes`."""
    metrics: MetricsSource = MetricsSource()
    """Who reads its servers' counters during a rollout. Empty: each server is asked itself."""
    allowed: Permissions = Permissions()
    """Who may promote to it, roll it back and approve, beside what Airflow's rights say."""
    approval: Approval | None = None
    """Do people have to approve before a release comes here? Empty: no."""
    notify: tuple[Notify, ...] = ()
    """Who is told what happens here, and how."""
    stuck_after_s: float = Field(default=86400.0, ge=600)
    """Seconds after which a promotion that has not ended counts as stuck. The time for an approval
    comes on top."""

    def takes_only_proven(self, name: str) -> bool:
        """Tell whether the environment, which has this name, takes only what was proven."""
        return name == "production" if self.proven_only is None else self.proven_only

    def closure(self, now: datetime) -> Closure | None:
        """Return why and how long promotions are held at `now`; None if they are not."""
        return closure_at(self.freeze, self.quiet_hours, now)


class Environments(SpecPart):
    """All environments, in the order in which releases pass through them."""

    schema_: Literal["trainyard/v1"] = Field(alias="schema")
    """Always `trainyard/v1`."""
    environments: dict[Name, Environment] = Field(min_length=1)
    """The environments by name."""
    steps: KubernetesSteps | None = None
    """Where heavy steps run as pods. Empty: as processes of Airflow's worker."""
    groups: dict[Name, tuple[Person, ...]] = Field(default_factory=dict)
    """Names of users by group, for `allowed`: the same with every auth manager of Airflow."""
    notify: tuple[Notify, ...] = ()
    """Who is told what happens to releases wherever they go, and before they go anywhere."""
    release: Allowed | None = None
    """Who may make releases (`neuron_release`). Empty: whoever Airflow lets start that DAG."""
