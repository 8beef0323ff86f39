"""The judge over many rollouts at once.

The same numbers as `trainyard.rollout.judge`, which handles one log at a time: closed blocks, score
tests, e-processes and rules of the verdict are computed for all runs together. Formulas that exist
as functions there are called; `tests/unit/rollout/judge/test_benchmark.py` compares the decisions
of the two run by run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import binom, norm
from tests.benchmarks.judge.traffic import (
    SLICE_S,
    SLICES,
    TPOT_CV2,
    TTFT_CV2,
    WEIGHTS,
    Rollouts,
    World,
)

from trainyard.documents.evidence import Covariance, JudgeSpec, MetricSpec, default_metrics
from trainyard.rollout.judge import defaults
from trainyard.rollout.judge.averages import harm_horizon, promotion_horizon
from trainyard.rollout.judge.blocks import PairedBlock, Side, Sums, log_start_weight
from trainyard.rollout.judge.boundary import boundary_constant, log_mixture
from trainyard.rollout.judge.counts import Counts, level_wagers, ratio_wagers
from trainyard.rollout.judge.guards import first_comparison, scatters
from trainyard.rollout.judge.history import Bins, autocovariance, dispersion_of, fit
from trainyard.rollout.judge.noise import effective_requests

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SPEC = JudgeSpec(metrics=default_metrics(), max_duration_s=SLICES * SLICE_S)
"""The one specification of every published figure; only the pods of the last step, which a plan
knows, are those of the cell."""

NEVER = np.inf


@dataclass(frozen=True)
class Closed:
    """Closed blocks of many runs, padded: runs x blocks (x pods)."""

    valid: Bools
    start_s: Floats
    end_s: Floats
    middle_s: Floats
    weight: Floats
    stable_n: Floats
    candidate_n: Floats
    onehot: Floats
    """runs x slices x blocks: which slice is in which block."""
    probe: Bools
    """Blocks of probes, not of users' requests."""
    counts_for_promotion: Bools
    """See the function of this name in `judge.blocks`."""
    comparable: Bools
    """Where it is known whether pods are alike (`judge.guards.first_comparison`)."""

    def sums(self, values: NDArray[np.generic]) -> Floats:
        """Return sums over the slices of each block, runs x blocks x pods."""
        return np.asarray(np.einsum("rtb,rtp->rbp", self.onehot, values, optimize=True))


@dataclass(frozen=True)
class Path:
    """Runs x blocks: where a metric crosses its thresholds."""

    harm: Bools
    promote: Bools


@dataclass(frozen=True)
class Decisions:
    """What was decided first, one entry a run; `inf` is never."""

    harm_s: Floats
    promote_s: Floats
    by_metric: dict[str, Floats]
    """When each metric alone would have been harm."""

    @property
    def harmed(self) -> Bools:
        return np.asarray((self.harm_s <= self.promote_s) & np.isfinite(self.harm_s))

    @property
    def promoted(self) -> Bools:
        return np.asarray((self.promote_s < self.harm_s) & np.isfinite(self.promote_s))


def decide(rollouts: Rollouts, spec: JudgeSpec = SPEC) -> Decisions:
    """Return the judge's first decision in each run, looking after every slice."""
    spec = planned(rollouts.world, spec)
    read = close(rollouts, rollouts.n, spec)
    counted = close(rollouts, rollouts.counted, spec) if rollouts.world.probes else read
    harm_s: dict[str, Floats] = {}
    good = np.ones((len(rollouts.n), SLICES), dtype=bool)
    for metric in spec.metrics:
        closed = counted if metric.name == "errors" else read
        path = _path(rollouts, closed, metric, spec)
        at = np.where(path.harm & closed.valid, closed.end_s, NEVER)
        harm_s[metric.name] = at.min(axis=1)
        last = closed.valid & ~closed.probe & (closed.weight >= spec.last_weight)
        enough = np.cumsum(last, axis=1) >= spec.min_blocks_last_step
        proven = path.promote & ~_contradicts(rollouts, closed, metric)
        good &= _after_slices(proven & enough, closed)
    promote_s = np.where(good, SLICE_S * np.arange(1, SLICES + 1), NEVER).min(axis=1)
    return Decisions(np.minimum.reduce(list(harm_s.values())), promote_s, harm_s)


