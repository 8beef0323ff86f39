"""Counts: who had the bad events?

An e-process is a wager against a null hypothesis that is fair or worse if the null is true:
starting from 1, P(it ever reaches 1 / alpha) <= alpha, whatever the number of looks. Two wagers a
block:

* ratio: a bad event of the block happened to the candidate with probability
  w(r) = r n_c / (r n_c + n_s) if the candidate's rate is r times stable's. The wager is the
  likelihood ratio of w(g r0) against w(r0). Rates that change with time cancel.
* level: the likelihood ratio of the share g p0 against p0 among the candidate's n_c requests.

Both are fair or worse on the whole one-sided null: for the level by monotone likelihood ratio; for
the ratio, with a = ln w(g r0)/w(r0) and b = ln (1-w(g r0))/(1-w(r0)), because
E exp(a k_c + b k_s) <= exp(n_c p_c (e^a - 1) + n_s p_s (e^b - 1)), which is 1 at p_c = r0 p_s and
less below it (1 + u <= e^u, so shares need not be small). Averages over the alternatives g remain
wagers.

Harm needs both (worse than the ratio and worse than the floor), so its evidence is the lesser of
the two. Promotion needs one (below the ceiling or below the ratio), so its null is that neither
holds and its evidence is a weighted mean.

Bad events come in bursts: a pod that fails loses all its requests in flight. Events that would
argue for a rejection are therefore clipped per pod and block (the candidate's for harm, stable's
for promotion), and no block gives more than half of the evidence that is needed. That only ever
lowers the evidence, so it costs no validity. Where counts of unchanged pods vary more than singly
coming events would, the log evidence is divided by their `dispersion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from trainyard.documents.evidence import JudgeSpec, MetricSpec, Track
from trainyard.rollout.judge import defaults
from trainyard.rollout.judge.blocks import (
    PairedBlock,
    counts_for_promotion,
    log_start_weight,
    restarts,
)
from trainyard.rollout.judge.paths import EvidencePath, Floats

_LARGEST_SHARE = 0.95
"""Alternatives of a level test stay below this share."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests and bad events of both tracks, one entry a closed block."""

    stable_n: Floats
    stable_bad: Floats
    candidate_n: Floats
    candidate_bad: Floats


def count_path(blocks: Sequence[PairedBlock], metric: MetricSpec, spec: JudgeSpec) -> EvidencePath:
    """Return the evidence on one metric of kind `count` after each closed block."""
    if not blocks:
        nothing = np.zeros(0)
        return EvidencePath(nothing, nothing, nothing, nothing)
    n = len(blocks)
    return EvidencePath(
        harm=harm_evidence(blocks, metric),
        harm_threshold=np.full(n, -log(metric.harm_alpha)),
        promote=promote_evidence(blocks, metric, counts_for_promotion(blocks, metric.name, spec)),
        promote_threshold=np.full(n, -log(metric.promote_beta)),
    )


def harm_evidence(blocks: Sequence[PairedBlock], metric: MetricSpec) -> Floats:
    """Return the log e-value, after each block, against "at most the ratio, or at most the floor".

    Evidence starts afresh where the weight rises, each start with its share of the wager.
    """
    counts = _clipped(
        blocks, "candidate", least=metric.harm_floor, ratio_to_stable=metric.harm_margin
    )
    tests = [ratio_wagers(counts, metric.harm_margin, defaults.HARM_RATIOS)]
    if metric.harm_floor > 0:
        tests.append(level_wagers(counts, metric.harm_floor, defaults.HARM_RATIOS))
    starts = restarts(blocks)
    stakes = [_tempered(test, metric, metric.harm_alpha) for test in tests]
    return np.asarray(np.minimum.reduce([_over_starts(stake, starts) for stake in stakes]))


def promote_evidence(
    blocks: Sequence[PairedBlock], metric: MetricSpec, counting: NDArray[np.bool_]
) -> Floats:
    """Return the log e-value, after each block, against "at least the ceiling and the ratio".

    Args:
        blocks: all closed blocks; what is a burst is learned from all.
        metric: its margins.
        counting: on which of them anything is wagered.
    """
    expected = metric.promote_ceiling / metric.promote_margin
    counts = _clipped(blocks, "stable", least=expected, ratio_to_stable=1.0)
    ratio = ratio_wagers(counts, metric.promote_margin, defaults.PROMOTE_RATIOS)
    stakes = _tempered(ratio, metric, metric.promote_beta)
    by_ratio = _log_mean(np.cumsum(stakes * counting[:, None], axis=0))
    if metric.promote_ceiling == 0:
        return by_ratio
    level = level_wagers(counts, metric.promote_ceiling, defaults.PROMOTE_RATIOS)
    stakes = _tempered(level, metric, metric.promote_beta)
    by_level = _log_mean(np.cumsum(stakes * counting[:, None], axis=0))
    weight = defaults.CEILING_WEIGHT
    return np.asarray(np.logaddexp(log(weight) + by_level, log(1 - weight) + by_ratio))


