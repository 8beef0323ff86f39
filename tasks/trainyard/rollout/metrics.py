"""What rollouts ask of whoever reads the servers' counters (`rollout.readers`)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from trainyard.documents.look import DeviceCounters, PodCounters
from trainyard.serving.protocol import ServerStatus

Moment = tuple[datetime, tuple[PodCounters, ...]]
"""Counters of several servers at one moment."""


class MetricReader(Protocol):
    """Reads servers' counters.

    Nothing raises because a source is away, refuses, or tells nonsense: what could not be read is
    missing from the answer, never zero.
    """

    def read(self, environment: str, servers: Sequence[ServerStatus]) -> tuple[PodCounters, ...]:
        """Return the counters of those servers that could be read."""

    def devices(self, environment: str, pods: Sequence[PodCounters]) -> tuple[DeviceCounters, ...]:
        """Return what is known about errors of the accelerators of servers that were read."""

    def history(
        self, environment: str, servers: Sequence[ServerStatus], *, until: datetime
    ) -> tuple[Moment, ...] | None:
        """Return what the servers' counters were over the hours before `until`, oldest first.

        Empty where the source has no memory; None where it cannot be asked now.
        """
