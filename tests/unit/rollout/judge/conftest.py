"""Builders of block logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from trainyard.documents.evidence import Block, JudgeSpec, MetricSpec, Track, default_metrics
from trainyard.rollout.judge.blocks import PairedBlock, closed_blocks, without_repeats

MakeLog = Callable[..., list[Block]]
Pair = Callable[..., tuple[PairedBlock, ...]]


@pytest.fixture(scope="session")
def spec() -> JudgeSpec:
    """The default metrics over half an hour."""
    return JudgeSpec(metrics=default_metrics(), max_duration_s=1800)


@pytest.fixture(scope="session")
def make_log() -> MakeLog:
    """Return a builder of logs without chance: a little ripple in place of noise."""

    def make(
        *,
        weights: Sequence[int] = (10,) * 6 + (50,) * 34,
        rate: float = 16.0,
        slice_s: float = 30.0,
        pods: int = 3,
        candidate_pods: int | None = None,
        ttft: float = 1.0,
        tpot: float = 1.0,
        errors: float = 0.0,
        tail: float = 0.005,
    ) -> list[Block]:
        rows: list[Block] = []
        owed: dict[tuple[str, str, int], float] = {}

        def events(track: str, metric: str, pod: int, expected: float) -> int:
            due = owed.get((track, metric, pod), 0.0) + expected
            owed[track, metric, pod] = due - int(due)
            return int(due)

        for i, weight in enumerate(weights):
            sides: tuple[tuple[Track, float], ...] = (
                ("stable", 1 - weight / 100),
                ("candidate", weight / 100),
            )
            for track, share in sides:
                slow = track == "candidate"
                servers = candidate_pods if slow and candidate_pods is not None else pods
                for pod in range(servers):
                    n = round(rate * slice_s * share / servers)
                    ripple = 1 + 0.03 * ((7 * i + 3 * pod + slow) % 5 - 2) / 2
                    means = {
                        "ttft": 0.2 * ripple * (ttft if slow else 1),
                        "tpot": 0.02 * ripple * (tpot if slow else 1),
                    }
                    shares = {"errors": errors if slow else 0.0, "ttft_tail": tail}
                    common = {
                        "t": slice_s * (i + 1),
                        "duration_s": slice_s,
                        "release": f"m-{track}",
                        "track": track,
                        "pod": f"{track}-{pod}",
                        "requests": n,
                        "weight_candidate": weight,
                    }
                    rows += [
                        Block.model_validate(
                            {**common, "metric": name, "kind": "mean", "total": n * mean}
                        )
                        for name, mean in means.items()
                    ]
                    rows += [
                        Block.model_validate(
                            {
                                **common,
                                "metric": name,
                                "kind": "count",
                                "bad": min(n, events(track, name, pod, n * share_)),
                            }
                        )
                        for name, share_ in shares.items()
                    ]
        return rows

    return make


@pytest.fixture(scope="session")
def pair() -> Pair:
    """Return a builder of closed blocks of one metric, one pod a side unless there are more."""

    def make(
        metric: MetricSpec,
        stable: Sequence[tuple[int, float]],
        candidate: Sequence[tuple[int, float]],
        *,
        weights: Sequence[int] | None = None,
        pods: tuple[int, int] = (1, 1),
        slice_s: float = 30.0,
    ) -> tuple[PairedBlock, ...]:
        rows = []
        sides: tuple[tuple[Track, Sequence[tuple[int, float]], int], ...] = (
            ("stable", stable, pods[0]),
            ("candidate", candidate, pods[1]),
        )
        for track, figures, count in sides:
            for i, (n, value) in enumerate(figures):
                for pod in range(count):
                    rows.append(
                        Block.model_validate(
                            {
                                "t": slice_s * (i + 1),
                                "duration_s": slice_s,
                                "release": track,
                                "track": track,
                                "pod": f"{track}-{pod}",
                                "metric": metric.name,
                                "kind": metric.kind,
                                "requests": n,
                                ("total" if metric.kind == "mean" else "bad"): value,
                                "weight_candidate": weights[i] if weights else 50,
                            }
                        )
                    )
        spec = JudgeSpec(
            metrics=(metric,), max_duration_s=1800, block_s=slice_s, min_requests_per_block=1
        )
        return closed_blocks(without_repeats(rows), metric, spec)

    return make
