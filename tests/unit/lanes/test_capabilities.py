"""What the lanes promise, by the settings of a target."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from trainyard.lanes.registry import get_lane
from trainyard.spec.model import BehaviourName, Target


def target(lane: str, **settings: Any) -> Target:
    return Target.model_validate({"name": "target", "lane": lane, **settings})


@pytest.mark.parametrize("lane", ["cpu", "neuron-native", "neuron-nxdi"])
def test_every_lane_says_something_about_every_check(lane: str) -> None:
    for name in get_args(BehaviourName):
        found = get_lane(lane).capability(target(lane), name)
        assert found.ability != "unsupported"
        assert (found.ability == "exact") == (found.why == "")


def test_sampling_on_the_device_of_nxdi_leaves_penalties_out() -> None:
    config = {"on_device_sampling_config": {"do_sample": True}}
    sampling = target("neuron-nxdi", nxdi={"override_neuron_config": config})
    found = get_lane("neuron-nxdi").capability(sampling, "penalties")
    assert found.ability == "unsupported"
    assert "penalties" in found.why
    assert found.source
    other = get_lane("neuron-nxdi").capability(sampling, "batching")
    assert other.ability == "tolerance"
