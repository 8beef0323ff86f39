"""The benchmark's judge over many runs is the judge, and what it shows in a few of them.

The figures themselves come from `python tests/benchmarks/judge` (part of `make soak`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainyard.documents.evidence import Block
from trainyard.rollout.judge import replay

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The modules of `tests/benchmarks/judge`."""
    sys.path.insert(0, str(ROOT))
    from tests.benchmarks.judge import fast, figures, peers, report, traffic

    yield SimpleNamespace(fast=fast, traffic=traffic, peers=peers, figures=figures, report=report)
    sys.path.remove(str(ROOT))


def cell(benchmark: Any, **change: Any) -> Any:
    world = dataclasses.replace(benchmark.traffic.DEFAULT, **change)
    return benchmark.traffic.Cell(f"short {change}", "", world)


def rows_of(benchmark: Any, rollouts: Any, run: int) -> list[Block]:
    """Return one run as the log that a driver would have written."""
    traffic, world = benchmark.traffic, rollouts.world
    stable_at, candidate_at = world.serving(traffic.WEIGHTS)
    rows = []
    for pod in range(world.pods):
        candidate = pod >= world.stable_pods
        number = pod - world.stable_pods if candidate else pod
        track = "candidate" if candidate else "stable"
        for place in range(rollouts.n.shape[1]):
            i = place % traffic.SLICES
            if number >= (candidate_at if candidate else stable_at)[i]:
                continue
            common = {
                "t": traffic.SLICE_S * (i + 1),
                "duration_s": traffic.SLICE_S,
                "release": track,
                "track": track,
                "pod": f"{track}-{number}",
                "requests": int(rollouts.n[run, place, pod]),
                "weight_candidate": int(traffic.WEIGHTS[i]),
                "stratum": "probe" if place >= traffic.SLICES else "",
            }
            figures = {
                "ttft": ("mean", {"total": float(rollouts.ttft[run, place, pod])}),
                "tpot": ("mean", {"total": float(rollouts.tpot[run, place, pod])}),
                "errors": ("count", {"bad": int(rollouts.errors[run, place, pod])}),
                "ttft_tail": ("count", {"bad": int(rollouts.late[run, place, pod])}),
            }
            counted = {"errors": {"requests": int(rollouts.counted[run, place, pod])}}
            rows += [
                Block.model_validate(
                    {**common, **counted.get(name, {}), "metric": name, "kind": kind, **value}
                )
                for name, (kind, value) in figures.items()
            ]
    return rows + history_rows(benchmark, rollouts, run)


def history_rows(benchmark: Any, rollouts: Any, run: int) -> list[Block]:
    history = rollouts.history
    if history is None:
        return []
    rows = []
    series = {
        "ttft": ("mean", history.length_s, history.n, history.ttft),
        "tpot": ("mean", history.length_s, history.n, history.tpot),
        "errors": ("count", benchmark.traffic.SLICE_S, history.slice_n, history.errors),
        "ttft_tail": ("count", benchmark.traffic.SLICE_S, history.slice_n, history.late),
    }
    for name, (kind, length_s, n, values) in series.items():
        _, bins, pods = n.shape
        for i in range(bins):
            for pod in range(pods):
                requests = int(n[run, i, pod])
                value = float(values[run, i, pod])
                rows.append(
                    Block.model_validate(
                        {
                            "t": length_s * (i + 1 - bins),
                            "duration_s": length_s,
                            "release": "stable",
                            "track": "stable",
                            "pod": f"stable-{pod}",
                            "metric": name,
                            "kind": kind,
                            "requests": requests,
                            "weight_candidate": 0,
                            "total": requests * value if kind == "mean" else 0.0,
                            "bad": int(value) if kind == "count" else 0,
                        }
                    )
                )
    return rows


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 40.0, "ttft": 1.6, "history_h": 0.0},
        {"candidate_errors": 0.2, "capacity": "replace", "history_h": 0.0},
        {"rate": 8.0, "replicas": 4, "history_h": 1.0},
        {"rate": 2.0, "replicas": 2, "slow_share": 0.1, "history_h": 0.0},
        {"rate": 4.0, "replicas": 2, "probes": 2.0, "history_h": 0.0},
        {"rate": 8.0, "burst": 30, "candidate_errors": 0.03, "history_h": 0.0},
        {"rate": 8.0, "load_slope": 0.4, "late_share": 0.01, "history_h": 0.0},
    ],
    ids=["slow", "errors", "good", "late", "probes", "bursts", "load"],
)
def test_the_benchmark_decides_as_looks_one_by_one_do(
    benchmark: Any, change: dict[str, Any]
) -> None:
    (rollouts,) = benchmark.traffic.simulate(cell(benchmark, **change), 2, seed=3)
    decisions = benchmark.fast.decide(rollouts)
    spec = benchmark.fast.planned(rollouts.world)
    for run in range(2):
        rows = rows_of(benchmark, rollouts, run)
        looks = (v for v in replay(rows, spec) if v.outcome != "UNDECIDED")
        first = next(((v.outcome, v.at) for v in looks), ("UNDECIDED", np.inf))
        if decisions.harmed[run]:
            assert first == ("HARM", decisions.harm_s[run])
        elif decisions.promoted[run]:
            assert first == ("NON_INFERIOR", decisions.promote_s[run])
        else:
            assert first[0] == "UNDECIDED"


