"""Geometry of a release's charts; `release.html.j2` draws it as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from trainyard.documents.measurement import QUANTILES, LevelFigures, Measurement, TaskScore
from trainyard.reports.axes import Axis, figure, linear_axis, log_axis
from trainyard.reports.charts import Point, Tick, polyline
from trainyard.spec.model import AccuracyTask, Slo

WIDTH = 300.0
"""Of a plot: three stand side by side, or one on a phone."""
HEIGHT = 150.0
_MOST_MARKS = 7
ROW = 26.0
"""Height of one row of a chart with rows."""

Whose = Literal["candidate", "stable"]
Mark = Literal["p50", "p90", "p99"]
MARKS: tuple[Mark, ...] = ("p50", "p90", "p99")

_METRICS = {"ttft": "Time to first token", "tpot": "Time per output token", "e2e": "Whole request"}
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Line:
    """A curve of one kind."""

    kind: str
    """Its class in the drawing: `p50` … `p99`, `candidate` or `stable`."""
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """The curve as the points of an SVG polyline."""
        return polyline(self.points)


@dataclass(frozen=True)
class Plot:
    """A chart with two axes."""

    title: str
    words: str
    """What it shows, for people who do not see it."""
    x_label: str
    lines: tuple[Line, ...]
    loose: tuple[Line, ...]
    """Points that no curve joins."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    limit: Tick | None = None
    """Where the SLO is on the value axis."""
    mark: Tick | None = None
    """What is marked on the other axis."""


def load_plots(measurement: Measurement, slo: Slo | None) -> tuple[Plot, ...]:
    """Return latency against the rate of requests, one plot for each of TTFT, TPOT and E2E.

    Rates that were tried in the search make curves; load levels are points, because their prompts
    and answers may differ.
    """
    tried = sorted(
        measurement.search.probes if measurement.search else (), key=lambda each: each.rate_per_s
    )
    loads = [(f"{figure(probe.rate_per_s)} requests a second", probe.rate_per_s, probe.figures)
             for probe in tried]  # fmt: skip
    levels = [
        (f"level {level.name}", level.figures["requests_per_s"], level.figures)
        for level in measurement.latency
        if level.figures.get("requests_per_s")
    ]
    best = measurement.search.rate_per_s if measurement.search else None
    plots = (_load_plot(name, loads, levels, slo, best) for name in _METRICS)
    return tuple(plot for plot in plots if plot is not None)


_Load = tuple[str, float, Mapping[str, float]]


def _load_plot(
    name: str, tried: Sequence[_Load], levels: Sequence[_Load], slo: Slo | None, best: float | None
) -> Plot | None:
    every = [*tried, *levels]
    values = [
        load[2][f"{name}_{mark}_ms"]
        for load in every
        for mark in MARKS
        if load[2].get(f"{name}_{mark}_ms")
    ]
    if not values:
        return None
    limit = getattr(slo, f"{name}_ms") if slo else None
    x = linear_axis([load[1] for load in every], WIDTH)
    y = log_axis([*values, *([limit] if limit else [])], HEIGHT, is_vertical=True)

    def lines(loads: Sequence[_Load]) -> Iterator[Line]:
        for mark in MARKS:
            metric = f"{name}_{mark}_ms"
            points = tuple(
                Point(
                    x.place(rate), y.place(found[metric]), f"{what}, {mark}: {_ms(found[metric])}"
                )
                for what, rate, found in loads
                if found.get(metric)
            )
            if points:
                yield Line(mark, points)

    title = _METRICS[name]
    return Plot(
        title=title,
        words=f"{title} in milliseconds against requests a second",
        x_label="requests a second",
        lines=tuple(lines(tried)),
        loose=tuple(lines(levels)),
        x_ticks=x.ticks(),
        y_ticks=y.ticks(_MOST_MARKS, _ms),
        limit=None if limit is None else Tick(y.place(limit), f"SLO {_ms(limit)}"),
        mark=None if best is None else Tick(x.place(best), f"{best:.4g} a second meets it"),
    )


def distribution_plots(level: LevelFigures, stable: LevelFigures | None) -> tuple[Plot, ...]:
    """Return which share of a level's requests was how fast, beside the stable release's."""
    return tuple(
        _distribution_plot(name, level, stable)
        for name in _METRICS
        if f"{name}_ms" in level.distributions
    )


def _distribution_plot(name: str, level: LevelFigures, stable: LevelFigures | None) -> Plot:
    metric = f"{name}_ms"
    found: dict[Whose, tuple[float, ...]] = {"candidate": level.distributions[metric]}
    if stable is not None and metric in stable.distributions:
        found = {"stable": stable.distributions[metric], **found}
    x = log_axis([value for values in found.values() for value in values], WIDTH)
    y = Axis(0.0, 100.0, HEIGHT, is_vertical=True)
    title = _METRICS[name]
    return Plot(
        title=title,
        words=f"Share of the requests of level {level.name} that were at least so fast: {title}",
        x_label="",
        lines=tuple(
            Line(
                whose,
                tuple(
                    Point(
                        x.place(value),
                        y.place(share * 100),
                        f"{whose}: {share:.0%} within {_ms(value)}",
                    )
                    for share, value in zip(QUANTILES, values, strict=False)
                ),
            )
            for whose, values in found.items()
        ),
        loose=(),
        x_ticks=x.ticks(words=_ms),
        y_ticks=tuple(Tick(y.place(share), f"{share} %") for share in (0, 25, 50, 75, 90, 100)),
    )


