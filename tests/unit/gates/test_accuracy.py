"""Scores are compared with their bounds; whatever is not a score fails."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.yard import measurement

from trainyard.documents.measurement import Measurement, TaskScore
from trainyard.gates.accuracy import accuracy_expectations
from trainyard.gates.expectations import Expectation
from trainyard.spec.model import AccuracyGate, AccuracyTask

share = st.floats(0, 1)


def expectations(
    measured: Measurement, baseline: Measurement | None = None, **task: Any
) -> tuple[Expectation, ...]:
    asked = AccuracyTask(**{"name": "sums", "min": 0.9, **task})
    return accuracy_expectations(AccuracyGate(tasks=(asked,)), measured, baseline)


def scored(*scores: dict[str, Any]) -> Measurement:
    base = {"name": "sums", "metric": "exact_match", "score": 0.97, "samples": 200}
    return measurement(accuracy=tuple(TaskScore(**{**base, **each}) for each in scores))


def test_a_task_expects_its_minimum() -> None:
    (only,) = expectations(measurement(score=0.97))

    assert (only.what, only.observed, only.bound) == ("sums exact_match", 0.97, ">= 0.9")
    assert (only.minimum, only.maximum, only.severity) == (0.9, None, "critical")
    assert only.note == "200 samples, standard error 0.01."


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ((), "no single score"),
        (({"name": "other"},), "no single score"),
        (({"metric": "acc"},), "no single score"),
        (({}, {}), "no single score"),
        (({"samples": 0},), "on no samples"),
        (({"score": 97.0},), "The score is 97, which is not a share of 1."),
        (({"score": -0.1},), "not a share of 1"),
        (({"score": math.nan},), "not a share of 1"),
        (({"score": math.inf},), "not a share of 1"),
    ],
)
def test_what_is_no_score_counts_as_missing(
    scores: tuple[dict[str, Any], ...], reason: str
) -> None:
    (only,) = expectations(scored(*scores))

    assert only.observed is None
    assert reason in only.note
    assert not only.skipped


def test_a_drop_is_measured_from_the_stable_release() -> None:
    _, drop = expectations(measurement(score=0.96), measurement(score=0.97), max_drop=0.02)

    assert drop.bound == ">= stable (0.97) - 0.02"
    assert drop.minimum == 0.95
    assert not drop.skipped


@given(stable=share, allowed=share)
def test_a_score_exactly_at_the_allowed_drop_is_not_below_its_bound(
    stable: float, allowed: float
) -> None:
    _, drop = expectations(measurement(), measurement(score=stable), min=0, max_drop=allowed)

    assert drop.minimum is not None
    assert drop.minimum == pytest.approx(max(0, stable - allowed), abs=1e-9)


def test_rounding_of_the_difference_does_not_fail_a_score_at_its_bound() -> None:
    _, drop = expectations(measurement(score=0.2), measurement(score=0.3), min=0.0, max_drop=0.1)

    assert 0.3 - 0.1 != 0.2
    assert drop.minimum == 0.2


@pytest.mark.parametrize(
    ("baseline", "reason"),
    [
        (None, "no stable release"),
        (scored({"name": "other"}), "was not scored on this task"),
        (scored({"samples": 0}), "no usable score"),
        (scored({"score": math.nan}), "no usable score"),
        (scored({"version": "2"}), "on version 2 of the task, this one on version unknown"),
    ],
)
def test_without_a_comparable_score_the_drop_is_skipped_and_says_why(
    baseline: Measurement | None, reason: str
) -> None:
    minimum, drop = expectations(measurement(), baseline, max_drop=0.02)

    assert not minimum.skipped
    assert reason in drop.skipped
    assert drop.bound == ">= stable - 0.02"


def test_a_missing_score_is_compared_all_the_same() -> None:
    # Skipping it would hide that there is nothing to compare.
    minimum, drop = expectations(scored(), measurement(), max_drop=0.02)

    assert (minimum.observed, drop.observed, drop.skipped) == (None, None, "")
