from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trainyard.documents.evidence import JudgeSpec, MetricSpec
from trainyard.rollout.judge.blocks import PairedBlock
from trainyard.rollout.judge.counts import (
    Counts,
    count_path,
    harm_evidence,
    level_wagers,
    promote_evidence,
    ratio_wagers,
)
from trainyard.rollout.judge.defaults import HARM_RATIOS, PROMOTE_RATIOS

Pair = Callable[..., tuple[PairedBlock, ...]]

ERRORS = MetricSpec(
    name="errors",
    kind="count",
    harm_margin=2.0,
    promote_margin=3.0,
    harm_floor=0.005,
    promote_ceiling=0.008,
    harm_alpha=0.003,
)


SPEC = JudgeSpec(metrics=(ERRORS,), max_duration_s=1800)


def drawn(p_stable: float, p_candidate: float, runs: int, seed: int) -> Counts:
    """Return counts of `runs` independent blocks, with shares that are not small."""
    rng = np.random.default_rng(seed)
    n_stable, n_candidate = np.full(runs, 90.0), np.full(runs, 30.0)
    return Counts(
        stable_n=n_stable,
        stable_bad=rng.binomial(90, p_stable, runs).astype(float),
        candidate_n=n_candidate,
        candidate_bad=rng.binomial(30, p_candidate, runs).astype(float),
    )


def mean_is_at_most_one(log_wagers: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bool:
    wagers = np.exp(log_wagers)
    errors = wagers.std(axis=0) / np.sqrt(len(wagers))
    return bool((wagers.mean(axis=0) <= 1 + 4 * errors).all())


@pytest.mark.parametrize("p_stable", [0.002, 0.05, 0.3])
@pytest.mark.parametrize("share_of_margin", [1.0, 0.5])
def test_the_ratio_wager_is_fair_or_worse_under_its_null(
    p_stable: float, share_of_margin: float
) -> None:
    counts = drawn(p_stable, 2 * p_stable * share_of_margin, 200_000, seed=1)
    assert mean_is_at_most_one(ratio_wagers(counts, 2.0, (1.5, 2.0, 3.0)))


@pytest.mark.parametrize("p_candidate", [0.15, 0.3])
def test_the_ratio_wager_for_promotion_is_fair_or_worse_under_its_null(p_candidate: float) -> None:
    counts = drawn(0.05, p_candidate, 200_000, seed=2)
    assert mean_is_at_most_one(ratio_wagers(counts, 3.0, PROMOTE_RATIOS))


def test_the_level_wagers_are_fair_or_worse_under_their_nulls() -> None:
    for p in (0.02, 0.01):
        counts = drawn(0.1, p, 200_000, seed=3)
        assert mean_is_at_most_one(level_wagers(counts, 0.02, (1.5, 2.0, 3.0)))
    for p in (0.02, 0.05):
        counts = drawn(0.1, p, 200_000, seed=4)
        assert mean_is_at_most_one(level_wagers(counts, 0.02, PROMOTE_RATIOS))


def test_a_wager_at_the_edge_of_its_null_is_fair_and_not_merely_bad() -> None:
    counts = drawn(0.01, 0.02, 400_000, seed=5)
    ratio = np.exp(ratio_wagers(counts, 2.0, (1.5,))).mean()
    level = np.exp(level_wagers(counts, 0.02, (1.5,))).mean()
    assert ratio == pytest.approx(1.0, abs=0.01)
    assert level == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("p_stable", "p_candidate"), [(0.02, 0.04), (0.0, 0.005), (0.1, 0.1), (0.002, 0.004)]
)
def test_false_harm_stays_inside_its_budget(
    pair: Pair, p_stable: float, p_candidate: float
) -> None:
    loose = ERRORS.model_copy(update={"harm_alpha": 0.05})
    rng = np.random.default_rng(6)
    false = 0
    for _ in range(300):
        stable = [(90, int(k)) for k in rng.binomial(90, p_stable, 20)]
        candidate = [(30, int(k)) for k in rng.binomial(30, p_candidate, 20)]
        false += count_path(pair(loose, stable, candidate), loose, SPEC).first_harm() is not None
    assert false / 300 <= 0.05


def test_false_promotion_stays_inside_its_budget(pair: Pair) -> None:
    rng = np.random.default_rng(7)
    false = 0
    for _ in range(300):
        stable = [(90, int(k)) for k in rng.binomial(90, 0.01 / 3, 30)]
        candidate = [(30, int(k)) for k in rng.binomial(30, 0.01, 30)]
        blocks = pair(ERRORS, stable, candidate)
        false += bool(count_path(blocks, ERRORS, SPEC).is_non_inferior().any())
    assert false / 300 <= 0.05 + 2 * np.sqrt(0.05 / 300)


