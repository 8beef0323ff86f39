"""Latencies: is the average worse than a margin allows?

The data are differences d_t = log(candidate's average) - log(stable's average), one a closed block.
Blocks are not independent: a pod that is slow now is slow for minutes, and some machines are slow
for good. A test that learns its variance from the spread of the blocks sees neither and rolls back
good releases, so the covariance of d is a model with frozen numbers (`Covariance`).

With V = L L', z = L^-1 d and x = L^-1 1 are what generalised least squares sees, block by block.
The score S_k = sum x z has information I_k = sum x^2 and, when the true difference is at most the
margin m, S_k - m I_k is a Brownian motion in I with drift <= 0: for every sequence of looks, and
for every rule that chooses weights from the past. `boundary` says when it has gone too far.
Promotion is the same with the other sign and its own margin, over the blocks that count for it
(`counts_for_promotion`).

One safety net: where the residuals spread more than the covariance says, S is divided by their
standard deviation. It can only make the judge slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, log1p
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from trainyard.documents.evidence import Covariance, JudgeSpec, MetricSpec, Track
from trainyard.rollout.judge import defaults
from trainyard.rollout.judge.blocks import (
    PairedBlock,
    counts_for_promotion,
    log_start_weight,
    restarts,
)
from trainyard.rollout.judge.boundary import boundary_constant, log_mixture
from trainyard.rollout.judge.guards import first_comparison, scatters
from trainyard.rollout.judge.noise import effective_requests, known_requests
from trainyard.rollout.judge.paths import EvidencePath, Floats, further

_TRACKS: tuple[Track, Track] = ("stable", "candidate")

_NO_INFORMATION = 1e-300
"""Divided by where no block counts yet: the score is 0 there."""


@dataclass(frozen=True, slots=True)
class Score:
    """Score statistics after each block of a run of blocks, before a margin is chosen."""

    raw: Floats
    """sum x z of the differences."""
    information: Floats
    """sum x^2; the estimate of the difference is raw / information."""
    scale: Floats
    """Standard deviation of the residuals, not below 1."""

    def against(self, margin: float) -> Floats:
        """Return the score of "more than `margin`" (log units), in units of the model's noise."""
        return np.asarray((self.raw - margin * self.information) / self.scale)


def average_path(
    blocks: Sequence[PairedBlock], metric: MetricSpec, spec: JudgeSpec
) -> EvidencePath:
    """Return the evidence on one metric of kind `mean` after each closed block."""
    if not blocks:
        nothing = np.zeros(0)
        return EvidencePath(nothing, nothing, nothing, nothing)
    model = metric.covariance or spec.covariance
    d = log_differences(blocks, model)
    covariance = covariance_of(blocks, model)
    horizon = harm_horizon(_first_of_each(blocks), model, spec)
    whole = score(d, covariance)

    harm_margin = log1p(metric.harm_margin)
    early_alpha = metric.harm_alpha * defaults.HARM_BOUNDARY_SHARE
    late_alpha = metric.harm_alpha - early_alpha
    harm = further(
        _boundary(whole, harm_margin, 1, early_alpha, horizon, defaults.BOUNDARY_EXPONENT),
        _harm_mixture(blocks, d, covariance, harm_margin, late_alpha, horizon),
    )

    promote_margin = log1p(metric.promote_margin)
    early_beta = metric.promote_beta * defaults.PROMOTE_BOUNDARY_SHARE
    late_beta = metric.promote_beta - early_beta
    used = counts_for_promotion(blocks, metric.name, spec)
    counting = score(d, covariance, used)
    firsts = _first_of_each([block for block, counts in zip(blocks, used, strict=True) if counts])
    if firsts:
        horizon = promotion_horizon(firsts, model, spec)
    exponent = defaults.PROMOTE_BOUNDARY_EXPONENT
    promote = further(
        _boundary(counting, promote_margin, -1, early_beta, horizon, exponent),
        _mixture(counting, promote_margin, -1, -log(late_beta), horizon),
    )
    pods = _of_pods(blocks, "candidate", "requests")
    strata = np.unique([block.stratum for block in blocks], return_inverse=True)[1]
    return EvidencePath(
        *harm,
        *promote,
        first_harm_block=max(defaults.MIN_HARM_BLOCKS - 1, first_comparison(pods, strata)),
        held=scatters(
            pods,
            _of_pods(blocks, "candidate", "total"),
            np.array([block.start_s for block in blocks]),
            np.array([block.end_s for block in blocks]),
            strata,
            model,
        ),
    )


