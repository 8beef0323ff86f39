"""Bounds from below on a difference: right by the theory, and in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainyard.gates.comparison import (
    bootstrap_lower,
    needed_samples,
    paired_difference,
    tango_lower,
    unpaired_difference,
)

Z = 1.6448536269514722


def scores(*values: float) -> dict[str, float]:
    return {f"s{number}": value for number, value in enumerate(values)}


def paired(better: int, worse: int, both: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return two sides of right and wrong answers."""
    candidate = [1.0] * better + [0.0] * worse + [1.0] * both
    stable = [0.0] * better + [1.0] * worse + [1.0] * both
    return scores(*candidate), scores(*stable)


def log_likelihood(share: float, difference: float, better: int, worse: int, same: int) -> float:
    parts = ((better, share + difference), (worse, share), (same, 1 - 2 * share - difference))
    return sum(count * math.log(chance) for count, chance in parts if count)


@pytest.mark.parametrize(
    ("samples", "better", "worse"), [(44, 1, 3), (200, 5, 9), (50, 10, 2), (30, 0, 4), (30, 4, 0)]
)
def test_the_bound_is_where_the_score_statistic_is_at_its_quantile(
    samples: int, better: int, worse: int
) -> None:
    """The nuisance parameter is found anew here, by looking for the largest likelihood."""
    lower = tango_lower(samples, better, worse)
    same = samples - better - worse
    least = max(0.0, -lower)
    grid = np.linspace(least + 1e-7, (1 - lower) / 2 - 1e-7, 200_001)
    likely = [
        log_likelihood(each, lower, better, worse, same) for each in grid[:: len(grid) // 2000]
    ]
    coarse = grid[:: len(grid) // 2000][int(np.argmax(likely))]
    fine = np.linspace(max(least + 1e-9, coarse - 1e-3), coarse + 1e-3, 20_001)
    fine = fine[1 - 2 * fine - lower > 0]
    share = fine[
        int(np.argmax([log_likelihood(each, lower, better, worse, same) for each in fine]))
    ]
    variance = samples * (2 * share + lower - lower**2)
    statistic = (better - worse - samples * lower) / math.sqrt(variance)
    assert statistic == pytest.approx(Z, abs=0.01)


@pytest.mark.parametrize("samples", [1, 10, 200, 5000])
def test_where_nothing_differs_the_bound_still_leaves_room(samples: int) -> None:
    assert tango_lower(samples, 0, 0) == pytest.approx(-(Z**2) / (samples + Z**2), abs=1e-6)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60))
def test_the_bound_lies_between_the_worst_and_what_was_seen(
    same: int, better: int, worse: int
) -> None:
    samples = same + better + worse
    lower = tango_lower(samples, better, worse)
    assert -1 <= lower <= (better - worse) / samples


@given(st.integers(1, 40), st.integers(1, 40))
def test_more_pairs_of_the_same_kind_raise_the_bound(worse: int, same: int) -> None:
    one = tango_lower(worse + same, 0, worse)
    ten = tango_lower(10 * (worse + same), 0, 10 * worse)
    assert ten > one


@pytest.mark.parametrize(("discordance", "margin"), [(0.06, 0.02), (0.15, 0.05), (0.3, 0.1)])
def test_a_release_exactly_at_its_margin_is_proven_in_one_case_of_twenty(
    discordance: float, margin: float
) -> None:
    """Simulated at the border of the margin, where the test is hardest to keep honest."""
    random = np.random.default_rng(5)
    runs, samples = 2000, 300
    worse_share = (discordance + margin) / 2
    better_share = discordance - worse_share
    counts = random.multinomial(samples, [better_share, worse_share, 1 - discordance], size=runs)
    proven = sum(tango_lower(samples, int(b), int(w)) >= -margin for b, w, _ in counts)
    assert 0.03 < proven / runs < 0.068


def test_the_needed_samples_are_those_of_the_textbook() -> None:
    """As worked out in advance: 2 points of margin, 5 % one-sided, 90 % power."""
    assert [needed_samples(share, 0.02) for share in (0.02, 0.05, 0.1)] == [429, 1071, 2141]
    assert needed_samples(0.1, 0.0) == 0


def test_the_needed_samples_prove_the_margin_in_nine_of_ten_cases() -> None:
    random = np.random.default_rng(6)
    samples, runs = needed_samples(0.1, 0.05), 1000
    counts = random.multinomial(samples, [0.05, 0.05, 0.9], size=runs)
    proven = sum(tango_lower(samples, int(b), int(w)) >= -0.05 for b, w, _ in counts)
    assert 0.86 < proven / runs < 0.94


def test_right_and_wrong_is_compared_by_tango_on_the_shared_samples() -> None:
    candidate, stable = paired(3, 5, 92)
    found = paired_difference(candidate, stable, 0.05)
    assert found is not None
    assert (found.method, found.samples, found.discordant) == ("Tango", 100, 8)
    assert found.estimate == pytest.approx(-0.02)
    assert found.lower == tango_lower(100, 3, 5)
    assert found.needed == needed_samples(0.08, 0.05)


def test_only_equal_samples_are_paired() -> None:
    candidate = {"0-a": 1.0, "1-a": 0.0, "2-x": 1.0}
    stable = {"0-a": 1.0, "1-a": 1.0, "2-y": 0.0}
    found = paired_difference(candidate, stable, 0.1)
    assert found is not None
    assert found.samples == 2
    assert paired_difference({"a": 1.0}, {"b": 1.0}, 0.1) is None
    assert paired_difference({}, {}, 0.1) is None


def test_other_scores_are_compared_by_a_bootstrap_that_can_be_repeated() -> None:
    random = np.random.default_rng(7)
    stable = scores(*random.uniform(0, 1, 400).tolist())
    candidate = {name: min(1.0, value + 0.01) for name, value in stable.items()}
    found = paired_difference(candidate, stable, 0.05)
    assert found is not None
    assert found.method == "bootstrap"
    assert found == paired_difference(candidate, stable, 0.05)
    assert 0 < found.estimate < 0.0101
    assert -0.01 < found.lower < found.estimate


def test_the_bootstrap_has_the_spread_of_the_mean() -> None:
    differences = np.random.default_rng(8).normal(0.0, 0.1, 5000)
    expected = differences.mean() - Z * 0.1 / math.sqrt(5000)
    assert bootstrap_lower(differences) == pytest.approx(expected, abs=3e-4)


def test_three_samples_that_agree_prove_nothing() -> None:
    assert bootstrap_lower(np.zeros(3)) < -0.4
    found = paired_difference(scores(0.5, 0.5, 0.5), scores(0.5, 0.5, 0.5), 0.05)
    assert found is not None
    assert found.lower < -0.05
    assert found.needed > 3


def test_without_pairs_the_same_scores_prove_less() -> None:
    found = unpaired_difference(0.9, 200, 0.9, 200, 0.05)
    candidate, stable = paired(4, 4, 192)
    together = paired_difference(candidate, stable, 0.05)
    assert together is not None
    assert found.method == "unpaired"
    assert found.lower < together.lower < 0
    assert found.needed > together.needed


@settings(max_examples=30)
@given(st.floats(0, 1), st.integers(1, 500), st.floats(0, 1), st.integers(1, 500))
def test_an_unpaired_bound_is_a_number_below_what_was_seen(
    candidate: float, own: int, stable: float, others: int
) -> None:
    found = unpaired_difference(candidate, own, stable, others, 0.05)
    assert math.isfinite(found.lower)
    assert found.lower <= found.estimate + 1e-12