@dataclass(frozen=True)
class ScoreRow:
    """One score and how sure it is, in the units of the drawing."""

    whose: Whose
    label: str
    at: float
    low: float
    high: float
    y: float
    words: str


@dataclass(frozen=True)
class ScorePlot:
    """The scores of one task."""

    title: str
    rows: tuple[ScoreRow, ...]
    bound: Tick | None
    """The score a release must reach."""
    ticks: tuple[Tick, ...]
    height: float


def score_plots(
    measurement: Measurement, baseline: Measurement | None, tasks: Sequence[AccuracyTask]
) -> tuple[ScorePlot, ...]:
    """Return the scores of each task with their 95 % intervals, beside the stable release's."""
    bounds = {(task.name, task.metric): task.min for task in tasks}
    axis = Axis(0.0, 1.0, WIDTH)
    plots = []
    for score in measurement.accuracy:
        shown: list[tuple[Whose, TaskScore]] = [("candidate", score)]
        shown += [
            ("stable", other)
            for other in (baseline.accuracy if baseline else ())
            if (other.name, other.metric) == (score.name, score.metric)
        ]
        bound = bounds.get((score.name, score.metric))
        plots.append(
            ScorePlot(
                title=f"{score.name} {score.metric}",
                rows=tuple(
                    _score_row(whose, each, axis, ROW * (index + 0.5))
                    for index, (whose, each) in enumerate(shown)
                ),
                bound=None if bound is None else Tick(axis.place(bound), f"needs {bound:g}"),
                ticks=axis.ticks(),
                height=ROW * len(shown),
            )
        )
    return tuple(plots)


def _score_row(whose: Whose, score: TaskScore, axis: Axis, y: float) -> ScoreRow:
    low, high = interval(score)
    words = f"{whose}: {score.score:.3g}, 95 % interval {low:.3g} to {high:.3g}"
    return ScoreRow(
        whose=whose,
        label=f"{score.score:.3g}",
        at=axis.place(score.score),
        low=axis.place(low),
        high=axis.place(high),
        y=y,
        words=f"{words}, {score.samples} samples",
    )


def interval(score: TaskScore) -> tuple[float, float]:
    """Return the 95 % interval of a score.

    From the harness's standard error, or, where that is 0 or missing, Wilson's interval of a share:
    all right of 20 is not surely all right.
    """
    if score.stderr:
        width = _NORMAL_95 * score.stderr
        return max(0.0, score.score - width), min(1.0, score.score + width)
    count = score.samples
    if count < 1 or not 0 <= score.score <= 1:
        return score.score, score.score
    z2 = _NORMAL_95**2
    centre = (score.score + z2 / (2 * count)) / (1 + z2 / count)
    spread = score.score * (1 - score.score) / count + z2 / (4 * count**2)
    half = _NORMAL_95 * math.sqrt(spread) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


class Counts(Protocol):
    """One position of all answers of a parity check."""

    @property
    def compared(self) -> int:
        """Answers that have this position."""

    @property
    def agreed(self) -> int:
        """Of those, how many have the reference's token."""

    @property
    def excused(self) -> int:
        """Of the others, how many may differ because two tokens are about as likely."""


@dataclass(frozen=True)
class PositionBar:
    """The answers at one position, in the units of the drawing from the top."""

    x: float
    width: float
    agreed: float
    excused: float
    diverged: float
    words: str


@dataclass(frozen=True)
class PositionPlot:
    """Agreement with the reference by position of the answer."""

    bars: tuple[PositionBar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def position_plot(counts: Sequence[Counts]) -> PositionPlot | None:
    """Return the plot of agreement by position; None if nothing was compared."""
    if not any(each.compared for each in counts):
        return None
    # Positions in groups, so that long answers do not make bars thinner than a pixel.
    group = math.ceil(len(counts) / (WIDTH / 6))
    starts = range(0, len(counts), group)
    width = WIDTH / len(starts)
    bars = []
    for index, start in enumerate(starts):
        inside = counts[start : start + group]
        compared = sum(each.compared for each in inside)
        if not compared:
            continue
        agreed = sum(each.agreed for each in inside)
        excused = sum(each.excused for each in inside)
        last = start + len(inside)
        place = f"position {start + 1}" if group == 1 else f"positions {start + 1} to {last}"
        bars.append(
            PositionBar(
                x=round(width * index, 2),
                width=round(max(1.0, width - 1), 2),
                agreed=round(HEIGHT * agreed / compared, 1),
                excused=round(HEIGHT * excused / compared, 1),
                diverged=round(HEIGHT * (compared - agreed - excused) / compared, 1),
                words=f"{place}: {agreed} of {compared} agree, {excused} excused",
            )
        )
    x = Axis(0.0, float(len(counts)), WIDTH)
    y = Axis(0.0, 100.0, HEIGHT, is_vertical=True)
    return PositionPlot(
        bars=tuple(bars),
        x_ticks=x.ticks(),
        y_ticks=tuple(Tick(y.place(share), f"{share} %") for share in (0, 50, 100)),
    )


@dataclass(frozen=True)
class BarRow:
    """One row of a chart of bars."""

    label: str
    value: str
    share: float
    """Percent of the longest bar."""
    is_own: bool
    """Is it of the release that the report is about?"""


def bar_rows(values: Sequence[tuple[str, float, str, bool]]) -> tuple[BarRow, ...]:
    """Return bars for (label, value, the value in words, is it the report's own)."""
    largest = max((value for _, value, _, _ in values), default=0.0) or 1.0
    return tuple(
        BarRow(label, words, round(100 * value / largest, 1), own)
        for label, value, words, own in values
    )


def _ms(value: float) -> str:
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"
