"""How answers end: a clear rise is harm, and promotion waits for nothing of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from trainyard.documents.evidence import (
    Block,
    JudgeSpec,
    Track,
    default_metrics,
    ending_metrics,
    quality_metric,
)
from trainyard.rollout.judge import judge
from trainyard.rollout.judge.blocks import closed_blocks
from trainyard.rollout.judge.combine import metric_verdict
from trainyard.spec.model import EndingMargins

MakeLog = Callable[..., list[Block]]
TRUNCATED = next(metric for metric in ending_metrics({}) if metric.name == "truncated")
NAMES = ("aborted", "truncated", "empty", "unanswered", "refused")
WEIGHTS = (10,) * 8 + (25,) * 8 + (50,) * 24


def ends(
    metric: str, stable: float, candidate: float, *, seed: int = 1, rate: float = 16.0
) -> list[Block]:
    """Return rows of one metric with these shares of bad ends; three pods a side."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, weight in enumerate(WEIGHTS):
        sides: tuple[tuple[Track, float, float], ...] = (
            ("stable", 1 - weight / 100, stable),
            ("candidate", weight / 100, candidate),
        )
        for track, traffic, share in sides:
            for pod in range(3):
                requests = int(rng.poisson(rate * 30 * traffic / 3))
                rows.append(
                    Block(
                        t=30.0 * (i + 1),
                        duration_s=30.0,
                        release=f"m-{track}",
                        track=track,
                        pod=f"{track}-{pod}",
                        metric=metric,
                        kind="count",
                        requests=requests,
                        bad=int(rng.binomial(requests, share)),
                        weight_candidate=weight,
                    )
                )
    return rows


@pytest.fixture
def with_endings(spec: JudgeSpec) -> JudgeSpec:
    return spec.model_copy(update={"metrics": (*default_metrics(), *ending_metrics({}))})


@pytest.mark.parametrize("metric", NAMES)
def test_a_clear_rise_alone_is_harm_and_named(
    metric: str, make_log: MakeLog, spec: JudgeSpec, with_endings: JudgeSpec
) -> None:
    log = [*make_log(weights=WEIGHTS), *ends(metric, 0.02, 0.3)]
    found = judge(log, with_endings)
    assert found.outcome == "HARM"
    assert [one.metric for one in found.metrics if one.outcome == "HARM"] == [metric]
    assert found.reason.startswith(f"Harm: {metric} ")
    assert "(allowed 2 or 2.00%)" in found.reason
    # Without the metric the same log is as good as it was.
    assert judge(log, spec).outcome == "NON_INFERIOR"


def test_promotion_waits_for_none_of_them(
    make_log: MakeLog, spec: JudgeSpec, with_endings: JudgeSpec
) -> None:
    """Absent or a little more frequent than stable's: looks say what they would say without."""
    plain = make_log(weights=WEIGHTS)
    quiet = [row for name in NAMES for row in ends(name, 0.02, 0.03)]
    outcomes = set()
    for until in (30.0, 270.0, 540.0, 1200.0):
        other = judge([row for row in plain if row.t <= until], spec)
        outcomes.add(other.outcome)
        for log in (plain, [*plain, *quiet]):
            one = judge([row for row in log if row.t <= until], with_endings)
            assert (one.outcome, one.reason) == (other.outcome, other.reason)
            assert one.metrics[: len(other.metrics)] == other.metrics
            assert one.exposed_requests == other.exposed_requests
            assert {each.outcome for each in one.metrics[len(other.metrics) :]} == {"UNDECIDED"}
    assert outcomes == {"UNDECIDED", "NON_INFERIOR"}


def test_absent_series_are_no_data_and_not_waited_for(
    make_log: MakeLog, with_endings: JudgeSpec
) -> None:
    (absent,) = [one for one in judge(make_log(), with_endings).metrics if one.metric == "empty"]
    assert absent.harm_only
    assert (absent.standing, absent.stable_value, absent.blocks) == ("no data", None, 0)
    assert "does not wait" in absent.note
    seen = judge([*make_log(weights=WEIGHTS), *ends("empty", 0.02, 0.02)], with_endings)
    (present,) = [one for one in seen.metrics if one.metric == "empty"]
    assert (present.standing, present.note) == ("no harm shown", "")
    assert present.candidate_value == pytest.approx(0.02, abs=0.01)
    assert (present.promote_evidence, present.promote_threshold) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("stable", "candidate"), [(0.0, 0.02), (0.01, 0.02), (0.05, 0.1), (0.3, 0.6), (0.6, 0.9)]
)
def test_twice_as_many_or_one_in_fifty_is_no_harm(
    stable: float, candidate: float, with_endings: JudgeSpec
) -> None:
    for seed in range(10):
        log = ends("truncated", stable, candidate, seed=seed)
        blocks = closed_blocks(log, TRUNCATED, with_endings)
        assert metric_verdict(blocks, TRUNCATED, with_endings).standing == "no harm shown"


def test_answers_to_other_prompts_may_end_in_another_way(
    make_log: MakeLog, with_endings: JudgeSpec
) -> None:
    log = [*make_log(weights=WEIGHTS), *ends("truncated", 0.05, 0.2)]
    assert judge(log, with_endings).outcome == "HARM"
    # The candidate's prompts are half as long again as stable's.
    prompts = [
        row.model_copy(
            update={
                "metric": "prompts",
                "total": row.total / 0.2 * (150 if row.track == "candidate" else 100),
            }
        )
        for row in log
        if row.metric == "ttft"
    ]
    found = judge([*log, *prompts], with_endings)
    assert found.outcome == "UNDECIDED"
    assert "prompts" in found.reason


def test_each_can_be_switched_off_or_have_margins_of_its_own() -> None:
    settings = {
        "truncated": EndingMargins(judged=False),
        "empty": EndingMargins(harm=3, harm_floor=0.05),
    }
    found = {one.name: one for one in ending_metrics(settings)}  # type: ignore[arg-type]
    assert set(found) == {"aborted", "empty", "unanswered", "refused"}
    assert (found["empty"].harm_margin, found["empty"].harm_floor) == (3, 0.05)
    assert (found["aborted"].harm_margin, found["aborted"].harm_floor) == (2, 0.02)
    assert all(one.harm_only for one in found.values())


def test_the_budget_of_false_rollbacks_is_one_percent_with_all_of_them() -> None:
    metrics = (*default_metrics(), quality_metric("answers"), *ending_metrics({}))
    assert sum(metric.harm_alpha for metric in metrics) <= 0.01 + 1e-12


def test_something_must_be_waited_for() -> None:
    with pytest.raises(ValidationError, match="no metric is left that promotion waits for"):
        JudgeSpec(metrics=ending_metrics({}), max_duration_s=60)
