"""Reads the counters of vLLM servers from their Prometheus pages.

==========================================  ========  ==============================================
family                                      as        remark
==========================================  ========  ==============================================
`vllm:time_to_first_token_seconds`          `ttft`    one observation a request
`vllm:request_time_per_output_token_…`      `tpot`    one observation a request; newer servers
`vllm:inter_token_latency_seconds`          `tpot`    one observation an output event; servers
                                                      without the family above
`vllm:time_per_output_token_seconds`        `tpot`    the old name of the latter
`vllm:request_success_total`                requests  only together with one of the latter two
==========================================  ========  ==============================================
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from trainyard.documents.look import Histogram, PodCounters
from trainyard.serving.protocol import ServerStatus

log = logging.getLogger(__name__)

TTFT = "vllm:time_to_first_token_seconds"
TPOT_PER_REQUEST = "vllm:request_time_per_output_token_seconds"
TPOT_PER_EVENT = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
FINISHED = "vllm:request_success"

SCRAPE_TIMEOUT_S = 3.0
"""Seconds for one page. A server under load answers late; a slice without it is only missing."""

_MOST_AT_ONCE = 16


class MetricReader(Protocol):
    """Reads servers' counters."""

    def read(self, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        """Return the counters of those servers that could be read."""


class HttpMetricReader:
    """Scrapes `/metrics` of vLLM servers."""

    def __init__(self, *, timeout_s: float = SCRAPE_TIMEOUT_S) -> None:
        """Give up on a page after `timeout_s`."""
        self._timeout_s = timeout_s

    def read(self, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        """Return the counters of those servers that could be read, all at about the same time."""
        known = [server for server in servers if server.url]
        if not known:
            return ()
        with (
            httpx.Client(timeout=self._timeout_s, trust_env=False) as client,
            ThreadPoolExecutor(min(_MOST_AT_ONCE, len(known))) as pool,
        ):
            found = pool.map(lambda server: self._read_one(client, server), known)
            return tuple(pod for pod in found if pod is not None)

    def _read_one(self, client: httpx.Client, server: ServerStatus) -> PodCounters | None:
        try:
            response = client.get(f"{server.url}/metrics")
            response.raise_for_status()
            return parse_counters(response.text, server)
        except (httpx.HTTPError, ValueError, LookupError, OverflowError) as error:
            log.warning("The metrics of %s cannot be read: %s", server.name, error)
            return None


def parse_counters(text: str, server: ServerStatus) -> PodCounters:
    """Return the counters on a Prometheus page.

    Raises:
        ValueError, LookupError, OverflowError: the page is no Prometheus text of the form that
            histograms have, or a counter is no finite number.
    """
    families = {family.name: family for family in text_string_to_metric_families(text)}
    tpot = _histogram(families.get(TPOT_PER_REQUEST))
    requests = None
    if tpot is None:
        tpot = next(filter(None, (_histogram(families.get(name)) for name in TPOT_PER_EVENT)), None)
        requests = _counter(families.get(FINISHED)) if tpot is not None else None
        if requests is None:
            tpot = None
    return PodCounters(
        pod=server.name,
        release_id=server.release_id,
        started_at=server.started_at,
        ttft=_histogram(families.get(TTFT)),
        tpot=tpot,
        tpot_requests=requests,
    )


def _histogram(family: Metric | None) -> Histogram | None:
    """Return a histogram, summed over all label sets (engines)."""
    if family is None:
        return None
    count = _sum(s.value for s in family.samples if s.name.endswith("_count"))
    total = [s.value for s in family.samples if s.name.endswith("_sum")]
    buckets: dict[str, int] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            label = sample.labels["le"]
            buckets[label] = buckets.get(label, 0) + int(sample.value)
    if not total:
        return None
    return Histogram(count=count, total=sum(total), buckets=buckets)


def _counter(family: Metric | None) -> int | None:
    if family is None:
        return None
    return _sum(s.value for s in family.samples if s.name.endswith("_total"))


def _sum(values: Iterable[float]) -> int:
    return int(sum(values))
