from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from trainyard.documents.evidence import Covariance, JudgeSpec, MetricSpec
from trainyard.rollout.judge.averages import (
    average_path,
    covariance_of,
    log_differences,
    planned_information,
    promotion_horizon,
    score,
)
from trainyard.rollout.judge.blocks import PairedBlock

Pair = Callable[..., tuple[PairedBlock, ...]]
Floats = NDArray[np.float64]

TTFT = MetricSpec(name="ttft", kind="mean", harm_margin=0.1, promote_margin=0.15, harm_alpha=0.05)
SPEC = JudgeSpec(metrics=(TTFT,), max_duration_s=1200)


def of_differences(pair: Pair, d: Floats, n: int = 200) -> tuple[PairedBlock, ...]:
    """Return blocks, one pod a side, whose log differences are `d`."""
    return pair(TTFT, [(n, float(n))] * len(d), [(n, n * float(np.exp(x))) for x in d])


def draws(pair: Pair, shift: float, count: int, seed: int, inflation: float) -> list[Floats]:
    """Return differences as the model says, with mean `shift`."""
    blocks = of_differences(pair, np.zeros(40))
    lower = np.linalg.cholesky(covariance_of(blocks, Covariance()) / 1.3 * inflation)
    rng = np.random.default_rng(seed)
    return [shift + lower @ rng.normal(size=40) for _ in range(count)]


def test_differences_are_logs_of_averages(pair: Pair) -> None:
    blocks = pair(TTFT, [(100, 20.0)], [(100, 30.0)])
    assert log_differences(blocks, Covariance())[0] == pytest.approx(np.log(1.5))


def test_averages_of_few_requests_are_not_lower_on_average(pair: Pair) -> None:
    rng = np.random.default_rng(1)
    sigma = np.sqrt(np.log(1.4))
    few = [(20, rng.lognormal(0, sigma, 20).sum()) for _ in range(4000)]
    many = [(400, rng.lognormal(0, sigma, 400).sum()) for _ in range(4000)]
    model = Covariance(se2=0.4)
    d = log_differences(pair(TTFT, many, few), model)
    error = d.std() / np.sqrt(len(d))
    assert abs(d.mean()) < 0.003 + 3 * error
    uncorrected = d - 0.5 * model.se2 * (1 / 20 - 1 / 400)
    assert uncorrected.mean() < -0.005


def test_the_covariance_is_the_documented_one(pair: Pair) -> None:
    model = Covariance(sb2=0.04, sa2=0.02, rho=0.5, rho_lag_s=60, nug=0.01, se2=0.3, inflation=1.0)
    blocks = pair(TTFT, [(30, 3.0)] * 2, [(20, 3.0)] * 2, pods=(2, 1))
    k = 1 + 0.5
    assert covariance_of(blocks, model) == pytest.approx(
        np.array(
            [
                [k * (0.04 + 0.02 + 0.01) + 0.3 * (1 / 60 + 1 / 20), k * (0.04 + 0.02 * 0.5**0.5)],
                [k * (0.04 + 0.02 * 0.5**0.5), k * (0.04 + 0.02 + 0.01) + 0.3 * (1 / 60 + 1 / 20)],
            ]
        )
    )


def test_pods_are_never_taken_to_be_more_alike_than_the_floor(pair: Pair) -> None:
    blocks = of_differences(pair, np.zeros(2))
    floored = covariance_of(blocks, Covariance(sb2=0.0))
    assert floored == pytest.approx(covariance_of(blocks, Covariance(sb2=0.03**2)))


def test_the_score_is_generalised_least_squares() -> None:
    rng = np.random.default_rng(2)
    square = rng.normal(size=(6, 6))
    covariance = square @ square.T + np.eye(6)
    d = rng.normal(size=6)
    inverse = np.linalg.inv(covariance)
    found = score(d, covariance)
    assert found.information[-1] == pytest.approx(inverse.sum())
    assert found.raw[-1] == pytest.approx((inverse @ d).sum())
    first_four = score(d[:4], covariance[:4, :4])
    assert found.raw[:4] == pytest.approx(first_four.raw)


def test_pods_that_differ_for_good_bound_what_can_be_known(pair: Pair) -> None:
    blocks = of_differences(pair, np.zeros(40))
    information = score(np.zeros(40), covariance_of(blocks, Covariance())).information
    assert information[-1] < 1 / (1.3 * 2 * 0.03**2)


@pytest.mark.parametrize(("shift", "limit"), [(np.log(1.1), 0.05), (0.0, 0.01)])
def test_false_harm_stays_inside_its_budget(pair: Pair, shift: float, limit: float) -> None:
    """At the margin itself, with noise that is as large as the inflated covariance says."""
    runs = draws(pair, shift, 600, seed=3, inflation=1.3)
    false = sum(
        average_path(of_differences(pair, d), TTFT, SPEC).first_harm() is not None for d in runs
    )
    assert false / len(runs) <= limit + 2 * np.sqrt(limit / len(runs))


