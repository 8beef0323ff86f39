"""When there are probes. Pure.

A server's own counters do not tell probes from users' requests, and the two are not alike: at a
small weight most of what the candidate answers would be probes, while most of what stable answers
would be users'. So probes have slices to themselves. In a slice with probes, users' latencies have
no rows, and the slices between are free of probes: one with, one without, and so on.

Figures that somebody else reads off the servers (a Prometheus) are older than the look. There the
figures at the beginning of a slice without probes must not be from before, so some slices of rest
lie between, and both kinds come several at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from trainyard.spec.metrics import MetricsSource

_REST_OF_SLICE = 0.2
"""Part of the last slice with probes in which none are sent, so that they come to their end."""


@dataclass(frozen=True)
class Windows:
    """Which slices have probes."""

    block_s: float
    """Length of a slice."""
    lag_s: float = 0.0
    """How much older than a look its figures may be."""

    @property
    def resting(self) -> int:
        """How many slices lie between those with probes and those for users."""
        return ceil(self.lag_s / self.block_s)

    @property
    def each(self) -> int:
        """How many slices of either kind there are in a row."""
        return 1 + self.resting

    @property
    def period(self) -> int:
        """After how many slices it begins again."""
        return 2 * self.each + self.resting

    @property
    def pace(self) -> float:
        """How much faster than on average probes are sent where there are any."""
        return self.period / (self.each - _REST_OF_SLICE)

    @property
    def users_share(self) -> float:
        """Share of the slices in which users' latencies count."""
        return self.each / self.period

    def has_probes(self, slot: int) -> bool:
        """Tell whether a slice has probes."""
        return slot % self.period < self.each

    def is_for_users(self, slot: int) -> bool:
        """Tell whether users' latencies count in a slice."""
        return slot % self.period >= self.each + self.resting

    def sending_s(self, slot: int, left_s: float, *, slowest_s: float = 0.0) -> float:
        """Return for how many seconds from now on probes may be sent; 0: not now.

        Args:
            slot: number of the present slice.
            left_s: seconds to its end.
            slowest_s: how long answers take; they must have ended when the slices with probes do.
                However slow they are, some are sent, or nobody would know when they are fast again.
        """
        if not self.has_probes(slot):
            return 0.0
        left_s += (self.each - 1 - slot % self.period) * self.block_s
        least, most = _REST_OF_SLICE * self.block_s, (1 - _REST_OF_SLICE) * self.block_s
        return max(0.0, left_s - min(most, max(least, 1.5 * slowest_s)))


def lag_s(source: MetricsSource) -> float:
    """Return how much older than a look the figures of a source may be."""
    return source.freshness_s + source.delay_s if source.source == "prometheus" else 0.0