def log_differences(blocks: Sequence[PairedBlock], model: Covariance) -> Floats:
    """Return log(candidate's average / stable's average) of each block.

    The log of an average of n values lies low by about se2 / 2n; without that correction the track
    with fewer requests would look better than it is.
    """
    sides = []
    for track in _TRACKS:
        n = _requests(blocks, track)
        total = np.array([block.side(track).all.total for block in blocks])
        sides.append(np.log(total / n) + model.se2 / (2 * n))
    stable, candidate = sides
    return np.asarray(candidate - stable)


def covariance_of(blocks: Sequence[PairedBlock], model: Covariance) -> Floats:
    """Return the covariance of the log differences, blocks x blocks (see `Covariance`)."""
    pods = sum(shares @ shares.T for shares in (_shares(blocks, track) for track in _TRACKS))
    middle_s = np.array([block.middle_s for block in blocks], dtype=np.float64)
    length_s = np.array([block.length_s for block in blocks])
    stable, candidate = (
        effective_requests(_of_pods(blocks, track, "requests"), length_s, model)
        for track in _TRACKS
    )
    sampling = np.asarray(model.se2 / stable + model.se2 / candidate, dtype=np.float64)
    return _covariance(np.asarray(pods, dtype=np.float64), middle_s, sampling, model)


def harm_horizon(firsts: Sequence[PairedBlock], model: Covariance, spec: JudgeSpec) -> float:
    """Return Imax for harm, from the first block of each stratum."""
    planned = planned_information(firsts, model, spec, spec.max_duration_s)
    return defaults.HORIZON_RESERVE * planned


def promotion_horizon(firsts: Sequence[PairedBlock], model: Covariance, spec: JudgeSpec) -> float:
    """Return Imax for promotion: of what is left of `max_duration_s` from the first block that
    counts for it.

    Args:
        firsts: the first block of each stratum that counts for promotion; at least one.
        model: the metric's covariance.
        spec: the duration, and the last step.
    """
    left_s = spec.max_duration_s - min(block.start_s for block in firsts)
    least_s = defaults.LEAST_PROMOTION_SHARE * spec.max_duration_s
    planned = planned_information(firsts, model, spec, max(left_s, least_s))
    return defaults.PROMOTE_HORIZON_RESERVE * planned


def planned_information(
    firsts: Sequence[PairedBlock], model: Covariance, spec: JudgeSpec, duration_s: float
) -> float:
    """Return the information that `duration_s` would yield.

    The plan takes the rate of requests of the first closed block of each stratum, the last weight
    throughout, and the pods of the last step (`last_pods`) or else those of the first block. All of
    that is known before the first difference is weighed and does not depend on latencies, so the
    horizon is fixed in advance in the sense that the boundary needs. The boundary is nearly flat: a
    plan that is wrong by a factor of 2 moves it by 7 %.
    """
    first = firsts[0]
    rate = sum(
        (one.stable.all.requests + one.candidate.all.requests) / one.length_s for one in firsts
    )
    share = spec.last_weight / 100
    smaller = rate * min(share, 1 - share)
    length_s = max(
        spec.block_s,
        spec.min_requests_per_block / smaller,
        duration_s / defaults.MAX_PLANNED_BLOCKS,
    )
    count = max(1, ceil(duration_s / length_s))
    if spec.last_pods is not None:
        products = [1 / max(1, count_of_pods) for count_of_pods in spec.last_pods]
    else:
        products = [float((_shares([first], track) ** 2).sum()) for track in _TRACKS]
    sampling = 0.0
    for of_track, product in zip((1 - share, share), products, strict=True):
        # Requests of a pod, if all its track's pods were alike.
        n = np.array([rate * of_track * length_s * product])
        sampling += model.se2 * product / float(known_requests(n, np.array(length_s), model)[0])
    covariance = _covariance(
        np.full((count, count), sum(products)),
        np.arange(count, dtype=np.float64) * length_s,
        np.full(count, sampling),
        model,
    )
    return float(score(np.zeros(count), covariance).information[-1])


def _first_of_each(blocks: Sequence[PairedBlock]) -> list[PairedBlock]:
    found: dict[str, PairedBlock] = {}
    for block in blocks:
        found.setdefault(block.stratum, block)
    return list(found.values())