def test_errors_of_the_candidate_are_harm(pair: Pair) -> None:
    blocks = pair(ERRORS, [(200, 0)] * 10, [(40, 4)] * 10)
    assert count_path(blocks, ERRORS, SPEC).first_harm() == 3


def test_no_bad_event_anywhere_is_good_evidence_and_no_nan(pair: Pair) -> None:
    path = count_path(pair(ERRORS, [(200, 0)] * 20, [(40, 0)] * 20), ERRORS, SPEC)
    assert np.isfinite(path.harm).all()
    assert np.isfinite(path.promote).all()
    assert path.first_harm() is None
    assert path.is_non_inferior()[-1]
    needed = 40 * (int(path.is_non_inferior().argmax()) + 1)
    assert 400 <= needed <= 600


def test_every_request_bad_is_no_nan_either(pair: Pair) -> None:
    path = count_path(pair(ERRORS, [(40, 40)] * 5, [(40, 40)] * 5), ERRORS, SPEC)
    assert np.isfinite(path.harm).all()
    assert np.isfinite(path.promote).all()
    assert path.first_harm() is None


def test_a_sick_stable_release_does_not_make_its_equal_harmful(pair: Pair) -> None:
    path = count_path(pair(ERRORS, [(180, 9)] * 40, [(20, 1)] * 40), ERRORS, SPEC)
    assert path.first_harm() is None


def test_a_burst_counts_as_little_as_two_events(pair: Pair) -> None:
    quiet = [(40, 0)] * 9
    burst, two = (
        count_path(pair(ERRORS, [(160, 0)] * 10, [*quiet, (40, bad)]), ERRORS, SPEC)
        for bad in (30, 2)
    )
    assert burst.harm[-1] == pytest.approx(two.harm[-1])
    assert burst.first_harm() is None
    assert burst.promote[-1] < two.promote[-1]


def test_a_burst_on_stable_does_not_promote(pair: Pair) -> None:
    candidate = [(40, 1)] * 10
    path = count_path(pair(ERRORS, [*[(160, 0)] * 9, (160, 100)], candidate), ERRORS, SPEC)
    assert not path.is_non_inferior().any()


def test_many_requests_raise_the_clip(pair: Pair) -> None:
    """5 % errors stay visible where a block has hundreds of requests."""
    path = count_path(pair(ERRORS, [(750, 1)] * 10, [(750, 37)] * 10), ERRORS, SPEC)
    assert path.first_harm() is not None


def test_harm_needs_the_ratio_and_the_floor(pair: Pair) -> None:
    below_floor = pair(ERRORS, [(5000, 0)] * 30, [(1000, 2)] * 30)
    assert count_path(below_floor, ERRORS, SPEC).first_harm() is None
    below_ratio = pair(ERRORS, [(500, 15)] * 30, [(100, 4)] * 30)
    assert count_path(below_ratio, ERRORS, SPEC).first_harm() is None
    without_floor = ERRORS.model_copy(update={"harm_floor": 0.0})
    assert count_path(below_floor, without_floor, SPEC).first_harm() is not None


def test_the_ratio_promotes_where_stable_is_above_the_ceiling(pair: Pair) -> None:
    blocks = pair(ERRORS, [(200, 4)] * 60, [(200, 4)] * 60)
    assert count_path(blocks, ERRORS, SPEC).is_non_inferior()[-1]
    only_ratio = ERRORS.model_copy(update={"promote_ceiling": 0.0})
    assert promote_evidence(blocks, only_ratio, np.ones(60, dtype=bool))[-1] > 3


def test_dispersion_divides_the_evidence_of_events(pair: Pair) -> None:
    blocks = pair(ERRORS, [(200, 1)] * 10, [(200, 6)] * 10)
    doubled = ERRORS.model_copy(update={"dispersion": 2.0})
    assert harm_evidence(blocks, doubled)[-1] < harm_evidence(blocks, ERRORS)[-1]


def test_a_fault_that_shows_only_under_load_is_found_soon(pair: Pair) -> None:
    stable, candidate = [(120, 0)] * 36, [(120, 0)] * 30 + [(120, 6)] * 6
    raised = pair(ERRORS, stable, candidate, weights=[10] * 30 + [50] * 6)
    level = pair(ERRORS, stable, candidate, weights=[50] * 36)
    found = count_path(raised, ERRORS, SPEC).first_harm()
    assert found is not None
    late = count_path(level, ERRORS, SPEC).first_harm()
    assert late is None or found < late


def test_the_alternatives_of_harm_lie_above_the_null_and_those_of_promotion_below() -> None:
    assert min(HARM_RATIOS) > 1 > max(PROMOTE_RATIOS) > 0
