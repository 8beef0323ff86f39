"""Figures of a load are compared with their bounds in the right direction."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.unit.yard import FIGURES, SPEC, measurement

from trainyard.documents.measurement import LevelFigures, Measurement, StartFigures
from trainyard.errors import BadInput
from trainyard.gates.expectations import Expectation
from trainyard.gates.latency import latency_expectations
from trainyard.spec.model import LatencyGate

LEVEL = SPEC["gates"]["latency"]["levels"][0]


def expectations(
    measured: Measurement, baseline: Measurement | None = None, **level: Any
) -> list[Expectation]:
    """Return what is expected besides the start."""
    gate = LatencyGate.model_validate({"levels": [{**LEVEL, **level}]})
    *rest, start = latency_expectations(gate, measured, baseline)
    assert start.figure == "start/new_cache_files"
    return rest


def with_figures(**figures: float) -> Measurement:
    return measurement(figures={**FIGURES, **figures})


def test_each_bound_becomes_an_expectation() -> None:
    ttft, tokens, failed = expectations(measurement(), max_regression={})

    assert (ttft.what, ttft.observed) == ("level busy: ttft_p99_ms", 210.0)
    assert (ttft.bound, ttft.minimum, ttft.maximum) == ("<= 400", None, 400)
    assert (tokens.bound, tokens.minimum, tokens.severity) == (">= 50", 50, "warning")
    assert (failed.bound, failed.maximum) == ("<= 0", 0)


def test_a_bound_may_have_two_sides() -> None:
    bounds = {"requests_per_s": {"min": 1, "max": 4.5}}

    (only, _completed) = expectations(
        with_figures(requests_per_s=2), bounds=bounds, max_regression={}
    )

    assert (only.bound, only.minimum, only.maximum) == (">= 1 and <= 4.5", 1, 4.5)


def test_a_bound_without_limits_is_refused() -> None:
    with pytest.raises(BadInput, match="ttft_p99_ms at level busy has neither min nor max"):
        expectations(measurement(), bounds={"ttft_p99_ms": {}})


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (measurement(latency=()), "no single set of figures"),
        (measurement(latency=measurement().latency * 2), "no single set of figures"),
        (measurement(completed=0), "No request of this level completed."),
        (measurement(figures={"failed_requests": 0.0}), "lacks this figure"),
        (with_figures(ttft_p99_ms=math.nan), "The figure is nan, which cannot be."),
        (with_figures(ttft_p99_ms=math.inf), "The figure is inf, which cannot be."),
        (with_figures(ttft_p99_ms=-1.0), "The figure is -1, which cannot be."),
    ],
)
def test_what_is_no_figure_counts_as_missing(measured: Measurement, reason: str) -> None:
    ttft, *_ = expectations(measured)

    assert ttft.observed is None
    assert reason in ttft.note


def test_zeros_of_a_benchmark_without_answers_do_not_count() -> None:
    zeros = dict.fromkeys(FIGURES, 0.0)

    ttft, tokens, failed, *_ = expectations(
        measurement(completed=0, figures={**zeros, "failed_requests": 64.0})
    )

    assert (ttft.observed, tokens.observed, failed.observed) == (None, None, 64.0)


def test_requests_that_failed_unseen_raise_a_warning() -> None:
    bounds = {"ttft_p99_ms": {"max": 400}}

    _, completed = expectations(measurement(completed=60), bounds=bounds, max_regression={})

    assert completed.what == "level busy: completed requests"
    assert (completed.observed, completed.minimum, completed.severity) == (60, 64, "warning")


@pytest.mark.parametrize(
    ("metric", "stable", "share", "bound", "minimum", "maximum"),
    [
        ("ttft_p99_ms", 200.0, 0.2, "<= stable (200) + 20 %", None, 240.0),
        ("output_tokens_per_s", 100.0, 0.2, ">= stable (100) - 20 %", 80.0, None),
        ("requests_per_s", 3.0, 0.1, ">= stable (3) - 10 %", 2.7, None),
        ("requests_per_s", 3.0, 1.5, ">= stable (3) - 150 %", 0.0, None),
        ("failed_requests", 0.0, 0.5, "<= stable (0) + 50 %", None, 0.0),
    ],
)
def test_worse_means_slower_or_fewer(
    metric: str,
    stable: float,
    share: float,
    bound: str,
    minimum: float | None,
    maximum: float | None,
) -> None:
    *_, comparison = expectations(
        with_figures(**{metric: 1.0}),
        with_figures(**{metric: stable}),
        max_regression={metric: share},
    )

    assert (comparison.bound, comparison.minimum, comparison.maximum) == (bound, minimum, maximum)
    assert not comparison.skipped


@pytest.mark.parametrize(
    ("baseline", "reason"),
    [
        (None, "no stable release"),
        (measurement(latency=()), "no usable figure"),
        (measurement(completed=0), "no usable figure"),
        (with_figures(ttft_p99_ms=math.nan), "no usable figure"),
    ],
)
def test_without_a_comparable_figure_the_comparison_is_skipped_and_says_why(
    baseline: Measurement | None, reason: str
) -> None:
    *_, comparison = expectations(measurement(), baseline, max_regression={"ttft_p99_ms": 0.2})

    assert reason in comparison.skipped
    assert comparison.bound == "<= stable + 20 %"
    assert comparison.observed == 210.0


def test_a_level_that_was_measured_under_another_name_is_missing() -> None:
    other = LevelFigures(name="idle", figures=FIGURES, duration_s=1.0, completed=64)

    ttft, *_ = expectations(measurement(latency=(other,)))

    assert ttft.observed is None


def test_figures_of_a_server_that_compiled_are_not_the_bundles() -> None:
    start = StartFigures(ready_s=60.0, engine_init_s=None, new_cache_files=("a.so", "b.so"))
    gate = LatencyGate.model_validate({"levels": [LEVEL]})

    *_, found = latency_expectations(gate, measurement(start=start), None)

    assert (found.observed, found.maximum) == (2.0, 0.0)
    assert "compiled a.so" in found.note


def test_a_comparison_of_two_machines_says_so() -> None:
    stable = measurement(machine={"processor": "Other CPU"})

    *_, comparison = expectations(measurement(), stable, max_regression={"ttft_p99_ms": 0.2})

    assert comparison.note == "Measured on Test CPU, the stable release on Other CPU."
