"""Simulated rollouts, many at a time: what a driver would have read from pods, slice by slice.

Every request has its own time to first token; nothing is replaced by a normal law, except in the
hours of history before exposure, of which only averages of bins are needed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import norm

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FILE = Path(__file__).with_name("parameters.yaml")
PARAMETERS: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
DIGEST = hashlib.sha256(FILE.read_bytes()).hexdigest()[:12]

SLICE_S = float(PARAMETERS["slice_s"])
MINUTES = "JUDGE_BENCHMARK_MINUTES"
"""The variable that names the length of the whole plan, if its last step is to be longer."""


def _plan() -> tuple[tuple[int, float], ...]:
    *steps, (weight, seconds) = ((int(w), float(s)) for w, s in PARAMETERS["plan"])
    longer = 60 * float(os.environ.get(MINUTES, "0")) - sum(s for _, s in steps)
    return (*steps, (weight, max(seconds, longer)))


PLAN = _plan()
WEIGHTS: Ints = np.concatenate([np.full(int(s / SLICE_S), w) for w, s in PLAN]).astype(np.int64)
SLICES = len(WEIGHTS)
MINUTE = np.arange(SLICES) * SLICE_S / 60
PROBED = np.arange(SLICES) % 2 == 0
"""Slices that probes have to themselves, where there are any; the others are users'."""
TTFT_S, SIGMA = float(PARAMETERS["ttft_s"]), float(PARAMETERS["ttft_sigma"])
TPOT_S, TPOT_CV2 = float(PARAMETERS["tpot_s"]), float(PARAMETERS["tpot_cv"]) ** 2
TTFT_CV2 = float(np.expm1(SIGMA**2))
TAIL_S = float(PARAMETERS["tail_stretch"]) * TTFT_S * float(np.exp(norm.ppf(0.99) * SIGMA))

BIN_LOG_WIDTH, BIN_FIRST_S, BINS = 0.05, 0.01, 160
"""Histograms of the time to first token that the peers' quantiles are read from."""

_REQUESTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class World:
    """A kind of traffic, and what is wrong with the candidate; fields as in `parameters.yaml`."""

    rate: float
    replicas: int
    capacity: str
    pod_sd: float
    minute_sd: float
    minute_rho: float
    candidate_noise: float
    load_slope: float
    surge: bool
    mix: bool
    burst: int
    error_share: float
    candidate_errors: float | None
    late_share: float | None
    candidate_late: float | None
    ttft: float
    tpot: float
    slow_share: float
    probes: float
    history_h: float
    history_share: float
    slow_pod: float

    @property
    def stable_pods(self) -> int:
        """Return how many pods of stable there ever are: all of them, before exposure."""
        return self.replicas

    @property
    def candidate_pods(self) -> int:
        return int(self.serving(WEIGHTS)[1].max())

    @property
    def pods(self) -> int:
        return self.stable_pods + self.candidate_pods

    def serving(self, weights: Ints) -> tuple[Ints, Ints]:
        """Return the pods of stable and of the candidate at each weight, as `RolloutPlan` has."""
        if self.capacity == "surge":
            return np.full_like(weights, self.replicas), np.full_like(weights, self.replicas)
        own = np.maximum(1, np.ceil(self.replicas * weights / 100)).astype(np.int64)
        return np.maximum(1, self.replicas + 1 - own), own


DEFAULT = World(**PARAMETERS["world"])


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    name: str
    truth: str
    """`good`, `harm_margin`, `promote_margin` or `bad`."""
    world: World


@dataclass(frozen=True)
class History:
    """Stable alone before exposure: runs x bins x stable pods."""

    length_s: float
    n: Floats
    ttft: Floats
    """Averages, seconds."""
    tpot: Floats
    slice_n: Floats
    errors: Floats
    """Counts in slices of `slice_n` requests, as `late`."""
    late: Floats


@dataclass(frozen=True)
class Rollouts:
    """Figures of many rollouts: runs x slices x pods, stable's pods first.

    With probes there are twice as many slices: those of users' requests, then those of probes. As
    in a real rollout, probes have every other slice to themselves: of users' requests nothing but
    errors is read there, which the router counts.
    """

    world: World
    arrived: Ints
    """Users' requests."""
    n: Ints
    """Those whose latencies were read."""
    counted: Ints
    """Those whose errors were: with probes more than `n`."""
    ttft: Floats
    """Sums over requests, seconds."""
    tpot: Floats
    errors: Ints
    late: Ints
    history: History | None
    histogram: Ints
    """Of the time to first token: runs x minutes x tracks x bins."""

    @property
    def exposed(self) -> Ints:
        """Return users' requests to the candidate up to each slice, runs x slices."""
        return np.asarray(self.arrived[:, :, self.world.stable_pods :].sum(axis=2).cumsum(axis=1))


