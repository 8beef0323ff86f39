"""Latencies: is the average worse than a margin allows?

The data are differences d_t = log(candidate's average) - log(stable's average), one a closed block.
Blocks are not independent: a pod that is slow now is slow for minutes, and some machines are slow
for good. A test that learns its variance from the spread of the blocks sees neither and rolls back
good releases, so the covariance of d is a model with frozen numbers (`Covariance`).

With V = L L', z = L^-1 d and x = L^-1 1 are what generalised least squares sees, block by block.
The score S_k = sum x z has information I_k = sum x^2 and, when the true difference is at most the
margin m, S_k - m I_k is a Brownian motion in I with drift <= 0: for every sequence of looks, and
for every rule that chooses weights from the past. `boundary` says when it has gone too far.
Promotion is the same with the other sign and its own margin.

One safety net: where the residuals spread more than the covariance says, S is divided by their
standard deviation. It can only make the judge slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, log1p

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from trainyard.documents.evidence import Covariance, JudgeSpec, MetricSpec, Track
from trainyard.rollout.judge import defaults
from trainyard.rollout.judge.blocks import PairedBlock, log_start_weight, restarts
from trainyard.rollout.judge.boundary import boundary_constant, log_mixture
from trainyard.rollout.judge.paths import EvidencePath, Floats, further

_TRACKS: tuple[Track, Track] = ("stable", "candidate")


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
    horizon = planned_information(blocks[0], model, spec)
    whole = score(d, covariance)

    harm_margin = log1p(metric.harm_margin)
    harm_alpha = metric.harm_alpha
    late_alpha = harm_alpha * (1 - defaults.HARM_BOUNDARY_SHARE)
    harm = further(
        _boundary(whole, harm_margin, 1, harm_alpha * defaults.HARM_BOUNDARY_SHARE, horizon),
        _harm_mixture(blocks, d, covariance, harm_margin, late_alpha, horizon),
    )

    promote_margin = log1p(metric.promote_margin)
    beta = metric.promote_beta
    late_beta = beta * (1 - defaults.PROMOTE_BOUNDARY_SHARE)
    promote = further(
        _boundary(whole, promote_margin, -1, beta * defaults.PROMOTE_BOUNDARY_SHARE, horizon),
        _mixture(whole, promote_margin, -1, -log(late_beta), horizon),
    )
    return EvidencePath(*harm, *promote, first_harm_block=defaults.MIN_HARM_BLOCKS - 1)


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
    stable, candidate = (_requests(blocks, track) for track in _TRACKS)
    sampling = np.asarray(model.se2 / stable + model.se2 / candidate, dtype=np.float64)
    return _covariance(np.asarray(pods, dtype=np.float64), middle_s, sampling, model)


def planned_information(first: PairedBlock, model: Covariance, spec: JudgeSpec) -> float:
    """Return Imax: the information that the whole of `max_duration_s` would yield.

    The plan takes the rate of requests of the first closed block, the last weight throughout, and
    the pods of the last step (`last_pods`) or else those of the first block. All of that is known
    before the first difference is weighed and does not depend on latencies, so the horizon is fixed
    in advance in the sense that the boundary needs. The boundary is nearly flat: a plan that is
    wrong by a factor of 2 moves it by 7 %.
    """
    rate = (first.stable.all.requests + first.candidate.all.requests) / first.length_s
    share = spec.last_weight / 100
    smaller = rate * min(share, 1 - share)
    length_s = max(
        spec.block_s,
        spec.min_requests_per_block / smaller,
        spec.max_duration_s / defaults.MAX_PLANNED_BLOCKS,
    )
    count = max(1, ceil(spec.max_duration_s / length_s))
    if spec.last_pods is not None:
        pods = sum(1 / max(1, count_of_pods) for count_of_pods in spec.last_pods)
    else:
        pods = sum(float((shares**2).sum()) for shares in (_shares([first], t) for t in _TRACKS))
    sampling = model.se2 / (rate * length_s) * (1 / share + 1 / (1 - share))
    covariance = _covariance(
        np.full((count, count), pods),
        np.arange(count, dtype=np.float64) * length_s,
        np.full(count, sampling),
        model,
    )
    information = float(score(np.zeros(count), covariance).information[-1])
    return defaults.HORIZON_RESERVE * information


def score(d: Floats, covariance: Floats) -> Score:
    """Return the score statistics of differences `d` with their covariance."""
    lower = cholesky(covariance, lower=True)
    both = solve_triangular(lower, np.column_stack([d, np.ones_like(d)]), lower=True)
    z, x = both[:, 0], both[:, 1]
    raw = np.cumsum(x * z)
    information = np.cumsum(x**2)
    residual = np.maximum(np.cumsum(z**2) - raw**2 / information, 0.0)
    freedom = np.maximum(np.arange(len(d)), 1)
    scale = np.sqrt(np.maximum(residual / freedom, 1.0))
    return Score(raw=raw, information=information, scale=scale)


def _requests(blocks: Sequence[PairedBlock], track: Track) -> Floats:
    return np.array([block.side(track).all.requests for block in blocks], dtype=float)


def _shares(blocks: Sequence[PairedBlock], track: Track) -> Floats:
    """Return each pod's share of its track's requests, blocks x pods."""
    names = sorted({name for block in blocks for name in block.side(track).pods})
    column = {name: index for index, name in enumerate(names)}
    shares = np.zeros((len(blocks), len(names)))
    for row, block in enumerate(blocks):
        side = block.side(track)
        for name, pod in side.pods.items():
            shares[row, column[name]] = pod.requests / side.all.requests
    return shares


def _covariance(pods: Floats, middle_s: Floats, sampling: Floats, model: Covariance) -> Floats:
    lag = np.abs(middle_s[:, None] - middle_s[None, :]) / model.rho_lag_s
    lasting = max(model.sb2, model.pod_floor**2)
    covariance = pods * (lasting + model.sa2 * model.rho**lag)
    covariance += np.diag(np.diag(pods) * model.nug + sampling)
    return np.asarray(model.inflation * covariance)


def _boundary(
    of: Score, margin: float, sign: int, alpha: float, horizon: float
) -> tuple[Floats, Floats]:
    """Return z and its boundary; the boundary is infinite outside the horizon."""
    share = of.information / horizon
    constant = boundary_constant(alpha, defaults.BOUNDARY_EXPONENT, defaults.BOUNDARY_START)
    inside: NDArray[np.bool_] = (share >= defaults.BOUNDARY_START) & (share <= 1)
    height = constant * share ** (defaults.BOUNDARY_EXPONENT - 0.5)
    z = sign * of.against(margin) / np.sqrt(of.information)
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
