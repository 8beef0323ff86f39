"""What stable's own pods say about noise, before anything is exposed.

Rows of the log with weight 0 that end at or before moment 0 are history: stable alone, under the
traffic that the comparison will have. What its pods differ by among themselves is what "nothing
changed" looks like. It is estimated once and cannot change any more, because no row of the exposure
counts for it, whatever is seen there.

* Averages: y = log of a pod's average in a bin, minus the mean over the pods (which removes waves
  of load that all of them see). Its autocovariance C(h) is fitted by
  `sb2 + sa2 rho^h + [h = 0] se2 mean(1/n)`, all parts >= 0, rho from a grid. Where traffic is so
  little that bins are long, `se2` holds for so little traffic only (`most_rps`, see `noise`).
* Counts: the dispersion of pods' counts around their common share, over windows as long as a step
  (Pearson's chi-square over its degrees of freedom). Slow pods show in it as well.

How much pods differ for good is known from few pods only. Where that part is larger than the
documented default can explain, it is taken with the factor by which a t quantile of so many degrees
of freedom exceeds a normal one (squared); `pod_floor` keeps it from being too small.

With one pod there is nothing to learn about averages, and with less than `LEAST_HISTORY_S` nothing
at all: the documented defaults stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import chi2, t

from trainyard.documents.evidence import Block, Covariance, JudgeSpec, MetricSpec
from trainyard.rollout.judge.defaults import CLIP_EVENTS, CLIP_EXCESS

Floats = NDArray[np.float64]

LEAST_HISTORY_S = 1800.0
"""Seconds of history that must be there."""

LEAST_PODS = 2
"""Pods that must be there: one pod cannot differ from itself."""

MOST_HISTORY_S = 7 * 86400.0
"""Older rows are another time's traffic."""

_MOST_BINS = 4000
_MOST_LAG = 60
_RHO_GRID = (0.3, 0.6, 0.8, 0.9, 0.95, 0.98)
_WINDOW_S = 1200.0
_LEAST_EVENTS = 10
_POD_SURPRISE = 0.99
_POD_QUANTILE = 0.998
_NORMAL_QUANTILE = 2.878
_MOST_FACTOR = 10.0
_LEAST_SHARE_OF_DEFAULT = 0.25
_LEAST_REQUESTS = 5
_LONG_BIN = 2.0
"""Times `rho_lag_s`: in longer bins what passes in a pod averages out and looks like `se2`."""


@dataclass(frozen=True, slots=True)
class Bins:
    """Sums of stable's pods over bins of equal length, bins x pods."""

    length_s: float
    requests: Floats
    values: Floats
    """Seconds or bad events."""


def is_history(row: Block) -> bool:
    """Tell whether a row speaks about stable alone, before the exposure."""
    alone = row.track == "stable" and row.weight_candidate == 0 and not row.stratum
    return alone and -MOST_HISTORY_S < row.t <= 0


def learn(rows: Sequence[Block], spec: JudgeSpec) -> JudgeSpec:
    """Return `spec` with the covariances and dispersions that the history among `rows` shows.

    A metric that has a covariance of its own keeps it: somebody has fixed it by hand.
    """
    history = [row for row in rows if is_history(row)]
    if not history or not spec.learn_from_history:
        return spec
    metrics = tuple(_learned(metric, history, spec) for metric in spec.metrics)
    return spec.model_copy(update={"metrics": metrics})


