from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr

from trainyard.rollout.judge.boundary import boundary_constant, crossing_probability, log_mixture


@pytest.mark.parametrize("constant", [1.5, 2.0, 3.0])
def test_a_flat_boundary_agrees_with_the_reflection_principle(constant: float) -> None:
    exact = 2 * (1 - ndtr(constant))
    assert crossing_probability(constant, 0.0, 0.001) == pytest.approx(exact, rel=1e-4)


def test_the_crossing_probability_agrees_with_simulated_paths() -> None:
    rng = np.random.default_rng(4)
    v = np.geomspace(0.02, 1.0, 3000)
    steps = np.sqrt(np.diff(v, prepend=0.0))
    crossed = 0
    for _ in range(20):
        paths = np.cumsum(rng.normal(size=(200, len(v))) * steps, axis=1)
        crossed += int((paths >= 2.0 * v**0.4).any(axis=1).sum())
    expected = crossing_probability(2.0, 0.4, 0.02)
    assert crossed / 4000 == pytest.approx(expected, abs=4 * np.sqrt(expected / 4000))


@pytest.mark.parametrize("alpha", [0.0005, 0.002, 0.05])
def test_the_constant_has_the_error_rate_that_was_asked_for(alpha: float) -> None:
    constant = boundary_constant(alpha, 0.4, 0.02)
    assert crossing_probability(constant, 0.4, 0.02) == pytest.approx(alpha, rel=1e-3)


def test_a_smaller_error_rate_needs_a_higher_boundary() -> None:
    heights = [boundary_constant(alpha, 0.4, 0.02) for alpha in (0.05, 0.01, 0.002, 0.0005)]
    assert heights == sorted(heights)


def test_the_mixture_is_a_fair_wager_without_drift_and_a_bad_one_below() -> None:
    rng = np.random.default_rng(5)
    information = np.linspace(0.0, 4.0, 41)
    brownian = np.cumsum(rng.normal(size=(20_000, 41)) * np.sqrt(0.1), axis=1)
    brownian -= brownian[:, :1]
    for drift in (0.0, -0.5):
        scores = brownian + drift * information
        wagers = np.exp([log_mixture(score, information, 0.5) for score in scores])
        error = wagers[:, -1].std() / np.sqrt(len(wagers))
        assert wagers[:, -1].mean() <= 1 + 4 * error
        assert (wagers.max(axis=1) >= 20).mean() <= 0.05
    fair = np.exp([log_mixture(score, information, 0.5) for score in brownian])[:, -1]
    assert fair.mean() == pytest.approx(1.0, abs=0.05)


def test_the_mixture_starts_at_one() -> None:
    assert log_mixture(np.zeros(1), np.zeros(1), 3.0)[0] == pytest.approx(0.0)