@pytest.mark.parametrize(
    ("change", "harmed", "promoted"),
    [
        ({}, (0.0, 0.02), (0.9, 1.0)),
        ({"ttft": 1.10, "minute_rho": 0.95, "pod_sd": 0.2, "minute_sd": 0.2}, (0.0, 0.03), (0, 1)),
        ({"ttft": 1.15}, (0.0, 0.2), (0.0, 0.1)),
        ({"ttft": 1.15, "load_slope": 0.4}, (0.0, 0.2), (0.0, 0.1)),
        ({"late_share": 0.005, "candidate_late": 0.03}, (0.5, 1.0), (0.0, 0.1)),
        ({"ttft": 1.5}, (0.98, 1.0), (0.0, 0.0)),
        ({"candidate_errors": 0.05}, (0.98, 1.0), (0.0, 0.0)),
        ({"slow_share": 0.05}, (0.95, 1.0), (0.0, 0.02)),
        ({"burst": 20}, (0.0, 0.02), (0, 1)),
    ],
    ids=[
        "no change",
        "noise at the margin",
        "promotion margin",
        "promotion margin under load",
        "tail at its promotion margin",
        "slow",
        "errors",
        "late",
        "burst",
    ],
)
def test_the_short_form_keeps_to_the_bounds(
    benchmark: Any, change: dict[str, Any], harmed: Any, promoted: Any
) -> None:
    tally = benchmark.figures.measure(cell(benchmark, **change), 100, seed=1)
    assert harmed[0] <= tally.harmed / 100 <= harmed[1]
    assert promoted[0] <= tally.promoted / 100 <= promoted[1]


def test_rules_with_thresholds_roll_back_good_releases_far_more_often(benchmark: Any) -> None:
    rules = benchmark.peers.PEERS
    assert benchmark.figures.measure(cell(benchmark), 60, seed=1).harmed == 0
    peers = benchmark.figures.measure_peers(cell(benchmark), 60, seed=1, peers=rules)
    assert peers["flagger"].harmed >= 10


def test_an_interval_holds_the_share_and_narrows_with_more_runs(benchmark: Any) -> None:
    low, high = benchmark.figures.clopper_pearson(0, 5000)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 5000))
    assert benchmark.figures.clopper_pearson(36, 5000)[1] < 0.01
    assert benchmark.figures.clopper_pearson(5, 5)[1] == 1


def made_up(benchmark: Any, name: str, truth: str, *, harmed: int = 0, promoted: int = 0) -> Any:
    """Return 1,000 runs of a cell in which the judge decided that often."""
    return benchmark.figures.Tally(
        benchmark.traffic.Cell(name, truth, benchmark.traffic.DEFAULT),
        runs=1000,
        harm_min=[10.0] * harmed,
        exposed=[500] * harmed,
        promote_min=[14.0] * promoted,
    )


@pytest.mark.parametrize(
    ("name", "truth", "harmed", "promoted", "said"),
    [
        ("no change; default", "good", 0, 990, ["holds", "holds"]),
        ("no change; default", "good", 8, 965, ["open", "open"]),
        ("no change; default", "good", 30, 900, ["FAILS", "FAILS"]),
        ("ttft +15 %; default", "promote_margin", 0, 20, ["holds"]),
        ("ttft +15 %; default", "promote_margin", 0, 80, ["FAILS"]),
        ("errors to 5 %; default", "bad", 1000, 0, ["FAILS"]),
    ],
)
def test_a_bound_holds_fails_or_is_open_where_so_many_runs_cannot_tell(
    benchmark: Any, name: str, truth: str, harmed: int, promoted: int, said: list[str]
) -> None:
    tally = made_up(benchmark, name, truth, harmed=harmed, promoted=promoted)
    assert [each for _, _, each in benchmark.report.bounds([tally])] == said


def test_the_page_says_what_fails_and_has_a_row_for_every_cell(benchmark: Any) -> None:
    good = made_up(benchmark, "no change; default", "good", harmed=30, promoted=900)
    surge = made_up(benchmark, "no change; surge True", "good", promoted=1000)
    page = benchmark.report.page([good, surge], surge, "traffic x")
    assert "2 cells, 6 bounds: 4 hold, 0 are open, 2 fail." in page
    assert "- Releases without a change: rolled back in at most 3.00 % (2.03-4.26)" in page
    for row in ("| no change | 3.00 |", "| no change; surge | 0.00 |", "## In 120 minutes"):
        assert row in page
