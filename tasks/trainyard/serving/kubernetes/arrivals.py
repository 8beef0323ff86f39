"""Who really got the requests: the data plane's own counts, by release.

`data_plane: gateway`: Envoy's statistics of each endpoint (`per_endpoint_stats`; with Envoy
Gateway `EnvoyProxy.spec.telemetry.metrics.enablePerEndpointStats`), read from each of the gateway's
pods and joined with the servers' pods by address. One cluster of Envoy stands for one rule of a
route (`httproute/<namespace>/<route>/rule/<index>`) and holds the endpoints of all its backends, so
only the endpoint tells the release. Requests of the pinned rules are in other clusters.

`data_plane: proxy`: our own proxies, each asked for its counts.

============================  ==========================================================
`envoy_cluster_endpoint_…`    used as
============================  ==========================================================
`rq_total`, `rq_error`,       arrivals: a request that failed to connect is in `rq_error` but not
`rq_active`,                  in `rq_total`
`cx_connect_fail`
`rq_error`                    errors: 5xx, no connection, or cut off before the head of an answer
`rq_active`                   in flight
`rq_success`                  for the fuse: one success and the first answers did not all fail
what is in `rq_total` and in  unanswered: the client left before the head of an answer. The head
none of the others            of a stream comes before its first token, so streams that say
                              nothing after it are not among them
============================  ==========================================================

Envoy counts answers of 4xx by cluster only, so nobody knows which release refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter, ValidationError

from trainyard.canonical import digest, short
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import POD
from trainyard.kubernetes.labels import PORT, RELEASE, owned, server_labels
from trainyard.serving.guard import FIRST_ANSWERS, ReleaseHealth
from trainyard.serving.kubernetes.manifests import PORT_NAME, SERVER_PORT
from trainyard.serving.kubernetes.route import SPLIT, find_rule
from trainyard.serving.protocol import ReleaseTraffic, RouteStatus, ServerTraffic
from trainyard.spec.kubernetes import KubernetesServing

log = logging.getLogger(__name__)

PROXY = "proxy"
"""Component label of our proxies' pods."""
STATUS_PORT = "status"
"""Name of the port on which our proxies tell their status."""
DEFAULT_STATUS_PORT = 8081

STATS_PATH = "/stats/prometheus"
ASK_TIMEOUT_S = 3.0
_PREFIX = "envoy_cluster_endpoint_"
_FIGURES = ("rq_total", "rq_success", "rq_error", "rq_active", "cx_connect_fail")
_MOST_AT_ONCE = 16


@dataclass(frozen=True)
class Counts:
    """Envoy's cumulative counts of some endpoints."""

    total: int = 0
    success: int = 0
    error: int = 0
    active: int = 0
    connect_failures: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both."""
        return Counts(
            self.total + other.total,
            self.success + other.success,
            self.error + other.error,
            self.active + other.active,
            self.connect_failures + other.connect_failures,
        )

    @property
    def arrivals(self) -> int:
        """Requests that were sent there, also in vain; at least those that failed or are active."""
        return max(self.total + self.connect_failures, self.error + self.active)

    @property
    def unanswered(self) -> int:
        """Requests that ended before there was the head of an answer, and did not fail."""
        return max(0, self.arrivals - self.success - self.error - self.active)


@dataclass(frozen=True)
class DataPlaneSight:
    """What a data plane says about one channel."""

    epoch: str
    """Changes whenever counters start anew."""
    traffic: Mapping[str, ReleaseTraffic]
    """By release id."""
    weights: Mapping[str, int] | None = None
    """As in effect, by release id; None: it does not tell."""
    counts: Mapping[str, Counts] = field(default_factory=dict)
    """Gateway only, by release id."""
    health: Mapping[str, ReleaseHealth] | None = None
    """Our own proxies only: what the fuse needs, by release id."""


class DataPlane(Protocol):
    """What carries the requests of an environment."""

    def look(self, environment: str, model: str, route: Object) -> DataPlaneSight | None:
        """Return its counts; None if some part of it does not answer.

        Raises:
            TrainyardError: the cluster does not answer.
        """


def open_data_plane(cluster: Cluster, place: KubernetesServing) -> DataPlane:
    """Return the data plane of an environment."""
    if place.data_plane == "proxy":
        return ProxyDataPlane(cluster, place)
    return GatewayDataPlane(cluster, place)


# --- Envoy ----------------------------------------------------------------------------------------


class GatewayDataPlane:
    """Envoy Gateway's pods, asked for their statistics."""

    def __init__(self, cluster: Cluster, place: KubernetesServing) -> None:
        """Ask the pods of the Gateway that `place` names."""
        self._cluster = cluster
        self._place = place
        self._last: dict[tuple[str, str], DataPlaneSight] = {}
        self._resets = 0

    def look(self, environment: str, model: str, route: Object) -> DataPlaneSight | None:
        """Return the counts of a channel's route."""
        place = self._place
        labels = {
            "gateway.envoyproxy.io/owning-gateway-name": place.gateway,
            "gateway.envoyproxy.io/owning-gateway-namespace": place.gateway_namespace
            or place.namespace,
        }
        gateways, _ = self._cluster.list(POD, place.gateway_pods_namespace, labels=labels)
        running = [pod for pod in gateways if is_ready(pod)]
        if not running:
            log.warning("No pod of Gateway %s is ready: nobody counts arrivals", place.gateway)
            return None
        servers, _ = self._cluster.list(
            POD, place.namespace, labels=server_labels(model=model, environment=environment)
        )
        urls = {
            pod["metadata"]["uid"]: f"http://{address(pod, place.gateway_stats_port)}{STATS_PATH}"
            for pod in running
        }
        pages = fetch_all(urls)
        if pages is None:
            return None
        sight = gateway_sight(pages, servers, rule_cluster(route), resets=self._resets)
        last = self._last.get((environment, model))
        if last is not None and last.epoch == sight.epoch and _went_back(last, sight):
            self._resets += 1
            sight = gateway_sight(pages, servers, rule_cluster(route), resets=self._resets)
        self._last[environment, model] = sight
        return sight


