from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainyard.documents.evidence import Block, JudgeSpec, Verdict
from trainyard.rollout.judge import judge, replay
from trainyard.rollout.judge.blocks import closed_blocks, without_repeats
from trainyard.rollout.judge.combine import path_of

MakeLog = Callable[..., list[Block]]
GOLDEN = Path(__file__).parent / "golden"

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def logs(draw: st.DrawFn) -> list[Block]:
    """Return a log of anything a reader may write: gaps, empty slices, pods that come and go."""
    rows = []
    slices = draw(st.integers(1, 14))
    weight = 10
    for i in range(slices):
        weight = draw(st.sampled_from((weight, weight, weight, 10, 50)))
        for track in ("stable", "candidate"):
            for pod in range(draw(st.integers(0, 2))):
                for metric, kind in (
                    ("ttft", "mean"),
                    ("tpot", "mean"),
                    ("errors", "count"),
                    ("ttft_tail", "count"),
                ):
                    if draw(st.integers(0, 9)) == 0:
                        continue
                    n = draw(st.one_of(st.just(0), st.integers(0, 400)))
                    value = draw(st.floats(0.0, 2.0))
                    rows.append(
                        Block.model_validate(
                            {
                                "t": 30.0 * (i + 1),
                                "duration_s": 30.0,
                                "release": f"m-{track}",
                                "track": track,
                                "pod": f"{track}-{pod}",
                                "metric": metric,
                                "kind": kind,
                                "requests": n,
                                "weight_candidate": weight,
                                "total": n * value if kind == "mean" else 0.0,
                                "bad": int(n * value / 2) if kind == "count" else 0,
                            }
                        )
                    )
    return rows


def by_metric(verdict: Verdict) -> dict[str, Any]:
    return {one.metric: one for one in verdict.metrics}


# What it says


def test_an_equal_candidate_is_promoted(make_log: MakeLog, spec: JudgeSpec) -> None:
    verdict = judge(make_log(), spec)
    assert verdict.outcome == "NON_INFERIOR"
    assert {one.outcome for one in verdict.metrics} == {"NON_INFERIOR"}
    assert verdict.looks == 40
    assert verdict.at == 1200
    assert verdict.reason.startswith("Good enough in every metric: ttft 0.2")


@pytest.mark.parametrize(
    ("fault", "metric"),
    [
        ({"ttft": 2.0}, "ttft"),
        ({"tpot": 2.0}, "tpot"),
        ({"errors": 0.05}, "errors"),
        ({"tail": 0.005, "ttft": 1.6}, "ttft"),
    ],
)
def test_an_obvious_fault_is_harm_and_named(
    make_log: MakeLog, spec: JudgeSpec, fault: dict[str, float], metric: str
) -> None:
    verdict = judge(make_log(**fault), spec)
    assert verdict.outcome == "HARM"
    assert [one.metric for one in verdict.metrics if one.outcome == "HARM"] == [metric]
    assert verdict.reason.startswith(f"Harm: {metric} ")
    harmed = by_metric(verdict)[metric]
    assert harmed.harm_evidence >= harmed.harm_threshold
    assert harmed.ratio is None or harmed.ratio > harmed.harm_margin


def test_the_figures_are_those_of_the_log(make_log: MakeLog, spec: JudgeSpec) -> None:
    verdict = judge(make_log(ttft=1.12, weights=(50,) * 10), spec)
    ttft = by_metric(verdict)["ttft"]
    assert ttft.stable_value == pytest.approx(0.2, rel=0.02)
    assert ttft.ratio == pytest.approx(1.12, rel=0.02)
    assert (ttft.stable_requests, ttft.candidate_requests, ttft.blocks) == (2400, 2400, 10)
    assert verdict.exposed_requests == 2400


def test_the_ratio_is_not_mixed_up_with_the_load_of_the_steps(
    make_log: MakeLog, spec: JudgeSpec
) -> None:
    """Everything is slower at the second step, when the candidate has more of the traffic."""
    log = [
        row.model_copy(update={"total": row.total * (2.0 if row.weight_candidate == 50 else 1.0)})
        for row in make_log()
    ]
    assert by_metric(judge(log, spec))["ttft"].ratio == pytest.approx(1.0, rel=0.03)


# What it needs