def cells() -> list[Cell]:
    """Return all cells: the families crossed with what must not fire, and the bad releases."""
    changes: Mapping[str, Mapping[str, Mapping[str, Any]]] = PARAMETERS["changes"]
    made: list[Cell] = []
    for truth in ("good", "harm_margin", "promote_margin"):
        for name, change in changes[truth].items():
            for label, world in _worlds(name):
                made.append(Cell(f"{name}; {label}", truth, replace(world, **change)))
    for name, change in changes["bad"].items():
        made.append(Cell(f"{name}; default", "bad", replace(DEFAULT, **change)))
    return made


def _worlds(change_name: str) -> Iterator[tuple[str, World]]:
    """Yield the worlds that a change is crossed with, and their names."""
    if change_name in PARAMETERS["alone"]:
        yield "default", DEFAULT
        return
    for change in PARAMETERS["families"]["traffic"]:
        label = ", ".join(f"{k} {v}" for k, v in change.items()) or "default"
        yield label, replace(DEFAULT, **change)
    if change_name not in PARAMETERS["noise_changes"]:
        return
    fields = PARAMETERS["families"]["noise"]
    for values in itertools.product(*fields.values()):
        change = dict(zip(fields, values, strict=True))
        yield ", ".join(f"{k} {v}" for k, v in change.items()), replace(DEFAULT, **change)


def simulate(cell: Cell, runs: int, seed: int) -> Iterator[Rollouts]:
    """Yield `runs` rollouts in batches. Same cell and seed, same rollouts."""
    size = max(1, min(runs, 500, int(_REQUESTS_AT_ONCE / (cell.world.rate * SLICES * SLICE_S))))
    for number, first in enumerate(range(0, runs, size)):
        rng = np.random.default_rng([seed, zlib.crc32(cell.name.encode()), number])
        yield _batch(cell.world, min(size, runs - first), rng)


def _batch(world: World, runs: int, rng: np.random.Generator) -> Rollouts:
    is_candidate = np.arange(world.pods) >= world.stable_pods
    louder = np.where(is_candidate, world.candidate_noise, 1.0)
    lasting = rng.normal(0, world.pod_sd, (runs, 1, world.pods)) * louder
    surging = world.surge & _within("surge_minutes")
    load = np.exp(_ar(runs, SLICES, 1, PARAMETERS["load_sd"], PARAMETERS["load_rho"], rng))
    load *= np.where(surging, 1.3, 1.0)[:, None]
    passing = _ar(runs, SLICES, world.pods, world.minute_sd, world.minute_rho, rng) * louder
    level = load * np.exp(lasting + passing)

    remaining, served = (pods[:, None] for pods in world.serving(WEIGHTS))
    share = np.where(is_candidate, WEIGHTS[:, None], 100 - WEIGHTS[:, None]) / 100
    share = share / np.where(is_candidate, served, remaining)
    number = np.where(
        is_candidate, np.arange(world.pods) - world.stable_pods, np.arange(world.pods)
    )
    share = share * (number < np.where(is_candidate, served, remaining))
    alike = 1 / (served[-1] + remaining[-1])
    level *= 1 - world.load_slope * (1 - share / alike)
    rate = world.rate * np.where(surging, 2.0, 1.0)[:, None] * SLICE_S
    arrived = rng.poisson(np.broadcast_to(rate * share, (runs, SLICES, world.pods)))
    counted, n = arrived, arrived * ~(PROBED & bool(world.probes))[:, None]
    ttft, late, histogram = _requests(world, n, level, is_candidate, rng)
    if world.probes:
        pairs = world.probes * SLICE_S * (share > 0) / np.where(is_candidate, served, remaining)
        pairs = pairs * np.where(PROBED, SLICES / PROBED.sum(), 0.0)[:, None]
        probe_n = rng.poisson(np.broadcast_to(pairs, n.shape))
        probe_ttft, probe_late, _ = _requests(world, probe_n, level, is_candidate, rng)
        n, counted = (np.concatenate([one, probe_n], axis=1) for one in (n, counted))
        level = np.concatenate([level, level], axis=1)
        load = np.concatenate([load, load], axis=1)
        ttft = np.concatenate([ttft, probe_ttft], axis=1)
        late = np.concatenate([late, probe_late], axis=1)
    tpot = rng.gamma(n / TPOT_CV2) * TPOT_CV2 * TPOT_S * level
    tpot *= np.where(is_candidate, world.tpot, 1.0)

    def bad(n: Ints, share: float, own: float | None) -> Ints:
        shares = np.where(is_candidate, share if own is None else own, share)
        return np.asarray(rng.binomial(n, np.minimum(shares * load, 1.0)))

    errors = bad(counted, world.error_share, world.candidate_errors)
    if world.burst:
        errors = np.minimum(counted, errors + world.burst * (rng.random(n.shape) < 0.5 / SLICES))
    if world.late_share is not None:
        own = world.late_share if world.candidate_late is None else world.candidate_late
        late = rng.binomial(n, np.where(is_candidate, own, world.late_share))
    return Rollouts(
        world=world,
        arrived=arrived,
        n=n,
        counted=counted,
        ttft=ttft,
        tpot=tpot,
        errors=errors,
        late=late,
        history=_history(world, lasting[:, :, : world.stable_pods], rng),
        histogram=histogram,
    )