def rule_cluster(route: Object) -> str:
    """Return the name of Envoy's cluster for the rule that splits, as Envoy Gateway names it."""
    metadata = route["metadata"]
    index, _ = find_rule(route, SPLIT)
    return f"httproute/{metadata['namespace']}/{metadata['name']}/rule/{index}"


def gateway_sight(
    pages: Mapping[str, str], servers: Sequence[Object], cluster: str, *, resets: int = 0
) -> DataPlaneSight:
    """Return what the pages of Envoys say about a channel.

    Args:
        pages: Prometheus text, by uid of the gateway's pod.
        servers: pods of the channel's releases.
        cluster: of Envoy.
        resets: how often counters have gone back without another sign of it.

    Raises:
        ValueError: a page is no Prometheus text.
    """
    by_address = {
        address(pod, port_of(pod, PORT_NAME, SERVER_PORT)): pod
        for pod in servers
        if (pod.get("status") or {}).get("podIP")
    }
    counts: dict[str, dict[str, Counts]] = {}
    marks: list[tuple[str, str]] = []
    for uid, page in sorted(pages.items()):
        for where, seen in parse_endpoints(page, cluster).items():
            pod = by_address.get(where)
            if pod is None:
                # A server that is gone while Envoy still drains it.
                continue
            release_id = pod["metadata"]["labels"][RELEASE]
            of_release, name = counts.setdefault(release_id, {}), pod["metadata"]["name"]
            of_release[name] = of_release.get(name, Counts()) + seen
            marks.append((uid, pod["metadata"]["uid"]))
    return DataPlaneSight(
        # Envoy forgets an endpoint's counts when it leaves the cluster, so they can be compared
        # only while the same endpoints are behind the same Envoys.
        epoch=short(digest([sorted(pages), sorted(marks), resets])),
        traffic={release_id: traffic_of(servers) for release_id, servers in counts.items()},
        counts={
            release_id: sum(servers.values(), start=Counts())
            for release_id, servers in counts.items()
        },
    )


def traffic_of(servers: Mapping[str, Counts]) -> ReleaseTraffic:
    """Return the counts of a release in the rollout's words, from those of its servers by name."""
    return ReleaseTraffic(
        sum(one.arrivals for one in servers.values()),
        sum(one.error for one in servers.values()),
        sum(one.active for one in servers.values()),
        {
            name: ServerTraffic(one.arrivals - one.active, one.error, one.arrivals, one.unanswered)
            for name, one in servers.items()
        },
    )


