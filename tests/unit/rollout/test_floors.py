"""The absolute limit on errors."""

from __future__ import annotations

import numpy as np
import pytest

from trainyard.rollout.floors import EVIDENCE_THRESHOLD, excess_evidence


def test_no_requests_are_no_evidence() -> None:
    assert excess_evidence(0, 0, 0.005) == pytest.approx(1.0)


def test_good_requests_are_evidence_against_harm() -> None:
    assert excess_evidence(0, 1000, 0.005) < 1.0


def test_a_few_failures_in_a_row_are_proof() -> None:
    assert excess_evidence(2, 2, 0.005) < EVIDENCE_THRESHOLD < excess_evidence(3, 3, 0.005)


def test_the_limit_itself_is_no_proof() -> None:
    assert excess_evidence(50, 10_000, 0.005) < EVIDENCE_THRESHOLD


def test_evidence_grows_with_failures() -> None:
    found = [excess_evidence(bad, 1000, 0.005) for bad in range(0, 60, 5)]
    assert found == sorted(found)


def test_great_numbers_do_not_overflow() -> None:
    assert excess_evidence(900_000, 1_000_000, 0.005) > EVIDENCE_THRESHOLD


def test_looking_often_hardly_ever_blames_a_release_at_the_limit() -> None:
    rng = np.random.default_rng(7)
    runs, looks, limit = 600, 120, 0.005
    blamed = 0
    for _ in range(runs):
        bad = rng.binomial(40, limit, looks).cumsum()
        if any(
            excess_evidence(int(b), 40 * (n + 1), limit) >= EVIDENCE_THRESHOLD
            for n, b in enumerate(bad)
        ):
            blamed += 1
    # Ville's inequality: at most 1 in 300, so 2 of 600 on average; 8 would be a chance of 1 in 900.
    assert blamed < 8


@pytest.mark.parametrize(
    ("bad", "requests", "limit"), [(-1, 2, 0.1), (3, 2, 0.1), (1, 2, 0), (1, 2, 1)]
)
def test_nonsense_is_refused(bad: int, requests: int, limit: float) -> None:
    with pytest.raises(ValueError, match=r"bad of|no share"):
        excess_evidence(bad, requests, limit)
