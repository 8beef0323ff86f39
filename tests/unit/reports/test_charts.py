"""Charts stay inside their drawing and keep the order of what they show."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.documents.evidence import Block, MetricVerdict, Verdict
from trainyard.documents.measurement import Check
from trainyard.reports.charts import (
    BAR_WIDTH,
    PLOT_HEIGHT,
    PLOT_WIDTH,
    bar,
    evidence_plots,
    level_plots,
    traffic_plot,
)

figure = st.floats(0, 1e9)
evidence = st.floats(-1e6, 1e6)


def check(observed: float | None, minimum: float | None, maximum: float | None) -> Check:
    return Check(
        what="x", observed=observed, bound="", minimum=minimum, maximum=maximum, outcome="pass"
    )


def verdict(at: float, harm: float, promote: float, *, threshold: float = 2.0) -> Verdict:
    values: dict[str, Any] = {
        "metric": "ttft",
        "outcome": "UNDECIDED",
        "stable_value": None,
        "candidate_value": None,
        "ratio": None,
        "harm_margin": 0.1,
        "promote_margin": 0.15,
        "harm_evidence": harm,
        "harm_threshold": threshold,
        "promote_evidence": promote,
        "promote_threshold": threshold,
        "stable_requests": 0,
        "candidate_requests": 0,
        "blocks": 0,
        "note": "",
    }
    return Verdict(
        outcome="UNDECIDED",
        metrics=(MetricVerdict(**values),),
        looks=0,
        exposed_requests=0,
        at=at,
        reason="",
    )


@given(figure, st.none() | figure, st.none() | figure)
def test_a_bar_stays_inside_and_keeps_its_side_of_the_bound(
    observed: float, minimum: float | None, maximum: float | None
) -> None:
    drawn = bar(check(observed, minimum, maximum))

    if drawn is None:
        assert (minimum, maximum) == (None, None) or max(observed, minimum or 0, maximum or 0) == 0
        return
    for limit, at in ((minimum, drawn.lower), (maximum, drawn.upper)):
        assert (limit is None) == (at is None)
        if limit is not None and at is not None:
            assert 0 <= at < BAR_WIDTH
            assert (at <= drawn.value) if observed >= limit else (drawn.value <= at)
    assert 0 <= drawn.value < BAR_WIDTH


def test_there_is_no_bar_without_a_figure_or_a_bound() -> None:
    assert bar(check(None, 1.0, None)) is None
    assert bar(check(1.0, None, None)) is None


@pytest.mark.parametrize("difference", [-0.06, -0.01, 0.02])
def test_a_difference_that_may_be_negative_has_no_bar(difference: float) -> None:
    assert bar(check(difference, -0.05, None)) is None


@given(st.lists(st.tuples(st.floats(0, 1e5), evidence, evidence), min_size=1, max_size=12))
def test_curves_stay_inside_their_plot(looks: list[tuple[float, float, float]]) -> None:
    looks.sort()

    (plot,) = evidence_plots([verdict(*each) for each in looks])

    for curve in plot.curves:
        xs = [point.x for point in curve.points]
        assert len(xs) == len(looks)
        assert xs == sorted(xs)
        assert all(0 <= x <= PLOT_WIDTH for x in xs)
        assert all(0 <= point.y <= PLOT_HEIGHT for point in curve.points)
    assert 1 < len(plot.ticks) <= 8
    assert all(0 <= tick.at <= PLOT_WIDTH for tick in plot.ticks)


def test_a_curve_reaches_the_threshold_line_when_evidence_reaches_its_threshold() -> None:
    (plot,) = evidence_plots([verdict(30, 2.0, 0.0)])

    harm, promote = plot.curves
    assert harm.points[0].y == plot.threshold_y
    assert promote.points[0].y == plot.zero_y


def test_a_look_without_a_threshold_is_left_out() -> None:
    (plot,) = evidence_plots([verdict(30, 2.0, 0.0, threshold=0.0), verdict(60, 1.0, 0.0)])

    assert [len(curve.points) for curve in plot.curves] == [1, 1]


def test_what_can_only_show_harm_has_one_curve_once_there_are_data() -> None:
    def look(at: float, blocks: int) -> Verdict:
        plain = verdict(at, 1.0, 1.0)
        only = {"metric": "empty", "promote_evidence": 0.0, "promote_threshold": 0.0}
        harm_only = plain.metrics[0].model_copy(update={**only, "blocks": blocks})
        return plain.model_copy(update={"metrics": (*plain.metrics, harm_only)})

    assert [plot.metric for plot in evidence_plots([look(30, 0)])] == ["ttft"]
    _, empty = evidence_plots([look(30, 0), look(60, 1)])
    assert [(curve.kind, len(curve.points)) for curve in empty.curves] == [
        ("harm", 2),
        ("promote", 0),
    ]


@pytest.mark.parametrize(
    ("longest", "labels"),
    [
        (10.0, ["0 s", "2 s", "4 s", "6 s", "8 s", "10 s"]),
        (90.0, ["0 s", "20 s", "40 s", "60 s", "80 s"]),
        (600.0, ["0 min", "2 min", "4 min", "6 min", "8 min", "10 min"]),
        (150.0, ["0 min", "0.5 min", "1 min", "1.5 min", "2 min", "2.5 min"]),
    ],
)
def test_times_on_the_axis_are_round(longest: float, labels: list[str]) -> None:
    (plot,) = evidence_plots([verdict(longest, 0, 0)])

    assert [tick.label for tick in plot.ticks] == labels


def test_nothing_to_plot() -> None:
    assert evidence_plots([]) == ()
    assert traffic_plot([], "adder-0123456789ab") is None


def block(t: float, track: str, **figures: Any) -> Block:
    values = {"duration_s": 10, "release": track, "pod": "p", "metric": "ttft", "kind": "mean"}
    return Block.model_validate(
        {**values, "t": t, "track": track, "weight_candidate": 10, **figures}
    )


def test_levels_are_averages_of_all_servers_of_a_slice() -> None:
    blocks = [
        block(10, "stable", requests=10, total=1.0),
        block(10, "stable", requests=30, total=5.0, pod="q"),
        block(20, "stable", requests=10, total=2.0),
        block(20, "candidate", requests=0),
        block(20, "candidate", requests=4, total=1.0, pod="q"),
    ]
    (plot,) = level_plots(blocks)
    assert (plot.metric, plot.unit) == ("ttft", "ms")
    stable, candidate = plot.curves
    assert [point.words for point in stable.points] == ["10 s: 150 ms", "20 s: 200 ms"]
    assert [point.words for point in candidate.points] == ["20 s: 250 ms"]
    assert [level.label for level in plot.levels] == ["0", "250", "500"]
    assert candidate.points[0].y == PLOT_HEIGHT / 2


def test_counts_are_shares_of_the_requests() -> None:
    bad = block(10, "stable", requests=200, bad=1, metric="errors", kind="count")
    (plot,) = level_plots([bad], width=100)
    assert plot.unit == "%"
    assert plot.curves[0].points[0].words == "10 s: 0.5 %"
    assert plot.curves[0].points[0].x == 100


def test_a_metric_that_is_always_zero_has_a_scale_all_the_same() -> None:
    (plot,) = level_plots([block(10, "stable", requests=5, metric="errors", kind="count")])
    assert plot.curves[0].points[0].y == PLOT_HEIGHT
    assert plot.levels[-1].label == "1"


def test_without_figures_there_is_no_plot() -> None:
    assert level_plots([]) == ()
