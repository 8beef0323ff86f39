"""Reads servers' counters from a server with Prometheus' HTTP API.

Three rules, which dashboards may break and judges must not:

* Samples are asked for as they are (`series[45s]`), never through `rate` or `histogram_quantile`.
  Such an answer carries each sample's own moment, so what is old is seen to be old; the answer to
  a plain query would bear the moment of the question.
* The counters of one server are those of one scrape: the newest moment at which all of its series
  have a sample. While a remote write is half through, that is the one before.
* What is missing, old, from before the server's start, no number, or told with a clock that is not
  ours, is missing. It is never zero.

Where two Prometheus servers scrape the same pods and both write here, one of them is taken.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from math import ceil
from ssl import create_default_context
from typing import Any

import httpx

from trainyard.documents.look import DeviceCounters, Histogram, PodCounters
from trainyard.errors import Refused, TrainyardError, Transient
from trainyard.rollout.metrics import Moment
from trainyard.rollout.readers.counters import Sample, pod_counters
from trainyard.rollout.readers.devices import DEVICE_SERIES, device_counters
from trainyard.rollout.readers.families import series_names
from trainyard.rollout.readers.http import answer
from trainyard.rollout.readers.signing import auth_of
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.metrics import MetricsSource

log = logging.getLogger(__name__)

INNER_LABELS = frozenset({"__name__", "le", "engine", "model_name", "finished_reason"})
"""Labels that vLLM itself sets. All others come from whoever scrapes, and are alike in one
scrape of one server."""

MOST_MOMENTS = 480
"""Moments of history: a minute apart over 8 hours."""

LEAST_STEP_S = 30
ALIVE = "vllm:num_requests_running"
"""What every vLLM tells, whatever its version."""
HISTORY_EDGES = 6
HISTORY_SHARE = 0.9
"""Of a histogram's edges, history keeps the lowest `HISTORY_EDGES` that hold more than this share
of the requests: the edge of the tail is among them. Of prompts it keeps none."""

HISTORY_TIMEOUT_FACTOR = 4
"""Hours of samples may take so many times as long as one answer."""


@dataclass(frozen=True)
class Series:
    """One series of an answer."""

    labels: Mapping[str, str]
    values: Mapping[float, float]
    """By moment, in seconds of Unix time."""


class BadAnswer(ValueError):
    """The server said something that a Prometheus does not say."""


class PrometheusReader:
    """Asks one Prometheus about the servers of one environment."""

    def __init__(
        self,
        source: MetricsSource,
        *,
        version_of: Callable[[str], str | None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Use a source whose rules are kept (`trainyard check`); nothing is asked yet.

        Args:
            source: where, and how to ask.
            version_of: the vLLM that serves a release, if known.
            now: our clock.
        """
        assert source.url is not None
        self._source = source
        self._api = f"{source.url.rstrip('/')}/api/v1"
        self._auth = auth_of(source)
        self._version_of = version_of
        self._now = now

    def read(self, environment: str, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        """Return the counters of those servers of which there are fresh samples."""
        if not servers:
            return ()
        now = self._now()
        found = self._ask_now(self._selector(series_names(), servers), now)
        pods = [self._pod(server, found, now) for server in servers]
        return tuple(pod for pod in pods if pod is not None)

    def devices(self, environment: str, pods: Sequence[PodCounters]) -> tuple[DeviceCounters, ...]:
        """Return the errors of devices on the machines of servers that were read."""
        nodes = sorted({pod.node for pod in pods if pod.node})
        if not nodes:
            return ()
        label = self._source.labels.node
        names = _one_of("__name__", DEVICE_SERIES)
        found = self._ask_now(self._matching(names, _one_of(label, nodes)), self._now())
        newest = (
            Sample(one.labels["__name__"], one.labels, one.values[max(one.values)])
            for one in found
            if one.values and "__name__" in one.labels
        )
        return device_counters(newest, self._source.labels, {pod.release_id for pod in pods})

    def history(
        self, environment: str, servers: Sequence[ServerStatus], *, until: datetime
    ) -> tuple[Moment, ...] | None:
        """Return what the servers' counters were over `history_s` before `until`, oldest first.

        None: the server gave no good answer.
        """
        if not servers or self._source.history_s == 0:
            return ()
        step_s = max(LEAST_STEP_S, ceil(self._source.history_s / MOST_MOMENTS))
        form = {
            "query": self._selector(series_names(), servers),
            "start": _seconds(until - timedelta(seconds=self._source.history_s)),
            "end": _seconds(until),
            "step": str(step_s),
        }
        found = self._ask("query_range", form, self._now(), slow=True)
        if found is None:
            return None
        moments: dict[float, list[PodCounters]] = defaultdict(list)
        for server in servers:
            for at_s, pod in self._moments(server, found):
                moments[at_s].append(pod)
        kept = _kept_edges(pod for pods in moments.values() for pod in pods)
        return tuple(
            (_moment(at_s), tuple(_with_edges(pod, kept) for pod in moments[at_s]))
            for at_s in sorted(moments)
        )

    def seen_servers(self) -> int:
        """Return of how many servers, of any release, there are fresh samples.

        Raises:
            Refused: the source does not let us ask.
            Transient: it gave no good answer.
        """
        now, one_a_server = self._now(), self._matching(f"__name__={_quoted(ALIVE)}")
        try:
            found = self._demand("query", self._newest(one_a_server, now), now)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                raise Refused(
                    f"{self._source.url} refuses us (status {status}).",
                    hint=f"Look at metrics.auth ({self._source.auth}) in the environments file, "
                    "and at the token or role of whoever runs this.",
                ) from error
            raise self._unanswered(error) from error
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise self._unanswered(error) from error
        labels = self._source.labels
        both = ((one.labels.get(labels.release), one.labels.get(labels.pod)) for one in found)
        return len({pair for pair in both if all(pair)})

    # --- from answers to counters -----------------------------------------------------------------

    def _pod(
        self, server: ServerStatus, found: Sequence[Series], now: datetime
    ) -> PodCounters | None:
        scrapes = [_last_scrape(group) for group in self._groups(server, found)]
        if not scrapes:
            return None
        at_s, series = max(scrapes, key=lambda scrape: (len(scrape[1]), scrape[0]))
        at = _moment(at_s)
        age_s = (now - at).total_seconds()
        if not -self._source.freshness_s <= age_s <= self._window_s:
            log.warning("The newest figures of %s are %.0f s old.", server.name, age_s)
            return None
        return self._counters(server, series, at_s, read_at=at)

    def _moments(
        self, server: ServerStatus, found: Sequence[Series]
    ) -> Iterator[tuple[float, PodCounters]]:
        """Yield a server's counters, moment by moment; gaps are filled by who else scraped it."""
        known: set[float] = set()
        for group in sorted(self._groups(server, found), key=len, reverse=True):
            moments = {at_s for series in group for at_s in series.values} - known
            known |= moments
            for at_s in sorted(moments):
                series = [one for one in group if at_s in one.values]
                pod = self._counters(server, series, at_s, read_at=None)
                if pod is not None:
                    yield at_s, pod

    def _counters(
        self,
        server: ServerStatus,
        series: Sequence[Series],
        at_s: float,
        *,
        read_at: datetime | None,
    ) -> PodCounters | None:
        if server.started_at is not None and at_s < server.started_at.timestamp():
            return None
        samples = (Sample(one.labels["__name__"], one.labels, one.values[at_s]) for one in series)
        try:
            return pod_counters(
                samples,
                server,
                version=self._version_of(server.release_id),
                read_at=read_at,
                node=series[0].labels.get(self._source.labels.node, ""),
            )
        except (ValueError, LookupError, OverflowError) as error:
            log.warning("The metrics of %s cannot be used: %s", server.name, error)
            return None

    def _groups(self, server: ServerStatus, found: Sequence[Series]) -> list[list[Series]]:
        """Return a server's series, by who scraped them."""
        labels = self._source.labels
        groups: dict[tuple[tuple[str, str], ...], list[Series]] = defaultdict(list)
        for series in found:
            mine = series.labels.get(labels.pod) == server.name
            if mine and series.labels.get(labels.release) == server.release_id and series.values:
                outer = sorted(
                    (name, text) for name, text in series.labels.items() if name not in INNER_LABELS
                )
                groups[tuple(outer)].append(series)
        return [groups[outer] for outer in sorted(groups)]

    # --- asking -----------------------------------------------------------------------------------

    @property
    def _window_s(self) -> float:
        return self._source.freshness_s + self._source.delay_s

    def _selector(self, names: Iterable[str], servers: Sequence[ServerStatus]) -> str:
        releases = sorted({server.release_id for server in servers})
        pods = sorted({server.name for server in servers})
        labels = self._source.labels
        return self._matching(
            _one_of("__name__", names), _one_of(labels.release, releases), _one_of(labels.pod, pods)
        )

    def _matching(self, *matchers: str) -> str:
        more = (f"{name}={_quoted(text)}" for name, text in sorted(self._source.match.items()))
        return "{" + ",".join((*matchers, *more)) + "}"

    def _newest(self, selector: str, now: datetime) -> dict[str, str]:
        """Return the form that asks for the samples that are fresh enough."""
        return {"query": f"{selector}[{ceil(self._window_s)}s]", "time": _seconds(now)}

    def _ask_now(self, selector: str, now: datetime) -> list[Series]:
        return self._ask("query", self._newest(selector, now), now) or []

    def _ask(
        self, path: str, form: Mapping[str, str], now: datetime, *, slow: bool = False
    ) -> list[Series] | None:
        """Return the series of an answer; None if there is no good one."""
        try:
            return self._demand(path, form, now, slow=slow)
        except (httpx.HTTPError, OSError, ValueError, TrainyardError) as error:
            log.warning("%s", self._unanswered(error))
            return None

    def _unanswered(self, error: Exception) -> Transient:
        return Transient(f"{self._source.url} cannot be asked: {error}")

    def _demand(
        self, path: str, form: Mapping[str, str], now: datetime, *, slow: bool = False
    ) -> list[Series]:
        """Return the series of an answer.

        Raises:
            httpx.HTTPError, OSError, BadAnswer, TrainyardError: there is no good one.
        """
        timeout_s = self._source.timeout_s * (HISTORY_TIMEOUT_FACTOR if slow else 1)
        verify: Any = True
        if self._source.ca_file is not None:
            verify = create_default_context(cafile=self._source.ca_file)
        # Proxies of the environment lead out of a cluster, not around in it.
        with httpx.Client(verify=verify, trust_env=self._source.auth == "sigv4") as client:
            url = f"{self._api}/{path}"
            response, body = answer(client, url, timeout_s=timeout_s, form=form, auth=self._auth)
        self._demand_our_time(response, now)
        return parse_matrix(body)

    def _demand_our_time(self, response: httpx.Response, now: datetime) -> None:
        """Refuse an answer of a server whose clock is not ours: moments cannot be compared."""
        told = response.headers.get("Date")
        if told is None:
            return
        apart_s = abs((parsedate_to_datetime(told) - now).total_seconds())
        if apart_s > max(self._source.freshness_s, self._source.timeout_s):
            raise BadAnswer(f"its clock and ours are {apart_s:.0f} s apart")


def parse_matrix(body: bytes) -> list[Series]:
    """Return the series of an answer to a query for samples.

    Raises:
        BadAnswer: it is no such answer, or says that something went wrong.
    """
    try:
        told = json.loads(body)
        if told["status"] != "success":
            raise BadAnswer(f"{told.get('errorType', 'error')}: {told.get('error', 'no reason')}")
        if told["data"]["resultType"] != "matrix":
            raise BadAnswer(f"a {told['data']['resultType']} in place of samples")
        return [
            Series(
                labels={str(name): str(text) for name, text in series["metric"].items()},
                values={float(at_s): float(text) for at_s, text in series.get("values", ())},
            )
            for series in told["data"]["result"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, BadAnswer):
            raise
        raise BadAnswer(f"no answer of a Prometheus ({type(error).__name__})") from error


def _last_scrape(group: Sequence[Series]) -> tuple[float, list[Series]]:
    """Return the newest moment at which all series that are alive have a sample, and those."""
    together: dict[float, int] = defaultdict(int)
    for series in group:
        for at_s in series.values:
            together[at_s] += 1
    at_s = max(together, key=lambda moment: (together[moment], moment))
    return at_s, [series for series in group if at_s in series.values]


def _kept_edges(pods: Iterable[PodCounters]) -> frozenset[str]:
    """Return the edges that history keeps."""
    newest: dict[str, Histogram] = {}
    for pod in pods:
        if pod.ttft is not None and (pod.pod not in newest or _is_later(pod.ttft, newest[pod.pod])):
            newest[pod.pod] = pod.ttft
    count = sum(histogram.count for histogram in newest.values())
    within: dict[str, int] = defaultdict(int)
    for histogram in newest.values():
        for label, number in histogram.buckets.items():
            within[label] += number
    edges = [label for label, number in within.items() if number > HISTORY_SHARE * count]
    return frozenset(sorted(edges, key=float)[:HISTORY_EDGES])


def _is_later(one: Histogram, other: Histogram) -> bool:
    return one.count >= other.count


def _with_edges(pod: PodCounters, kept: frozenset[str]) -> PodCounters:
    if pod.prompts is not None:
        pod = pod.model_copy(update={"prompts": pod.prompts.model_copy(update={"buckets": {}})})
    if pod.ttft is None:
        return pod
    buckets = {label: number for label, number in pod.ttft.buckets.items() if label in kept}
    return pod.model_copy(update={"ttft": pod.ttft.model_copy(update={"buckets": buckets})})


def _one_of(label: str, texts: Iterable[str]) -> str:
    return f"{label}=~{_quoted('|'.join(re.escape(text) for text in texts))}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _seconds(moment: datetime) -> str:
    return f"{moment.timestamp():.3f}"


def _moment(at_s: float) -> datetime:
    return datetime.fromtimestamp(at_s, UTC)
