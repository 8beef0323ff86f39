"""What a canary will take, said before anything is done: rehearsed with the judge itself. Pure.

A release that is no different from the stable one is simulated at the traffic that the channel has,
many times, under the plan and the judge that the rollout would have; requests, latencies and errors
vary as the judge's covariance says they do. Probes, if the plan has any, are answered as users'
requests are, in the slices that are theirs. When the judge would promote it is when the rollout
will, and how many of these good releases it would not promote in time is what nobody wants to find
out after an hour of compiling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainyard.documents.channel import ProbePlan, RolloutPlan
from trainyard.documents.evidence import PROBE, QUALITY, Block, Covariance, JudgeSpec, Track
from trainyard.documents.forecast import StepForecast, Traffic
from trainyard.documents.look import RouteCounters, Snapshot
from trainyard.rollout.judge.blocks import PairedBlock, closed_blocks
from trainyard.rollout.judge.combine import blocks_that_count, path_of
from trainyard.rollout.plan_rollout import servers_at
from trainyard.rollout.probes.windows import Windows
from trainyard.rollout.state_machine import candidate_target
from trainyard.spec.model import Probes

RUNS = 40
"""Rehearsals: enough to tell a half from nearly all, and over in a few seconds."""

MOST_SLICES = 120
"""A longer rollout is rehearsed in longer slices."""

MOST_PODS = 16
"""A larger fleet is rehearsed as one of so many pods a side: with more, noise is less still."""

LATE_SHARE = 0.005
"""Share of a good release's requests beyond the edge of the tail: the edge leaves at most 1 %."""

ERROR_SHARE = 0.001
"""Share of failed requests where nobody has seen any traffic."""

WORSE_SHARE = 0.005
"""Share of a good release's pairs of probes in which its answer alone is wrong; stable's too."""