def score(d: Floats, covariance: Floats, used: NDArray[np.bool_] | None = None) -> Score:
    """Return the score statistics of differences `d` with their covariance.

    Args:
        d: one a block.
        covariance: blocks x blocks.
        used: the blocks that count; the others change nothing. None: all do.
    """
    if used is None:
        used = np.ones(len(d), dtype=bool)
    # A block that is not used is one of its own, of which nothing is known.
    lower = cholesky(np.where(np.outer(used, used), covariance, np.eye(len(d))), lower=True)
    seen = np.column_stack([np.where(used, d, 0.0), used.astype(np.float64)])
    both = solve_triangular(lower, seen, lower=True)
    z, x = both[:, 0], both[:, 1]
    raw = np.cumsum(x * z)
    information = np.cumsum(x**2)
    fitted = raw**2 / np.maximum(information, _NO_INFORMATION)
    residual = np.maximum(np.cumsum(z**2) - fitted, 0.0)
    freedom = np.maximum(np.cumsum(used) - 1, 1)
    scale = np.sqrt(np.maximum(residual / freedom, 1.0))
    return Score(raw=raw, information=information, scale=scale)


def _requests(blocks: Sequence[PairedBlock], track: Track) -> Floats:
    return np.array([block.side(track).all.requests for block in blocks], dtype=float)


def _shares(blocks: Sequence[PairedBlock], track: Track) -> Floats:
    """Return each pod's share of its track's requests, blocks x pods."""
    requests = _of_pods(blocks, track, "requests")
    return np.asarray(requests / requests.sum(axis=1, keepdims=True))


def _of_pods(
    blocks: Sequence[PairedBlock], track: Track, field: Literal["requests", "total"]
) -> Floats:
    """Return a sum of each pod that the track ever had, blocks x pods; 0 where it was not there."""
    names = sorted({name for block in blocks for name in block.side(track).pods})
    column = {name: index for index, name in enumerate(names)}
    sums = np.zeros((len(blocks), len(names)))
    for row, block in enumerate(blocks):
        for name, pod in block.side(track).pods.items():
            sums[row, column[name]] = getattr(pod, field)
    return sums


def _covariance(pods: Floats, middle_s: Floats, sampling: Floats, model: Covariance) -> Floats:
    lag = np.abs(middle_s[:, None] - middle_s[None, :]) / model.rho_lag_s
    lasting = max(model.sb2, model.pod_floor**2)
    covariance = pods * (lasting + model.sa2 * model.rho**lag)
    covariance += np.diag(np.diag(pods) * model.nug + sampling)
    return np.asarray(model.inflation * covariance)


def _boundary(
    of: Score, margin: float, sign: int, alpha: float, horizon: float, exponent: float
) -> tuple[Floats, Floats]:
    """Return z and its boundary; the boundary is infinite outside the horizon."""
    information = np.maximum(of.information, _NO_INFORMATION)
    share = information / horizon
    constant = boundary_constant(alpha, exponent, defaults.BOUNDARY_START)
    inside: NDArray[np.bool_] = (share >= defaults.BOUNDARY_START) & (share <= 1)
    height = constant * share ** (exponent - 0.5)
    z = sign * of.against(margin) / np.sqrt(information)
    return z, np.where(inside, height, np.inf)


def _mixture(
    of: Score, margin: float, sign: int, log_threshold: float, horizon: float
) -> tuple[Floats, Floats]:
    variance = defaults.MIXTURE_TIGHTNESS / horizon
    evidence = log_mixture(sign * of.against(margin), of.information, variance)
    return evidence, np.full_like(evidence, log_threshold)


def _harm_mixture(
    blocks: Sequence[PairedBlock],
    d: Floats,
    covariance: Floats,
    margin: float,
    alpha: float,
    horizon: float,
) -> tuple[Floats, Floats]:
    """Return the mixture over all blocks or, where nearer, over those since the weight rose.

    Each start has its own share of alpha. The union bound makes that valid although a pod's lasting
    effect, which the earlier blocks have shown, makes the later ones no fresh experiment.
    """
    threshold = np.full(len(blocks), -log(alpha))
    evidence = np.full(len(blocks), -np.inf)
    for number, start in enumerate(restarts(blocks)):
        of = score(d[start:], covariance[start:, start:])
        since, _ = _mixture(of, margin, 1, 0.0, horizon)
        evidence[start:] = np.maximum(evidence[start:], since + log_start_weight(number))
    return evidence, threshold
