"""What the cluster's guard tells Prometheus, and whether it works, over HTTP.

::

    /healthz   200 while it looks at everything again and again
    /readyz    200 once it has seen everything
    /metrics   the series below
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    generate_latest,
)

from trainyard.serving.guard import RouteDecision
from trainyard.serving.kubernetes.listening import listen
from trainyard.serving.protocol import GuardState

log = logging.getLogger(__name__)

_STATES: tuple[GuardState, ...] = ("following", "lease_expired", "fuse", "failover")


class MetricsPage(Protocol):
    """Something that has a page of metrics."""

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""


class GuardMetrics:
    """All series of one guard, in a registry of its own."""

    def __init__(self) -> None:
        """Begin with empty series."""
        self._registry = CollectorRegistry()
        self.leads = Gauge(
            "trainyard_guard_leads", "1 for the guard that leads.", registry=self._registry
        )
        self.store_age = Gauge(
            "trainyard_guard_store_age_seconds",
            "Since the store was last read.",
            registry=self._registry,
        )
        self.api_age = Gauge(
            "trainyard_guard_api_age_seconds",
            "Since the cluster's API last told anything about routes, leases or pods.",
            registry=self._registry,
        )
        self.patches = Counter(
            "trainyard_guard_patches",
            "Changes of routes, by outcome: done, conflict (planned again), failed.",
            ("outcome",),
            registry=self._registry,
        )
        self._weight = Gauge(
            "trainyard_guard_weight_percent",
            "Share of the traffic that the guard decided on.",
            ("environment", "model", "release"),
            registry=self._registry,
        )
        self._state = Gauge(
            "trainyard_guard_state",
            "1 for what the guard does now, 0 for the other states.",
            ("environment", "model", "state"),
            registry=self._registry,
        )
        self._lease_age = Gauge(
            "trainyard_guard_lease_age_seconds",
            "Since the rollout's driver was last seen to renew its lease; absent without a lease.",
            ("environment", "model"),
            registry=self._registry,
        )
        self._releases: dict[tuple[str, str], set[str]] = {}

    def show(
        self, channel: tuple[str, str], decision: RouteDecision, lease_age_s: float | None
    ) -> None:
        """Take over what was decided for a channel, and how old its lease is."""
        if lease_age_s is not None:
            self._lease_age.labels(*channel).set(lease_age_s)
        elif channel in self._releases:
            with contextlib.suppress(KeyError):
                self._lease_age.remove(*channel)
        for release in self._releases.get(channel, set()) - set(decision.weights):
            self._weight.remove(*channel, release)
        self._releases[channel] = set(decision.weights)
        for release, weight in decision.weights.items():
            self._weight.labels(*channel, release).set(weight)
        for state in _STATES:
            self._state.labels(*channel, state).set(state == decision.guard)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


def serve_pages(
    host: str, port: int, metrics: MetricsPage, checks: Mapping[str, Callable[[], bool]]
) -> ThreadingHTTPServer:
    """Answer in threads until `shutdown` of what is returned.

    Args:
        host: to listen on.
        port: to listen on; 0 chooses a free one.
        metrics: for `/metrics`.
        checks: by path.
    """

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer a request."""
            check = checks.get(self.path)
            if self.path == "/metrics":
                self._answer(HTTPStatus.OK, metrics.text(), CONTENT_TYPE_LATEST)
            elif check is None:
                self._answer(HTTPStatus.NOT_FOUND, b"not found\n")
            elif check():
                self._answer(HTTPStatus.OK, b"ok\n")
            else:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"not now\n")

        def _answer(self, status: HTTPStatus, body: bytes, content: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep probes out of the log."""

    sock = listen(host, port)
    server = ThreadingHTTPServer(sock.getsockname()[:2], Pages, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    threading.Thread(target=server.serve_forever, name="pages", daemon=True).start()
    return server
