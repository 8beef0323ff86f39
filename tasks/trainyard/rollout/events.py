"""What may happen to a rollout, and what is to be done about it: the state machine's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from trainyard.documents.channel import BeyondKind, HistoryEntry, RolloutPlan
from trainyard.documents.evidence import Verdict

ServerState = Literal["starting", "ready", "unhealthy", "failed", "stopping"]


# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutRequested:
    """Somebody wants a rollout, and `plan_rollout` had nothing against it."""

    number: int
    release_id: str
    plan: RolloutPlan
    run_id: str
    requested_by: str = ""
    reason: str = ""
    """Why it was forced, or why it rolls back."""


@dataclass(frozen=True)
class DriverClaimed:
    """A run takes the rollout over; whoever drove it before must stop."""

    run_id: str


@dataclass(frozen=True)
class ServerSeen:
    """One server as its host sees it."""

    name: str
    release_id: str
    state: ServerState
    message: str = ""
    started_at: datetime | None = None

    @property
    def incarnation(self) -> str:
        """Name and start: a server that was started again must warm up again."""
        return f"{self.name}@{self.started_at.isoformat() if self.started_at else ''}"


@dataclass(frozen=True)
class ServersSeen:
    """The host was asked; `servers` are all servers of the model in the environment."""

    servers: tuple[ServerSeen, ...]


@dataclass(frozen=True)
class TrafficSeen:
    """Cumulative counts of one release at the router."""

    arrivals: int = 0
    errors: int = 0
    in_flight: int = 0


@dataclass(frozen=True)
class RouteSeen:
    """The router was asked."""

    epoch: str
    """Counters of another epoch cannot be compared."""
    weights: Mapping[str, int]
    """Percent by release id, as in effect."""
    traffic: Mapping[str, TrafficSeen]
    """By release id."""


@dataclass(frozen=True)
class WarmedUp:
    """A server was asked to answer its warm-up requests."""

    server: str
    """`ServerSeen.incarnation`."""
    asked: int
    answered: int
    refused: int = 0
    """Requests that the server answered with an error; the rest got no answer at all."""
    message: str = ""
    """The first failure, in one sentence."""


@dataclass(frozen=True)
class Looked:
    """The judge has looked at the evidence."""

    verdict: Verdict
    evidence_key: str


@dataclass(frozen=True)
class FuseBlown:
    """The candidate is broken beyond statistics."""

    reason: str
    against_release: bool = True
    """False: what is broken is the machine, so the release may come again."""


@dataclass(frozen=True)
class Sighted:
    """A look was tried: who could be seen?"""

    candidate: str
    """Why the release under test was not seen, in a few words; empty if it was."""
    stable: str
    """As `candidate`, of the release that it is compared with."""


@dataclass(frozen=True)
class TrafficBeyond:
    """Live traffic is beyond what the release was measured with, in one way."""

    kind: BeyondKind
    why: str
    """With figures."""


@dataclass(frozen=True)
class ControllerLost:
    """The lease ran out: for a while nobody watched the candidate."""

    reason: str


@dataclass(frozen=True)
class AbortRequested:
    """Somebody wants the rollout to end."""

    reason: str
    who: str = ""


@dataclass(frozen=True)
class UndoRequested:
    """Somebody wants the release that was stable before the rollout, also if its bake is over."""

    reason: str
    who: str = ""


@dataclass(frozen=True)
class PauseRequested:
    """Somebody wants the weights to stay where they are; looks and safety go on."""

    reason: str
    who: str = ""


@dataclass(frozen=True)
class ResumeRequested:
    """Somebody wants a paused rollout to go on."""

    reason: str = ""
    who: str = ""


@dataclass(frozen=True)
class PromotionForced:
    """Somebody answers for the candidate, so that it bakes without the judge's proof."""

    reason: str
    who: str = ""


@dataclass(frozen=True)
class QueueJoined:
    """A run waits for the channel, or shows that it still does."""

    run_id: str
    release_id: str
    requested_by: str = ""


@dataclass(frozen=True)
class QueueLeft:
    """A run does not wait for the channel any more."""

    run_id: str


@dataclass(frozen=True)
class ObjectiveMissed:
    """The stable release misses its objectives, or they cannot be told."""

    alert: str
    """Its name; the same alert is noted once until it is over."""
    why: str


@dataclass(frozen=True)
class ObjectiveMet:
    """An alert of the watch is over."""

    alert: str


@dataclass(frozen=True)
class OutcomeNoted:
    """The run that owned a rollout has taken note of its outcome."""

    run_id: str = ""
    """Empty: the one that owned the last rollout."""


@dataclass(frozen=True)
class RequesterNoted:
    """It became known who asked for the rollout."""

    who: str


@dataclass(frozen=True)
class Adopted:
    """Servers that somebody else deployed are to be the stable release."""

    release_id: str
    deployment: str
    who: str = ""


@dataclass(frozen=True)
class TimePassed:
    """Nothing happened but time."""


Event = (
    RolloutRequested
    | DriverClaimed
    | ServersSeen
    | RouteSeen
    | WarmedUp
    | Looked
    | Sighted
    | TrafficBeyond
    | FuseBlown
    | ControllerLost
    | AbortRequested
    | UndoRequested
    | PauseRequested
    | ResumeRequested
    | PromotionForced
    | QueueJoined
    | QueueLeft
    | ObjectiveMissed
    | ObjectiveMet
    | OutcomeNoted
    | RequesterNoted
    | Adopted
    | TimePassed
)


# --- commands: wishes that may be repeated at any time --------------------------------------------


@dataclass(frozen=True)
class DeployServers:
    """Have so many servers of a release, however many there are now."""

    release_id: str
    replicas: int


@dataclass(frozen=True)
class RemoveServers:
    """Have no servers of a release."""

    release_id: str


@dataclass(frozen=True)
class HoldAutoscaling:
    """Have nobody else change the number of servers while two releases are compared."""


@dataclass(frozen=True)
class ResumeAutoscaling:
    """Have autoscalers work again, on the servers of a release."""

    release_id: str


@dataclass(frozen=True)
class WarmUp:
    """Have every ready server of a release answer requests, unless it has."""

    release_id: str
    requests: int
    warmed: tuple[str, ...]
    """Incarnations that have."""


@dataclass(frozen=True)
class RenewLease:
    """Show that the rollout is driven."""

    duration_s: float


@dataclass(frozen=True)
class ReleaseLease:
    """Show that nothing needs to be driven."""


@dataclass(frozen=True)
class Attest:
    """Write beside the release what became of it, once."""

    kind: Literal["promotion", "rejection"]
    release_id: str
    rollout: int
    subject: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Notify:
    """Tell people about an event, once."""

    rollout: int
    entry: HistoryEntry = field(hash=False)


Command = (
    DeployServers
    | RemoveServers
    | HoldAutoscaling
    | ResumeAutoscaling
    | WarmUp
    | RenewLease
    | ReleaseLease
    | Attest
    | Notify
)
