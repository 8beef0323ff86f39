"""Geometry of the charts; the templates draw it as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainyard.documents.evidence import MetricVerdict, Verdict
from trainyard.documents.measurement import Check

BAR_WIDTH = 160.0
PLOT_WIDTH = 640.0
PLOT_HEIGHT = 150.0
_HEADROOM = 1.15
_LOWEST, _HIGHEST = -1.0, 2.0
"""Where curves of evidence are cut off, in multiples of the threshold."""
_TICKS = 6


@dataclass(frozen=True)
class Bar:
    """A measured value beside its bounds, in the units of the drawing."""

    value: float
    lower: float | None
    """Where the lower bound is; None without one."""
    upper: float | None


def bar(check: Check) -> Bar | None:
    """Return the bar of `check`; None if there is nothing to draw."""
    limits = [limit for limit in (check.minimum, check.maximum) if limit is not None]
    if check.observed is None or not limits:
        return None
    largest = max(check.observed, *limits)
    if largest <= 0:
        return None
    scale = BAR_WIDTH / (largest * _HEADROOM)

    def place(value: float | None) -> float | None:
        return None if value is None else round(max(0.0, value * scale), 1)

    return Bar(place(check.observed) or 0.0, place(check.minimum), place(check.maximum))


@dataclass(frozen=True)
class Point:
    """One look on a curve."""

    x: float
    y: float
    words: str
    """What the figure was, for people."""


@dataclass(frozen=True)
class Curve:
    """One kind of evidence over the looks."""

    kind: str
    """`harm` or `promote`."""
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """The curve as the points of an SVG polyline."""
        return " ".join(f"{point.x:g},{point.y:g}" for point in self.points)


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class EvidencePlot:
    """Evidence of one metric over the time of exposure, each as a multiple of its threshold."""

    metric: str
    curves: tuple[Curve, ...]
    threshold_y: float
    zero_y: float
    ticks: tuple[Tick, ...]
    """On the time axis."""


def evidence_plots(looks: Sequence[Verdict]) -> tuple[EvidencePlot, ...]:
    """Return one plot for each metric of `looks`, in the order of the newest look."""
    if not looks:
        return ()
    ordered = sorted(looks, key=lambda look: look.at)
    longest = max(ordered[-1].at, 1.0)
    return tuple(_plot(each.metric, ordered, longest) for each in ordered[-1].metrics)


def _plot(metric: str, looks: Sequence[Verdict], longest: float) -> EvidencePlot:
    seen = [(look.at, each) for look in looks for each in look.metrics if each.metric == metric]

    def curve(kind: str, figures: Callable[[MetricVerdict], tuple[float, float]]) -> Curve:
        points = []
        for at, verdict in seen:
            evidence, threshold = figures(verdict)
            if threshold > 0:
                words = f"{at:.0f} s: {evidence:.3g} of {threshold:.3g}"
                points.append(Point(_x(at, longest), _y(evidence / threshold), words))
        return Curve(kind, tuple(points))

    return EvidencePlot(
        metric=metric,
        curves=(
            curve("harm", lambda each: (each.harm_evidence, each.harm_threshold)),
            curve("promote", lambda each: (each.promote_evidence, each.promote_threshold)),
        ),
        threshold_y=_y(1.0),
        zero_y=_y(0.0),
        ticks=tuple(Tick(_x(at, longest), _time(at)) for at in _round_times(longest)),
    )


def _x(at: float, longest: float) -> float:
    return round(PLOT_WIDTH * at / longest, 1)


def _y(multiple: float) -> float:
    inside = min(max(multiple, _LOWEST), _HIGHEST)
    return round(PLOT_HEIGHT * (_HIGHEST - inside) / (_HIGHEST - _LOWEST), 1)


def _round_times(longest: float) -> list[float]:
    """Return round times (1, 2 or 5 times a power of ten, or of a minute) from 0 to `longest`."""
    unit = 60.0 if longest >= 120 else 1.0
    step = longest / unit / _TICKS
    power = 10 ** math.floor(math.log10(step))
    factor = next(factor for factor in (1, 2, 5, 10) if factor * power >= step)
    size = factor * power * unit
    return [size * index for index in range(int(longest / size) + 1)]


def _time(seconds: float) -> str:
    if seconds >= 60 and seconds % 60 == 0:
        return f"{seconds / 60:g} min"
    return f"{seconds:g} s"
