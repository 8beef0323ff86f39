"""Errors of accelerators that end a rollout. Pure.

Only "more than before" counts, and only where there was a before: neuron-monitor's exporter has no
series while nobody uses a device, and "absent" is no data. What corrects itself (`transient`,
corrected ECC events) is no reason.

Errors of a release's own processes speak against it, unless stable's processes have them as well.
Broken hardware under the candidate speaks against the machine: the traffic goes back all the same,
but the release may come again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainyard.documents.look import DeviceCounters, Snapshot

RELEASE_ERRORS = tuple(f"execution/{kind}" for kind in ("generic", "numerical", "model", "runtime"))
"""Errors of executions that a release can cause."""

HARDWARE_ERRORS = (
    "execution/hardware",
    "ecc/mem_ecc_uncorrected",
    "ecc/sram_ecc_uncorrected",
)
"""Errors that it cannot cause."""

_Owner = tuple[str, str]
"""Node and release id; the latter is empty for the devices themselves."""


@dataclass(frozen=True)
class DeviceTrouble:
    """Why the candidate must not keep its traffic."""

    reason: str
    against_release: bool


def device_trouble(
    snapshots: Sequence[Snapshot], *, candidate: str, stable: str
) -> DeviceTrouble | None:
    """Return what the devices of the candidate had since the rollout began, if it is a reason.

    Args:
        snapshots: all of the rollout, oldest first.
        candidate: the release under test.
        stable: what it is compared with.
    """
    more = _increases(snapshots)
    of = {
        release_id: _sum(errors for (_, owner), errors in more.items() if owner == release_id)
        for release_id in (candidate, stable)
    }
    own = [name for name in RELEASE_ERRORS if of[candidate][name] and not of[stable][name]]
    if own:
        told = ", ".join(f"{of[candidate][name]} {name.partition('/')[2]}" for name in own)
        return DeviceTrouble(
            f"Executions of {candidate} failed on its devices ({told}), none of {stable} did so.",
            against_release=True,
        )
    nodes = {pod.node for shot in snapshots for pod in shot.pods if pod.release_id == candidate}
    broken = {
        place: [name for name in HARDWARE_ERRORS if errors[name]]
        for (place, owner), errors in more.items()
        if place in nodes and owner in ("", candidate)
    }
    for place in sorted(place for place, names in broken.items() if names):
        names = ", ".join(name.replace("/", " ") for name in broken[place])
        return DeviceTrouble(
            f"A device of {place}, where {candidate} runs, is broken ({names}).",
            against_release=False,
        )
    return None


def _increases(snapshots: Sequence[Snapshot]) -> Mapping[_Owner, Mapping[str, int]]:
    found: dict[_Owner, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    seen: dict[_Owner, list[DeviceCounters]] = defaultdict(list)
    for snapshot in snapshots:
        for counters in snapshot.devices:
            seen[counters.place, counters.release_id].append(counters)
    for owner, rows in seen.items():
        for before, after in pairwise(rows):
            for name, value in after.errors.items():
                old = before.errors.get(name, 0)
                # A counter that is lower was cleared; what it shows has come since.
                found[owner][name] += value - old if value >= old else value
    return found


def _sum(parts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    total: dict[str, int] = defaultdict(int)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return total