PROBE_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Pairs a second that are tried for whoever has too little evidence."""

LONGER = (2, 4)
"""Times `max_duration_s` that are tried."""

WIDER = (0.2, 0.25, 0.35, 0.5)
"""Promotion margins of average latencies that are tried."""

_SEED = 20


@dataclass(frozen=True)
class Rehearsal:
    """What became of a good release."""

    promoted_share: float
    """Share of the rehearsals in which it was promoted within `max_duration_s`."""
    median_s: float | None
    """Seconds of exposure after which half of all rehearsals were; None if fewer ever were."""
    most_s: float | None
    """As `median_s`, of nine in ten."""
    candidate_requests: int | None
    """Requests that the candidate answers until `median_s`."""


def traffic_of(snapshots: Sequence[Snapshot]) -> Traffic | None:
    """Return the traffic between the oldest and the newest snapshot that can be compared.

    None: there are no two, or nothing arrived between them.
    """
    asked = [(each.at, each.route) for each in snapshots if each.route is not None]
    if not asked:
        return None
    newest_at, newest = asked[-1]
    for at, oldest in asked:
        seconds = (newest_at - at).total_seconds()
        if oldest.epoch == newest.epoch and seconds > 0:
            arrivals = _sum(newest, "arrivals") - _sum(oldest, "arrivals")
            errors = _sum(newest, "errors") - _sum(oldest, "errors")
            if arrivals <= 0 or errors < 0:
                return None
            return Traffic(
                requests_per_s=arrivals / seconds,
                error_share=min(1.0, errors / arrivals),
                seen_at=newest_at,
                seen_for_s=seconds,
            )
    return None


def _sum(counters: RouteCounters, name: str) -> int:
    return sum(int(getattr(one, name)) for one in counters.releases.values())


def steps_of(plan: RolloutPlan, requests_per_s: float | None) -> tuple[StepForecast, ...]:
    """Return how long each step lasts at least and how many requests the candidate gets in it."""
    return tuple(
        StepForecast(
            weight=step.weight,
            hold_s=step.hold_s,
            servers=candidate_target(plan, index),
            candidate_requests=None
            if requests_per_s is None
            else round(requests_per_s * step.hold_s * step.weight / 100),
        )
        for index, step in enumerate(plan.steps)
    )


def rehearse(
    plan: RolloutPlan, traffic: Traffic, *, runs: int = RUNS, lag_s: float = 0.0
) -> Rehearsal:
    """Rehearse a canary of a good release.

    Args:
        plan: of a canary with steps; latencies are compared from the first step on.
        traffic: of the channel.
        runs: rehearsals; the seed is fixed, so the same question has the same answer.
        lag_s: how much older than a look the servers' figures may be; with probes, less of users'
            latencies counts for that.
    """
    generator = np.random.default_rng(_SEED)
    slices = _slices(plan)
    windows = Windows(slices[0].length_s, lag_s) if plan.probes is not None else None
    ends = [
        _promoted_at(list(_rows(plan, slices, traffic, windows, generator)), plan)
        for _ in range(runs)
    ]
    found = sorted(end for end in ends if end is not None)

    def reached(share: float) -> float | None:
        needed = ceil(share * runs)
        return found[needed - 1] if len(found) >= needed else None

    median_s = reached(0.5)
    return Rehearsal(
        promoted_share=len(found) / runs,
        median_s=median_s,
        most_s=reached(0.9),
        candidate_requests=None
        if median_s is None
        else round(
            sum(
                traffic.requests_per_s * one.length_s * one.weight / 100
                for one in slices
                if one.end_s <= median_s
            )
        ),
    )


def enough_probes(
    plan: RolloutPlan,
    traffic: Traffic,
    *,
    share: float,
    lag_s: float = 0.0,
    runs: int = RUNS // 2,
) -> float | None:
    """Return the least of `PROBE_RATES` with which good releases are promoted in time.

    Args:
        plan: of a canary with steps, with or without probes.
        traffic: of the channel.
        share: of the good releases.
        lag_s: as of `rehearse`.
        runs: rehearsals of each rate.

    Returns:
        Pairs a second; None if no rate suffices, since pods differ too much, for example.
    """

    def suffices(rate: float) -> bool:
        settings = Probes(prompts="any", pairs_per_s=rate)
        probed = plan.model_copy(update={"probes": ProbePlan(settings=settings, comparing=None)})
        return rehearse(probed, traffic, runs=runs, lag_s=lag_s).promoted_share >= share

    low, high = 0, len(PROBE_RATES)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(PROBE_RATES[middle]) else (middle + 1, high)
    return PROBE_RATES[low] if low < len(PROBE_RATES) else None


def enough_time(
    plan: RolloutPlan,
    traffic: Traffic,
    *,
    share: float,
    lag_s: float = 0.0,
    runs: int = RUNS // 2,
) -> float | None:
    """Return the least `max_duration_s` tried in which good releases are promoted.

    None: no longer one suffices, since pods differ too much, for example. Arguments as of
    `enough_probes`.
    """
    for times in LONGER:
        seconds = {"max_duration_s": plan.max_duration_s * times}
        longer = plan.model_copy(update={**seconds, "judge": plan.judge.model_copy(update=seconds)})
        if rehearse(longer, traffic, runs=runs, lag_s=lag_s).promoted_share >= share:
            return longer.max_duration_s
    return None


def enough_margin(
    plan: RolloutPlan,
    traffic: Traffic,
    *,
    share: float,
    lag_s: float = 0.0,
    runs: int = RUNS // 2,
) -> float | None:
    """Return the least promotion margin of both latencies with which good releases are promoted.

    None: none that was tried suffices. Arguments as of `enough_probes`.
    """
    present = max(m.promote_margin for m in plan.judge.metrics if m.kind == "mean")
    for margin in WIDER:
        if margin <= present:
            continue
        metrics = tuple(
            metric.model_copy(update={"promote_margin": margin})
            if metric.kind == "mean"
            else metric
            for metric in plan.judge.metrics
        )
        wider = plan.model_copy(
            update={"judge": plan.judge.model_copy(update={"metrics": metrics})}
        )
        if rehearse(wider, traffic, runs=runs, lag_s=lag_s).promoted_share >= share:
            return margin
    return None


@dataclass(frozen=True)
class _Slice:
    end_s: float
    length_s: float
    weight: int
    stable_pods: int
    candidate_pods: int


def _slices(plan: RolloutPlan) -> list[_Slice]:
    """Cut the rollout: the steps one after the other, the last one until `max_duration_s`."""
    length_s = max(plan.judge.block_s, plan.max_duration_s / MOST_SLICES)
    ends = np.cumsum([step.hold_s for step in plan.steps])
    slices = []
    for number in range(max(1, int(plan.max_duration_s / length_s))):
        start_s = number * length_s
        index = min(int(np.searchsorted(ends, start_s, side="right")), len(plan.steps) - 1)
        stables, candidates = servers_at(plan, index)
        slices.append(
            _Slice(
                end_s=start_s + length_s,
                length_s=length_s,
                weight=plan.steps[index].weight,
                stable_pods=min(MOST_PODS, stables),
                candidate_pods=min(MOST_PODS, candidates),
            )
        )
    return slices


def _rows(
    plan: RolloutPlan,
    slices: Sequence[_Slice],
    traffic: Traffic,
    windows: Windows | None,
    generator: np.random.Generator,
) -> Iterator[Block]:
    """Yield the rows of one rehearsal, as the driver would have read them."""
    model = plan.judge.covariance
    tracks: tuple[tuple[Track, int], ...] = (
        ("stable", max(one.stable_pods for one in slices)),
        ("candidate", max(one.candidate_pods for one in slices)),
    )
    for track, most_pods in tracks:
        for pod in range(most_pods):
            noise = {name: _pod_noise(model, slices, generator) for name in ("ttft", "tpot")}
            for number, one in enumerate(slices):
                pods = one.stable_pods if track == "stable" else one.candidate_pods
                share = one.weight if track == "candidate" else 100 - one.weight
                if pod >= pods:
                    continue
                expected = traffic.requests_per_s * one.length_s * share / 100 / pods
                of_pod = {name: float(of[number]) for name, of in noise.items()}
                at = _Place(one, track, f"{track}-{pod}", int(generator.poisson(expected)))
                yield at.count("errors", generator.binomial(at.requests, traffic.error_share))
                if windows is None or windows.is_for_users(number):
                    yield from _latencies(at, of_pod, model, generator)
                if windows is not None and plan.probes is not None and windows.has_probes(number):
                    rounds = plan.probes.settings.pairs_per_s * one.length_s
                    rounds *= windows.period / windows.each
                    expected = rounds / min(one.stable_pods, one.candidate_pods)
                    at = _Place(one, track, at.pod, int(generator.poisson(expected)), PROBE)
                    yield at.count("errors", generator.binomial(at.requests, traffic.error_share))
                    yield from _latencies(at, of_pod, model, generator)
                    if any(metric.name == QUALITY for metric in plan.judge.metrics):
                        at = _Place(
                            one, track, at.pod, int(generator.poisson(rounds / pods)), PROBE
                        )
                        yield at.count(QUALITY, generator.binomial(at.requests, WORSE_SHARE))


def _latencies(
    at: _Place, of_pod: Mapping[str, float], model: Covariance, generator: np.random.Generator
) -> Iterator[Block]:
    yield at.count("ttft_tail", generator.binomial(at.requests, LATE_SHARE))
    for name, level in of_pod.items():
        sampling = np.sqrt(model.se2 / max(1, at.requests))
        average = np.exp(level + sampling * generator.standard_normal())
        yield at.mean(name, at.requests * float(average))


@dataclass(frozen=True)
class _Place:
    """What all rows of one pod in one slice have in common."""

    slice: _Slice
    track: Track
    pod: str
    requests: int
    stratum: str = ""

    def count(self, metric: str, bad: int) -> Block:
        return self._row(metric, kind="count", bad=int(bad))

    def mean(self, metric: str, total: float) -> Block:
        return self._row(metric, kind="mean", total=total)

    def _row(self, metric: str, **figures: Any) -> Block:
        # Without validation: there are a hundred thousand of them, and all are of our own making.
        return Block.model_construct(
            t=self.slice.end_s,
            duration_s=self.slice.length_s,
            release=self.track,
            track=self.track,
            pod=self.pod,
            metric=metric,
            requests=self.requests,
            weight_candidate=self.slice.weight,
            stratum=self.stratum,
            **figures,
        )


def _pod_noise(
    model: Covariance, slices: Sequence[_Slice], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return by how much one pod is slower than another of its kind, in log units, a slice each."""
    lasting = max(model.sb2, model.pod_floor**2)
    keep = model.rho ** (slices[0].length_s / model.rho_lag_s)
    drawn = generator.standard_normal((3, len(slices)))
    slow = np.empty(len(slices))
    slow[0] = drawn[0, 0]
    for number in range(1, len(slices)):
        slow[number] = keep * slow[number - 1] + np.sqrt(1 - keep**2) * drawn[0, number]
    return np.asarray(
        np.sqrt(lasting) * drawn[1, 0] + np.sqrt(model.sa2) * slow + np.sqrt(model.nug) * drawn[2]
    )


