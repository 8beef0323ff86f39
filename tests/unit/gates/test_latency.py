"""Figures of a load are compared with their bounds in the right direction."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.unit.yard import FIGURES, SPEC, measurement

from trainyard.documents.measurement import (
    LevelFigures,
    Measurement,
    RateFound,
    RateProbe,
    StartFigures,
)
from trainyard.errors import BadInput
from trainyard.gates.expectations import Expectation, evaluate
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


def test_it_is_said_why_a_stable_release_cannot_be_compared_with() -> None:
    gate = LatencyGate.model_validate({"levels": [LEVEL]})
    why = "The stable release was adopted and never measured."

    found = latency_expectations(gate, measurement(), None, why)

    assert [each.skipped for each in found if each.skipped] == [why, why]


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


def spread(
    low: float, high: float, metric: str = "ttft_p99_ms", *, median: float | None = None
) -> Measurement:
    """Return a measurement of several repeats that gave `low` to `high`."""
    value = (low + high) / 2 if median is None else median
    figures = LevelFigures(
        name="busy",
        figures={**FIGURES, metric: value},
        duration_s=9.0,
        completed=64,
        repeats=3,
        spread={metric: (low, high)},
    )
    return measurement(latency=(figures,))


@pytest.mark.parametrize(
    ("low", "high", "severity", "outcome"),
    [
        (300.0, 390.0, "critical", "pass"),
        (401.0, 500.0, "critical", "fail"),
        (390.0, 420.0, "critical", "warn"),
        (380.0, 400.0, "critical", "pass"),
        (401.0, 500.0, "warning", "warn"),
        (390.0, 420.0, "warning", "warn"),
        (390.0, 420.0, "info", "info"),
    ],
)
def test_a_bound_inside_the_spread_is_a_warning_and_no_coin_toss(
    low: float, high: float, severity: str, outcome: str
) -> None:
    bounds = {"ttft_p99_ms": {"max": 400, "severity": severity}, "failed_requests": {"max": 0}}

    found = expectations(spread(low, high), bounds=bounds, max_regression={})

    check = evaluate("latency", found).checks[0]
    assert check.outcome == outcome
    assert (check.observed, check.low, check.high) == ((low + high) / 2, low, high)


@pytest.mark.parametrize("median", [395.0, 410.0])
def test_on_which_side_the_median_fell_does_not_matter_then(median: float) -> None:
    measured = spread(390.0, 420.0, median=median)

    ttft, *_ = expectations(measured, bounds={"ttft_p99_ms": {"max": 400}}, max_regression={})

    (check,) = evaluate("latency", [ttft]).checks
    assert (check.outcome, check.observed) == ("warn", median)
    assert check.note == (
        "The repeats gave 390 to 420, on both sides of the bound: measuring again could give the "
        "other answer."
    )


def test_a_least_figure_is_doubted_at_its_lower_end() -> None:
    bounds = {"output_tokens_per_s": {"min": 50}}
    measured = spread(45.0, 90.0, "output_tokens_per_s")

    tokens, *_ = expectations(measured, bounds=bounds, max_regression={})

    assert (tokens.judged, tokens.severity) == (45.0, "warning")


def test_failures_of_a_single_repeat_are_never_doubted() -> None:
    figures = LevelFigures(
        name="busy",
        figures={**FIGURES, "failed_requests": 2.0},
        duration_s=9.0,
        completed=62,
        repeats=3,
        spread={"failed_requests": (0.0, 2.0)},
        errors=("TimeoutError: too slow",),
    )

    found = expectations(measurement(latency=(figures,)), max_regression={})

    failed = found[2]
    assert (failed.severity, failed.judged, failed.spread) == ("critical", None, None)
    assert failed.note == "They said: TimeoutError: too slow"
    assert evaluate("latency", [failed]).checks[0].outcome == "fail"


@pytest.mark.parametrize("end", [math.nan, math.inf, -1.0])
def test_a_spread_that_cannot_be_makes_the_figure_unusable(end: float) -> None:
    ttft, *_ = expectations(spread(200.0, end, median=210.0))

    assert ttft.observed is None
    assert "which cannot be" in ttft.note


@pytest.mark.parametrize(
    ("candidate", "stable", "outcome"),
    [
        # The limit is 20 % above the stable release's: 240.
        ((225.0, 235.0), (200.0, 200.0), "pass"),
        ((230.0, 250.0), (200.0, 200.0), "warn"),
        ((245.0, 260.0), (200.0, 200.0), "fail"),
        # The stable release's own repeats move the limit from 228 to 252.
        ((245.0, 250.0), (190.0, 210.0), "warn"),
        ((253.0, 260.0), (190.0, 210.0), "fail"),
        ((200.0, 227.0), (190.0, 210.0), "pass"),
    ],
)
def test_a_comparison_counts_the_spread_of_both_releases(
    candidate: tuple[float, float], stable: tuple[float, float], outcome: str
) -> None:
    *_, comparison = expectations(
        spread(*candidate), spread(*stable), max_regression={"ttft_p99_ms": 0.2}
    )

    (check,) = evaluate("latency", [comparison]).checks
    assert check.outcome == outcome


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"processor": "Test CPU"}, {"processor": "Other CPU"}),
        ({"neuron_driver": "2.30"}, {"neuron_driver": "2.31"}),
        ({"threads": 2}, {"threads": 4}),
    ],
)
@pytest.mark.parametrize("severity", ["warning", "critical"])
def test_another_machine_or_driver_is_not_comparable(
    here: dict[str, Any], there: dict[str, Any], severity: str
) -> None:
    gate = LatencyGate.model_validate({"levels": [LEVEL], "other_machine": severity})

    found = latency_expectations(gate, measurement(machine=here), measurement(machine=there))

    checks = {check.what: check for check in evaluate("latency", found).checks}
    refused = checks["machine and driver: differences from the stable release's"]
    assert refused.outcome == {"warning": "warn", "critical": "fail"}[severity]
    (name,) = here
    assert f"{name.replace('_', ' ')} {here[name]}" in refused.note
    assert f"{name.replace('_', ' ')} {there[name]}" in refused.note
    skipped = [check for check in checks.values() if check.outcome == "skipped"]
    assert [check.note for check in skipped] == [refused.note] * 2


def test_another_instance_type_is_another_machine() -> None:
    gate = LatencyGate.model_validate({"levels": [LEVEL]})
    measured = measurement(instance="trn2.48xlarge")

    found = latency_expectations(gate, measured, measurement(instance="trn2.3xlarge"))

    assert "instance trn2.48xlarge, the stable release with instance trn2.3xlarge" in found[-2].note


def test_what_differs_from_day_to_day_makes_no_other_machine() -> None:
    here = {"processor": "Test CPU", "host": "a", "load_1min": 0.1, "kernel": "6.1"}
    there = {"processor": "Test CPU", "host": "b", "load_1min": 1.1, "kernel": "6.2"}

    *_, comparison = expectations(
        measurement(machine=here), measurement(machine=there), max_regression={"ttft_p99_ms": 0.2}
    )

    assert not comparison.skipped


def test_machines_do_not_matter_where_nothing_is_compared() -> None:
    other = measurement(machine={"processor": "Other CPU"})

    assert len(expectations(measurement(), other, max_regression={})) == 3


def searched(best: float | None, failing: float | None) -> Measurement:
    probe = RateProbe(
        rate_per_s=best or failing or 0.0,
        requests=20,
        completed=20,
        attainment=1.0,
        meets=best is not None,
        figures={},
        duration_s=10.0,
    )
    found = RateFound(
        level="busy",
        rate_per_s=best,
        failing_rate_per_s=failing,
        complete=True,
        reason="It was looked for.",
        probes=(probe,),
    )
    return measurement(search=found)


@pytest.mark.parametrize(
    ("best", "failing", "outcome"),
    [
        (12.0, 13.0, "pass"),
        (10.0, 11.0, "pass"),
        (9.5, 10.5, "warn"),
        (9.0, 10.0, "fail"),
        (8.0, 9.0, "fail"),
        (64.0, None, "pass"),
        (None, 1.0, "fail"),
    ],
)
def test_the_rate_that_was_found_is_held_against_its_bound(
    best: float | None, failing: float | None, outcome: str
) -> None:
    gate = LatencyGate.model_validate(
        {"levels": [LEVEL], "search": {"level": "busy", "bound": {"min": 10}}}
    )

    found = latency_expectations(gate, searched(best, failing), None)[-2]

    (check,) = evaluate("latency", [found]).checks
    assert check.outcome == outcome
    assert check.note.startswith("It was looked for.")


def test_a_rate_that_was_not_looked_for_fails() -> None:
    gate = LatencyGate.model_validate(
        {"levels": [LEVEL], "search": {"level": "busy", "bound": {"min": 10}}}
    )

    (check,) = evaluate("latency", [latency_expectations(gate, measurement(), None)[-2]]).checks

    assert (check.outcome, check.note) == ("fail", "The measurement has not looked for it.")
