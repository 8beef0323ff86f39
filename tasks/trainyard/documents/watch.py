"""What the watch of a channel knows between two looks: small, whole, and written once a slot."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from trainyard.documents.base import Document, Frozen
from trainyard.documents.look import PodCounters, RouteCounters


class Counted(Frozen):
    """Requests, or observations, in a stretch of time."""

    total: int = Field(ge=0)
    bad: int = Field(ge=0)
    """Those that missed the objective."""
    covered_s: float = Field(ge=0)
    """Seconds of the stretch that were counted; the rest is not known."""


class Sample(Frozen):
    """A stretch of time; a metric without figures was not seen, which is neither good nor bad."""

    start: datetime
    end: datetime
    errors: Counted | None = None
    ttft: Counted | None = None
    tpot: Counted | None = None


class Reading(Frozen):
    """Cumulative counters of the stable release, as read at one moment."""

    at: datetime
    pods: tuple[PodCounters, ...]
    route: RouteCounters | None
    """None: the router could not be asked."""


class Unattended(Document):
    """`rollouts/<model>/<environment>/<n>/unattended/<epoch>-<lease>.json`, written once.

    A rollout that is not decided was seen without a living driver. One with `-told` after its name
    says that people know.
    """

    since: datetime
    """When the watch saw it first; the lease itself may have ended before."""


class WatchState(Document):
    """`rollouts/<model>/<environment>/<n>/watch/<slot>.json`."""

    model: str
    environment: str
    rollout: int
    """The channel's last rollout."""
    slot: int
    release_id: str
    """The stable release that all of it is about."""
    since: datetime
    """When the watch of this release began."""
    reading: Reading
    """The last one, from which the next sample is counted."""
    samples: tuple[Sample, ...] = ()
    """Oldest first; older ones are merged."""
