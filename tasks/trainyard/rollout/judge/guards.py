"""Reasons to wait: where the comparison itself is in doubt. A guard can only hold.

=============  ====================================================  ===========================
guard          what it sees                                          what it holds back
=============  ====================================================  ===========================
pod spread     the candidate's pods differ among themselves by more  harm and promotion by that
               than stable's history (or the default) explains       average
sample ratio   the candidate's share of the requests is not its      promotion
               weight: weights not applied, or sessions that stick
stable sick    stable itself fails too many requests to be a         promotion
               measure of anything
=============  ====================================================  ===========================

That loads of pods are equal, that pods are warm and that figures are fresh is seen to where rows
are made: what is not comparable has no row (see `rollout.slices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.special import logsumexp
from scipy.stats import chi2

from trainyard.documents.evidence import Covariance
from trainyard.rollout.judge import defaults
from trainyard.rollout.judge.blocks import PairedBlock
from trainyard.rollout.judge.counts import Counts, level_wagers
from trainyard.rollout.judge.paths import Floats

Bools = NDArray[np.bool_]


def pods_scatter(blocks: Sequence[PairedBlock], model: Covariance) -> Bools:
    """Tell after which blocks the candidate's pods differ too much among themselves.

    Blocks count together as long as the candidate's pods are the same.
    """
    held: list[bool] = []
    for names, group in groupby(blocks, key=lambda block: sorted(block.candidate.pods)):
        run = list(group)
        pods = [[block.candidate.pods[name] for name in names] for block in run]
        requests = np.array([[pod.requests for pod in row] for row in pods], dtype=float)
        totals = np.array([[pod.total for pod in row] for row in pods], dtype=float)
        middle_s = np.array([block.middle_s for block in run])
        held.extend(scatters(requests, totals, middle_s, model).tolist())
    return np.array(held, dtype=bool)


def scatters(requests: Floats, totals: Floats, middle_s: Floats, model: Covariance) -> Bools:
    """Tell, after each block, whether pods' lasting differences exceed what the model explains.

    Each pod's deviation from the mean of the pods is whitened as the differences of the tracks are;
    the squared scores over all pods have a chi-square law if pods are as alike as the model says.
    Requests that are noisier than stable's, which the test of the averages takes into account by
    itself, are no scatter: the squared scores are divided by how much more successive blocks of a
    pod differ than the model says, where that is more. Only blocks so far count for each answer.

    Args:
        requests: blocks x pods.
        totals: seconds, blocks x pods.
        middle_s: of each block.
        model: with its inflation and floor.
    """
    count, pods = requests.shape
    usable = (requests >= defaults.LEAST_REQUESTS_OF_POD).all(axis=1) & (totals > 0).all(axis=1)
    result = np.zeros(count, dtype=bool)
    if pods < 2 or usable.sum() < defaults.MIN_HARM_BLOCKS:
        return result
    y = np.log(totals[usable] / requests[usable])
    deviation = (y - y.mean(axis=1, keepdims=True)) / np.sqrt(1 - 1 / pods)
    white = model.nug + model.se2 * (1 / requests[usable]).mean(axis=1)
    gap_s = np.abs(middle_s[usable][:, None] - middle_s[usable][None, :])
    passing = model.sa2 * model.rho ** (gap_s / model.rho_lag_s)
    covariance = max(model.sb2, model.pod_floor**2) + passing + np.diag(white)
    lower = cholesky(model.inflation * covariance, lower=True)
    both = solve_triangular(
        lower, np.column_stack([deviation, np.ones(len(deviation))]), lower=True
    )
    x = both[:, -1:]
    score = np.cumsum(x * both[:, :-1], axis=0)
    information = np.cumsum(x[:, 0] ** 2)
    spread = (score**2).sum(axis=1) / information / _own_noise(deviation, white, passing, model)
    beyond = spread > chi2.isf(defaults.SCATTER_LEVEL, pods - 1)
    beyond[: defaults.MIN_HARM_BLOCKS - 1] = False
    seen = np.cumsum(usable) - 1
    return np.asarray(np.where(seen >= 0, beyond[np.maximum(seen, 0)], False))


def _own_noise(deviation: Floats, white: Floats, passing: Floats, model: Covariance) -> Floats:
    """Return, after each block, how much noisier successive blocks are than the model; at least 1.

    That is half the mean square of successive differences over what it should be, which is the
    white part and what drifts away between two blocks.
    """
    steps = (np.diff(deviation, axis=0) ** 2).mean(axis=1) / 2
    expected = (white[1:] + white[:-1]) / 2 + model.sa2 - np.diag(passing, 1)
    ratio = np.cumsum(steps) / np.maximum(np.cumsum(expected), 1e-12)
    return np.concatenate([[1.0], np.maximum(ratio, 1.0)])


def share_is_off(blocks: Sequence[PairedBlock]) -> bool:
    """Tell whether the candidate's share of all requests cannot come from its weights.

    Only users' own requests follow the weights. Both wagers are against odds that are off by
    `SHARE_TOLERANCE` at most, in either direction.
    """
    blocks = [block for block in blocks if not block.stratum]
    if not blocks:
        return False
    n_c = np.array([block.candidate.all.requests for block in blocks], dtype=float)
    n_s = np.array([block.stable.all.requests for block in blocks], dtype=float)
    weight = np.clip([block.weight for block in blocks], 1, 99)
    odds = weight / (100 - weight)
    for ours, theirs, fair in ((n_c, n_s, odds), (n_s, n_c, 1 / odds)):
        least = fair * defaults.SHARE_TOLERANCE
        more = least[:, None] * np.asarray(defaults.HARM_RATIOS)
        base = np.log(least / (1 + least))[:, None], -np.log1p(least)[:, None]
        wager = ours[:, None] * (np.log(more / (1 + more)) - base[0])
        wager += theirs[:, None] * (-np.log1p(more) - base[1])
        if _log_mean_of_sum(wager) >= defaults.GUARD_EVIDENCE:
            return True
    return False


def stable_is_sick(blocks: Sequence[PairedBlock]) -> bool:
    """Tell whether stable fails more than `SICK_SHARE` of its requests at the newest weight."""
    if not blocks:
        return False
    now = [block for block in blocks if block.weight == blocks[-1].weight]
    n = np.array([block.stable.all.requests for block in now], dtype=float)
    bad = np.array([block.stable.all.bad for block in now], dtype=float)
    counts = Counts(n, bad, n, bad)
    wagers = level_wagers(counts, defaults.SICK_SHARE, defaults.HARM_RATIOS)
    return _log_mean_of_sum(wagers) >= defaults.GUARD_EVIDENCE


def _log_mean_of_sum(wagers: Floats) -> float:
    return float(logsumexp(wagers.sum(axis=0)) - np.log(wagers.shape[1]))
