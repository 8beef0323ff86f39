"""The channel: the mutable document for one model in one environment.

Every change is a compare-and-swap of `channels/<model>/<environment>.json`. Whoever routes traffic
reads `weights`, `stable` and `candidate`; only the rollout's shell writes it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field, model_validator

from trainyard.documents.base import Document, Frozen
from trainyard.documents.evidence import Comparing, JudgeSpec, Verdict
from trainyard.documents.measurement import Envelope
from trainyard.spec.model import Capacity, Probes, RolloutStep

Phase = Literal[
    "idle", "deploying", "warming", "scaling", "shifting", "holding", "baking", "rolling_back"
]
Outcome = Literal["promoted", "rolled_back", "withdrawn"]
"""`promoted`: the rollout's release is stable now (for a rollback: the earlier release is back).
`rolled_back`: harm or a fuse, the release is rejected. `withdrawn`: ended without a verdict
against the release (controller lost, aborted, undecided); it may be promoted again."""

EXPOSED_PHASES: frozenset[Phase] = frozenset({"shifting", "holding", "baking"})
"""The only phases in which a candidate may have traffic."""

BeyondKind = Literal["prompts", "concurrency", "rate"]
"""Ways in which live traffic can be beyond what a release was measured with."""

PAUSE_LIMIT = 20
"""Pauses of one rollout."""

WAITING_LIMIT = 20
"""Requests that may wait for a channel at the same time."""

HISTORY_LIMIT = 200
"""Entries of a channel's history that are kept."""

UNSETTLED_LIMIT = 20
"""Ended rollouts that a channel remembers for their runs."""


class Track(Frozen):
    """A release in a role."""

    release_id: str
    since: datetime
    verified: bool = True
    """False for releases that were adopted without Trainyard's gates."""
    warm_until: datetime | None = None
    """Earlier releases only: until then its servers stay up, for a rollback without a start."""


class Weights(Frozen):
    """Desired percentages; they sum to 100."""

    stable: int = Field(default=100, ge=0, le=100)
    candidate: int = Field(default=0, ge=0, le=100)

    @model_validator(mode="after")
    def _sum_is_100(self) -> Weights:
        if self.stable + self.candidate != 100:
            raise ValueError(f"weights {self.stable} + {self.candidate} are not 100")
        return self


class ProbePlan(Frozen):
    """Probes of one rollout."""

    settings: Probes
    comparing: Comparing | None
    """None: nothing is said about the answers, since there are no references."""


class RolloutPlan(Frozen):
    """Everything a rollout needs to know, pinned at its start."""

    kind: Literal["bootstrap", "canary", "rollback"]
    """bootstrap: there is no stable release yet. rollback: back to a proven release."""
    capacity: Capacity
    replicas: int
    """Servers of the release when it is stable."""
    stable_replicas: int = 0
    """Servers of the stable release at the start; what it gets back if the rollout fails."""
    steps: tuple[RolloutStep, ...]
    bake_s: float
    holdback_weight: int
    max_duration_s: float
    on_undecided: Literal["hold", "rollback"]
    max_hold_s: float
    max_pause_s: float = 4 * 3600.0
    """Seconds that people may pause it in all; after that it is withdrawn."""
    warm_up_requests: int
    deploy_timeout_s: float
    drain_timeout_s: float
    arrivals_timeout_s: float = 30.0
    """Seconds in which a change of weights must show in the arrivals."""
    lease_s: float
    blind_candidate_s: float = 180.0
    """Seconds after which a candidate is withdrawn that cannot be seen while stable can."""
    blind_s: float = 600.0
    """Seconds after which it is withdrawn if one of the two could not be seen, whichever."""
    keep_warm_s: float = 0.0
    """Seconds after a promotion during which the old release keeps its servers."""
    judge: JudgeSpec
    envelope: Envelope | None = None
    """The loads that the release was measured with; None: nobody knows them."""
    probes: ProbePlan | None = None
    """None: users' requests are all the evidence there is."""


class RolloutDriver(Frozen):
    """Who drives the rollout now; an older epoch must stop."""

    run_id: str
    attempt: int
    epoch: int


class Replicas(Frozen):
    """Numbers of servers by role."""

    stable: int = Field(default=0, ge=0)
    candidate: int = Field(default=0, ge=0)


class Pause(Frozen):
    """A time in which a person keeps the weights where they are."""

    since: datetime
    until: datetime | None = None
    """None: it goes on."""
    who: str = ""
    reason: str = ""


class ByHand(Frozen):
    """A promotion that a person answers for, not the judge."""

    at: datetime
    who: str
    reason: str
    verdict: str
    """What the judge said at that time; empty if it had not looked yet."""


class ArrivalsMark(Frozen):
    """The router's counters when a change of weights was first seen in effect."""

    at: datetime
    epoch: str
    """The router's epoch; counters of another epoch cannot be compared."""
    arrivals: dict[str, int]
    """By release id."""
    errors: dict[str, int] = Field(default_factory=dict)
    """By release id."""


class Blindness(Frozen):
    """Since when looks have not seen what they should."""

    since: datetime
    """The first of the looks in a row that did not see both releases."""
    candidate_only_since: datetime | None = None
    """The first of the looks in a row that saw stable alone; None if the last did not."""
    why: str = ""
    """Of the last look, in a few words."""
    told: bool = False
    """Have people been told?"""


class Alone(Frozen):
    """Since when the release that stays has had no ready server, while the other one has."""

    since: datetime
    told: bool = False
    """Have people been told?"""


class Beyond(Frozen):
    """One way in which live traffic was beyond what the release was measured with."""

    kind: BeyondKind
    since: datetime
    """When it was first seen in this rollout."""
    why: str
    """As last seen, with figures."""


