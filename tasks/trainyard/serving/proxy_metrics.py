"""What the proxy tells Prometheus at `/-/metrics`. All series carry environment, model, release."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trainyard.serving.protocol import GuardState
from trainyard.serving.route import Outcome, Route

_LABELS = ("environment", "model", "release")
_GUARD_STATES: tuple[GuardState, ...] = ("following", "lease_expired", "fuse", "failover")
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
_REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class ReleaseMetrics:
    """The series of one release, looked up once."""

    outcomes: Mapping[Outcome, Counter]
    pinned: Counter
    in_flight: Gauge
    ttft: Histogram
    duration: Histogram

    def ended(self, outcome: Outcome) -> None:
        """Count how a request ended."""
        self.outcomes[outcome].inc()


class ProxyMetrics:
    """All series of one proxy, in a registry of its own."""

    def __init__(self) -> None:
        """Begin with empty series."""
        self._registry = CollectorRegistry()
        self._releases: dict[tuple[str, str, str], ReleaseMetrics] = {}
        self._requests = Counter(
            "trainyard_proxy_requests",
            "Requests that ended, by outcome: ok, refused (4xx), busy (408, 429), error, "
            "unreachable, unanswered (the client left before the first byte), cancelled (later).",
            (*_LABELS, "outcome"),
            registry=self._registry,
        )
        self._pinned = Counter(
            "trainyard_proxy_pinned_requests",
            "Requests that named their track themselves; in no other series.",
            _LABELS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "trainyard_proxy_requests_in_flight",
            "Requests that have not ended.",
            _LABELS,
            registry=self._registry,
        )
        self._ttft = Histogram(
            "trainyard_proxy_time_to_first_token_seconds",
            "From a request's arrival to the first bytes of its streamed answer.",
            _LABELS,
            buckets=_TTFT_S,
            registry=self._registry,
        )
        self._duration = Histogram(
            "trainyard_proxy_request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            _LABELS,
            buckets=_REQUEST_S,
            registry=self._registry,
        )
        self._weight = Gauge(
            "trainyard_proxy_weight_percent",
            "Share of the traffic, as in effect.",
            _LABELS,
            registry=self._registry,
        )
        self._lease_age = Gauge(
            "trainyard_proxy_lease_age_seconds",
            "Since the rollout's driver renewed its lease; absent without a lease.",
            ("environment", "model"),
            registry=self._registry,
        )
        self._guard = Gauge(
            "trainyard_proxy_guard_state",
            "1 for what the guard does now, 0 for the other states.",
            ("environment", "model", "state"),
            registry=self._registry,
        )

    def of(self, environment: str, model: str, release: str) -> ReleaseMetrics:
        """Return the series of a release."""
        key = (environment, model, release)
        found = self._releases.get(key)
        if found is None:
            found = self._releases[key] = ReleaseMetrics(
                outcomes={each: self._requests.labels(*key, each) for each in get_args(Outcome)},
                pinned=self._pinned.labels(*key),
                in_flight=self._in_flight.labels(*key),
                ttft=self._ttft.labels(*key),
                duration=self._duration.labels(*key),
            )
        return found

    def text(self, routes: Iterable[Route]) -> bytes:
        """Return everything in Prometheus' text format."""
        self._weight.clear()
        self._guard.clear()
        self._lease_age.clear()
        for route in routes:
            self._show(route.environment, route.model, route.decision.weights, route.decision.guard)
            if route.lease_age_s is not None:
                self._lease_age.labels(route.environment, route.model).set(route.lease_age_s)
        return generate_latest(self._registry)

    def _show(
        self, environment: str, model: str, weights: Mapping[str, int], guard: GuardState
    ) -> None:
        for release, weight in weights.items():
            self._weight.labels(environment, model, release).set(weight)
        for state in _GUARD_STATES:
            self._guard.labels(environment, model, state).set(state == guard)
