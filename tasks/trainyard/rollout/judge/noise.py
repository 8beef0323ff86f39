"""How many requests count against noise.

`se2` is requests' own noise, which falls with their number. History of little traffic, whose bins
are long, cannot tell it from what passes in a pod within such a bin, and that does not fall with
the number of requests, only with time. So `se2` is taken to fall up to the rate of requests that
history had (`Covariance.most_rps`), and no further.
"""

from __future__ import annotations

import numpy as np

from trainyard.documents.evidence import Covariance
from trainyard.rollout.judge.paths import Floats


def known_requests(requests: Floats, length_s: Floats, model: Covariance) -> Floats:
    """Return how many of each pod's requests count: all, or those of `most_rps`.

    Args:
        requests: of pods.
        length_s: in which they came.
        model: whose `se2` is meant.
    """
    if model.most_rps is None:
        return requests
    return np.minimum(requests, model.most_rps * length_s)


def effective_requests(requests: Floats, length_s: Floats, model: Covariance) -> Floats:
    """Return of how many requests an average over pods has the noise, blocks.

    Args:
        requests: blocks x pods, at least one in each block.
        length_s: of each block.
        model: whose `se2` is meant.
    """
    whole = requests.sum(axis=1)
    if model.most_rps is None:
        return np.asarray(whole)
    shares = requests / whole[:, None]
    known = known_requests(requests, length_s[:, None], model)
    # A pod without requests has no share, and no noise.
    noise = np.where(requests > 0, shares**2 / np.where(requests > 0, known, 1.0), 0.0)
    return np.asarray(1 / noise.sum(axis=1))
