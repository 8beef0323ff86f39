"""The lanes that this version of Trainyard has."""

from __future__ import annotations

from trainyard.errors import BadInput
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.neuron_native import NativeLane
from trainyard.lanes.neuron_nxdi import NxdiLane
from trainyard.lanes.protocol import Lane

_ALL: tuple[Lane, ...] = (CpuLane(), NativeLane(), NxdiLane())
_LANES: dict[str, Lane] = {lane.name: lane for lane in _ALL}


def get_lane(name: str) -> Lane:
    """Return the lane of that name.

    Raises:
        BadInput: this version has no such lane.
    """
    lane = _LANES.get(name)
    if lane is None:
        raise BadInput(
            f"This version of Trainyard has no lane {name!r}.",
            hint=f"Lanes it has: {', '.join(sorted(_LANES))}.",
        )
    return lane
