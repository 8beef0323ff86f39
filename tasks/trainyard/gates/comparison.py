"""Is the candidate as good as the stable release on the same samples? Non-inferiority, paired.

A bound from below on the difference (candidate minus stable), with 95 % confidence on one side. For
right/wrong it is the score bound of Tango (Statistics in Medicine 17, 1998, 891-908) on paired
proportions, which holds also where hardly anything differs; for other scores a paired bootstrap.
What is proven is "not more than the margin worse", never "equal".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
"""One-sided."""
POWER = 0.9
"""Of the sample size that is asked for."""
_Z_CONFIDENCE = 1.6448536269514722
_Z_POWER = 1.2815515655446004

RESAMPLES = 4_000
SEED = 20261127
"""Of the bootstrap: the same samples always give the same bound."""
_CHUNK = 1 << 22
"""Random indices that are in memory at the same time."""

_MOST_SAMPLES = 1e8
_PRECISION = 1e-9


@dataclass(frozen=True)
class Difference:
    """How much better (or worse) the candidate is than the stable release, and how sure that is."""

    method: Literal["Tango", "bootstrap", "unpaired"]
    samples: int
    """Samples that both were scored on; of the smaller side where they are not the same."""
    candidate: float
    """Score on these samples."""
    stable: float
    lower: float
    """Bound from below on the difference."""
    needed: int
    """Samples that would prove the margin in nine of ten cases, if the two are equally good."""
    discordant: int = 0
    """Samples on which the two differ."""

    @property
    def estimate(self) -> float:
        """The difference as it was seen."""
        return self.candidate - self.stable


def paired_difference(
    candidate: Mapping[str, float], stable: Mapping[str, float], margin: float
) -> Difference | None:
    """Compare scores of the same samples; None if they have none in common.

    Args:
        candidate: score of each sample by its id; shares of 1.
        stable: the stable release's.
        margin: how much lower the candidate may be.
    """
    shared = sorted(candidate.keys() & stable.keys())
    if not shared:
        return None
    left = np.array([candidate[each] for each in shared], dtype=float)
    right = np.array([stable[each] for each in shared], dtype=float)
    size, differences = len(shared), left - right
    discordant = int(np.count_nonzero(differences))
    binary = bool(np.isin(left, (0.0, 1.0)).all() and np.isin(right, (0.0, 1.0)).all())
    if binary:
        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        lower, spread = tango_lower(size, better, worse), discordant / size
    else:
        lower, spread = bootstrap_lower(differences), float(np.mean(differences**2))
    # Where nothing was seen to differ something still may, as often as the confidence leaves open.
    spread = max(spread, _unseen(size))
    return Difference(
        method="Tango" if binary else "bootstrap",
        samples=size,
        candidate=float(left.mean()),
        stable=float(right.mean()),
        lower=lower,
        needed=needed_samples(spread, margin),
        discordant=discordant,
    )


def unpaired_difference(
    candidate: float, candidate_samples: int, stable: float, stable_samples: int, margin: float
) -> Difference:
    """Compare two scores of which only the totals are known, as if of different samples.

    Wilson's intervals, combined after Newcombe (Statistics in Medicine 17, 1998, 873-890, method
    10); it needs several times as many samples as a paired comparison.
    """
    least, _ = _wilson(candidate, candidate_samples)
    _, most = _wilson(stable, stable_samples)
    below = math.hypot(candidate - least, most - stable)
    spread = candidate * (1 - candidate) + stable * (1 - stable)
    samples = min(candidate_samples, stable_samples)
    return Difference(
        method="unpaired",
        samples=samples,
        candidate=candidate,
        stable=stable,
        lower=candidate - stable - below,
        needed=needed_samples(max(spread, _unseen(samples)), margin),
    )


def tango_lower(samples: int, better: int, worse: int) -> float:
    """Return Tango's bound from below on the difference of two paired proportions.

    Args:
        samples: all pairs.
        better: pairs that only the candidate has right.
        worse: pairs that only the stable release has right.
    """
    estimate = (better - worse) / samples

    def statistic(difference: float) -> float:
        a = 2 * samples
        b = -better - worse + (2 * samples - better + worse) * difference
        c = -worse * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = samples * (2 * share + difference * (1 - difference))
        distance = better - worse - samples * difference
        return distance / math.sqrt(variance) if variance > 0 else math.inf * (distance > 0)

    if statistic(-1 + _PRECISION) <= _Z_CONFIDENCE:
        return -1.0
    return _bisect(lambda each: statistic(each) - _Z_CONFIDENCE, -1 + _PRECISION, estimate)


def bootstrap_lower(differences: np.ndarray) -> float:
    """Return the bootstrap's bound from below on the mean of paired differences (shares of 1)."""
    size = len(differences)
    random = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    step = max(1, _CHUNK // size)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        picked = random.integers(size, size=(rows, size))
        means[start : start + rows] = differences[picked].mean(axis=1)
    # Resampling knows no difference that it has not seen: few samples that agree prove little.
    return float(min(np.quantile(means, 1 - CONFIDENCE), differences.mean() - _unseen(size)))


def needed_samples(spread: float, margin: float) -> int:
    """Return how many pairs prove a margin, if the two are equally good.

    Args:
        spread: mean of the squared differences; for right/wrong the share that differs.
        margin: of non-inferiority; 0 can never be proven.

    Returns:
        0 if no number that anybody could collect is enough.
    """
    wanted = (_Z_CONFIDENCE + _Z_POWER) ** 2 * spread
    return math.ceil(wanted / margin**2) if wanted < _MOST_SAMPLES * margin**2 else 0


def _unseen(size: int) -> float:
    """Return the share of samples of a kind that may exist though none of `size` is of it."""
    return _Z_CONFIDENCE**2 / (size + _Z_CONFIDENCE**2)


def _wilson(share: float, samples: int) -> tuple[float, float]:
    z2 = _Z_CONFIDENCE**2
    centre = share + z2 / (2 * samples)
    half = _Z_CONFIDENCE * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    scale = 1 + z2 / samples
    return (centre - half) / scale, (centre + half) / scale


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function crosses zero, from below."""
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return low
