"""Looks: what a rollout's driver read at one moment, and what the judge said about all of it.

A look holds cumulative counters as they were read. Slices of time are differences of two looks, and
every verdict can be derived from the looks again.
"""

from __future__ import annotations

from datetime import datetime
from math import isnan
from typing import Literal

from pydantic import Field

from trainyard.documents.base import Document, Frozen
from trainyard.documents.channel import Phase
from trainyard.documents.evidence import JudgeSpec, Verdict


class Histogram(Frozen):
    """A cumulative histogram, summed over a server's engines."""

    count: int = Field(ge=0)
    total: float = Field(ge=0, allow_inf_nan=False)
    """Sum of the observed values, in the metric's unit (seconds, tokens)."""
    buckets: dict[str, int] = Field(default_factory=dict)
    """Observations at most as large as the edge; keys are the `le` labels as the server wrote
    them, in the metric's unit. Empty where nobody needs them."""

    def by_edge(self) -> dict[float, int]:
        """Return `buckets` by edges as numbers, since servers may write `1.0` for `1`.

        Without labels that are no number: looks of older versions may have some, and are kept.
        """
        edges = ((edge_of(label), within) for label, within in self.buckets.items())
        return {edge: within for edge, within in edges if edge is not None}


def edge_of(label: str) -> float | None:
    """Return the edge that a label `le` names; None if it is no number."""
    try:
        edge = float(label)
    except ValueError:
        return None
    return None if isnan(edge) else edge


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
    events: Histogram | None = None
    """Time between output events, of servers whose `tpot` has one observation a request: to be
    compared with servers that have nothing else."""
    finished: int | None = None
    """Finished requests, beside `events`."""
    ended: dict[str, int] | None = None
    """Finished requests by the reason that the server gives: `stop`, `length`, `abort`, of newer
    ones also `error` and `repetition`."""
    short: int | None = None
    """Finished requests with one output token at most. A token that ends an answer is one, so these
    are the empty answers."""
    prompts: Histogram | None = None
    """Tokens of a prompt, of finished requests."""
    prefix_queries: int | None = None
    """Prompt tokens that were looked for in the prefix cache."""
    prefix_hits: int | None = None
    """Prompt tokens that were found there."""
    in_flight: int | None = None
    """Requests that run or wait at the moment."""
    node: str = ""
    """The machine, where the source tells."""
    read_at: datetime | None = None
    """The moment of these figures by whoever read them off the server. None: the snapshot's."""
    process_started_s: float | None = Field(default=None, allow_inf_nan=False)
    """Start of the server's process as it says itself, in seconds of Unix time."""


class DeviceCounters(Frozen):
    """Errors of accelerators since their exporter's start, as neuron-monitor counts them.

    What the exporter does not show is not here: it clears its series while no process uses a
    device, so "absent" says nothing.
    """

    place: str
    """The node."""
    release_id: str = ""
    """Whose process had them; empty for errors of the device itself."""
    errors: dict[str, int]
    """By kind: `execution/<error_type>` or `ecc/<event_type>`."""


class ServerCounters(Frozen):
    """The router's counters of one server. They go on when the server is started anew."""

    ended: int = Field(ge=0)
    """Requests that were sent to it and have ended, in whatever way."""
    errors: int = Field(ge=0)
    """Those of them that failed."""
    arrivals: int | None = Field(default=None, ge=0)
    """Requests that were sent to it, ended or not. This and what follows is None where the router
    does not count it, and in looks of older versions."""
    unanswered: int | None = Field(default=None, ge=0)
    """Requests that ended without an answer and are no error: the client went away before the first
    byte of one, or the server said that it was too busy (408, 429)."""
    refused: int | None = Field(default=None, ge=0)
    """Requests that it answered with another 4xx."""


class ReleaseCounters(Frozen):
    """The router's counters of one release."""

    arrivals: int = Field(ge=0)
    errors: int = Field(ge=0)
    in_flight: int = Field(ge=0)
    servers: dict[str, ServerCounters] = Field(default_factory=dict)
    """By the server's name, as in `PodCounters.pod`. Empty: the router tells nothing but sums, as
    in looks of older versions. Requests that are in the sums alone reached no server, or one that
    the router has forgotten since."""


class RouteCounters(Frozen):
    """What the router said."""

    epoch: str
    """Counters of another epoch cannot be compared."""
    weights: dict[str, int]
    """Percent by release id, as in effect."""
    releases: dict[str, ReleaseCounters]
    """By release id."""


class ProbeCounters(Frozen):
    """What probes saw of one server since the prober's start. Times are the prober's own."""

    pod: str
    """Name of the server."""
    release_id: str
    sent: int = Field(ge=0)
    """Requests that were begun."""
    ended: int = Field(ge=0)
    """Requests that ended, in whatever way."""
    answered: int = Field(ge=0)
    """Requests that were answered in full."""
    failed: int = Field(ge=0)
    """Requests that failed while the other release answered the same prompt. What failed on both
    sides at once is neither answered nor failed."""
    ttft: Histogram
    """Seconds to the first token."""
    tpot: Histogram
    """Seconds per output token after the first; one value a request that has two tokens."""
    pairs: int = Field(ge=0)
    """Pairs whose answers were compared."""
    worse: int = Field(ge=0)
    """Those of them in which only this side's answer was wrong."""


class ProbeReading(Frozen):
    """What a prober has seen."""

    epoch: str
    """Of its start; counters of another one cannot be compared."""
    cursor: int = Field(ge=0)
    """Prompts that were sent since the rollout's beginning, by whichever prober: where the next
    prober goes on, so that no prompt is scored twice."""
    pods: tuple[ProbeCounters, ...] = ()


class Snapshot(Frozen):
    """Everything that was read at one moment."""

    at: datetime
    phase: Phase
    step_index: int
    pods: tuple[PodCounters, ...]
    """Servers of both releases; one that could not be read is missing."""
    route: RouteCounters | None
    """None: the router could not be asked."""
    devices: tuple[DeviceCounters, ...] = ()
    """Errors of devices on the nodes of these servers; empty where nobody counts them."""
    probes: ProbeReading | None = None
    """None: this rollout has no probes, or nobody has begun with them."""


class History(Document):
    """`rollouts/<model>/<environment>/<n>/history.json`: stable before the rollout, written once.

    It is fixed before the candidate gets traffic. What the judge learns from it can be learned
    again, however long the source of the figures remembers them.
    """

    rollout: int
    release_id: str
    """The stable release."""
    source: Literal["metrics", "looks", "none"]
    """`metrics`: the source of the counters remembered them. `looks`: of the rollout before, in
    which this release became stable. `none`: nobody did."""
    snapshots: tuple[Snapshot, ...] = ()
    """Oldest first; its own servers only, and of the router's counters those of this release. They
    are known from looks; snapshots from `metrics`, and those of older versions, have no `route`."""


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
