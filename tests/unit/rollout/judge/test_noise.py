"""How many requests count against noise."""

from __future__ import annotations

import numpy as np
import pytest

from trainyard.documents.evidence import Covariance
from trainyard.rollout.judge.history import Bins, autocovariance, fit
from trainyard.rollout.judge.noise import effective_requests, known_requests

LENGTH_S = np.array([30.0, 60.0])
N = np.array([[30.0, 10.0], [90.0, 0.0]])


def test_all_requests_count_where_history_says_nothing_else() -> None:
    assert effective_requests(N, LENGTH_S, Covariance()).tolist() == [40.0, 90.0]
    assert known_requests(N, LENGTH_S[:, None], Covariance()) is N


def test_no_more_requests_count_than_history_had() -> None:
    model = Covariance(most_rps=0.5)
    assert known_requests(N, LENGTH_S[:, None], model).tolist() == [[15.0, 10.0], [30.0, 0.0]]
    first, second = effective_requests(N, LENGTH_S, model)
    assert first == pytest.approx(1 / ((30 / 40) ** 2 / 15 + (10 / 40) ** 2 / 10))
    assert second == pytest.approx(30.0)


@pytest.mark.parametrize(("length_s", "known"), [(30.0, None), (60.0, None), (320.0, 20 / 320)])
def test_long_bins_tell_of_little_traffic_only(length_s: float, known: float | None) -> None:
    rng = np.random.default_rng(1)
    n = np.full((400, 8), 20.0)
    bins = Bins(length_s, n, n * np.exp(rng.normal(0, 0.2, n.shape)))
    covariance, pairs, inverse = autocovariance(bins)
    model = fit(
        covariance,
        pairs,
        length_s=length_s,
        mean_inverse_n=inverse,
        pods=8,
        default=Covariance(),
    )
    assert model.most_rps == (None if known is None else pytest.approx(known))