def _after_slices(of_blocks: Bools, closed: Closed) -> Bools:
    """Return what the newest closed block says after each slice; no block says no."""
    ends = np.where(closed.valid, closed.end_s, NEVER)
    at = SLICE_S * np.arange(1, SLICES + 1)
    so_far = (ends[:, None, :] <= at[None, :, None]).sum(axis=2)
    newest = np.take_along_axis(of_blocks, np.maximum(so_far - 1, 0), axis=1)
    return np.asarray(newest & (so_far > 0))


def planned(world: World, spec: JudgeSpec = SPEC) -> JudgeSpec:
    """Return `spec` with the pods of the last step, as a plan pins them."""
    stable, candidate = world.serving(WEIGHTS[-1:])
    return spec.model_copy(update={"last_pods": (int(stable[0]), int(candidate[0]))})


def close(rollouts: Rollouts, n: Ints, spec: JudgeSpec = SPEC) -> Closed:
    """Return the closed blocks of requests `n`: at least `min_requests_per_block` on both sides,
    one weight.
    """
    split = rollouts.world.stable_pods
    stable, candidate = n[:, :, :split].sum(axis=2), n[:, :, split:].sum(axis=2)
    users = _labels(stable[:, :SLICES], candidate[:, :SLICES], spec)
    probed = n.shape[1] > SLICES
    labels = [users]
    if probed:
        probes = _labels(stable[:, SLICES:], candidate[:, SLICES:], spec)
        labels.append(np.where(probes >= 0, probes + users.max(axis=1, keepdims=True) + 1, -1))
    label = np.concatenate(labels, axis=1)
    count = max(int(label.max()) + 1, 1)
    onehot = (label[:, :, None] == np.arange(count)).astype(float)
    place = np.arange(label.shape[1]) % SLICES
    end_s = (onehot * (place + 1)[None, :, None]).max(axis=1) * SLICE_S
    length_s = onehot.sum(axis=1) * SLICE_S
    probe = onehot[:, SLICES:].any(axis=1)
    if probed:
        late = np.where(length_s > 0, end_s * 1e6 + (end_s - length_s) * 2 + probe, np.inf)
        order = np.argsort(late, axis=1, kind="stable")
        onehot = np.take_along_axis(onehot, order[:, None, :], axis=2)
        end_s, length_s, probe = (
            np.take_along_axis(x, order, axis=1) for x in (end_s, length_s, probe)
        )
    valid = length_s > 0
    weights = np.tile(WEIGHTS, 2)[: label.shape[1]]
    weight = (onehot * weights[None, :, None]).max(axis=1)
    served = np.einsum("rtb,rtp->rbp", onehot, n, optimize=True) > 0
    servers = [
        np.maximum(1, side.sum(axis=2)) for side in (served[..., :split], served[..., split:])
    ]
    loads = weight / servers[1] / ((100 - weight) / servers[0])
    of_pods = np.einsum("rtb,rtp->rbp", onehot, n[:, :, split:], optimize=True)
    firsts = [
        first_comparison(of_pods[run, :number], probe[run, :number].astype(np.int64))
        for run, number in enumerate(valid.sum(axis=1))
    ]
    return Closed(
        valid=valid,
        start_s=end_s - length_s,
        end_s=end_s,
        middle_s=end_s - length_s / 2,
        weight=weight,
        stable_n=np.einsum("rtb,rt->rb", onehot, stable),
        candidate_n=np.einsum("rtb,rt->rb", onehot, candidate),
        onehot=onehot,
        probe=probe,
        counts_for_promotion=(weight >= spec.last_weight) | (loads >= defaults.LEAST_LOAD),
        comparable=np.arange(count) >= np.array(firsts)[:, None],
    )


