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
no first       far more of the candidate's requests than of          promotion
token          stable's ended well for the router and have no first
               token in the servers' figures
=============  ====================================================  ===========================

That loads of pods are equal, that pods are warm and that figures are fresh is seen to where rows
are made: what is not comparable has no row (see `rollout.slices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.special import logsumexp
from scipy.stats import chi2

from trainyard.documents.evidence import Block, Covariance, Track
from trainyard.rollout.judge import defaults
from trainyard.rollout.judge.blocks import PairedBlock
from trainyard.rollout.judge.counts import Counts, level_wagers
from trainyard.rollout.judge.noise import known_requests
from trainyard.rollout.judge.paths import Floats

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Window:
    """Successive blocks over which pods are compared: `first` to `last`, both in it."""

    first: int
    last: int
    pods: Bools
    """Those with enough requests to tell."""


def windows(requests: Floats) -> list[Window]:
    """Return the windows that are over: each ends where every pod that is served can tell.

    Where the candidate gets little traffic, a block has too few requests of each pod. A pod that
    got none for `GONE_BLOCKS` is not waited for, and no window is longer than `LONGEST_WINDOW`.

    Args:
        requests: blocks x pods.
    """
    found: list[Window] = []
    pods = requests.shape[1]
    got, silent, first = [0.0] * pods, [defaults.GONE_BLOCKS] * pods, 0
    for block, row in enumerate(requests.tolist()):
        waits = False
        for pod, count in enumerate(row):
            got[pod] += count
            silent[pod] = 0 if count > 0 else silent[pod] + 1
            few = 0 < got[pod] < defaults.LEAST_REQUESTS_OF_POD
            waits |= few and silent[pod] < defaults.GONE_BLOCKS
        if not waits or block - first + 1 >= defaults.LONGEST_WINDOW:
            tell = np.array(got) >= defaults.LEAST_REQUESTS_OF_POD
            found.append(Window(first, block, tell))
            got, first = [0.0] * pods, block + 1
    return found


def first_comparison(requests: Floats, strata: Ints) -> int:
    """Return the block before whose end nobody can say whether pods are alike; 0 for one pod.

    Args:
        requests: blocks x pods.
        strata: number of each block's stratum.
    """
    if (requests.sum(axis=0) > 0).sum() < 2:
        return 0
    ends = [len(requests)]
    for mine in _each_stratum(strata):
        ends += [int(mine[window.last]) for window in windows(requests[mine])[:1]]
    return min(ends)


def scatters(
    requests: Floats,
    totals: Floats,
    start_s: Floats,
    end_s: Floats,
    strata: Ints,
    model: Covariance,
) -> Bools:
    """Tell, after each block, whether pods' lasting differences exceed what the model explains.

    Each pod's deviation from the mean of the pods is whitened as the differences of the tracks are;
    the squared scores over all pods have a chi-square law if pods are as alike as the model says.
    Requests that are noisier than stable's, which the test of the averages takes into account by
    itself, are no scatter: the squared scores are divided by how much more successive windows of a
    pod differ than the model says, where that is more. Only blocks so far count for each answer,
    and windows of one stratum count together as long as the same pods tell.

    Args:
        requests: blocks x pods; 0 where a pod was not there.
        totals: seconds, blocks x pods.
        start_s: of each block.
        end_s: of each block.
        strata: number of each block's stratum.
        model: with its inflation and floor.
    """
    held = np.zeros(len(requests), dtype=bool)
    for mine in _each_stratum(strata):
        seen = _scatters(requests[mine], totals[mine], start_s[mine], end_s[mine], model)
        newest = np.searchsorted(mine, np.arange(len(requests)), side="right")
        held |= np.concatenate([[False], seen])[newest]
    return held


def _each_stratum(strata: Ints) -> list[Ints]:
    return [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]


def _scatters(
    requests: Floats, totals: Floats, start_s: Floats, end_s: Floats, model: Covariance
) -> Bools:
    over = windows(requests)
    answers = [False]
    for _, group in groupby(over, key=lambda window: window.pods.tobytes()):
        run = list(group)
        if run[0].pods.sum() < 2:
            answers += [False] * len(run)
            continue
        n, sums = (
            np.array([values[w.first : w.last + 1, w.pods].sum(axis=0) for w in run])
            for values in (requests, totals)
        )
        lengths_s = [(end_s - start_s)[w.first : w.last + 1] for w in run]
        blocks = np.array([len(each) for each in lengths_s])
        length_s = np.array([each.sum() for each in lengths_s])
        middle_s = (start_s[[w.first for w in run]] + end_s[[w.last for w in run]]) / 2
        known = known_requests(n, length_s[:, None], model)
        white = model.nug / blocks + model.se2 * (1 / known).mean(axis=1)
        answers += _beyond(np.log(sums / n), white, middle_s, model).tolist()
    lasts = np.array([window.last for window in over])
    newest = np.searchsorted(lasts, np.arange(len(requests)), side="right")
    return np.array(answers, dtype=bool)[newest]


def _beyond(y: Floats, white: Floats, middle_s: Floats, model: Covariance) -> Bools:
    """Return, after each window, whether pods' averages are too far from each other.

    Args:
        y: logs of averages, windows x pods.
        white: what is new in every window, windows.
        middle_s: of each window.
        model: with its inflation and floor.
    """
    pods = y.shape[1]
    deviation = (y - y.mean(axis=1, keepdims=True)) / np.sqrt(1 - 1 / pods)
    gap_s = np.abs(middle_s[:, None] - middle_s[None, :])
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
    return np.asarray(spread > chi2.isf(defaults.SCATTER_LEVEL, pods - 1))


def _own_noise(deviation: Floats, white: Floats, passing: Floats, model: Covariance) -> Floats:
    """Return, after each window, how much noisier successive ones are than the model; at least 1.

    That is half the mean square of successive differences over what it should be, which is the
    white part and what drifts away between two windows.
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


def latencies_are_missing(rows: Sequence[Block]) -> bool:
    """Tell whether latencies are those of a part of the candidate's requests only.

    Requests that hang, or are refused, have none, and not every router tells them from answers. Of
    each server and slice that has figures of both, what ended without an error is compared with
    what had a first token, over the newest weight. They are counted at different moments of a
    request, so with few requests the two differ by chance.
    """
    users = [row for row in rows if row.weight_candidate > 0 and not row.stratum]
    now = max((row.t for row in users), default=0.0)
    weight = {row.weight_candidate for row in users if row.t == now}
    users = [row for row in users if row.weight_candidate in weight]
    begun = {_where(row): row.requests for row in users if row.metric == "ttft"}
    good: dict[Track, int] = {"stable": 0, "candidate": 0}
    seen: dict[Track, int] = {"stable": 0, "candidate": 0}
    for row in users:
        if row.metric == "errors" and _where(row) in begun:
            good[row.track] += row.requests - row.bad
            seen[row.track] += begun[_where(row)]
    if not all(good.values()):
        return False
    missing = {track: 1 - seen[track] / good[track] for track in good}
    least = max(defaults.MISSING_SHARE, defaults.MISSING_RATIO * missing["stable"])
    return missing["candidate"] > least + 2 / sqrt(good["candidate"])


def _where(row: Block) -> tuple[float, Track, str]:
    return row.t, row.track, row.pod


def _log_mean_of_sum(wagers: Floats) -> float:
    return float(logsumexp(wagers.sum(axis=0)) - np.log(wagers.shape[1]))