def test_nothing_is_undecided(spec: JudgeSpec) -> None:
    verdict = judge([], spec)
    assert verdict.outcome == "UNDECIDED"
    assert (verdict.looks, verdict.exposed_requests, verdict.at) == (0, 0, 0.0)
    assert "no closed block yet" in verdict.reason


def test_a_candidate_without_requests_is_undecided(make_log: MakeLog, spec: JudgeSpec) -> None:
    log = make_log()
    absent = [row for row in log if row.track == "stable"]
    idle = [
        row
        if row.track == "stable"
        else row.model_copy(update={"requests": 0, "total": 0.0, "bad": 0})
        for row in log
    ]
    for rows in (absent, idle):
        assert judge(rows, spec).outcome == "UNDECIDED"
        assert judge(rows, spec).exposed_requests == 0


@pytest.mark.parametrize("metric", ["ttft", "tpot", "errors", "ttft_tail"])
def test_a_metric_that_is_missing_is_never_passed(
    make_log: MakeLog, spec: JudgeSpec, metric: str
) -> None:
    for side in ("stable", "candidate"):
        log = [row for row in make_log() if (row.metric, row.track) != (metric, side)]
        verdict = judge(log, spec)
        assert verdict.outcome == "UNDECIDED"
        assert f"Undecided: {metric}:" in verdict.reason


def test_promotion_needs_blocks_at_the_last_weight(make_log: MakeLog, spec: JudgeSpec) -> None:
    patient = spec.model_copy(update={"max_duration_s": 7200.0})

    def alike(*weights: int) -> Verdict:
        """Return the verdict where all servers are loaded alike at 25 %, so those blocks count."""
        return judge(make_log(weights=weights, candidate_pods=1), patient)

    quiet = alike(*(25,) * 200)
    assert {one.outcome for one in quiet.metrics} == {"NON_INFERIOR"}
    assert quiet.outcome == "UNDECIDED"
    assert "only 0 of 2 blocks at 50 %" in quiet.reason
    assert alike(*(25,) * 200, 50).outcome == "UNDECIDED"
    assert alike(*(25,) * 200, 50, 50).outcome == "NON_INFERIOR"


def test_what_is_seen_under_less_load_never_promotes(make_log: MakeLog, spec: JudgeSpec) -> None:
    patient = spec.model_copy(update={"max_duration_s": 7200.0})
    quiet = judge(make_log(weights=(25,) * 40), patient)
    assert {one.outcome for one in quiet.metrics} == {"UNDECIDED"}
    assert {one.promote_evidence for one in quiet.metrics} == {0.0}
    assert "counts from 50 % of the traffic on" in quiet.reason
    later = judge(make_log(weights=(25,) * 40 + (50,) * 40), patient)
    alone = judge(make_log(weights=(50,) * 40), patient)
    assert later.outcome == "NON_INFERIOR"
    assert [one.promote_evidence for one in later.metrics] == pytest.approx(
        [one.promote_evidence for one in alone.metrics], rel=0.05
    )


def test_less_load_finds_harm(make_log: MakeLog, spec: JudgeSpec) -> None:
    assert judge(make_log(weights=(25,) * 40, ttft=1.5), spec).outcome == "HARM"


def test_earlier_steps_promote_nothing_that_has_become_slow(
    make_log: MakeLog, spec: JudgeSpec
) -> None:
    quiet = make_log(weights=(25,) * 100, candidate_pods=1)
    later = make_log(weights=(25,) * 100 + (50,) * 3, candidate_pods=1, ttft=1.3)
    loaded = [row for row in later if row.t > 100 * 30]
    verdict = judge([*quiet, *loaded], spec.model_copy(update={"max_duration_s": 3600.0}))
    assert verdict.outcome != "NON_INFERIOR"
    ttft = by_metric(verdict)["ttft"]
    assert ttft.promote_evidence >= ttft.promote_threshold
    assert "at 50 % of the traffic" in ttft.note


def test_harm_stays_whatever_follows(make_log: MakeLog, spec: JudgeSpec) -> None:
    slow = [row for row in make_log(ttft=3.0) if row.t <= 300]
    fine = [row for row in make_log() if row.t > 300]
    verdict = judge([*slow, *fine], spec)
    assert verdict.outcome == "HARM"
    assert "of exposure" in by_metric(verdict)["ttft"].note