def _labels(stable: Ints, candidate: Ints, spec: JudgeSpec) -> Ints:
    """Return the number of the block that each slice is in, runs x slices; -1 for none."""
    runs = len(stable)
    label = np.full((runs, SLICES), -1)
    block = np.zeros(runs, dtype=np.int64)
    start = np.zeros(runs, dtype=np.int64)
    have_s, have_c = np.zeros(runs), np.zeros(runs)
    place = np.arange(SLICES)
    for i in range(SLICES):
        if i and WEIGHTS[i] != WEIGHTS[i - 1]:
            start[:] = i
            have_s[:], have_c[:] = 0, 0
        have_s += stable[:, i]
        have_c += candidate[:, i]
        done = np.minimum(have_s, have_c) >= spec.min_requests_per_block
        inside = (place[None, :] >= start[:, None]) & (place[None, :] <= i) & done[:, None]
        label = np.where(inside, block[:, None], label)
        block += done
        start = np.where(done, i + 1, start)
        have_s, have_c = np.where(done, 0, have_s), np.where(done, 0, have_c)
    return label


def oracle(rollouts: Rollouts, at_s: float, spec: JudgeSpec = SPEC) -> float:
    """Return how often a test that knows the truth about noise and looks once, at `at_s`, calls the
    release harm, by that metric of its world that shows most: no valid test that looks repeatedly
    can do much better on these blocks. Errors and late requests are taken to come one by one.
    """
    world = rollouts.world
    worse = {
        "ttft": world.ttft > 1 or world.slow_share > 0 or world.slow_pod > 1,
        "tpot": world.tpot > 1,
        "errors": (world.candidate_errors or 0.0) > world.error_share,
        "ttft_tail": (world.candidate_late or 0.0) > (world.late_share or 0.0)
        or world.slow_share > 0,
    }
    closed = close(rollouts, rollouts.n, spec)
    powers = [
        _average_oracle(rollouts, closed, metric, at_s)
        if metric.kind == "mean"
        else _count_oracle(rollouts, closed, metric, at_s)
        for metric in spec.metrics
        if worse[metric.name]
    ]
    return max(powers, default=0.0)


def _average_oracle(rollouts: Rollouts, closed: Closed, metric: MetricSpec, at_s: float) -> float:
    world, is_ttft = rollouts.world, metric.name == "ttft"
    truth = Covariance(
        sb2=world.pod_sd**2,
        sa2=world.minute_sd**2,
        rho=world.minute_rho,
        se2=TTFT_CV2 if is_ttft else TPOT_CV2,
        inflation=1.0,
        pod_floor=0.0,
    )
    models = [truth] * len(closed.valid)
    d, covariance = _differences(
        rollouts, closed, rollouts.ttft if is_ttft else rollouts.tpot, models
    )
    used = closed.valid & (closed.end_s <= at_s)
    raw, information, _ = _score(d, covariance, used)
    raw, information = raw[:, -1], information[:, -1]
    z = (raw - log1p(metric.harm_margin) * information) / np.sqrt(np.maximum(information, 1e-9))
    return float((z >= norm.isf(metric.harm_alpha)).mean())


def _count_oracle(rollouts: Rollouts, closed: Closed, metric: MetricSpec, at_s: float) -> float:
    used = (closed.valid & (closed.end_s <= at_s))[:, :, None]
    split = rollouts.world.stable_pods
    is_errors = metric.name == "errors"
    n, bad = (
        (closed.sums(values) * used).sum(axis=1)
        for values in (
            rollouts.counted if is_errors else rollouts.n,
            rollouts.errors if is_errors else rollouts.late,
        )
    )
    n_s, n_c = n[:, :split].sum(axis=1), n[:, split:].sum(axis=1)
    bad_s, bad_c = bad[:, :split].sum(axis=1), bad[:, split:].sum(axis=1)
    odds = metric.harm_margin * n_c / np.maximum(n_s, 1)
    beyond_ratio = binom.sf(bad_c - 1, bad_c + bad_s, odds / (1 + odds)) <= metric.harm_alpha
    beyond_level = binom.sf(bad_c - 1, n_c, metric.harm_floor) <= metric.harm_alpha
    return float((beyond_ratio & beyond_level & (bad_c > 0)).mean())