def _promoted_at(rows: Sequence[Block], plan: RolloutPlan) -> float | None:
    """Return after how many seconds the judge would promote; None if not, or if it says HARM."""
    spec = plan.judge
    proven: list[list[tuple[float, bool]]] = []
    for metric in spec.metrics:
        if metric.harm_only:
            continue
        blocks = closed_blocks(rows, metric, spec)
        path = path_of(blocks, metric, spec)
        if not blocks or path.first_harm() is not None:
            return None
        enough = _enough(blocks, metric.name, spec)
        proven.append(
            [
                (block.end_s, bool(good) and index >= enough)
                for index, (block, good) in enumerate(
                    zip(blocks, path.is_non_inferior(), strict=True)
                )
            ]
        )
    return _first_moment_of_all(proven, earliest_s=sum(step.hold_s for step in plan.steps))


def _enough(blocks: Sequence[PairedBlock], metric: str, spec: JudgeSpec) -> int:
    """Return the index of the block from which on enough blocks are there that count."""
    seen = 0
    for index, block in enumerate(blocks):
        seen += blocks_that_count([block], metric, spec)
        if seen >= spec.min_blocks_last_step:
            return index
    return len(blocks)


def _first_moment_of_all(
    proven: Sequence[Sequence[tuple[float, bool]]], *, earliest_s: float
) -> float | None:
    """Return the first moment at which the newest block of every metric is proven."""
    moments = sorted({end_s for path in proven for end_s, _ in path})
    positions = [-1] * len(proven)
    for moment in moments:
        for number, path in enumerate(proven):
            while positions[number] + 1 < len(path) and path[positions[number] + 1][0] <= moment:
                positions[number] += 1
        if moment >= earliest_s and all(
            position >= 0 and path[position][1]
            for path, position in zip(proven, positions, strict=True)
        ):
            return moment
    return None