class Rollout(Frozen):
    """The rollout in progress, or the last one."""

    number: int
    release_id: str
    """The release that the rollout is about, whatever its role is now."""
    reference_id: str = ""
    """The release that was stable at the start; empty for a bootstrap."""
    phase: Phase
    plan: RolloutPlan
    owner: str = ""
    """The run that asked for it, whoever drives it now. Empty where an older version wrote it; use
    `Channel.owner`."""
    driver: RolloutDriver
    requested_by: str = ""
    started_at: datetime
    phase_since: datetime
    step_index: int = 0
    """Index into `plan.steps`; meaningless before exposure."""
    exposed_since: datetime | None = None
    """When the candidate first got traffic."""
    held_since: datetime | None = None
    """When an undecided rollout froze its weights."""
    pauses: tuple[Pause, ...] = ()
    """All pauses, oldest first; only the last one can still go on."""
    driven_at: datetime | None = None
    """Bake only: when a driver was last there, to a quarter of the lease. None: since it began."""
    bake_watched: bool = False
    """Bake only: when its time was over, somebody looked, and saw no harm."""
    promoted_by_hand: ByHand | None = None
    """Who took it to the bake without the judge's proof."""
    blind: Blindness | None = None
    """None: the last look saw both releases."""
    alone: Alone | None = None
    """None: the release that has the traffic if the rollout ends now could answer it."""
    beyond: tuple[Beyond, ...] = ()
    """What was seen of traffic that the release was not measured with: a warning, no more."""
    replicas: Replicas = Replicas()
    """Desired servers, by the roles of now."""
    ready: Replicas = Replicas()
    """Ready servers as last seen, by the roles of now."""
    warmed: tuple[str, ...] = ()
    """Servers (name and start time) that have answered their warm-up requests."""
    mark: ArrivalsMark | None = None
    """What arrivals are compared with, since the last change of weights."""
    verdict: Verdict | None = None
    """The last look."""
    evidence_key: str = ""
    """Key of the last look's document."""
    ending: Outcome | None = None
    """The outcome that is certain already, while the servers of the losing side are taken away."""
    cleanup: Literal["exchanging", "traffic", "draining", "removing"] | None = None
    """How far that is: until the winner has all its servers (where it had to grow first), until
    arrivals stop, until requests end, until servers are gone."""
    cleanup_since: datetime | None = None
    outcome: Outcome | None = None
    reason: str = ""
    """Why it ended, or what it waits for."""
    settled: bool = False
    """The run that owned it has taken note of its outcome; the same run may try again."""

    @property
    def paused(self) -> Pause | None:
        """The pause that goes on; None if there is none."""
        last = self.pauses[-1] if self.pauses else None
        return last if last is not None and last.until is None else None

    def paused_s(self, now: datetime, *, since: datetime | None = None) -> float:
        """Return the seconds of all pauses until `now`; with `since`, only what is after that."""
        begin = since or self.started_at
        return sum(
            max(0.0, ((pause.until or now) - max(pause.since, begin)).total_seconds())
            for pause in self.pauses
        )

    def running_s(self, since: datetime, now: datetime) -> float:
        """Return the seconds from `since` to `now` without those of pauses."""
        return (now - since).total_seconds() - self.paused_s(now, since=since)


class Rejection(Frozen):
    """A release that must not be promoted again without force and a reason."""

    release_id: str
    at: datetime
    rollout: int
    reason: str
    evidence_key: str = ""


class Unsettled(Frozen):
    """A rollout that another one has followed before its run took note of the outcome."""

    run_id: str
    rollout: int
    release_id: str
    outcome: Outcome
    reason: str = ""


class Waiting(Frozen):
    """A request that waits until the channel is free."""

    run_id: str
    release_id: str
    since: datetime
    """When it came: whoever came first is first."""
    seen_at: datetime
    """When whoever asks last showed that they still do."""
    requested_by: str = ""


class HistoryEntry(Frozen):
    """One line of the channel's bounded history."""

    at: datetime
    generation: int = 0
    """Generation of the channel that the event made; with `event` it identifies the entry."""
    event: str
    """Such as `rollout_started`, `weights`, `promoted`, `rolled_back`, `withdrawn`, `held`."""
    release_id: str = ""
    rollout: int | None = None
    who: str = ""
    detail: dict[str, Any] = Field(default_factory=dict)


class Channel(Document):
    """`channels/<model>/<environment>.json`."""

    model: str
    environment: str
    generation: int = 0
    """Counts the changes."""
    stable: Track | None = None
    previous: tuple[Track, ...] = ()
    """Earlier stable releases, newest first; the first is where a rollback goes."""
    candidate: Track | None = None
    weights: Weights = Weights()
    rollout: Rollout | None = None
    rejected: tuple[Rejection, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    """Requests in the order in which they came."""
    unsettled: tuple[Unsettled, ...] = ()
    """What runs are told that come back after others have gone on. Newest last, bounded."""
    history: tuple[HistoryEntry, ...] = ()
    """Newest last, bounded."""

    @property
    def in_progress(self) -> bool:
        """Is a rollout under way?"""
        return self.rollout is not None and self.rollout.outcome is None

    @property
    def owner(self) -> str:
        """The run that asked for the rollout in progress, or for the last one; empty: none."""
        rollout = self.rollout
        if rollout is None or rollout.owner:
            return rollout.owner if rollout is not None else ""
        for entry in reversed(self.history):
            if (entry.event, entry.rollout) == ("rollout_started", rollout.number):
                return str(entry.detail.get("run_id", "")) or rollout.driver.run_id
        return rollout.driver.run_id