def _path(rollouts: Rollouts, closed: Closed, metric: MetricSpec, spec: JudgeSpec) -> Path:
    if metric.kind == "mean":
        return _average_path(rollouts, closed, metric, spec)
    return _count_path(rollouts, closed, metric, spec)


def learned_models(rollouts: Rollouts, metric: MetricSpec, spec: JudgeSpec) -> list[Covariance]:
    """Return the covariance that each run's history shows."""
    default = metric.covariance or spec.covariance
    history = rollouts.history
    if history is None or history.n.shape[1] * history.length_s < 1800:
        return [default] * len(rollouts.n)
    values = history.ttft if metric.name == "ttft" else history.tpot
    models = []
    for n, averages in zip(history.n, values, strict=True):
        covariance, pairs, inverse = autocovariance(Bins(history.length_s, n, n * averages))
        models.append(
            fit(
                covariance,
                pairs,
                length_s=history.length_s,
                mean_inverse_n=inverse,
                pods=n.shape[1],
                default=default,
            )
        )
    return models


def dispersions(rollouts: Rollouts, metric: MetricSpec) -> Floats:
    """Return the dispersion that each run's history shows."""
    history = rollouts.history
    if history is None or history.slice_n.shape[1] * SLICE_S < 1800:
        return np.full(len(rollouts.n), metric.dispersion)
    values = history.errors if metric.name == "errors" else history.late
    return np.array(
        [
            max(
                metric.dispersion,
                dispersion_of(Bins(SLICE_S, n, bad), least_share=metric.harm_floor),
            )
            for n, bad in zip(history.slice_n, values, strict=True)
        ]
    )


def _average_path(rollouts: Rollouts, closed: Closed, metric: MetricSpec, spec: JudgeSpec) -> Path:
    models = learned_models(rollouts, metric, spec)
    values = rollouts.ttft if metric.name == "ttft" else rollouts.tpot
    d, covariance = _differences(rollouts, closed, values, models)
    horizons = _horizons(rollouts, closed, models, spec)
    horizon, for_promotion = horizons[:, :1], horizons[:, 1:]
    whole = _score(d, covariance, closed.valid)
    early = metric.harm_alpha * defaults.HARM_BOUNDARY_SHARE
    late = metric.harm_alpha - early
    margin = log1p(metric.harm_margin)
    harm = _crosses(whole, margin, 1, early, horizon, defaults.BOUNDARY_EXPONENT)
    for number, since in enumerate(_since_rises(closed)):
        used = closed.valid & since
        raw, information, scale = _score(d, covariance, used)
        score = (raw - margin * information) / scale
        evidence = log_mixture(score, information, defaults.MIXTURE_TIGHTNESS / horizon)
        harm |= used & (evidence + log_start_weight(number) >= -log(late))
    harm[:, : defaults.MIN_HARM_BLOCKS - 1] = False

    margin = log1p(metric.promote_margin)
    beta = metric.promote_beta
    counting = _score(d, covariance, closed.valid & closed.counts_for_promotion)
    early = beta * defaults.PROMOTE_BOUNDARY_SHARE
    exponent = defaults.PROMOTE_BOUNDARY_EXPONENT
    promote = _crosses(counting, margin, -1, early, for_promotion, exponent)
    raw, information, scale = counting
    score = -(raw - margin * information) / scale
    evidence = log_mixture(score, information, defaults.MIXTURE_TIGHTNESS / for_promotion)
    promote |= evidence >= -log(beta - early)
    held = _held(rollouts, closed, values, models)
    return Path(harm & ~held & closed.comparable, promote & ~held)


def _held(rollouts: Rollouts, closed: Closed, values: Floats, models: list[Covariance]) -> Bools:
    """Tell where the guard of pod spread holds, runs x blocks (see `scatters`)."""
    split = rollouts.world.stable_pods
    n, total = closed.sums(rollouts.n)[:, :, split:], closed.sums(values)[:, :, split:]
    held = np.zeros(closed.valid.shape, dtype=bool)
    for run, model in enumerate(models):
        count = int(closed.valid[run].sum())
        held[run, :count] = scatters(
            n[run, :count],
            total[run, :count],
            closed.start_s[run, :count],
            closed.end_s[run, :count],
            closed.probe[run, :count].astype(np.int64),
            model,
        )
    return held


