"""What the latency gate expects: every figure of every load level in its bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainyard.documents.measurement import LevelFigures, Measurement
from trainyard.errors import BadInput
from trainyard.gates.expectations import Expectation
from trainyard.gates.words import NO_BASELINE, ROUNDING_DIGITS, number
from trainyard.spec.model import Bound, LatencyGate, LoadLevel

_MORE_IS_BETTER = frozenset({"output_tokens_per_s", "requests_per_s"})


def latency_expectations(
    gate: LatencyGate, measurement: Measurement, baseline: Measurement | None
) -> tuple[Expectation, ...]:
    """Return what `gate` expects of `measurement`; `baseline` is the stable release's.

    Besides the spec's bounds: the server must have started from its bundle, and where a level sets
    no bound on failed requests, a warning says that some did not complete, because the other
    figures are of completed requests only.

    Raises:
        BadInput: a bound of the spec has neither `min` nor `max`.
    """
    return (
        *(
            expectation
            for level in gate.levels
            for expectation in _level_expectations(level, measurement, baseline)
        ),
        _started_from_bundle(measurement),
    )


def _started_from_bundle(measurement: Measurement) -> Expectation:
    new = measurement.start.new_cache_files
    return Expectation(
        "start/new_cache_files",
        "start: files compiled anew",
        float(len(new)),
        "<= 0",
        maximum=0.0,
        note=f"The server compiled {new[0]}: the figures are not the bundle's." if new else "",
    )


def _level_expectations(
    level: LoadLevel, measurement: Measurement, baseline: Measurement | None
) -> Iterator[Expectation]:
    measured = _find(measurement, level)
    for metric, bound in level.bounds.items():
        yield _absolute(level, metric, bound, measured)
    if measured is not None and "failed_requests" not in level.bounds:
        yield Expectation(
            f"{level.name}/completed",
            f"level {level.name}: completed requests",
            float(measured.completed),
            f">= {level.num_prompts}",
            minimum=float(level.num_prompts),
            severity="warning",
        )
    for metric, share in level.max_regression.items():
        yield _comparison(level, metric, share, measurement, baseline)


def _absolute(
    level: LoadLevel, metric: str, bound: Bound, measured: LevelFigures | None
) -> Expectation:
    if bound.min is None and bound.max is None:
        raise BadInput(
            f"The bound of {metric} at level {level.name} has neither min nor max.",
            hint="Give the spec's bound a limit, or remove it.",
        )
    words = [f">= {number(bound.min)}"] if bound.min is not None else []
    words += [f"<= {number(bound.max)}"] if bound.max is not None else []
    observed, note = _observed(measured, metric)
    return Expectation(
        f"{level.name}/{metric}",
        _what(level, metric),
        observed,
        " and ".join(words),
        minimum=bound.min,
        maximum=bound.max,
        severity=bound.severity,
        note=note,
    )


def _comparison(
    level: LoadLevel,
    metric: str,
    share: float,
    measurement: Measurement,
    baseline: Measurement | None,
) -> Expectation:
    figure, what = f"{level.name}/{metric}", _what(level, metric)
    observed, note = _observed(_find(measurement, level), metric)
    better_more = metric in _MORE_IS_BETTER
    sign, operator = (">=", "-") if better_more else ("<=", "+")
    percent = f"{operator} {number(share * 100)} %"
    if baseline is None:
        return Expectation(figure, what, observed, f"{sign} stable {percent}", skipped=NO_BASELINE)
    stable, _ = _observed(_find(baseline, level), metric)
    if stable is None:
        reason = "The stable release has no usable figure for it."
        return Expectation(figure, what, observed, f"{sign} stable {percent}", skipped=reason)
    factor = max(0.0, 1 - share) if better_more else 1 + share
    if other := _other_machine(measurement, baseline):
        note = f"{note} {other}".strip()
    limit = round(stable * factor, ROUNDING_DIGITS)
    return Expectation(
        figure,
        what,
        observed,
        f"{sign} stable ({number(stable)}) {percent}",
        minimum=limit if better_more else None,
        maximum=None if better_more else limit,
        note=note,
    )


def _other_machine(measurement: Measurement, baseline: Measurement) -> str:
    """Return what to know about a comparison of two kinds of machine, or nothing."""
    here, there = (each.machine.get("processor") for each in (measurement, baseline))
    if here == there:
        return ""
    return (
        f"Measured on {here or 'an unknown processor'}, the stable release on {there or 'another'}."
    )


def _what(level: LoadLevel, metric: str) -> str:
    return f"level {level.name}: {metric}"


def _find(measurement: Measurement, level: LoadLevel) -> LevelFigures | None:
    """Return the figures of `level`; None if there are none, or several to choose from."""
    found = [figures for figures in measurement.latency if figures.name == level.name]
    return found[0] if len(found) == 1 else None


def _observed(measured: LevelFigures | None, metric: str) -> tuple[float | None, str]:
    """Return a figure, or None and why it cannot be used."""
    if measured is None:
        return None, "The measurement has no single set of figures for this level."
    if measured.completed < 1 and metric != "failed_requests":
        # The benchmark reports zeros then, which would pass every upper bound.
        return None, "No request of this level completed."
    if metric not in measured.figures:
        return None, "The measurement lacks this figure."
    figure = measured.figures[metric]
    if not (math.isfinite(figure) and figure >= 0):
        return None, f"The figure is {number(figure)}, which cannot be."
    return figure, ""
