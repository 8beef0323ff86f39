"""The charts of a release show its figures, and nothing where there are none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.report_world import level, measured

from trainyard.documents.measurement import TaskScore
from trainyard.reports.plots import (
    HEIGHT,
    WIDTH,
    bar_rows,
    distribution_plots,
    interval,
    load_plots,
    position_plot,
    score_plots,
)
from trainyard.spec.model import Slo


def score(value: float, *, stderr: float | None = None, samples: int = 100) -> TaskScore:
    return TaskScore(name="sums", metric="acc", score=value, stderr=stderr, samples=samples)


def test_latency_grows_to_the_right_and_the_slo_is_a_line() -> None:
    ttft, tpot, e2e = load_plots(measured(), Slo(ttft_ms=500, e2e_ms=20000))

    p50, p90, p99 = ttft.lines
    assert [line.kind for line in ttft.lines] == ["p50", "p90", "p99"]
    assert [point.x for point in p50.points] == sorted(point.x for point in p50.points)
    # Higher up is slower.
    assert p99.points[-1].y < p90.points[-1].y < p50.points[-1].y < p50.points[0].y
    assert ttft.limit is not None
    assert ttft.limit.label == "SLO 500 ms"
    assert e2e.limit is not None
    assert e2e.limit.label == "SLO 20 s"
    assert tpot.limit is None
    assert ttft.mark is not None
    assert ttft.mark.label == "11.31 a second meets it"
    assert [len(line.points) for line in ttft.loose] == [2, 2, 2]


def test_levels_alone_are_points_without_a_curve() -> None:
    plots = load_plots(measured(search=None), None)

    assert [(plot.lines, plot.mark, plot.limit) for plot in plots] == [((), None, None)] * 3


def test_nothing_measured_draws_nothing() -> None:
    assert load_plots(measured(search=None, latency=()), None) == ()
    assert distribution_plots(level("chat", 1, 1, distributions={}), None) == ()
    assert score_plots(measured(accuracy=()), None, ()) == ()
    assert position_plot([]) is None
    assert position_plot([SimpleNamespace(compared=0, agreed=0, excused=0)]) is None


def test_distributions_lie_beside_the_stable_releases() -> None:
    ttft, *_ = distribution_plots(level("chat", 2.0, 1), level("chat", 1.0, 1))

    stable, candidate = ttft.lines
    assert (stable.kind, candidate.kind) == ("stable", "candidate")
    assert all(b.x > a.x for a, b in zip(stable.points, candidate.points, strict=True))
    assert [point.y for point in candidate.points][::20] == [HEIGHT, 0.0]


@pytest.mark.parametrize(
    ("found", "low", "high"),
    [
        (score(0.8, stderr=0.04), 0.7216, 0.8784),
        (score(0.99, stderr=0.01), 0.9704, 1.0),
        # Wilson's interval: all of 20, 16 of 20.
        (score(1.0, stderr=0.0, samples=20), 0.8389, 1.0),
        (score(0.8, samples=20), 0.584, 0.9193),
        (score(0.8, samples=0), 0.8, 0.8),
        (score(35.0, samples=20), 35.0, 35.0),
    ],
)
def test_an_interval_says_how_sure_a_score_is(found: TaskScore, low: float, high: float) -> None:
    assert interval(found) == pytest.approx((low, high), abs=1e-4)


def test_long_answers_are_drawn_in_groups_of_positions() -> None:
    counts = [SimpleNamespace(compared=10, agreed=9, excused=1) for _ in range(1000)]

    plot = position_plot(counts)

    assert plot is not None
    assert len(plot.bars) <= WIDTH / 6
    assert plot.bars[0].words == "positions 1 to 20: 180 of 200 agree, 20 excused"
    assert all(bar.diverged == 0 for bar in plot.bars)
    assert plot.bars[-1].x + plot.bars[-1].width <= WIDTH


def test_bars_are_shares_of_the_longest() -> None:
    rows = bar_rows([("a", 2.0, "2 s", True), ("b", 8.0, "8 s", False), ("c", 0.0, "0 s", False)])

    assert [row.share for row in rows] == [25.0, 100.0, 0.0]
    assert bar_rows([]) == ()
