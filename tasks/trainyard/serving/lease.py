"""The lease of a rollout on one machine: a file that its driver renews.

A lease carries its end on two clocks. The monotonic clock of the machine decides as long as the
machine has not been restarted, so setting the wall clock neither ends nor revives a lease. After a
restart, monotonic times of before mean nothing and the wall clock decides. Monotonic time stands
still while a machine sleeps: a lease outlives a sleep by what was left of it, and so does the
rollout's driver, which slept as long.

The channel, not the lease, says who may drive: the last to renew has the lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from trainyard.documents.base import Frozen
from trainyard.serving.protocol import LeaseSight
from trainyard.serving.protocol import LeaseState as LeaseState
from trainyard.serving.records import ServingPaths, may_write, read_record, write_record
from trainyard.settings import Settings
from trainyard.store.disk import boot_id


class LeaseRecord(Frozen):
    """What a lease's file says."""

    holder: str
    duration_s: float
    ends_wall: float
    """Seconds since 1970."""
    ends_monotonic: float
    """Seconds of `time.monotonic`, which all processes of the machine share."""
    boot_id: str
    """The machine's present run; empty where the system does not tell."""


class FileLease:
    """The `Lease` of the local platform."""

    def __init__(
        self,
        settings: Settings,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep leases in the home that `settings` names; clocks in seconds."""
        self._paths = ServingPaths.of(settings)
        self._wall = wall
        self._monotonic = monotonic
        self._boot_id = boot_id()

    def renew(self, environment: str, model: str, *, holder: str, duration_s: float) -> None:
        """Say that `holder` drives the rollout for another `duration_s`."""
        record = LeaseRecord(
            holder=holder,
            duration_s=duration_s,
            ends_wall=self._wall() + duration_s,
            ends_monotonic=self._monotonic() + duration_s,
            boot_id=self._boot_id,
        )
        write_record(self._paths.lease(environment, model), record)

    def release(self, environment: str, model: str, *, holder: str) -> None:
        """End the lease, if `holder` has it."""
        path = self._paths.lease(environment, model)
        record = read_record(path, LeaseRecord)
        if record is not None and record.holder == holder:
            path.unlink(missing_ok=True)

    def age_s(self, environment: str, model: str) -> float | None:
        """Return the seconds since the lease was renewed; None if there is none."""
        record = read_record(self._paths.lease(environment, model), LeaseRecord)
        if record is None:
            return None
        left_s = seconds_left(
            record, wall=self._wall(), monotonic=self._monotonic(), boot=self._boot_id
        )
        return record.duration_s - left_s

    def state(self, environment: str, model: str) -> LeaseState:
        """Tell whether somebody holds the lease now."""
        return self.look(environment, model).state

    def look(self, environment: str, model: str) -> LeaseSight:
        """Return whether somebody drives the rollout, as far as its lease tells."""
        path = self._paths.lease(environment, model)
        record = read_record(path, LeaseRecord)
        wall, monotonic = self._wall(), self._monotonic()
        state = lease_state(record, wall=wall, monotonic=monotonic, boot=self._boot_id)
        if record is None:
            return LeaseSight(state, may_renew=may_write(path))
        return LeaseSight(
            state,
            record.holder,
            f"{record.boot_id} {record.ends_monotonic}",
            may_renew=may_write(path),
            left_s=seconds_left(record, wall=wall, monotonic=monotonic, boot=self._boot_id),
        )


def lease_state(
    record: LeaseRecord | None, *, wall: float, monotonic: float, boot: str
) -> LeaseState:
    """Judge a lease at a moment that is given on both clocks, in seconds."""
    if record is None:
        return "absent"
    left_s = seconds_left(record, wall=wall, monotonic=monotonic, boot=boot)
    # More than it was given can only come from a clock that was set back.
    return "alive" if 0 < left_s <= record.duration_s else "expired"


def seconds_left(record: LeaseRecord, *, wall: float, monotonic: float, boot: str) -> float:
    """Return how long a lease still holds, by the clock that counts; negative once it is over."""
    if record.boot_id and record.boot_id == boot:
        return record.ends_monotonic - monotonic
    return record.ends_wall - wall
