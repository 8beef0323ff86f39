"""Where an environment's servers are watched: who reads their counters, and from where."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from trainyard.spec.kubernetes import AbsolutePath, EnvName
from trainyard.spec.part import SpecPart

HTTP_URL_PATTERN = r"^https?://[A-Za-z0-9\[][A-Za-z0-9.:\[\]-]*(/[A-Za-z0-9._~/-]*)?$"
LABEL_PATTERN = r"^[a-zA-Z_][a-zA-Z0-9_]*$"
REGION_PATTERN = r"^([a-z]{2}(-[a-z]+)+-[0-9])?$"

LabelName = Annotated[str, StringConstraints(pattern=LABEL_PATTERN)]
"""Name of a label in Prometheus."""


class MetricLabels(SpecPart):
    """Which labels of the series tell what. `k8s/components/monitoring` sets the default ones."""

    pod: LabelName = "pod"
    """Name of the server, as its host names it: of the pod, on a cluster."""
    release: LabelName = "release"
    """Release id: of vLLM's series, and of neuron-monitor's that belong to a process."""
    node: LabelName = "node"
    """The machine, on vLLM's series and on neuron-monitor's."""


class MetricsSource(SpecPart):
    """Who reads the counters of an environment's servers."""

    source: Literal["scrape", "prometheus"] = "scrape"
    """`scrape`: the rollout asks each server itself. `prometheus`: it asks a server with
    Prometheus' HTTP API, which also knows the hours before the rollout and errors of devices."""
    url: Annotated[str, StringConstraints(pattern=HTTP_URL_PATTERN)] | None = None
    """With `prometheus`: what comes before `/api/v1/query`, such as `http://prometheus.monitoring:9090`
    or `https://aps-workspaces.eu-central-1.amazonaws.com/workspaces/ws-…`."""
    auth: Literal["none", "bearer", "sigv4"] = "none"
    """`bearer`: a token, from `token_file` or `token_env`. `sigv4`: AWS' signature, with the role
    or credentials that AWS' libraries find; for Amazon Managed Service for Prometheus."""
    region: Annotated[str, StringConstraints(pattern=REGION_PATTERN)] = ""
    """With `sigv4`: region of the workspace. Empty: that of AWS' configuration."""
    token_env: EnvName = "TRAINYARD_METRICS_TOKEN"
    """With `bearer`: environment variable that holds the token, if there is no `token_file`."""
    token_file: AbsolutePath | None = None
    """With `bearer`: file that holds the token; it is read anew for each request, since tokens of
    service accounts change."""
    ca_file: AbsolutePath | None = None
    """Certificates of a private authority that signed the server's. Empty: the system's."""
    labels: MetricLabels = MetricLabels()
    """Which labels tell server, release and machine."""
    match: dict[LabelName, str] = Field(default_factory=dict)
    """More labels that series must have, such as `cluster`, where several clusters share a
    workspace."""
    timeout_s: float = Field(default=5.0, gt=0, le=30)
    """Seconds that one answer may take."""
    freshness_s: float = Field(default=45.0, ge=1, le=600)
    """Age at which a sample counts as missing: at least two intervals of the scraping."""
    delay_s: float = Field(default=0.0, ge=0, le=600)
    """Seconds that samples need until they can be asked for, beside their age: some for remote
    writes into Amazon Managed Service for Prometheus."""
    history_s: float = Field(default=28800.0, ge=0, le=604800)
    """Seconds before a rollout from which the judge learns how much the stable release's servers
    differ and drift. 0: nothing."""


DEVICES_UNSEEN = (
    "metrics.source scrape sees no errors of accelerators, so executions that fail on the devices "
    "of a candidate blow no fuse. Let a Prometheus scrape neuron-monitor's exporter, and name it "
    "in `metrics`."
)
"""What people with Neuron devices should know of the source that needs no settings."""