# What it does not depend on


@few
@given(log=logs(), seed=st.integers(0, 2**32 - 1))
def test_order_and_repeats_change_nothing(log: list[Block], seed: int, spec: JudgeSpec) -> None:
    chance = random.Random(seed)
    mixed = log + chance.sample(log, len(log) // 2)
    chance.shuffle(mixed)
    assert judge(mixed, spec) == judge(log, spec)


@few
@given(log=logs())
def test_looking_does_not_change_what_is_seen(log: list[Block], spec: JudgeSpec) -> None:
    """Harm seen at any look is harm at every later one, and the last look is the whole log."""
    verdicts = list(replay(log, spec))
    assert len(verdicts) == len({row.t for row in log})
    if verdicts:
        assert verdicts[-1] == judge(log, spec)
    outcomes = [verdict.outcome for verdict in verdicts]
    # A row that arrives late may pair up with earlier ones; these logs have none.
    if "HARM" in outcomes:
        assert set(outcomes[outcomes.index("HARM") :]) == {"HARM"}


@few
@given(log=logs())
def test_any_log_gives_finite_figures_and_keeps_the_rules(
    log: list[Block], spec: JudgeSpec
) -> None:
    verdict = judge(log, spec)  # the model refuses NaN and infinity
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    for one in verdict.metrics:
        assert (one.outcome == "HARM") <= (one.harm_evidence >= one.harm_threshold)
        assert (one.outcome == "NON_INFERIOR") <= (one.promote_evidence >= one.promote_threshold)
        if one.blocks == 0:
            assert one.outcome == "UNDECIDED"
        else:
            assert min(one.stable_requests, one.candidate_requests) >= 20
    if verdict.outcome == "NON_INFERIOR":
        assert {one.outcome for one in verdict.metrics} == {"NON_INFERIOR"}


@few
@given(log=logs(), factor=st.floats(1.0, 20.0))
def test_a_slower_candidate_is_never_less_harmful_nor_more_promotable(
    log: list[Block], factor: float, spec: JudgeSpec
) -> None:
    slower = [
        row.model_copy(update={"total": row.total * factor}) if row.track == "candidate" else row
        for row in log
    ]
    compare_paths(log, slower, spec)


@few
@given(log=logs(), more=st.integers(1, 50))
def test_more_errors_are_never_less_harmful_nor_more_promotable(
    log: list[Block], more: int, spec: JudgeSpec
) -> None:
    worse = [
        row.model_copy(update={"bad": min(row.bad + more, row.requests)})
        if row.track == "candidate" and row.kind == "count"
        else row
        for row in log
    ]
    compare_paths(log, worse, spec)


def compare_paths(better: list[Block], worse: list[Block], spec: JudgeSpec) -> None:
    for metric in spec.metrics:
        one, other = (
            path_of(closed_blocks(without_repeats(log), metric, spec), metric, spec)
            for log in (better, worse)
        )
        rounding = 1e-6
        assert (other.harm / other.harm_threshold >= one.harm / one.harm_threshold - rounding).all()
        assert (
            other.promote / other.promote_threshold
            <= one.promote / one.promote_threshold + rounding
        ).all()


# What is on record


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("promoted", {}),
        ("slow", {"ttft": 1.45}),
        ("errors", {"errors": 0.04}),
        ("undecided", {"weights": (10,) * 12, "ttft": 1.12}),
    ],
)
def test_verdicts_stay_as_they_were(
    name: str, arguments: dict[str, Any], make_log: MakeLog, spec: JudgeSpec
) -> None:
    """Golden verdicts. If one changes on purpose, run the calibration before it is replaced."""
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    found = judge(make_log(**arguments), spec).model_dump(mode="json")
    assert rounded(found) == rounded(expected)


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def test_the_package_can_be_imported_without_numpy_and_scipy() -> None:
    code = (
        "import sys, trainyard.rollout.judge; sys.exit(bool({'numpy', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600, check=False).returncode == 0


def test_a_ratio_that_is_no_number_is_left_out() -> None:
    from trainyard.rollout.judge.combine import Values

    assert Values(stable=0.0, candidate=1.0).ratio is None
    assert Values(stable=5e-324, candidate=1.0).ratio is None
    assert Values(stable=2.0, candidate=1.0).ratio == 0.5
