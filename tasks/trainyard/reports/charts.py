"""Geometry of the charts; the templates draw it as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainyard.documents.evidence import Block, MetricVerdict, Track, Verdict
from trainyard.documents.look import Look
from trainyard.documents.measurement import Check

BAR_WIDTH = 160.0
PLOT_WIDTH = 920.0
NARROW_WIDTH = 460.0
"""Of plots that stand side by side, and of pages that are also read on a phone."""
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
    # A bar begins at zero; differences from something else may lie below it.
    if largest <= 0 or min(check.observed, *limits) < 0:
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


def polyline(points: Sequence[Point]) -> str:
    """Return points as an SVG polyline has them."""
    return " ".join(f"{point.x:g},{point.y:g}" for point in points)


@dataclass(frozen=True)
class Curve:
    """One kind of evidence over the looks."""

    kind: str
    """`harm` or `promote`."""
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """The curve as the points of an SVG polyline."""
        return polyline(self.points)


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class _Time:
    """The time axis: from 0 to `longest` seconds over `width` units of the drawing."""

    longest: float
    width: float

    def x(self, at: float) -> float:
        """Return where a moment is."""
        return round(self.width * at / self.longest, 1)

    def ticks(self) -> tuple[Tick, ...]:
        """Return marks at round times (1, 2 or 5 times a power of ten)."""
        unit, name = (60.0, "min") if self.longest >= 2 * 60 else (1.0, "s")
        step = self.longest / unit / _TICKS
        power = 10.0 ** math.floor(math.log10(step))
        size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)
        count = int(self.longest / unit / size)
        return tuple(
            Tick(self.x(size * index * unit), f"{size * index:g} {name}")
            for index in range(count + 1)
        )


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


@dataclass(frozen=True)
class LevelCurve:
    """One metric of one release over the time of exposure."""

    track: Track
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """The curve as the points of an SVG polyline."""
        return " ".join(f"{point.x:g},{point.y:g}" for point in self.points)


@dataclass(frozen=True)
class LevelPlot:
    """One metric of both releases over the time of exposure, slice by slice."""

    metric: str
    unit: str
    curves: tuple[LevelCurve, ...]
    levels: tuple[Tick, ...]
    """On the value axis, from the bottom."""
    ticks: tuple[Tick, ...]
    """On the time axis."""


def level_plots(blocks: Sequence[Block], *, width: float = PLOT_WIDTH) -> tuple[LevelPlot, ...]:
    """Return one plot for each metric of `blocks`: averages in ms, counts in percent."""
    longest = max((block.t for block in blocks), default=0.0)
    metrics = list(dict.fromkeys(block.metric for block in blocks))
    return tuple(_level_plot(metric, blocks, _Time(max(1.0, longest), width)) for metric in metrics)


def _level_plot(metric: str, blocks: Sequence[Block], time: _Time) -> LevelPlot:
    own = [block for block in blocks if block.metric == metric]
    is_mean = own[0].kind == "mean"
    unit = "ms" if is_mean else "%"
    tracks: tuple[Track, ...] = ("stable", "candidate")
    figures = {track: _levels_of(own, track) for track in tracks}
    top = _round_up(max((y for each in figures.values() for _, y in each), default=0.0))
    curves = tuple(
        LevelCurve(
            track,
            tuple(
                Point(
                    time.x(at),
                    round(PLOT_HEIGHT * (1 - value / top), 1),
                    f"{at:.0f} s: {value:.3g} {unit}",
                )
                for at, value in figures[track]
            ),
        )
        for track in tracks
    )
    levels = tuple(
        Tick(round(PLOT_HEIGHT * (1 - share), 1), f"{top * share:g}") for share in (0, 0.5, 1)
    )
    return LevelPlot(metric, unit, curves, levels, time.ticks())


def _levels_of(blocks: Sequence[Block], track: Track) -> list[tuple[float, float]]:
    """Return (seconds, value) of one release; slices without requests are left out."""
    sums: dict[float, tuple[float, int]] = {}
    for block in blocks:
        if block.track == track:
            total, requests = sums.get(block.t, (0.0, 0))
            amount = block.total * 1000 if block.kind == "mean" else block.bad * 100.0
            sums[block.t] = (total + amount, requests + block.requests)
    return [(t, total / requests) for t, (total, requests) in sorted(sums.items()) if requests]


def _round_up(value: float) -> float:
    """Return the least 1, 2 or 5 times a power of ten that is not less than `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def evidence_plots(
    verdicts: Sequence[Verdict], *, width: float = PLOT_WIDTH
) -> tuple[EvidencePlot, ...]:
    """Return one plot for each metric of `verdicts` (oldest first), in the newest one's order.

    Metrics that can only show harm have one once there are data.
    """
    if not verdicts:
        return ()
    time = _Time(_longest(verdicts), width)
    shown = [each.metric for each in verdicts[-1].metrics if each.blocks or not each.harm_only]
    return tuple(_plot(metric, verdicts, time) for metric in shown)


def traffic_plot(
    looks: Sequence[Look], release_id: str, *, width: float = PLOT_WIDTH
) -> TrafficPlot | None:
    """Return the plot of the release's weight over `looks` (oldest first); None without figures."""
    seen = [
        (look.verdict.at, look.snapshot.route.weights.get(release_id, 0))
        for look in looks
        if look.verdict and look.snapshot.route
    ]
    if not seen:
        return None
    time = _Time(_longest([look.verdict for look in looks if look.verdict]), width)
    outline = [(0.0, 0), (0.0, seen[0][1])]
    for (_, before), (at, weight) in pairwise(seen):
        outline += [(at, before), (at, weight)]
    outline += [(seen[-1][0], seen[-1][1]), (seen[-1][0], 0)]
    return TrafficPlot(
        path=" ".join(
            f"{time.x(at):g},{round(TRAFFIC_HEIGHT * (1 - weight / 100), 1):g}"
            for at, weight in outline
        ),
        ticks=time.ticks(),
        newest=seen[-1][1],
    )


def _longest(verdicts: Sequence[Verdict]) -> float:
    """Return the seconds that the time axis shows."""
    return max(1.0, *(verdict.at for verdict in verdicts))


def _plot(metric: str, verdicts: Sequence[Verdict], time: _Time) -> EvidencePlot:
    seen = [(look.at, each) for look in verdicts for each in look.metrics if each.metric == metric]

    def curve(kind: str, figures: Callable[[MetricVerdict], tuple[float, float]]) -> Curve:
        points = []
        for at, verdict in seen:
            evidence, threshold = figures(verdict)
            if threshold > 0:
                words = f"{at:.0f} s: {evidence:.3g} of {threshold:.3g}"
                points.append(Point(time.x(at), _y(evidence / threshold), words))
        return Curve(kind, tuple(points))

    return EvidencePlot(
        metric=metric,
        curves=(
            curve("harm", lambda each: (each.harm_evidence, each.harm_threshold)),
            curve("promote", lambda each: (each.promote_evidence, each.promote_threshold)),
        ),
        threshold_y=_y(1.0),
        zero_y=_y(0.0),
        ticks=time.ticks(),
    )


def _y(multiple: float) -> float:
    inside = min(max(multiple, _LOWEST), _HIGHEST)
    return round(PLOT_HEIGHT * (_HIGHEST - inside) / (_HIGHEST - _LOWEST), 1)
