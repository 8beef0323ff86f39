"""Airflow's pools for scarce devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pool:
    """A pool; deferred tasks count, since their work goes on in a pod or process."""

    name: str
    slots: int
    description: str


POOLS = (
    Pool(
        "trainyard_local_devices",
        1,
        "Compiling and measuring on this machine: one at a time, or the figures are disturbed.",
    ),
)