def test_false_promotion_stays_inside_its_budget(pair: Pair) -> None:
    runs = draws(pair, np.log(1.15), 600, seed=4, inflation=1.3)
    false = sum(
        average_path(of_differences(pair, d), TTFT, SPEC).is_non_inferior().any() for d in runs
    )
    assert false / len(runs) <= 0.05 + 2 * np.sqrt(0.05 / len(runs))


def test_a_regression_is_found(pair: Pair) -> None:
    runs = draws(pair, np.log(1.5), 50, seed=5, inflation=1.0)
    found = [average_path(of_differences(pair, d), TTFT, SPEC).first_harm() for d in runs]
    assert all(index is not None for index in found)


def test_more_noise_than_the_covariance_says_makes_the_judge_slower(pair: Pair) -> None:
    rng = np.random.default_rng(6)
    wild = np.log(1.1) + rng.normal(0, 0.8, 40)
    blocks = of_differences(pair, wild)
    d = log_differences(blocks, SPEC.covariance)
    found = score(d, covariance_of(blocks, SPEC.covariance))
    assert found.scale[-1] > 2
    assert average_path(blocks, TTFT, SPEC).first_harm() is None


def test_one_or_two_blocks_are_never_harm(pair: Pair) -> None:
    path = average_path(of_differences(pair, np.full(3, np.log(20.0))), TTFT, SPEC)
    assert path.first_harm() == 2


def test_a_fault_that_shows_only_under_load_does_not_have_to_outweigh_the_quiet_step(
    pair: Pair,
) -> None:
    d = np.concatenate([np.zeros(30), np.full(8, np.log(1.8))])
    n = [(100, 100.0)] * len(d)
    slow = [(100, 100 * float(np.exp(x))) for x in d]
    raised = pair(TTFT, n, slow, weights=[10] * 30 + [50] * 8)
    level = pair(TTFT, n, slow, weights=[50] * 38)
    harmed_at = average_path(raised, TTFT, SPEC).first_harm()
    assert harmed_at is not None
    late = average_path(level, TTFT, SPEC).first_harm()
    assert late is None or harmed_at <= late


def test_the_horizon_counts_blocks_at_the_last_weight(pair: Pair) -> None:
    first = pair(TTFT, [(216, 20.0)], [(24, 2.0)], weights=[10])[0]
    model = SPEC.covariance
    short, long = (planned_information([first], model, SPEC, seconds) for seconds in (300, 3600))
    assert 0 < short < long
    flat = score(
        np.zeros(10),
        covariance_of(pair(TTFT, [(120, 10.0)] * 10, [(120, 10.0)] * 10), model),
    )
    assert short == pytest.approx(flat.information[-1])


def test_promotion_is_planned_for_what_is_left_of_the_rollout(pair: Pair) -> None:
    blocks = pair(TTFT, [(120, 10.0)] * 60, [(120, 10.0)] * 60)
    model = SPEC.covariance

    spec = SPEC.model_copy(update={"max_duration_s": 1800.0})
    for start, left_s in ((0, 1800), (16, 1320), (59, 450)):
        whole = planned_information([blocks[0]], model, spec, left_s)
        assert promotion_horizon([blocks[start]], model, spec) == pytest.approx(1.1 * whole)


def test_blocks_that_do_not_count_change_nothing() -> None:
    rng = np.random.default_rng(3)
    covariance = 0.04 * (0.5 * np.ones((6, 6)) + 0.5 * np.eye(6))
    used = np.array([False, True, True, False, True, True])
    found = score(rng.normal(0, 0.2, 6), covariance, used)
    rng = np.random.default_rng(3)
    alone = score(rng.normal(0, 0.2, 6)[used], covariance[np.ix_(used, used)])
    for name in ("raw", "information", "scale"):
        assert getattr(found, name)[used] == pytest.approx(getattr(alone, name))
    assert found.information[0] == 0
    assert found.raw[3] == found.raw[2]


def test_a_metric_may_have_its_own_covariance(pair: Pair) -> None:
    blocks = of_differences(pair, np.full(20, np.log(1.3)))
    own = TTFT.model_copy(update={"covariance": Covariance(sa2=0.3)})
    calm = average_path(blocks, TTFT, SPEC)
    noisy = average_path(blocks, own, SPEC)
    assert noisy.harm[-1] / noisy.harm_threshold[-1] < calm.harm[-1] / calm.harm_threshold[-1]


def test_evidence_goes_on_after_the_horizon(pair: Pair) -> None:
    brief = SPEC.model_copy(update={"max_duration_s": 60.0})
    path = average_path(of_differences(pair, np.full(60, np.log(1.6))), TTFT, brief)
    assert path.first_harm() is not None
    assert np.isfinite(path.harm_threshold).all()