def _differences(
    rollouts: Rollouts, closed: Closed, values: Floats, models: list[Covariance]
) -> tuple[Floats, Floats]:
    """Return log differences (runs x blocks) and their covariances (runs x blocks x blocks)."""
    split = rollouts.world.stable_pods
    n, total = closed.sums(rollouts.n), closed.sums(values)
    field = {
        name: np.array([getattr(model, name) for model in models])[:, None]
        for name in ("sb2", "sa2", "rho", "nug", "se2", "inflation", "pod_floor")
    }
    sides, pods = [], np.zeros((*closed.valid.shape, closed.valid.shape[1]))
    sampling = np.zeros(closed.valid.shape)
    for chosen in (slice(None, split), slice(split, None)):
        requests = np.maximum(n[:, :, chosen].sum(axis=2), 1)
        average = total[:, :, chosen].sum(axis=2) / requests
        log_average = np.log(np.where(closed.valid, np.maximum(average, 1e-12), 1.0))
        sides.append(log_average + field["se2"] / (2 * requests))
        shares = n[:, :, chosen] / requests[:, :, None]
        pods += shares @ shares.transpose(0, 2, 1)
        for run, model in enumerate(models):
            valid = closed.valid[run]
            length_s = (closed.end_s - closed.start_s)[run, valid]
            effective = effective_requests(n[run, valid, chosen], length_s, model)
            sampling[run, valid] += model.se2 / effective
    lag = np.abs(closed.middle_s[:, :, None] - closed.middle_s[:, None, :]) / models[0].rho_lag_s
    lasting = np.maximum(field["sb2"], field["pod_floor"] ** 2)[:, :, None]
    covariance = pods * (lasting + field["sa2"][:, :, None] * field["rho"][:, :, None] ** lag)
    index = np.arange(covariance.shape[1])
    covariance[:, index, index] += pods[:, index, index] * field["nug"] + sampling
    return sides[1] - sides[0], covariance * field["inflation"][:, :, None]


def _score(d: Floats, covariance: Floats, used: Bools) -> tuple[Floats, Floats, Floats]:
    """Return raw score, information and scale after each block; unused blocks change nothing."""
    both = used[:, :, None] & used[:, None, :]
    size = covariance.shape[1]
    lower = np.linalg.cholesky(np.where(both, covariance, np.eye(size)))
    right = np.stack([np.where(used, d, 0.0), used.astype(float)], axis=2)
    solved = np.linalg.solve(lower, right)
    z, x = solved[:, :, 0], solved[:, :, 1]
    raw, information = np.cumsum(x * z, axis=1), np.cumsum(x**2, axis=1)
    fitted = raw**2 / np.maximum(information, 1e-300)
    residual = np.maximum(np.cumsum(z**2, axis=1) - fitted, 0.0)
    freedom = np.maximum(np.cumsum(used, axis=1) - 1, 1)
    return raw, information, np.sqrt(np.maximum(residual / freedom, 1.0))


def _crosses(
    score: tuple[Floats, Floats, Floats],
    margin: float,
    sign: int,
    alpha: float,
    horizon: Floats,
    exponent: float,
) -> Bools:
    raw, information, scale = score
    share = information / horizon
    constant = boundary_constant(alpha, exponent, defaults.BOUNDARY_START)
    inside = (share >= defaults.BOUNDARY_START) & (share <= 1)
    safe = np.maximum(share, 1e-12)
    height = np.where(inside, constant * safe ** (exponent - 0.5), np.inf)
    z = sign * (raw - margin * information) / scale / np.sqrt(np.maximum(information, 1e-12))
    return np.asarray(z >= height)