def ratio_wagers(counts: Counts, ratio: float, alternatives: Sequence[float]) -> Floats:
    """Return the log wagers against "the candidate's rate is (not) above `ratio` times stable's".

    Shape blocks x alternatives; an alternative is a multiple of `ratio`, above 1 for harm and
    below 1 for promotion.
    """
    odds = ratio * counts.candidate_n / counts.stable_n
    multiple = np.asarray(alternatives)[None, :]
    log_stable = np.log1p(odds)[:, None] - np.log1p(odds[:, None] * multiple)
    log_candidate = np.log(multiple) + log_stable
    return np.asarray(
        counts.candidate_bad[:, None] * log_candidate + counts.stable_bad[:, None] * log_stable
    )


def level_wagers(counts: Counts, level: float, alternatives: Sequence[float]) -> Floats:
    """Return the log wagers against "the candidate's share of bad requests is (not) above `level`".

    Shape blocks x alternatives, as in `ratio_wagers`.
    """
    shares = np.minimum(level * np.asarray(alternatives), max(_LARGEST_SHARE, level))[None, :]
    good = (counts.candidate_n - counts.candidate_bad)[:, None]
    return np.asarray(
        counts.candidate_bad[:, None] * np.log(shares / level)
        + good * (np.log1p(-shares) - np.log1p(-level))
    )


def _clipped(
    blocks: Sequence[PairedBlock], track: Track, *, least: float, ratio_to_stable: float
) -> Counts:
    """Return the counts, with those of each pod of `track` clipped.

    The limit is CLIP_EVENTS or CLIP_EXCESS times what a pod is expected to have, at a share of
    `least` or of `ratio_to_stable` times what stable had in earlier blocks, bursts left out.
    """
    kept: dict[Track, list[int]] = {"stable": [], "candidate": []}
    seen_n = seen_bad = 0
    for block in blocks:
        so_far = seen_bad / seen_n if seen_n else 0.0
        expected = max(least, ratio_to_stable * so_far)
        for side_track, kept_bad in kept.items():
            side = block.side(side_track)
            kept_bad.append(
                sum(min(pod.bad, _limit(expected, pod.requests)) for pod in side.pods.values())
                if side_track == track
                else side.all.bad
            )
        seen_n += block.stable.all.requests
        # Stable's own bursts must not raise what counts as a burst.
        usual = max(least, so_far)
        seen_bad += sum(
            min(pod.bad, _limit(usual, pod.requests)) for pod in block.stable.pods.values()
        )
    return Counts(
        stable_n=np.array([block.stable.all.requests for block in blocks], dtype=float),
        stable_bad=np.array(kept["stable"], dtype=float),
        candidate_n=np.array([block.candidate.all.requests for block in blocks], dtype=float),
        candidate_bad=np.array(kept["candidate"], dtype=float),
    )


def _limit(expected: float, requests: int) -> int:
    return max(defaults.CLIP_EVENTS, ceil(defaults.CLIP_EXCESS * expected * requests))


def _tempered(wagers: Floats, metric: MetricSpec, error: float) -> Floats:
    """Return the log wagers over the metric's dispersion, none above its share of ln(1 / error)."""
    most = -log(error) * defaults.MAX_SHARE_PER_BLOCK
    return np.asarray(np.minimum(wagers / metric.dispersion, most))


def _over_starts(wagers: Floats, starts: Sequence[int]) -> Floats:
    """Return ln of the wager that splits its stake over the starts and keeps the rest."""
    total = np.full(len(wagers), log_start_weight(len(starts) - 1))
    for number, start in enumerate(starts):
        share = np.full(len(wagers), log_start_weight(number))
        share[start:] += _log_mean(np.cumsum(wagers[start:], axis=0))
        total = np.logaddexp(total, share)
    return total


def _log_mean(log_wagers: Floats) -> Floats:
    """Return the log of the mean over alternatives, blocks x alternatives -> blocks."""
    return np.asarray(logsumexp(log_wagers, axis=1) - log(log_wagers.shape[1]))