def parse_endpoints(page: str, cluster: str) -> dict[str, Counts]:
    """Return Envoy's counts by address, of one cluster and of its parts (`…/backend/0`)."""
    wanted = f'envoy_cluster_name="{cluster}'
    # Pages have megabytes: only what is needed goes through the parser.
    lines = [line for line in page.splitlines() if line.startswith(_PREFIX) and wanted in line]
    found: dict[str, dict[str, int]] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            name = sample.labels.get("envoy_cluster_name", "")
            figure = sample.name.removeprefix(_PREFIX)
            if figure not in _FIGURES or not (name == cluster or name.startswith(f"{cluster}/")):
                continue
            where = found.setdefault(sample.labels.get("envoy_endpoint_address", ""), {})
            where[figure] = where.get(figure, 0) + int(sample.value)
    return {
        where: Counts(*(figures.get(name, 0) for name in _FIGURES))
        for where, figures in found.items()
    }


def _went_back(before: DataPlaneSight, after: DataPlaneSight) -> bool:
    return any(after.counts.get(name, Counts()).total < old.total
               for name, old in before.counts.items())  # fmt: skip


class FuseCounts:
    """What the guard's fuse needs to know, from cumulative counts that it did not make itself.

    Counts begin with a candidate's exposure. Only samples are seen, so the first answers count as
    failed only if no request at all has succeeded yet.
    """

    def __init__(self) -> None:
        """Begin without an exposure."""
        self._exposure: tuple[int | None, str] | None = None
        self._base: dict[str, Counts] = {}
        self._last: DataPlaneSight | None = None
        self._row: dict[str, int] = {}
        self._worked: set[str] = set()

    def health(
        self, rollout: int | None, exposed: str | None, sight: DataPlaneSight | None
    ) -> dict[str, ReleaseHealth]:
        """Return answers and failures by release id.

        Args:
            rollout: number of the rollout.
            exposed: the candidate, if it has weight.
            sight: of the data plane now.
        """
        if sight is None:
            return {}
        if sight.health is not None:
            return dict(sight.health)
        exposure = (rollout, exposed) if exposed is not None else None
        if exposure is None or exposure != self._exposure:
            self._base = dict(sight.counts) if exposure is None else self._known_before(sight)
            self._row, self._worked = {}, set()
        elif self._last is not None and self._last.epoch != sight.epoch:
            # Endpoints came or went: what there was of them before is lost, the others go on.
            self._base = self._known_before(sight)
        else:
            self._count_row(sight)
        self._exposure, self._last = exposure, sight
        return {name: self._of(name, now) for name, now in sight.counts.items()}

    def _known_before(self, sight: DataPlaneSight) -> dict[str, Counts]:
        """Return what to subtract: a release that was not there before has begun at zero."""
        if self._last is None:
            return dict(sight.counts)
        if self._last.epoch == sight.epoch:
            return dict(self._last.counts)
        return {name: now for name, now in sight.counts.items() if name in self._last.counts}

    def _count_row(self, sight: DataPlaneSight) -> None:
        assert self._last is not None
        for name, now in sight.counts.items():
            before = self._last.counts.get(name, Counts())
            failed = now.connect_failures - before.connect_failures
            worked = now.success > before.success
            self._row[name] = failed if worked else self._row.get(name, 0) + failed

    def _of(self, name: str, now: Counts) -> ReleaseHealth:
        base = self._base.get(name, Counts())
        answers = max(0, now.success + now.error - base.success - base.error)
        if now.success > base.success:
            self._worked.add(name)
        return ReleaseHealth(
            answers=answers,
            failures=0 if name in self._worked else min(answers, FIRST_ANSWERS),
            connection_failures=max(0, self._row.get(name, 0)),
        )


# --- our own proxies ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProxyAnswer:
    """What one of our proxies tells about a channel."""

    status: RouteStatus
    health: Mapping[str, ReleaseHealth]


_answer = TypeAdapter(ProxyAnswer)


class ProxyDataPlane:
    """Our proxies that follow the route, asked for their status."""

    def __init__(self, cluster: Cluster, place: KubernetesServing) -> None:
        """Ask the proxies in the namespace of `place`."""
        self._cluster = cluster
        self._place = place

    def look(self, environment: str, model: str, route: Object) -> DataPlaneSight | None:
        """Return the counts of all proxies together."""
        pods, _ = self._cluster.list(POD, self._place.namespace, labels=owned(PROXY))
        running = [pod for pod in pods if is_ready(pod)]
        if not running:
            log.warning("No proxy is ready in namespace %s", self._place.namespace)
            return None
        urls = {}
        for pod in running:
            where = address(pod, port_of(pod, STATUS_PORT, DEFAULT_STATUS_PORT))
            urls[pod["metadata"]["uid"]] = f"http://{where}/-/status/{environment}/{model}"
        pages = fetch_all(urls)
        if pages is None:
            return None
        try:
            answers = [_answer.validate_json(page) for page in pages.values()]
        except ValidationError as error:
            log.warning("A proxy's answer makes no sense: %s", error)
            return None
        return proxies_sight(answers)


