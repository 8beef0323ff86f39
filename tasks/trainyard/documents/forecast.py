"""What a release's way into an environment will take, as the plan sees it."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from trainyard.documents.base import Frozen


class Traffic(Frozen):
    """The requests that a channel gets."""

    requests_per_s: float = Field(gt=0)
    error_share: float = Field(default=0.001, ge=0, le=1)
    seen_at: datetime | None = None
    """When it was seen last; None: the spec says so (`rollout.expected_rps`)."""
    seen_for_s: float = 0.0
    """Over how many seconds."""


class StepForecast(Frozen):
    """One step of a canary."""

    weight: int
    """Percent of the traffic that the candidate has."""
    hold_s: float
    """Seconds that it lasts at least."""
    servers: int
    """Servers of the candidate."""
    candidate_requests: int | None
    """Requests that the candidate gets in them; None where the traffic is not known."""


class DevicesForecast(Frozen):
    """The accelerators of the cluster that an environment is in, as they were when it was asked."""

    instance: str
    """Type of the nodes that count."""
    per_server: int = Field(ge=1)
    """Devices that one server takes."""
    unknown: str = ""
    """Why nobody could tell the rest, which is then 0; empty: it is known."""
    nodes: int = 0
    """Nodes of that type which would take a server now."""
    total: int = 0
    """Devices that they can allocate."""
    free: int = 0
    """Of them, how many no pod has asked for."""
    room: int = 0
    """Servers that fit into what is free, each on one node."""
    stable_servers: int = 0
    """Servers of the stable release that have devices there already."""


class RolloutForecast(Frozen):
    """One environment that was asked for."""

    environment: str
    kind: str
    """`canary`, or `bootstrap` where nothing serves yet."""
    steps: tuple[StepForecast, ...]
    bake_s: float
    holdback_weight: int | None = None
    """Percent that the old release keeps in the bake; None: nothing is compared there, or an older
    version made the forecast."""
    bake_compares_latencies: bool = False
    """Are loads in the bake equal enough to compare latencies, or do only errors, answers to probes
    and fuses decide?"""
    max_duration_s: float
    servers_needed: int
    """Most servers of the model that run at the same time."""
    servers_free: int
    """Servers that the environment has room for beside those of other models."""
    devices: DevicesForecast | None = None
    """None: it needs none, its servers are not in a cluster, or an older version made the
    forecast."""
    devices_unseen: bool = False
    """It serves on Neuron devices, whose errors its source of metrics does not see."""
    traffic: Traffic | None = None
    """None: nobody knows it."""
    promoted_share: float | None = None
    """Share of good releases that the judge would promote within `max_duration_s`; None where the
    traffic is not known or nothing is compared."""
    probes_per_s: float | None = None
    """Pairs of probes a second that the rollout has; None: it has none."""
    enough_probes_per_s: float | None = None
    """Pairs a second with which most good releases would be proven in time, where they are not
    now; None: they are, or no rate that was tried would do."""
    enough_duration_s: float | None = None
    """As `enough_probes_per_s`: a longer `max_duration_s` that would do."""
    enough_promote_margin: float | None = None
    """As `enough_probes_per_s`: a wider promotion margin of latencies that would do."""
    verdict_median_s: float | None = None
    """Seconds of exposure until half of them would be promoted; None: fewer would."""
    verdict_most_s: float | None = None
    """As `verdict_median_s`, nine in ten."""
    verdict_requests: int | None = None
    """Requests to the candidate until `verdict_median_s`."""
