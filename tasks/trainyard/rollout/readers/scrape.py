"""Reads the Prometheus pages of vLLM servers, straight from the servers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import httpx
from prometheus_client.parser import text_string_to_metric_families

from trainyard.documents.look import DeviceCounters, PodCounters
from trainyard.rollout.metrics import Moment
from trainyard.rollout.readers.counters import Sample, pod_counters
from trainyard.rollout.readers.families import series_names
from trainyard.rollout.readers.http import answer
from trainyard.serving.protocol import ServerStatus

log = logging.getLogger(__name__)

SCRAPE_TIMEOUT_S = 3.0
"""Seconds for one page. A server under load answers late; a slice without it is only missing."""

_MOST_AT_ONCE = 16


def _unknown(release_id: str) -> str | None:
    return None


class HttpMetricReader:
    """Scrapes `/metrics` of vLLM servers."""

    def __init__(
        self,
        *,
        timeout_s: float = SCRAPE_TIMEOUT_S,
        version_of: Callable[[str], str | None] = _unknown,
    ) -> None:
        """Give up on a page after `timeout_s`; ask `version_of` for the vLLM of a release."""
        self._timeout_s = timeout_s
        self._version_of = version_of

    def read(self, environment: str, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        """Return the counters of those servers that could be read, all at about the same time."""
        known = [server for server in servers if server.url]
        if not known:
            return ()
        with (
            httpx.Client(trust_env=False) as client,
            ThreadPoolExecutor(min(_MOST_AT_ONCE, len(known))) as pool,
        ):
            found = pool.map(lambda server: self._read_one(client, server), known)
            return tuple(pod for pod in found if pod is not None)

    def devices(self, environment: str, pods: Sequence[PodCounters]) -> tuple[DeviceCounters, ...]:
        """Return nothing: servers' own pages say nothing about devices."""
        return ()

    def history(
        self, environment: str, servers: Sequence[ServerStatus], *, until: datetime
    ) -> tuple[Moment, ...] | None:
        """Return nothing: servers' own pages speak about now only."""
        return ()

    def _read_one(self, client: httpx.Client, server: ServerStatus) -> PodCounters | None:
        try:
            _, page = answer(client, f"{server.url}/metrics", timeout_s=self._timeout_s)
            return parse_counters(
                page.decode(), server, version=self._version_of(server.release_id)
            )
        except (httpx.HTTPError, ValueError, LookupError, OverflowError) as error:
            log.warning("The metrics of %s cannot be read: %s", server.name, error)
            return None


def parse_counters(text: str, server: ServerStatus, *, version: str | None = None) -> PodCounters:
    """Return the counters on a Prometheus page.

    Raises:
        ValueError, LookupError, OverflowError: the page is no Prometheus text of the form that
            histograms have, or a counter is no finite number.
    """
    return pod_counters(_samples(text), server, version=version)


def _samples(text: str) -> Iterator[Sample]:
    wanted = frozenset(series_names())
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in wanted:
                yield Sample(sample.name, sample.labels, sample.value)