def bins_of(
    rows: Sequence[Block], metric: MetricSpec, *, length_s: float, least_pods: int = LEAST_PODS
) -> Bins | None:
    """Return the sums of one metric; None without enough history.

    Args:
        rows: history, without repeats.
        metric: whose rows count.
        length_s: of a bin.
        least_pods: how many pods there must be.
    """
    mine = [row for row in rows if row.metric == metric.name and row.kind == metric.kind]
    names = sorted({row.pod for row in mine})
    if not mine or len(names) < least_pods:
        return None
    first = min(row.t - row.duration_s for row in mine)
    last = max(row.t for row in mine)
    if sum(row.duration_s for row in mine) < LEAST_HISTORY_S * least_pods:
        return None
    if last - first < LEAST_HISTORY_S:
        return None
    column = {name: index for index, name in enumerate(names)}
    length_s = max(length_s, (last - first) / _MOST_BINS)
    count = ceil((last - first) / length_s)
    requests = np.zeros((count, len(names)))
    values = np.zeros((count, len(names)))
    for row in mine:
        place = (
            min(int((row.t - row.duration_s / 2 - first) // length_s), count - 1),
            column[row.pod],
        )
        requests[place] += row.requests
        values[place] += row.total if metric.kind == "mean" else row.bad
    return Bins(length_s, requests, values)


def autocovariance(bins: Bins) -> tuple[Floats, Floats, float]:
    """Return the autocovariance of pods around their mean, the pairs behind it and mean(1/n).

    Bins in which a pod had fewer than 5 requests are missing for that pod, and so are those with
    fewer than two pods left.
    """
    seen = (bins.requests >= _LEAST_REQUESTS) & (bins.values > 0)
    seen &= seen.sum(axis=1, keepdims=True) >= LEAST_PODS
    pods = np.maximum(seen.sum(axis=1, keepdims=True), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(seen, np.log(bins.values / bins.requests), 0.0)
    deviation = np.where(seen, y - y.sum(axis=1, keepdims=True) / pods, 0.0)
    # A deviation from the mean of P values has (1 - 1/P) of a value's variance.
    deviation *= np.sqrt(pods / np.maximum(pods - 1, 1))
    lags = min(_MOST_LAG, max(1, len(y) // 3))
    there, size = seen.astype(np.float64), len(seen)
    pairs = np.array([np.vdot(there[h:], there[: size - h]) for h in range(lags)])
    products = [np.vdot(deviation[h:], deviation[: size - h]) for h in range(lags)]
    covariance = np.array(products) / np.maximum(pairs, 1)
    inverse = float((1 / bins.requests[seen]).mean()) if seen.any() else 1.0
    return covariance, pairs, inverse


def fit(
    covariance: Floats,
    pairs: Floats,
    *,
    length_s: float,
    mean_inverse_n: float,
    pods: int,
    default: Covariance,
) -> Covariance:
    """Return the covariance model that comes nearest to an autocovariance.

    Args:
        covariance: of a pod, by lag in bins.
        pairs: of bins behind each value; its weight.
        length_s: of a bin.
        mean_inverse_n: mean of one over a pod's requests in a bin.
        pods: how many stable pods there were.
        default: for what cannot be learned: inflation, floor and extra noise of blocks stay.
    """
    weight = np.sqrt(pairs)
    lag = np.arange(len(covariance)) * length_s / default.rho_lag_s
    best: tuple[float, float, Floats] | None = None
    for rho in _RHO_GRID:
        columns = np.column_stack([np.ones_like(lag), rho**lag, lag == 0])
        parts, residual = nnls(columns * weight[:, None], covariance * weight)
        if best is None or residual < best[0]:
            best = residual, rho, parts
    assert best is not None
    _, rho, (lasting, passing, sampling) = best
    long = length_s > _LONG_BIN * default.rho_lag_s
    most_rps = 1 / (mean_inverse_n * length_s) if long else None
    freedom = max(1, pods - 1)
    surprise, factor = _few_pods(freedom)
    if lasting * freedom > default.sb2 * surprise:
        lasting *= factor
    return default.model_copy(
        update={
            "sb2": float(lasting),
            "sa2": float(passing),
            "rho": rho,
            "se2": max(float(sampling / mean_inverse_n), _LEAST_SHARE_OF_DEFAULT * default.se2),
            "most_rps": most_rps,
        }
    )


@lru_cache(maxsize=64)
def _few_pods(freedom: int) -> tuple[float, float]:
    """Return the chi-square beyond which few pods differ by more than accident, and the factor on
    the variance between them that so few may hide.
    """
    factor = float((t.ppf(_POD_QUANTILE, freedom) / _NORMAL_QUANTILE) ** 2)
    return float(chi2.ppf(_POD_SURPRISE, freedom)), min(_MOST_FACTOR, factor)


def dispersion_of(bins: Bins, *, least_share: float) -> float:
    """Return how much more pods' counts vary than singly coming events would; at least 1.

    Args:
        bins: short ones; each is clipped as the judge will clip, then they are merged into
            windows as long as a step. Where one place counts for all pods, as a router does, the
            bins of a window are compared in place of the pods.
        least_share: of bad requests, on which the clip is based.
    """
    share = max(least_share, float(bins.values.sum() / max(bins.requests.sum(), 1)))
    limit = np.maximum(CLIP_EVENTS, np.ceil(CLIP_EXCESS * share * bins.requests))
    clipped = np.minimum(bins.values, limit)
    if clipped.sum() < _LEAST_EVENTS:
        return 1.0
    width = max(1, min(round(_WINDOW_S / bins.length_s), len(clipped)))
    starts = np.arange(0, len(clipped) - width + 1, width)
    k = np.add.reduceat(clipped, starts, axis=0)
    n = np.add.reduceat(bins.requests, starts, axis=0)
    if clipped.shape[1] == 1:
        whole = len(starts) * width
        k, n = (x[:whole, 0].reshape(-1, width) for x in (clipped, bins.requests))
    share_of_window = k.sum(axis=1, keepdims=True) / np.maximum(n.sum(axis=1, keepdims=True), 1)
    expected = n * share_of_window
    used = expected > 0
    freedom = float(np.maximum(used.sum(axis=1) - 1, 0).sum())
    if freedom < 1:
        return 1.0
    pearson = float((((k - expected) ** 2)[used] / expected[used]).sum())
    return max(1.0, pearson / freedom)


def _learned(metric: MetricSpec, history: Sequence[Block], spec: JudgeSpec) -> MetricSpec:
    if metric.kind == "count":
        bins = bins_of(history, metric, length_s=spec.block_s, least_pods=1)
        if bins is None:
            return metric
        seen = dispersion_of(bins, least_share=metric.harm_floor)
        return metric.model_copy(update={"dispersion": max(metric.dispersion, seen)})
    if metric.covariance is not None:
        return metric
    bins = bins_of(history, metric, length_s=_bin_s(history, metric, spec))
    if bins is None:
        return metric
    covariance, pairs, inverse = autocovariance(bins)
    if pairs[0] < LEAST_PODS * LEAST_HISTORY_S / bins.length_s / 2:
        return metric
    model = fit(
        covariance,
        pairs,
        length_s=bins.length_s,
        mean_inverse_n=inverse,
        pods=bins.requests.shape[1],
        default=spec.covariance,
    )
    return metric.model_copy(update={"covariance": model})


def _bin_s(history: Sequence[Block], metric: MetricSpec, spec: JudgeSpec) -> float:
    """Return a length in which a pod has the requests that a block needs."""
    mine = [row for row in history if row.metric == metric.name]
    requests = sum(row.requests for row in mine)
    served_s = sum(row.duration_s for row in mine)
    return max(spec.block_s, spec.min_requests_per_block * served_s / max(requests, 1))