def _horizons(
    rollouts: Rollouts, closed: Closed, models: list[Covariance], spec: JudgeSpec
) -> Floats:
    """Return the horizons of harm and of promotion, runs x 2."""
    n = closed.sums(rollouts.n)
    horizons = np.ones((len(n), 2))
    split = rollouts.world.stable_pods
    length_s = closed.onehot.sum(axis=1) * SLICE_S

    def firsts_of(run: int, used: Bools) -> list[PairedBlock]:
        firsts = []
        for of_stratum in (~closed.probe[run], closed.probe[run]):
            places = np.flatnonzero(used & of_stratum)
            if places.size:
                at = places[0]
                firsts.append(
                    PairedBlock(
                        start_s=closed.end_s[run, at] - length_s[run, at],
                        end_s=closed.end_s[run, at],
                        weight=int(closed.weight[run, at]),
                        stable=_side(n[run, at, :split]),
                        candidate=_side(n[run, at, split:]),
                    )
                )
        return firsts

    for run, model in enumerate(models):
        firsts = firsts_of(run, closed.valid[run])
        if firsts:
            horizons[run] = harm_horizon(firsts, model, spec)
        counting = firsts_of(run, closed.valid[run] & closed.counts_for_promotion[run])
        if counting:
            horizons[run, 1] = promotion_horizon(counting, model, spec)
    return horizons


def _side(requests: Floats) -> Side:
    pods = {str(i): Sums(requests=int(n)) for i, n in enumerate(requests) if n}
    return Side(all=Sums(requests=int(requests.sum())), pods=pods)


def _since_rises(closed: Closed) -> list[Bools]:
    """Return, for each start of evidence, which blocks are not before it."""
    weight = np.where(closed.valid, closed.weight, -1)
    rises = np.zeros(closed.valid.shape, dtype=np.int64)
    rises[:, 1:] = np.cumsum(weight[:, 1:] > weight[:, :-1], axis=1)
    return [rises >= number for number in range(int(rises.max()) + 1)]


def _count_path(rollouts: Rollouts, closed: Closed, metric: MetricSpec, spec: JudgeSpec) -> Path:
    is_errors = metric.name == "errors"
    n = closed.sums(rollouts.counted if is_errors else rollouts.n)
    bad = closed.sums(rollouts.errors if is_errors else rollouts.late)
    dispersion = dispersions(rollouts, metric)[:, None, None]
    split = rollouts.world.stable_pods

    counts = _clipped(n, bad, split, metric.harm_floor, metric.harm_margin, "candidate")
    tests = [ratio_wagers(counts, metric.harm_margin, defaults.HARM_RATIOS)]
    if metric.harm_floor > 0:
        tests.append(level_wagers(counts, metric.harm_floor, defaults.HARM_RATIOS))
    starts = _since_rises(closed)
    shape = closed.valid.shape
    stakes = [_tempered(t, shape, dispersion, metric.harm_alpha) for t in tests]
    evidence = np.minimum.reduce([_over_starts(stake, closed.valid, starts) for stake in stakes])
    harm = evidence >= -log(metric.harm_alpha)

    expected = metric.promote_ceiling / metric.promote_margin
    counts = _clipped(n, bad, split, expected, 1.0, "stable")
    ratio = ratio_wagers(counts, metric.promote_margin, defaults.PROMOTE_RATIOS)
    counting = closed.valid & closed.counts_for_promotion
    by_ratio = _log_mean_sum(_tempered(ratio, shape, dispersion, metric.promote_beta), counting)
    level = level_wagers(counts, metric.promote_ceiling, defaults.PROMOTE_RATIOS)
    by_level = _log_mean_sum(_tempered(level, shape, dispersion, metric.promote_beta), counting)
    weight = defaults.CEILING_WEIGHT
    both = np.logaddexp(log(weight) + by_level, log(1 - weight) + by_ratio)
    return Path(harm, both >= -log(metric.promote_beta))


