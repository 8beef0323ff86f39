"""Scores are compared with their bounds; whatever is not a score fails."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.yard import measurement

from trainyard.documents.measurement import Measurement, TaskScore
from trainyard.documents.parity import (
    Divergence,
    ParityFigures,
    PositionCounts,
    Samples,
    TaskSamples,
)
from trainyard.errors import BadInput
from trainyard.gates.accuracy import Baseline, accuracy_expectations, parity_expectations
from trainyard.gates.expectations import Expectation
from trainyard.spec.model import AccuracyGate, AccuracyTask, Bound, ParityCheck

share = st.floats(0, 1)


def expectations(
    measured: Measurement, baseline: Measurement | None = None, **task: Any
) -> tuple[Expectation, ...]:
    asked = AccuracyTask(**{"name": "sums", "min": 0.9, **task})
    return accuracy_expectations(AccuracyGate(tasks=(asked,)), measured, Baseline(baseline))


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
    _, drop, _ = expectations(measurement(score=0.96), measurement(score=0.97), max_drop=0.02)

    assert drop.bound == ">= stable (0.97) - 0.02"
    assert drop.minimum == 0.95
    assert not drop.skipped


@given(stable=share, allowed=share)
def test_a_score_exactly_at_the_allowed_drop_is_not_below_its_bound(
    stable: float, allowed: float
) -> None:
    _, drop, _ = expectations(measurement(), measurement(score=stable), min=0, max_drop=allowed)

    assert drop.minimum is not None
    assert drop.minimum == pytest.approx(max(0, stable - allowed), abs=1e-9)


def test_rounding_of_the_difference_does_not_fail_a_score_at_its_bound() -> None:
    _, drop, _ = expectations(measurement(score=0.2), measurement(score=0.3), min=0.0, max_drop=0.1)

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


def test_a_first_or_adopted_release_says_why_nothing_is_compared() -> None:
    asked = AccuracyTask(name="sums", min=0.9, max_drop=0.02)
    stable = Baseline(None, None, "The stable release of production was adopted.")
    _, drop = accuracy_expectations(AccuracyGate(tasks=(asked,)), measurement(), stable)

    assert drop.skipped == "The stable release of production was adopted."


def samples(right: int, wrong: int, *, first: int = 0) -> Samples:
    """Return samples of which the first are right."""
    scores = {f"{first + number}-p-t": float(number < right) for number in range(right + wrong)}
    task = TaskSamples(name="sums", metric="exact_match", scores=scores)
    return Samples(measurement_id="m", tasks=(task,))


def proof(own: Samples | None, others: Samples | None, **task: Any) -> Expectation:
    asked = AccuracyTask(**{"name": "sums", "min": 0.5, "max_drop": 0.05, **task})
    stable = Baseline(measurement("stable", score=0.97), others)
    expected = accuracy_expectations(AccuracyGate(tasks=(asked,)), measurement(), stable, own)
    return expected[2]


def test_the_same_samples_prove_that_nothing_was_lost() -> None:
    found = proof(samples(194, 6), samples(194, 6))

    assert found.paired
    assert found.observed is not None
    assert found.observed > -0.05
    assert (found.bound, found.minimum) == (">= -0.05", -0.05)
    assert found.note == "+0 seen on 200 paired samples, 0 of which differ (Tango's bound)."


def test_too_few_samples_are_a_warning_that_says_how_many_it_takes() -> None:
    found = proof(samples(29, 1), samples(30, 0), max_drop=0.02)

    assert found.severity == "warning"
    assert found.observed is not None
    assert found.observed < -0.02
    assert "Not enough samples to prove it: that takes about" in found.note


def test_too_few_samples_stop_a_release_where_the_spec_says_so() -> None:
    assert proof(samples(29, 1), samples(30, 0), on_undecided="fail").severity == "critical"


@pytest.mark.parametrize(
    ("own", "others", "reason"),
    [
        (None, None, "the scores of single samples are lost"),
        (samples(10, 0), None, "the scores of single samples are lost"),
        (samples(10, 0), samples(10, 0, first=50), "they have no samples in common"),
    ],
)
def test_an_unpaired_comparison_says_so(
    own: Samples | None, others: Samples | None, reason: str
) -> None:
    found = proof(own, others)

    assert f"not paired because {reason}" in found.note
    assert found.observed is not None
    assert math.isfinite(found.observed)


def test_samples_without_a_partner_are_told() -> None:
    found = proof(samples(100, 0), samples(50, 0))

    assert "50 samples have no partner" in found.note


PARITY = ParityFigures(
    reference="references/c/s.json",
    prompts=10,
    prompt_agreement=1.0,
    compared=50,
    agreed=48,
    excused=2,
    first_divergence=5,
    exact_answers=0.9,
    top_logprobs=5,
    logprob_error=0.03,
    rounding_error=0.02,
    by_position=(PositionCounts(compared=50, agreed=48, excused=2),),
)
BOUNDS: dict[str, Any] = {
    "agreement": Bound(min=0.99),
    "excused": Bound(max=0.1),
    "error_ratio": Bound(min=0.3, max=3),
}


def parity(figures: ParityFigures | None, **bounds: Bound) -> dict[str, Expectation]:
    found = parity_expectations(ParityCheck(bounds=bounds or BOUNDS), figures)
    return {each.figure.removeprefix("parity/"): each for each in found}


def test_parity_expects_its_bounds_and_that_prompts_mean_the_same() -> None:
    found = parity(PARITY)

    assert {name: each.observed for name, each in found.items()} == {
        "prompt_agreement": 1.0,
        "agreement": 1.0,
        "excused": 0.04,
        "error_ratio": pytest.approx(1.5),
    }
    assert found["error_ratio"].bound == ">= 0.3 and <= 3"
    assert "rounding explains 0.02" in found["error_ratio"].note


def test_another_tokenizer_is_named() -> None:
    found = parity(PARITY.model_copy(update={"prompt_agreement": 0.5}))["prompt_agreement"]

    assert (found.observed, found.minimum, found.severity) == (0.5, 1.0, "critical")
    assert "other tokens" in found.note


def test_the_first_divergence_is_named() -> None:
    first = Divergence(prompt=2, position=3, served=5, expected=9, gap=1.25)
    found = parity(PARITY.model_copy(update={"agreed": 40, "divergences": (first,)}))["agreement"]

    assert found.observed == 0.84
    assert "prompt 3, position 3, token 5 instead of token 9 (1.25 nats ahead" in found.note


def test_without_parity_figures_every_bound_fails() -> None:
    for each in parity(None).values():
        assert each.observed is None
        assert each.note == "The measurement has no parity figures."
        assert not each.skipped


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"compared": 0, "agreed": 0, "excused": 0}, "agreement"),
        ({"prompts": 0}, "prompt_agreement"),
        ({"logprob_error": None}, "error_ratio"),
        ({"rounding_error": None}, "error_ratio"),
    ],
)
def test_half_of_the_parity_figures_fail_their_bounds(changes: dict[str, Any], metric: str) -> None:
    found = parity(PARITY.model_copy(update=changes))[metric]

    assert (found.observed, found.skipped) == (None, "")


def test_a_lane_without_log_probs_shows_what_it_cannot_tell() -> None:
    silent = PARITY.model_copy(update={"top_logprobs": 0, "logprob_error": None})
    found = parity(silent)

    assert found["error_ratio"].skipped == "The lane returns no log-probs for this target."
    assert found["agreement"].skipped == ""


def test_a_parity_bound_without_limits_is_refused() -> None:
    with pytest.raises(BadInput, match="neither min nor max"):
        parity(PARITY, agreement=Bound())
