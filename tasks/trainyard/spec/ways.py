"""Who may do what in an environment, who has to approve, and who is told: parts of the environments
file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from trainyard.spec.model import Name
from trainyard.spec.part import SpecPart

PERSON_PATTERN = r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]{0,254}[^\s\x00-\x1f\x7f])?$"
CONNECTION_PATTERN = r"^[A-Za-z0-9_.\-]{1,200}$"
ADDRESS_PATTERN = r"^[^\s@<>,;:\"]+@[^\s@<>,;:\"]+$"
TOPIC_PATTERN = r"^arn:aws[a-z-]*:sns:[a-z0-9-]+:[0-9]{12}:[A-Za-z0-9_-]{1,256}$"

Person = Annotated[str, StringConstraints(pattern=PERSON_PATTERN)]
"""A user's name, as Airflow tells it (the login)."""

NoticeKind = Literal[
    "promoted",
    "rolled_back",
    "withdrawn",
    "held",
    "slo_missed",
    "gate_failed",
    "waiting_approval",
    "stuck",
]
"""What people can be told of. `rolled_back` also tells of rollbacks that somebody asked for;
`slo_missed`: what serves misses its objectives after its rollout."""


class Allowed(SpecPart):
    """Who may do one thing: whoever one of the lines names. Without any line: nobody."""

    users: tuple[Person, ...] = ()
    """Users, by the name with which they log in to Airflow."""
    groups: tuple[Name, ...] = ()
    """Groups of the file's own `groups`."""
    roles: tuple[Person, ...] = ()
    """Roles of Airflow's FAB auth manager. They become the rights of the DAG, so they are checked
    by Airflow where a run is asked for, and only there: not for what another run starts."""
    schedule: bool = False
    """May runs that nobody asked for, such as a scheduled refresh, do it?"""


class Permissions(SpecPart):
    """Who may do what in an environment. What is left out is left to Airflow's rights alone."""

    promote: Allowed | None = None
    """Who may promote a release, and pause and resume rollouts."""
    rollback: Allowed | None = None
    """Who may roll back, and abort rollouts."""
    approve: Allowed | None = None
    """Who may approve where `approval` asks for it."""


class Approval(SpecPart):
    """A promotion waits for people before anything is deployed. Time that runs out approves
    nothing."""

    needs: int = Field(default=1, ge=1, le=10)
    """How many different people have to approve."""
    timeout_s: float = Field(default=86400.0, ge=60, le=30 * 86400)
    """Seconds after which a promotion that nobody answered fails."""
    by_requester: bool = False
    """May whoever asked for the promotion approve it?"""
    user_ids: dict[Person, Person] = Field(default_factory=dict)
    """Ids of approvers in Airflow, by name, where they are not the name (FAB: a number, Keycloak: a
    UUID). With the ids of all approvers, Airflow itself refuses everybody else's answer."""


class Notify(SpecPart):
    """One way to tell people."""

    kind: Literal["slack", "webhook", "email", "sns"]
    """`slack`: an incoming webhook of Slack. `webhook`: the notice as JSON to any address."""
    connection: Annotated[str, StringConstraints(pattern=CONNECTION_PATTERN)]
    """Airflow connection with the secret: for webhooks the address is its password (or its host,
    path and scheme), for `email` it is an SMTP connection, for `sns` an AWS connection."""
    events: tuple[NoticeKind, ...] = (
        "rolled_back",
        "withdrawn",
        "held",
        "slo_missed",
        "gate_failed",
        "waiting_approval",
        "stuck",
    )
    """What to tell of. Everything but `promoted` unless given."""
    to: tuple[Annotated[str, StringConstraints(pattern=ADDRESS_PATTERN)], ...] = ()
    """For `email`: addresses."""
    topic: Annotated[str, StringConstraints(pattern=TOPIC_PATTERN)] | None = None
    """For `sns`: ARN of the topic."""