def _requests(
    world: World, n: Ints, level: Floats, is_candidate: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[Floats, Ints, Ints]:
    """Return sums and numbers of late requests a pod and slice, and histograms a minute."""
    slow = np.where(is_candidate, world.ttft, 1.0)
    slow[world.stable_pods] *= world.slow_pod
    flat = n.ravel()
    total = int(flat.sum())
    x = np.exp(SIGMA * rng.standard_normal(total, dtype=np.float32))
    x *= np.repeat((level * slow * TTFT_S).ravel().astype(np.float32), flat)
    if world.mix:
        mixed = np.broadcast_to(_within("mix_minutes")[None, :, None], n.shape)
        long = np.repeat(mixed.ravel(), flat) & (
            rng.random(total, dtype=np.float32) < PARAMETERS["mix_share"]
        )
        x[long] *= PARAMETERS["mix_factor"]
    if world.slow_share:
        changed = np.repeat(np.broadcast_to(is_candidate, n.shape).ravel(), flat)
        changed &= rng.random(total, dtype=np.float32) < world.slow_share
        x[changed] += PARAMETERS["slow_s"]
    sums, late = np.zeros(len(flat)), np.zeros(len(flat), dtype=np.int64)
    some = flat > 0
    starts = (np.cumsum(flat) - flat)[some]
    if total:
        sums[some] = np.add.reduceat(x, starts, dtype=np.float64)
        late[some] = np.add.reduceat((x > TAIL_S).astype(np.int64), starts)
    runs, minutes = len(n), int(SLICES * SLICE_S / 60)
    place = np.clip((np.log(x / BIN_FIRST_S) / BIN_LOG_WIDTH).astype(np.int64), 0, BINS - 1)
    group = (np.arange(runs)[:, None] * minutes + MINUTE.astype(np.int64))[:, :, None] * 2
    group = np.broadcast_to(group + is_candidate, n.shape)
    place += np.repeat(group.ravel() * BINS, flat)
    histogram = np.bincount(place, minlength=runs * minutes * 2 * BINS)
    return (
        sums.reshape(n.shape),
        late.reshape(n.shape),
        histogram.reshape(runs, minutes, 2, BINS),
    )


def _history(world: World, lasting: Floats, rng: np.random.Generator) -> History | None:
    if not world.history_h or world.stable_pods < 2:
        return None
    runs, _, pods = lasting.shape
    slices = int(world.history_h * 3600 / SLICE_S)
    slice_n = world.rate * world.history_share * SLICE_S / pods
    each = max(1, int(np.ceil(20 / slice_n)))
    slices -= slices % each
    passing = _ar(runs, slices, pods, world.minute_sd, world.minute_rho, rng)
    level = np.exp(lasting + passing)
    binned = level.reshape(runs, slices // each, each, pods).mean(axis=2)
    n = np.full(binned.shape, slice_n * each)

    def averages(mean_s: float, cv2: float) -> Floats:
        return np.asarray(mean_s * binned * (1 + rng.normal(0, np.sqrt(cv2 / n))))

    load = np.exp(_ar(runs, slices, 1, PARAMETERS["load_sd"], PARAMETERS["load_rho"], rng))
    counts = rng.poisson(slice_n, level.shape)
    errors = rng.binomial(counts, np.minimum(world.error_share * load, 1.0))
    if world.burst:
        errors = np.minimum(
            counts, errors + world.burst * (rng.random(errors.shape) < 0.5 / SLICES)
        )
    late = (
        ndtr(-np.log(TAIL_S / (TTFT_S * level * load)) / SIGMA)
        if world.late_share is None
        else np.full(level.shape, world.late_share)
    )
    return History(
        length_s=SLICE_S * each,
        n=n,
        ttft=np.maximum(averages(TTFT_S, TTFT_CV2), 1e-6),
        tpot=np.maximum(averages(TPOT_S, TPOT_CV2), 1e-6),
        slice_n=counts.astype(float),
        errors=errors.astype(float),
        late=rng.binomial(counts, late).astype(float),
    )


def _within(name: str) -> NDArray[np.bool_]:
    first, last = PARAMETERS[name]
    return np.asarray((first <= MINUTE) & (last > MINUTE))


def _ar(
    runs: int, length: int, series: int, sd: float, rho: float, rng: np.random.Generator
) -> Floats:
    """Return stationary AR(1) series, runs x length x series."""
    out = rng.standard_normal((runs, length, series)) * sd
    keep = np.sqrt(1 - rho**2)
    for i in range(1, length):
        out[:, i] = rho * out[:, i - 1] + keep * out[:, i]
    return np.asarray(out)
