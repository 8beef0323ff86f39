"""Geometry of the charts; the templates draw it as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainyard.documents.evidence import MetricVerdict, Verdict
from trainyard.documents.look import Look
from trainyard.documents.measurement import Check

BAR_WIDTH = 160.0
PLOT_WIDTH = 920.0
PLOT_HEIGHT = 150.0
TRAFFIC_HEIGHT = 60.0
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

    def place(value: float | None) -> float | None:
        return (
            None if value is None else round(BAR_WIDTH / _HEADROOM * max(0.0, value / largest), 1)
        )

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


@dataclass(frozen=True)
class TrafficPlot:
    """The candidate's share of the traffic over the time of exposure."""

    path: str
    """The outline of the area, as the points of an SVG polygon."""
    ticks: tuple[Tick, ...]
    newest: int
    """Percent at the newest look."""


def evidence_plots(verdicts: Sequence[Verdict]) -> tuple[EvidencePlot, ...]:
    """Return one plot for each metric of `verdicts` (oldest first), in the newest one's order."""
    if not verdicts:
        return ()
    longest = _longest(verdicts)
    return tuple(_plot(each.metric, verdicts, longest) for each in verdicts[-1].metrics)


def traffic_plot(looks: Sequence[Look], release_id: str) -> TrafficPlot | None:
    """Return the plot of the release's weight over `looks` (oldest first); None without figures."""
    seen = [
        (look.verdict.at, look.snapshot.route.weights.get(release_id, 0))
        for look in looks
        if look.verdict and look.snapshot.route
    ]
    if not seen:
        return None
    longest = _longest([look.verdict for look in looks if look.verdict])
    outline = [(0.0, 0), (0.0, seen[0][1])]
    for (_, before), (at, weight) in pairwise(seen):
        outline += [(at, before), (at, weight)]
    outline += [(seen[-1][0], seen[-1][1]), (seen[-1][0], 0)]
    return TrafficPlot(
        path=" ".join(
            f"{_x(at, longest):g},{round(TRAFFIC_HEIGHT * (1 - weight / 100), 1):g}"
            for at, weight in outline
        ),
        ticks=_ticks(longest),
        newest=seen[-1][1],
    )


def _longest(verdicts: Sequence[Verdict]) -> float:
    """Return the seconds that the time axis shows."""
    return max(1.0, *(verdict.at for verdict in verdicts))


def _plot(metric: str, verdicts: Sequence[Verdict], longest: float) -> EvidencePlot:
    seen = [(look.at, each) for look in verdicts for each in look.metrics if each.metric == metric]

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
        ticks=_ticks(longest),
    )


def _x(at: float, longest: float) -> float:
    return round(PLOT_WIDTH * at / longest, 1)


def _y(multiple: float) -> float:
    inside = min(max(multiple, _LOWEST), _HIGHEST)
    return round(PLOT_HEIGHT * (_HIGHEST - inside) / (_HIGHEST - _LOWEST), 1)


def _ticks(longest: float) -> tuple[Tick, ...]:
    """Return marks at round times (1, 2 or 5 times a power of ten) from 0 to `longest` seconds."""
    unit, name = (60.0, "min") if longest >= 2 * 60 else (1.0, "s")
    step = longest / unit / _TICKS
    power = 10.0 ** math.floor(math.log10(step))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)
    count = int(longest / unit / size)
    return tuple(
        Tick(_x(size * index * unit, longest), f"{size * index:g} {name}")
        for index in range(count + 1)
    )
