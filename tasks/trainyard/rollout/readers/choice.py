"""The reader that each environment has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from trainyard.documents.look import DeviceCounters, PodCounters
from trainyard.rollout.metrics import MetricReader, Moment
from trainyard.rollout.readers.prometheus import PrometheusReader
from trainyard.rollout.readers.scrape import HttpMetricReader
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.environments import Environment
from trainyard.spec.metrics import MetricsSource


def open_reader(source: MetricsSource, version_of: Callable[[str], str | None]) -> MetricReader:
    """Return the reader of a source; nothing is asked yet."""
    if source.source == "prometheus":
        return PrometheusReader(source, version_of=version_of)
    return HttpMetricReader(version_of=version_of)


class MetricsByEnvironment:
    """The `MetricReader` that uses each environment's own."""

    def __init__(
        self, environments: Mapping[str, Environment], version_of: Callable[[str], str | None]
    ) -> None:
        """Open readers at their first use; ask `version_of` for the vLLM of a release."""
        self._environments = environments
        self._version_of = version_of
        self._readers: dict[str, MetricReader] = {}
        self._guard = threading.Lock()

    def read(self, environment: str, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        """Return the counters of those servers that could be read."""
        return self._of(environment).read(environment, servers)

    def devices(self, environment: str, pods: Sequence[PodCounters]) -> tuple[DeviceCounters, ...]:
        """Return what is known about errors of the accelerators of servers that were read."""
        return self._of(environment).devices(environment, pods)

    def history(
        self, environment: str, servers: Sequence[ServerStatus], *, until: datetime
    ) -> tuple[Moment, ...] | None:
        """Return what the servers' counters were over the hours before `until`, oldest first."""
        return self._of(environment).history(environment, servers, until=until)

    def _of(self, environment: str) -> MetricReader:
        with self._guard:
            if environment not in self._readers:
                known = self._environments.get(environment)
                source = known.metrics if known is not None else MetricsSource()
                self._readers[environment] = open_reader(source, self._version_of)
            return self._readers[environment]
