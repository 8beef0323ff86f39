"""A plan whose pods could not run in the place is refused before it is stored."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit import yard
from tests.unit.kubernetes.step_work import BYTES_OF_8B, NOW, place, target

from trainyard.documents.plan import Plan, PlannedStep
from trainyard.settings import Settings
from trainyard.steps.place import pod_problems

SETTINGS = Settings(store="s3://yard/x")


def plan(lane: str = "neuron-native", *, compiled: bool = False) -> Plan:
    planned = yard.plan().targets[0].model_copy(update={"target": target(lane)})
    name = planned.target.name
    steps = [
        PlannedStep(step="download", key="c", exists=True, reason=""),
        PlannedStep(step="tasks", target=name, key="t", exists=compiled, reason=""),
        PlannedStep(step="compile", target=name, key="b", exists=compiled, reason=""),
        PlannedStep(step="measure", target=name, key="m", exists=compiled, reason=""),
        PlannedStep(step="publish", target=name, key="r", exists=False, reason=""),
    ]
    return yard.plan().model_copy(
        update={
            "targets": (planned,),
            "steps": tuple(steps),
            "checkpoint_bytes": BYTES_OF_8B,
        }
    )


def problems(made: Plan, **changes: Any) -> list[str]:
    return list(pod_problems(made, place(**changes), SETTINGS, now=NOW))


def test_a_place_that_has_everything() -> None:
    assert problems(plan()) == []


def test_a_kind_of_device_that_the_place_does_not_name() -> None:
    (found,) = problems(plan(), slots={"cpu": 1, "inf2": 1})
    assert found.startswith("Target trn2: it computes on trn2, which steps.slots")
    assert "(cpu, inf2)" in found


def test_an_image_that_nobody_named_is_told_for_each_step() -> None:
    found = problems(plan("cpu"), image="")
    assert [each.split(" of ")[0] for each in found] == [
        "Target cpu: No image is named for step tasks",
        "Target cpu: No image is named for step compile",
        "Target cpu: No image is named for step measure",
    ]


def test_a_store_that_no_pod_sees() -> None:
    found = list(pod_problems(plan(), place(), Settings(store="/srv/store"), now=NOW))
    assert len(found) == 3
    assert all("is a folder that no pod sees" in each for each in found)


@pytest.mark.parametrize(("compiled", "count"), [(False, 2), (True, 0)])
def test_a_block_that_ends_too_early_for_what_is_to_be_done(compiled: bool, count: int) -> None:
    block = {
        "id": "cr-01234567",
        "instance": "trn2.48xlarge",
        "ends_at": (NOW + timedelta(hours=2)).isoformat(),
    }
    found = problems(plan(compiled=compiled), reservations=[block])
    assert len(found) == count
    assert all("Capacity Block cr-01234567" in each for each in found)
