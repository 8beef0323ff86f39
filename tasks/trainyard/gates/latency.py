"""What the latency gate expects: every figure of every load level in its bounds.

A level that was measured several times has a spread for each figure: the lowest and the highest of
its repeats. If all repeats are on the same side of a bound, the bound is kept or broken. If they
are not, the bound lies inside the spread, which is a warning: measuring again could give the other
answer. The range of n repeats misses the figure's true median with probability 2^(1-n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainyard.documents.measurement import LevelFigures, Measurement, RateFound
from trainyard.errors import BadInput
from trainyard.gates.expectations import Expectation
from trainyard.gates.words import NO_BASELINE, ROUNDING_DIGITS, number
from trainyard.spec.model import Bound, LatencyGate, LoadLevel, RateSearch

_MORE_IS_BETTER = frozenset(
    {
        "input_tokens_per_s",
        "output_tokens_per_s",
        "requests_per_s",
        "good_requests_per_s",
        "slo_attainment",
    }
)
_COUNTS = frozenset({"failed_requests"})
"""Figures of which the worst repeat counts, so that they have no spread."""


def latency_expectations(
    gate: LatencyGate,
    measurement: Measurement,
    baseline: Measurement | None,
    why_no_baseline: str = NO_BASELINE,
) -> tuple[Expectation, ...]:
    """Return what `gate` expects of `measurement`; `baseline` is the stable release's.

    Besides the spec's bounds: the server must have started from its bundle, and where a level sets
    no bound on failed requests, a warning says that some did not complete, because the other
    figures are of completed requests only. Where the stable release was measured on another kind
    of machine or with another driver, nothing is compared, and `gate.other_machine` says whether
    that stops the release.

    Raises:
        BadInput: a bound of the spec has neither `min` nor `max`.
    """
    compares = any(level.max_regression for level in gate.levels)
    other = _other_machine(measurement, baseline) if compares and baseline is not None else ""
    reason = why_no_baseline if baseline is None else other
    return (
        *(
            expectation
            for level in gate.levels
            for expectation in _level_expectations(level, measurement, baseline, reason)
        ),
        *_search_expectations(gate.search, measurement.search),
        *([_same_machine(gate, other)] if other else []),
        _started_from_bundle(measurement),
    )


def _same_machine(gate: LatencyGate, other: str) -> Expectation:
    """Return the expectation that the machine is not another one, which it is."""
    return Expectation(
        "machine/differences",
        "machine and driver: differences from the stable release's",
        1.0,
        "<= 0",
        maximum=0.0,
        severity=gate.other_machine,
        note=other,
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
    level: LoadLevel, measurement: Measurement, baseline: Measurement | None, reason: str
) -> Iterator[Expectation]:
    measured = _find(measurement, level)
    for metric, bound in level.bounds.items():
        yield _absolute(level, metric, bound, measured)
    if measured is not None and "failed_requests" not in level.bounds:
        said = f"They said: {'; '.join(measured.errors)}" if measured.errors else ""
        yield Expectation(
            f"{level.name}/completed",
            f"level {level.name}: completed requests",
            float(measured.completed),
            f">= {level.num_prompts}",
            minimum=float(level.num_prompts),
            severity="warning",
            note=said,
        )
    for metric, share in level.max_regression.items():
        yield _comparison(level, metric, share, measured, baseline, reason)


def _absolute(
    level: LoadLevel, metric: str, bound: Bound, measured: LevelFigures | None
) -> Expectation:
    figure = _observed(measured, metric)
    expectation = Expectation(
        f"{level.name}/{metric}",
        _what(level, metric),
        figure.value,
        _words(bound, f"{metric} at level {level.name}"),
        minimum=bound.min,
        maximum=bound.max,
        severity=bound.severity,
        note=figure.note,
        spread=figure.spread,
    )
    if metric == "failed_requests" and measured is not None and measured.errors:
        expectation = replace(expectation, note=f"They said: {'; '.join(measured.errors)}")
    return _doubted(expectation, figure.spread)


def _words(bound: Bound, of: str) -> str:
    """Return a bound in words. Raises BadInput if it has none."""
    if bound.min is None and bound.max is None:
        raise BadInput(
            f"The bound of {of} has neither min nor max.",
            hint="Give the spec's bound a limit, or remove it.",
        )
    words = [f">= {number(bound.min)}"] if bound.min is not None else []
    words += [f"<= {number(bound.max)}"] if bound.max is not None else []
    return " and ".join(words)


def _doubted(
    expectation: Expectation, spread: tuple[float, float] | None, said: str = "The repeats gave"
) -> Expectation:
    """Return the expectation as a warning if a bound of it lies inside `spread`."""
    if spread is None or expectation.observed is None:
        return expectation
    low, high = spread
    minimum = -math.inf if expectation.minimum is None else expectation.minimum
    maximum = math.inf if expectation.maximum is None else expectation.maximum
    kept = all(minimum <= end <= maximum for end in spread)
    broken = high < minimum or low > maximum
    if kept or broken:
        # The median is on the same side as all of them.
        return expectation
    note = (
        f"{said} {number(low)} to {number(high)}, on both sides of the bound: measuring again "
        "could give the other answer."
    )
    return replace(
        expectation,
        figure=f"{expectation.figure} beyond {expectation.bound}",
        judged=low if low < minimum else high,
        severity="info" if expectation.severity == "info" else "warning",
        note=f"{expectation.note} {note}".strip(),
    )


def _comparison(
    level: LoadLevel,
    metric: str,
    share: float,
    measured: LevelFigures | None,
    baseline: Measurement | None,
    reason: str,
) -> Expectation:
    figure, what = f"{level.name}/{metric}", _what(level, metric)
    observed = _observed(measured, metric)
    better_more = metric in _MORE_IS_BETTER
    sign, percent = (">=", f"- {number(share * 100)} %") if better_more else (
        "<=", f"+ {number(share * 100)} %")  # fmt: skip
    stable = _Figure(None)
    if baseline is not None and not reason:
        stable = _observed(_find(baseline, level), metric)
        if stable.value is None:
            reason = "The stable release has no usable figure for it."
    if reason or stable.value is None:
        return Expectation(figure, what, observed.value, f"{sign} stable {percent}", skipped=reason)
    factor = max(0.0, 1 - share) if better_more else 1 + share
    limit = round(stable.value * factor, ROUNDING_DIGITS)
    expectation = Expectation(
        figure,
        what,
        observed.value,
        f"{sign} stable ({number(stable.value)}) {percent}",
        minimum=limit if better_more else None,
        maximum=None if better_more else limit,
        note=observed.note,
        spread=observed.spread,
    )
    return _doubted(
        expectation,
        _spread_of_difference(observed, stable, factor),
        "With the repeats of both releases it may be",
    )


def _spread_of_difference(
    observed: _Figure, stable: _Figure, factor: float
) -> tuple[float, float] | None:
    """Return the spread of a figure, widened by how far the stable release's moves the limit.

    So all repeats are on one side of the limit only if they are for every repeat of the stable
    release as well.
    """
    if observed.value is None or stable.value is None or not (observed.spread or stable.spread):
        return None
    low, high = observed.spread or (observed.value, observed.value)
    stable_low, stable_high = stable.spread or (stable.value, stable.value)
    limit = stable.value * factor
    return low - (stable_high * factor - limit), high + (limit - stable_low * factor)


def _search_expectations(
    search: RateSearch | None, found: RateFound | None
) -> Iterator[Expectation]:
    """Yield what is expected of the highest rate that meets the SLO."""
    if search is None or search.bound is None:
        return
    expectation = Expectation(
        "search/rate_per_s",
        "highest requests a second within the SLO",
        None,
        _words(search.bound, "the rate that is searched"),
        minimum=search.bound.min,
        maximum=search.bound.max,
        severity=search.bound.severity,
        note="" if found is None else found.reason,
    )
    if found is None or not found.probes:
        yield replace(expectation, note="The measurement has not looked for it.")
        return
    # The rate is somewhere from the best that met the SLO to the lowest that did not.
    low = found.rate_per_s or 0.0
    high = low if found.failing_rate_per_s is None else found.failing_rate_per_s
    expectation = replace(expectation, observed=low, spread=(low, high))
    least = search.bound.min
    if least is not None and low < least < high:
        expectation = _doubted(expectation, (low, high), "It is somewhere from")
    yield expectation


def _other_machine(measurement: Measurement, baseline: Measurement) -> str:
    """Return why two measurements are not comparable, or nothing if they are."""
    here, there = measurement.kind, baseline.kind
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if not differing:
        return ""
    return (
        f"Not comparable: measured with {_machine_words(here, differing)}, the stable release with "
        f"{_machine_words(there, differing)}."
    )


def _machine_words(kind: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {kind.get(name, 'unknown')}" for name in names)


def _what(level: LoadLevel, metric: str) -> str:
    return f"level {level.name}: {metric}"


def _find(measurement: Measurement, level: LoadLevel) -> LevelFigures | None:
    """Return the figures of `level`; None if there are none, or several to choose from."""
    found = [figures for figures in measurement.latency if figures.name == level.name]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class _Figure:
    """A figure of a level."""

    value: float | None
    note: str = ""
    """Why it cannot be used."""
    spread: tuple[float, float] | None = None
    """Of its repeats, where they count."""


def _observed(measured: LevelFigures | None, metric: str) -> _Figure:
    """Return a figure, or why it cannot be used."""
    if measured is None:
        return _Figure(None, "The measurement has no single set of figures for this level.")
    if measured.completed < 1 and metric not in _COUNTS:
        # The benchmark reports zeros then, which would pass every upper bound.
        return _Figure(None, "No request of this level completed.")
    if metric not in measured.figures:
        return _Figure(None, "The measurement lacks this figure.")
    value = measured.figures[metric]
    spread = None if metric in _COUNTS else measured.spread.get(metric)
    for each in (value, *(spread or ())):
        if not (math.isfinite(each) and each >= 0):
            return _Figure(None, f"The figure is {number(each)}, which cannot be.")
    return _Figure(value, spread=spread)
