"""Serves the metrics, and looks at the store between scrapes.

::

    /healthz   200 while it looks at the store again and again
    /readyz    200 once it has seen the store
    /metrics   the figures of the last look that did not fail
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from trainyard.errors import TrainyardError
from trainyard.metrics.figures import Seen, families
from trainyard.metrics.reader import MetricsReader
from trainyard.serving.kubernetes.guard_metrics import serve_pages
from trainyard.serving.records import LOOPBACK
from trainyard.settings import Settings
from trainyard.store.factory import open_store

log = logging.getLogger(__name__)

STALE_AFTER = 10
"""Intervals without a look, failed or not, after which the exporter counts as stuck."""


class _Figures(Collector):
    """Makes the metrics of what was seen."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def collect(self) -> Iterator[Metric]:
        yield from families(self._seen)


def text_of(seen: Seen) -> bytes:
    """Return the page in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(seen))
    return generate_latest(registry)


class Exporter:
    """Looks at a store at intervals, and keeps the page of the last look."""

    def __init__(
        self,
        reader: MetricsReader,
        interval_s: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look at nothing yet; the page is empty."""
        self._reader = reader
        self._interval_s = interval_s
        self._monotonic = monotonic
        self._tried = monotonic()
        self._page = b""

    def run(self, stop: threading.Event) -> None:
        """Look until `stop` is set."""
        while not stop.is_set():
            self.look()
            stop.wait(self._interval_s)

    def look(self) -> bool:
        """Look once; a store that fails now leaves the page as it was, and its time says so."""
        try:
            seen = self._reader.look()
        except (TrainyardError, OSError) as error:
            log.warning("The store cannot be read: %s", error)
            return False
        finally:
            self._tried = self._monotonic()
        self._page = text_of(seen)
        return True

    def text(self) -> bytes:
        """Return the page."""
        return self._page

    @property
    def checks(self) -> Mapping[str, Callable[[], bool]]:
        """What tells its health, by path."""
        return {
            "/healthz": lambda: (
                self._monotonic() - self._tried < max(60.0, STALE_AFTER * self._interval_s)
            ),
            "/readyz": lambda: bool(self._page),
        }


def page_now(settings: Settings) -> bytes:
    """Return the page of one look, for a textfile collector or a person. Raises TrainyardError."""
    return text_of(MetricsReader(open_store(settings)).look())


def run_exporter(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises TrainyardError if the store cannot be opened."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    exporter = Exporter(MetricsReader(open_store(settings)), settings.metrics_interval_s)
    server = serve_pages(
        settings.listen_host or LOOPBACK, settings.metrics_port, exporter, exporter.checks
    )
    host, port = server.server_address[:2]
    log.info("metrics at port %s of %s", port, host)
    try:
        exporter.run(stop)
    finally:
        server.shutdown()
        server.server_close()