def _clipped(n: Floats, bad: Floats, split: int, least: float, ratio: float, track: str) -> Counts:
    stable_n, stable_bad = n[:, :, :split], bad[:, :, :split]
    so_far = np.zeros(n.shape[:2])
    seen_n, seen_bad = np.zeros(len(n)), np.zeros(len(n))
    for block in range(n.shape[1]):
        so_far[:, block] = np.where(seen_n > 0, seen_bad / np.maximum(seen_n, 1), 0.0)
        usual = np.maximum(least, so_far[:, block])[:, None]
        most = np.ceil(defaults.CLIP_EXCESS * usual * stable_n[:, block])
        kept_bad = np.minimum(stable_bad[:, block], np.maximum(defaults.CLIP_EVENTS, most))
        seen_n += stable_n[:, block].sum(axis=1)
        seen_bad += kept_bad.sum(axis=1)
    expected = np.maximum(least, ratio * so_far)[:, :, None]
    limit = np.maximum(defaults.CLIP_EVENTS, np.ceil(defaults.CLIP_EXCESS * expected * n))
    chosen = np.arange(n.shape[2]) >= split
    if track == "stable":
        chosen = ~chosen
    kept = np.where(chosen, np.minimum(bad, limit), bad)
    return Counts(
        stable_n=np.maximum(stable_n.sum(axis=2), 1).ravel(),
        stable_bad=kept[:, :, :split].sum(axis=2).ravel(),
        candidate_n=np.maximum(n[:, :, split:].sum(axis=2), 1).ravel(),
        candidate_bad=kept[:, :, split:].sum(axis=2).ravel(),
    )


def _tempered(wagers: Floats, shape: tuple[int, ...], dispersion: Floats, error: float) -> Floats:
    most = -log(error) * defaults.MAX_SHARE_PER_BLOCK
    return np.asarray(np.minimum(wagers.reshape(*shape, -1) / dispersion, most))


def _log_mean_sum(wagers: Floats, used: Bools) -> Floats:
    total = np.cumsum(np.where(used[:, :, None], wagers, 0.0), axis=1)
    return np.asarray(logsumexp(total, axis=2) - log(total.shape[2]))


def _over_starts(wagers: Floats, valid: Bools, starts: list[Bools]) -> Floats:
    # Runs without a rise have fewer starts than `starts`, and keep more of the stake.
    numbers = np.stack([since.any(axis=1) & (since & valid).any(axis=1) for since in starts])
    kept = np.array([log_start_weight(int(k) - 1) for k in numbers.sum(axis=0)])
    total = np.broadcast_to(kept[:, None], valid.shape)
    for number, since in enumerate(starts):
        used = since & valid
        begun = np.cumsum(used, axis=1) > 0
        grown = np.where(begun, _log_mean_sum(wagers, used), 0.0)
        share = np.where(numbers[number][:, None], log_start_weight(number) + grown, -np.inf)
        total = np.logaddexp(total, share)
    return np.asarray(total)


def _contradicts(rollouts: Rollouts, closed: Closed, metric: MetricSpec) -> Bools:
    """Tell where the candidate looks bad at the newest weight (see `contradicts_promotion`)."""
    split = rollouts.world.stable_pods
    values = {
        "ttft": rollouts.ttft,
        "tpot": rollouts.tpot,
        "errors": rollouts.errors,
        "ttft_tail": rollouts.late,
    }[metric.name]
    total = closed.sums(values)
    own = total[:, :, split:].sum(axis=2)
    stable = total[:, :, :split].sum(axis=2) / np.maximum(closed.stable_n, 1)
    of_n, of_own = closed.candidate_n, own
    of_stable = stable * closed.candidate_n
    n, theirs, ours = (_since_change(x, closed) for x in (of_n, of_stable, of_own))
    n = np.maximum(n, 1)
    stable_value, candidate_value = theirs / n, ours / n
    if metric.kind == "mean":
        return np.asarray(candidate_value > (1 + metric.harm_margin) * stable_value)
    return np.asarray(
        (candidate_value > metric.promote_ceiling)
        & (candidate_value > metric.promote_margin * stable_value)
    )


def _since_change(values: Floats, closed: Closed) -> Floats:
    running = np.zeros_like(values)
    for i in range(values.shape[1]):
        same = closed.weight[:, i] == closed.weight[:, i - 1] if i else np.zeros(len(values), bool)
        running[:, i] = values[:, i] + np.where(same, running[:, i - 1], 0.0)
    return running
