"""What Argo Rollouts, Flagger and Kayenta would have done with the same rollouts.

Rules as their own documentation and code set them (commits in `docs/judge-benchmark.md`):

* Argo Rollouts: an analysis every minute over the last five, from the first minute. Failed when
  errors of the candidate exceed stable's by 0.5 points, or its p95 of the time to first token or
  its average time per output token exceeds 1.15 times stable's. More than `failureLimit` (3) failed
  measurements abort. A measurement without requests is no failure. (`argo static` compares with
  figures of stable before the rollout instead: 1 % errors, 1.25 times.)
* Flagger: every minute over the last one: success rate below 99 %, or p99 above 1.25 times what
  stable had before. Failed checks add up; rollback on the tick after they reached the threshold,
  5.
* Kayenta: one value a minute and metric; Mann-Whitney interval at 98 %, "High" when its lower end
  exceeds a quarter of the Hodges-Lehmann estimate and the ratio of the means is at least
  `allowedIncrease` (1). Metrics are critical: one High fails. Growing window; looks every 1 or 5
  minutes, from minute 5 on, before which the interval has no such level; minutes without data are
  left out (`nanStrategy: remove`).

All of them promote what they have not rejected at the end. `tuned` forms have that one number
chosen, from a grid, with which at most 1 % of unchanged releases of the default world are rolled
back; it is then fixed for all other cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from tests.benchmarks.judge.traffic import (
    BIN_FIRST_S,
    BIN_LOG_WIDTH,
    BINS,
    SLICE_S,
    SLICES,
    Rollouts,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Minutes:
    """Figures a minute: runs x minutes x tracks (stable, candidate)."""

    requests: Floats
    counted: Floats
    """Requests whose errors were counted; as `requests`, but for rollouts with probes."""
    errors: Floats
    tpot: Floats
    """Sums, seconds."""
    histogram: Floats
    """x bins."""


@dataclass(frozen=True)
class Peer:
    """One rule; `decide` returns the minute of the rollback a run, `inf` for a promotion."""

    name: str
    decide: Callable[[Minutes, float], Floats]
    setting: float
    grid: tuple[float, ...] = ()
    """Settings to tune over, most eager first; none for a rule without a tuned form."""


def minutes_of(rollouts: Rollouts) -> Minutes:
    """Return the figures a minute, of users' requests."""
    split = rollouts.world.stable_pods
    per = int(60 / SLICE_S)

    def by_track(values: NDArray[np.generic]) -> Floats:
        users = values[:, :SLICES]
        tracks = np.stack(
            [users[:, :, :split].sum(axis=2), users[:, :, split:].sum(axis=2)], axis=2
        )
        runs, slices, _ = tracks.shape
        return np.asarray(tracks.reshape(runs, slices // per, per, 2).sum(axis=2), dtype=float)

    return Minutes(
        by_track(rollouts.n),
        by_track(rollouts.counted),
        by_track(rollouts.errors),
        by_track(rollouts.tpot),
        rollouts.histogram.astype(float),
    )


def quantile(histogram: Floats, q: float) -> Floats:
    """Return quantiles of histograms (last axis), interpolated in the log; NaN when empty."""
    total = histogram.sum(axis=-1, keepdims=True)
    reached = np.cumsum(histogram, axis=-1)
    place = np.minimum((reached < q * total).sum(axis=-1), BINS - 1)
    here = np.take_along_axis(histogram, place[..., None], -1)[..., 0]
    before = np.take_along_axis(reached, place[..., None], -1)[..., 0] - here
    part = np.where(here > 0, (q * total[..., 0] - before) / np.maximum(here, 1), 0.5)
    value = BIN_FIRST_S * np.exp(BIN_LOG_WIDTH * (place + np.clip(part, 0, 1)))
    return np.where(total[..., 0] > 0, value, np.nan)


def argo_ratio(minutes: Minutes, limit: float) -> Floats:
    """Return when more than `limit` measurements against concurrent stable had failed."""
    _, errors, tpot, p95 = _window(minutes, 5, 0.95)
    failed = errors[..., 1] - errors[..., 0] > 0.005
    failed |= p95[..., 1] > 1.15 * p95[..., 0]
    failed |= tpot[..., 1] > 1.15 * tpot[..., 0]
    return _exceeds(failed, limit)


def argo_static(minutes: Minutes, limit: float) -> Floats:
    """Return when more than `limit` measurements against fixed thresholds had failed."""
    _, errors, tpot, p95 = _window(minutes, 5, 0.95)
    before_p95, _, before_tpot = _before()
    failed = errors[..., 1] > 0.01
    failed |= p95[..., 1] > 1.25 * before_p95
    failed |= tpot[..., 1] > 1.25 * before_tpot
    return _exceeds(failed, limit)


def flagger(minutes: Minutes, threshold: float) -> Floats:
    """Return the tick after `threshold` checks had failed."""
    n, errors, _, p99 = _window(minutes, 1, 0.99)
    _, before_p99, _ = _before()
    failed = errors[..., 1] > 0.01
    failed |= p99[..., 1] > 1.25 * before_p99
    failed |= n[..., 1] == 0
    return _exceeds(failed, threshold - 1) + 1


def kayenta(minutes: Minutes, allowed: float, *, interval: int) -> Floats:
    """Return when a judgement, one every `interval` minutes, had failed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        series = [
            minutes.errors / minutes.counted,
            minutes.tpot / minutes.requests,
            quantile(minutes.histogram, 0.5),
            quantile(minutes.histogram, 0.95),
        ]
    count = minutes.requests.shape[1]
    at = np.full(len(minutes.requests), np.inf)
    for now in range(max(interval, 5), count + 1, interval):
        high = np.zeros(len(at), dtype=bool)
        for values in series:
            high |= _is_high(values[:, :now, 0], values[:, :now, 1], allowed)
        at = np.where(np.isinf(at) & high, now, at)
    return at


def _is_high(stable: Floats, candidate: Floats, allowed: float) -> Bools:
    missing = np.isnan(stable) | np.isnan(candidate)
    count = (~missing).sum(axis=1)
    differences = candidate[:, :, None] - stable[:, None, :]
    gone = missing[:, :, None] | missing[:, None, :]
    ordered = np.sort(np.where(gone, np.inf, differences).reshape(len(stable), -1), axis=1)
    pairs = np.maximum(count**2, 1)
    spread = norm.isf(0.01) * np.sqrt(count**2 * (2 * count + 1) / 12)
    low = np.clip(np.floor(pairs / 2 - spread), 0, pairs - 1).astype(np.int64)
    rows = np.arange(len(stable))
    middle = (ordered[rows, pairs // 2] + ordered[rows, (pairs - 1) // 2]) / 2
    bound = ordered[rows, low]
    safe_s, safe_c = np.where(missing, 0, stable), np.where(missing, 0, candidate)
    mean_s, mean_c = safe_s.sum(axis=1), safe_c.sum(axis=1)
    increased = np.where(mean_s > 0, mean_c >= allowed * mean_s, mean_c > 0)
    return np.asarray((count >= 2) & (bound > 0.25 * np.abs(middle)) & increased)


def _window(minutes: Minutes, width: int, q: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Return requests, shares of errors, times per output token and a quantile of the time to first
    token in the last `width` minutes.
    """

    def last(values: Floats) -> Floats:
        running = np.cumsum(values, axis=1)
        running[:, width:] = running[:, width:] - running[:, :-width]
        return running

    n, counted = (np.maximum(last(one.copy()), 1e-9) for one in (minutes.requests, minutes.counted))
    errors, tpot = last(minutes.errors.copy()) / counted, last(minutes.tpot.copy()) / n
    return n, errors, tpot, quantile(last(minutes.histogram.copy()), q)


def _before() -> tuple[float, float, float]:
    """Return stable's p95 and p99 of the time to first token and its time per output token."""
    from tests.benchmarks.judge.traffic import SIGMA, TPOT_S, TTFT_S

    p95, p99 = (TTFT_S * float(np.exp(norm.ppf(q) * SIGMA)) for q in (0.95, 0.99))
    return p95, p99, TPOT_S


def _exceeds(failed: Bools, limit: float) -> Floats:
    over = np.cumsum(failed, axis=1) > limit
    return np.where(over.any(axis=1), over.argmax(axis=1) + 1.0, np.inf)


_LIMITS = tuple(float(limit) for limit in range(30))
_INCREASES = (1.0, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)

KAYENTA = ("kayenta 5 min", "kayenta 1 min")

PEERS: tuple[Peer, ...] = (
    Peer("argo static", argo_static, 3),
    Peer("argo ratio", argo_ratio, 3, _LIMITS),
    Peer("flagger", flagger, 5, _LIMITS[1:]),
    Peer(KAYENTA[0], partial(kayenta, interval=5), 1.0, _INCREASES),
    Peer(KAYENTA[1], partial(kayenta, interval=1), 1.0, _INCREASES),
)


def tuned(minutes: list[Minutes]) -> tuple[Peer, ...]:
    """Return the tuned forms, from batches of unchanged releases of the default world."""
    made = []
    for peer in PEERS:
        for setting in peer.grid:
            fired = np.concatenate([np.isfinite(peer.decide(one, setting)) for one in minutes])
            if fired.mean() <= 0.01:
                made.append(Peer(f"{peer.name} tuned ({setting:g})", peer.decide, setting))
                break
    return tuple(made)