def proxies_sight(answers: Sequence[ProxyAnswer]) -> DataPlaneSight | None:
    """Return what several proxies say; None while they do not have the same weights."""
    weights = dict(answers[0].status.weights)
    if any(dict(answer.status.weights) != weights for answer in answers):
        return None
    names = dict.fromkeys(name for answer in answers for name in answer.status.traffic)
    none = ReleaseTraffic(0, 0, 0)
    traffic = {}
    for name in names:
        of_each = [answer.status.traffic.get(name, none) for answer in answers]
        traffic[name] = ReleaseTraffic(
            sum(one.arrivals for one in of_each),
            sum(one.errors for one in of_each),
            sum(one.in_flight for one in of_each),
            _joint_servers([one.servers for one in of_each]),
        )
    return DataPlaneSight(
        epoch=short(digest(sorted(answer.status.epoch for answer in answers))),
        traffic=traffic,
        weights=weights,
        health={
            name: _joint_health([a.health.get(name, ReleaseHealth()) for a in answers])
            for name in dict.fromkeys(name for answer in answers for name in answer.health)
        },
    )


def _joint_servers(of_each: Sequence[Mapping[str, ServerTraffic]]) -> dict[str, ServerTraffic]:
    names = dict.fromkeys(name for servers in of_each for name in servers)
    none = ServerTraffic(0, 0, 0, 0, 0)
    found = {}
    for name in names:
        mine = [servers.get(name, none) for servers in of_each]
        found[name] = ServerTraffic(
            sum(one.ended for one in mine),
            sum(one.errors for one in mine),
            _sum([one.arrivals for one in mine]),
            _sum([one.unanswered for one in mine]),
            _sum([one.refused for one in mine]),
        )
    return found


def _sum(figures: Sequence[int | None]) -> int | None:
    """Return the sum; None if a proxy of an older version does not count it."""
    known = [figure for figure in figures if figure is not None]
    return sum(known) if len(known) == len(figures) else None


def _joint_health(of_each: Sequence[ReleaseHealth]) -> ReleaseHealth:
    all_failed = all(one.failures == min(one.answers, FIRST_ANSWERS) for one in of_each)
    return ReleaseHealth(
        answers=sum(one.answers for one in of_each),
        failures=sum(one.failures for one in of_each) if all_failed else 0,
        connection_failures=max(one.connection_failures for one in of_each),
    )


# --- pods -----------------------------------------------------------------------------------------


def is_ready(pod: Object) -> bool:
    """Tell whether a pod may get requests."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    status = pod.get("status") or {}
    conditions: Iterable[Mapping[str, Any]] = status.get("conditions") or ()
    return bool(status.get("podIP")) and any(
        each.get("type") == "Ready" and each.get("status") == "True" for each in conditions
    )


def port_of(pod: Object, name: str, default: int) -> int:
    """Return a named port of a pod; of an adopted one, where it serves."""
    adopted = (pod["metadata"].get("annotations") or {}).get(PORT)
    if adopted is not None and name == PORT_NAME:
        return int(adopted)
    for container in (pod.get("spec") or {}).get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("name") == name:
                return int(port["containerPort"])
    return default


def address(pod: Object, port: int) -> str:
    """Return host and port, as in a URL."""
    host = pod["status"]["podIP"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def fetch_all(urls: Mapping[str, str]) -> dict[str, str] | None:
    """Return all pages, or None if one of them could not be had."""

    def fetch(url: str) -> str | None:
        try:
            response = client.get(url)
            response.raise_for_status()
        except httpx.HTTPError as error:
            log.warning("%s does not answer: %s", url, error)
            return None
        return response.text

    with (
        httpx.Client(timeout=ASK_TIMEOUT_S, trust_env=False) as client,
        ThreadPoolExecutor(min(_MOST_AT_ONCE, len(urls))) as pool,
    ):
        pages = dict(zip(urls, pool.map(fetch, urls.values()), strict=True))
    found = {name: page for name, page in pages.items() if page is not None}
    return found if len(found) == len(urls) else None
