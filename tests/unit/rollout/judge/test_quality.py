"""Answers that are compared pair by pair: what is harm, what is good enough, and how soon."""

from __future__ import annotations

import numpy as np
import pytest

from trainyard.documents.evidence import (
    Block,
    Comparing,
    JudgeSpec,
    Outcome,
    Track,
    default_metrics,
    quality_metric,
)
from trainyard.rollout.judge import judge
from trainyard.rollout.judge.blocks import closed_blocks
from trainyard.rollout.judge.combine import metric_verdict

SLICE_S = 30.0
PAIRS = 15
"""In a slice: half a pair a second, on average."""
WEIGHTS = (10,) * 8 + (25,) * 8 + (50,) * 44


def log_of(
    seed: int, *, stable: float, candidate: float, slices: int = 60, every: int = 2
) -> list[Block]:
    """Return the rows of pairs in which only stable, or only the candidate, was wrong."""
    rng = np.random.default_rng(seed)
    rows: list[Block] = []
    for number in range(0, slices, every):
        both = rng.multinomial(PAIRS * every, [stable, candidate, 1 - stable - candidate])
        sides: tuple[tuple[Track, int], ...] = (("stable", both[0]), ("candidate", both[1]))
        rows += [
            Block(
                t=SLICE_S * (number + 1),
                duration_s=SLICE_S,
                release=track,
                track=track,
                pod=track,
                metric="quality",
                kind="count",
                requests=PAIRS * every,
                bad=int(bad),
                weight_candidate=WEIGHTS[number],
                stratum="probe",
            )
            for track, bad in sides
        ]
    return rows


def spec_of(comparing: Comparing = "answers") -> JudgeSpec:
    return JudgeSpec(metrics=(quality_metric(comparing),), max_duration_s=1800)


def decided(rows: list[Block], comparing: Comparing = "answers") -> tuple[Outcome, int]:
    """Return the verdict, and of how many pairs: of harm, those until it was shown."""
    spec = spec_of(comparing)
    found = metric_verdict(closed_blocks(rows, spec.metrics[0], spec), spec.metrics[0], spec)
    return found.outcome, found.candidate_requests


def test_a_fifth_of_the_answers_gone_wrong_is_harm_within_300_pairs() -> None:
    # Each release alone gets one answer in a hundred wrong; the bad one a fifth more.
    found = [decided(log_of(seed, stable=0.01, candidate=0.2)) for seed in range(40)]
    assert {outcome for outcome, _ in found} == {"HARM"}
    assert max(pairs for _, pairs in found) <= 300
    assert np.median([pairs for _, pairs in found]) <= 240


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.15])
def test_releases_that_are_wrong_as_often_are_no_harm(share: float) -> None:
    outcomes = [decided(log_of(s, stable=share, candidate=share))[0] for s in range(60)]
    assert "HARM" not in outcomes


@pytest.mark.soak
@pytest.mark.parametrize(
    ("stable", "candidate"), [(0.0, 0.02), (0.0134, 0.02), (0.05, 0.075), (0.15, 0.225)]
)
def test_exactly_at_the_margin_harm_is_rare(stable: float, candidate: float) -> None:
    runs = 2000
    harmed = sum(
        decided(log_of(s, stable=stable, candidate=candidate))[0] == "HARM" for s in range(runs)
    )
    # 0.1 % is promised; more than 8 of 2,000 are an accident once in some 4,000 times.
    assert harmed <= 8


def test_answers_as_good_are_good_enough_after_some_hundred_pairs() -> None:
    found = [
        decided(log_of(seed, stable=0.005, candidate=0.005, slices=24))[0] for seed in range(40)
    ]
    assert found.count("NON_INFERIOR") >= 36


def test_few_pairs_prove_nothing() -> None:
    assert decided(log_of(1, stable=0.0, candidate=0.0, slices=4)) == ("UNDECIDED", 60)


def test_other_tokens_are_tolerated_up_to_a_share() -> None:
    faithful = [decided(log_of(s, stable=0.0, candidate=0.04), "tokens")[0] for s in range(20)]
    broken = [decided(log_of(s, stable=0.0, candidate=0.5), "tokens") for s in range(20)]
    assert set(faithful) == {"NON_INFERIOR"}
    assert {outcome for outcome, _ in broken} == {"HARM"}
    assert max(pairs for _, pairs in broken) <= 120


def test_blocks_of_pairs_go_on_when_the_weight_changes() -> None:
    rows = [
        row.model_copy(update={"weight_candidate": 10 if row.t <= 30 else 50, "requests": 12})
        for row in log_of(1, stable=0.0, candidate=0.0, slices=4)
    ]
    (block,) = closed_blocks(rows, quality_metric("answers"), spec_of())
    assert block.candidate.all.requests == 24


def test_a_rollout_with_pairs_needs_them_and_one_without_does_not(
    make_log: object, spec: JudgeSpec
) -> None:
    assert callable(make_log)
    users: list[Block] = make_log()
    probed = spec.model_copy(update={"metrics": (*default_metrics(), quality_metric("answers"))})
    assert judge(users, spec).outcome == "NON_INFERIOR"
    without = judge(users, probed)
    assert without.outcome == "UNDECIDED"
    assert "quality: no closed block yet" in without.reason
    good = judge([*users, *log_of(1, stable=0.0, candidate=0.0, slices=40)], probed)
    assert good.outcome == "NON_INFERIOR"
    # All of them at the first steps, since the set was over then: what answers say does not
    # depend on the load.
    early = judge([*users, *log_of(1, stable=0.0, candidate=0.0, slices=8)], probed)
    assert early.outcome == "NON_INFERIOR"
    bad = judge([*users, *log_of(1, stable=0.0, candidate=0.2, slices=40)], probed)
    assert bad.outcome == "HARM"
    assert "quality" in bad.reason
    assert good.exposed_requests == without.exposed_requests


def test_the_budget_of_false_rollbacks_is_one_percent_with_quality() -> None:
    metrics = (*default_metrics(), quality_metric("answers"))
    assert sum(metric.harm_alpha for metric in metrics) <= 0.01 + 1e-12
