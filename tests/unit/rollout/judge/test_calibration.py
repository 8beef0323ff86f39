"""The error rates and the speed of the judge in simulated rollouts, beside fixed thresholds.

The short form has few runs and fixed seeds; the long form (`-m soak`) covers every cell of
`tests/benchmarks/judge_calibration.py`.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from trainyard.documents.evidence import JudgeSpec, default_metrics
from trainyard.rollout.judge import replay

SHORT = 40
LONG = 1000

# The world's noise is worse than the default covariance, so no promise is made about its rates.
BEYOND_THE_MODEL = {"no change, minutes 0.95", "no change, noisy pods"}


def cell(calibration: ModuleType, name: str) -> Any:
    (found,) = (each for each in calibration.CELLS if each.name == name)
    return found


def short(calibration: ModuleType, name: str) -> tuple[Any, Any]:
    ours, fixed = calibration.run(
        cell(calibration, name), calibration.PLANS["10/25/50"], SHORT, seed=1
    )
    return ours, fixed


def test_a_good_release_is_not_rolled_back(calibration: ModuleType) -> None:
    ours, fixed = short(calibration, "no change")
    assert ours.rolled_back == 0
    assert ours.promoted >= 0.7
    assert fixed.rolled_back >= 0.1


def test_a_release_at_the_promotion_margin_is_hardly_ever_promoted(
    calibration: ModuleType,
) -> None:
    ours, _ = short(calibration, "ttft +15 %, promotion margin")
    assert ours.promoted <= 0.1


@pytest.mark.parametrize(
    ("name", "minutes"), [("ttft x3", 3.0), ("ttft +50 %", 10.0), ("errors 5 %", 6.0)]
)
def test_a_bad_release_is_rolled_back_in_time(
    calibration: ModuleType, name: str, minutes: float
) -> None:
    ours, _ = short(calibration, name)
    assert ours.rolled_back == 1
    assert float(np.median(ours.rolled_back_at_s)) / 60 <= minutes


def test_the_benchmark_decides_as_looks_one_by_one_do(calibration: ModuleType) -> None:
    plan = ((10, 120.0), (50, 600.0))
    spec = JudgeSpec(metrics=default_metrics(), max_duration_s=720)
    outcomes = set()
    for number, name in enumerate(("no change", "ttft x3", "errors 30 %", "ttft +30 %")):
        world = cell(calibration, name).world
        blocks = calibration.simulate(
            dataclasses.replace(world, rate=40.0), plan, np.random.default_rng(number)
        )
        decided = [(v.outcome, v.at) for v in replay(blocks, spec) if v.outcome != "UNDECIDED"]
        outcome, at_s, _ = calibration.decide(blocks, spec)
        outcomes.add(outcome)
        assert (decided[0] if decided else ("UNDECIDED", 720.0)) == (outcome, at_s)
    assert "HARM" in outcomes


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_every_cell_keeps_its_error_rates(calibration: ModuleType) -> None:
    for each in calibration.CELLS:
        ours, fixed = calibration.run(each, calibration.PLANS["10/25/50"], LONG, seed=2)
        print(calibration.line(each, ours, fixed), flush=True)
        if each.name in BEYOND_THE_MODEL:
            continue
        if each.truth == "bad":
            assert ours.promoted <= 0.05 + 3 * math.sqrt(0.05 / LONG), each.name
        else:
            assert ours.rolled_back <= 0.01 + 3 * math.sqrt(0.01 / LONG), each.name
