"""Looks: what a rollout's driver read at one moment, and what the judge said about all of it.

A look holds cumulative counters as they were read. Slices of time are differences of two looks, and
every verdict can be derived from the looks again.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from trainyard.documents.base import Document, Frozen
from trainyard.documents.channel import Phase
from trainyard.documents.evidence import JudgeSpec, Verdict


class Histogram(Frozen):
    """A cumulative histogram, summed over a server's engines."""

    count: int = Field(ge=0)
    total: float = Field(ge=0, allow_inf_nan=False)
    """Sum of the observed values, in seconds."""
    buckets: dict[str, int] = Field(default_factory=dict)
    """Observations at most as large as the edge; keys are the `le` labels as the server wrote
    them, in seconds."""


class PodCounters(Frozen):
    """The counters of one server since its start."""

    pod: str
    """Name of the server."""
    release_id: str
    started_at: datetime | None
    """Start of the server; counters of another start cannot be compared."""
    ttft: Histogram | None = None
    """Time to the first token of a request."""
    tpot: Histogram | None = None
    """Time per output token: one observation a request, or one an output event (see
    `tpot_requests`)."""
    tpot_requests: int | None = None
    """Finished requests, for servers whose `tpot` has one observation an output event."""


class ReleaseCounters(Frozen):
    """The router's counters of one release."""

    arrivals: int = Field(ge=0)
    errors: int = Field(ge=0)
    in_flight: int = Field(ge=0)


class RouteCounters(Frozen):
    """What the router said."""

    epoch: str
    """Counters of another epoch cannot be compared."""
    weights: dict[str, int]
    """Percent by release id, as in effect."""
    releases: dict[str, ReleaseCounters]
    """By release id."""


class Snapshot(Frozen):
    """Everything that was read at one moment."""

    at: datetime
    phase: Phase
    step_index: int
    pods: tuple[PodCounters, ...]
    """Servers of both releases; one that could not be read is missing."""
    route: RouteCounters | None
    """None: the router could not be asked."""


class Comparison(Frozen):
    """What the judge was told besides the counters: enough to derive a verdict again."""

    candidate: str
    """Release id of the release under test, also while it bakes in the role of stable."""
    stable: str
    """Release id of what it is compared with."""
    exposed_since: datetime
    """When the candidate first got traffic."""
    judge: JudgeSpec
    """As pinned by the rollout's plan."""


class Look(Document):
    """`rollouts/<model>/<environment>/<n>/looks/<slot>.json`, written once."""

    rollout: int
    slot: int
    """Number of the slice of time since the rollout's start."""
    snapshot: Snapshot
    verdict: Verdict | None = None
    """None before the candidate was exposed, and while there is nothing to judge."""
    comparison: Comparison | None = None
    """None where `verdict` is, and in looks of older versions."""
    message: str = ""
    """One line for people."""
