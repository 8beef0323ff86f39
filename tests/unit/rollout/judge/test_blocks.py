from __future__ import annotations

import random
from typing import Any

import pytest

from trainyard.documents.evidence import Block, JudgeSpec, MetricSpec
from trainyard.rollout.judge.blocks import (
    closed_blocks,
    counts_for_promotion,
    restarts,
    without_repeats,
)

TTFT = MetricSpec(name="ttft", kind="mean", harm_margin=0.1, promote_margin=0.15, harm_alpha=0.01)
SPEC = JudgeSpec(metrics=(TTFT,), max_duration_s=600, block_s=5)


def row(t: float, track: str, requests: int, **more: Any) -> Block:
    return Block.model_validate(
        {
            "t": t,
            "duration_s": 5.0,
            "release": f"m-{track}",
            "track": track,
            "pod": f"{track}-0",
            "metric": "ttft",
            "kind": "mean",
            "requests": requests,
            "total": 0.1 * requests,
            "weight_candidate": 10,
            **more,
        }
    )


def both(t: float, stable: int, candidate: int, **more: Any) -> list[Block]:
    return [row(t, "stable", stable, **more), row(t, "candidate", candidate, **more)]


def close(rows: list[Block], spec: JudgeSpec = SPEC) -> list[tuple[float, float, int, int]]:
    return [
        (b.start_s, b.end_s, b.stable.all.requests, b.candidate.all.requests)
        for b in closed_blocks(without_repeats(rows), TTFT, spec)
    ]


def test_slices_are_merged_until_both_tracks_have_enough() -> None:
    rows = [r for i in range(1, 8) for r in both(5.0 * i, 40, 8)]
    assert close(rows) == [(0, 15, 120, 24), (15, 30, 120, 24)]


def test_a_slice_with_enough_is_a_block_by_itself() -> None:
    assert close(both(5, 25, 20) + both(10, 25, 20)) == [(0, 5, 25, 20), (5, 10, 25, 20)]


def test_blocks_are_not_shorter_than_planned() -> None:
    rows = [r for i in range(1, 7) for r in both(5.0 * i, 50, 50)]
    assert [b[:2] for b in close(rows, SPEC.model_copy(update={"block_s": 15.0}))] == [
        (0, 15),
        (15, 30),
    ]


def test_a_slice_that_the_clock_cut_a_little_short_still_counts() -> None:
    assert len(close(both(4.9, 30, 30, duration_s=4.9))) == 1


def test_blocks_grow_with_the_age_of_a_long_rollout() -> None:
    rows = [r for i in range(1, 4000) for r in both(5.0 * i, 50, 50)]
    found = close(rows)
    assert len(found) < 1000
    assert found[0][1] - found[0][0] == 5
    assert found[-1][1] - found[-1][0] >= 0.9 * found[-1][1] / 200


def test_a_block_never_spans_a_change_of_weight() -> None:
    rows = both(5, 40, 8) + both(10, 40, 8) + both(15, 25, 25, weight_candidate=50)
    assert close(rows) == [(10, 15, 25, 25)]


def test_rows_of_one_track_alone_are_left_out() -> None:
    rows = [*both(5, 30, 30), row(10, "stable", 30), row(15, "stable", 30), *both(20, 30, 30)]
    assert close(rows) == [(0, 5, 30, 30), (15, 20, 30, 30)]


def test_a_late_row_over_a_longer_time_finds_its_counterparts() -> None:
    rows = [row(5, "stable", 30), row(10, "stable", 30), row(10, "candidate", 40, duration_s=10)]
    assert close(rows) == [(0, 10, 60, 40)]


def test_rows_need_not_end_at_the_very_same_moment() -> None:
    rows = [row(5.0, "stable", 30), row(5.2, "candidate", 30), row(10.0, "stable", 30)]
    rows.append(row(10.2, "candidate", 30))
    assert [b[2:] for b in close(rows)] == [(30, 30), (30, 30)]


def test_nothing_before_exposure_counts() -> None:
    assert close(both(5, 30, 30, weight_candidate=0)) == []


def test_an_average_of_zero_is_missing_and_not_fast() -> None:
    assert close([row(5, "stable", 30), row(5, "candidate", 30, total=0.0)]) == []


def test_rows_of_another_kind_or_metric_are_not_mixed_in() -> None:
    rows = [*both(5, 30, 30, metric="tpot"), *both(5, 30, 30, kind="count", bad=3)]
    assert close(rows) == []


def test_repeats_count_once_and_the_larger_reading_is_kept() -> None:
    rows = [*both(5, 30, 30), *both(5, 30, 30), row(5, "candidate", 33)]
    random.Random(3).shuffle(rows)
    assert close(rows) == [(0, 5, 30, 33)]


def test_pods_add_up_and_stay_apart() -> None:
    rows = [*both(5, 30, 15), row(5, "candidate", 10, pod="candidate-1")]
    (block,) = closed_blocks(without_repeats(rows), TTFT, SPEC)
    assert {name: pod.requests for name, pod in block.candidate.pods.items()} == {
        "candidate-0": 15,
        "candidate-1": 10,
    }
    assert block.candidate.all.total == pytest.approx(2.5)


def test_evidence_starts_afresh_where_the_weight_rises() -> None:
    rows = [
        r
        for i, weight in enumerate((10, 10, 50, 50, 25, 50), start=1)
        for r in both(5.0 * i, 30, 30, weight_candidate=weight)
    ]
    assert restarts(closed_blocks(without_repeats(rows), TTFT, SPEC)) == (0, 2, 5)
    assert restarts(()) == ()


def test_strata_close_blocks_of_their_own() -> None:
    users = [r for i in range(1, 5) for r in both(5.0 * i, 40, 10)]
    probes = [r for i in range(1, 5) for r in both(5.0 * i, 30, 30, stratum="probe")]
    blocks = closed_blocks(without_repeats([*users, *probes]), TTFT, SPEC)
    assert [(b.end_s, b.stratum, b.candidate.all.requests) for b in blocks] == [
        (5.0, "probe", 30),
        (10.0, "", 20),
        (10.0, "probe", 30),
        (15.0, "probe", 30),
        (20.0, "", 20),
        (20.0, "probe", 30),
    ]


def test_the_same_slice_of_two_strata_is_no_repeat() -> None:
    rows = both(5, 40, 10) + both(5, 40, 10, stratum="probe")
    assert len(without_repeats([*rows, *rows])) == 4


@pytest.mark.parametrize(
    ("weight", "stable_pods", "metric", "counts"),
    [
        (10, 1, "ttft", False),
        (50, 1, "ttft", True),
        (90, 1, "ttft", True),
        (25, 3, "ttft", True),
        (25, 2, "ttft", False),
        (10, 1, "quality", True),
    ],
    ids=["idle", "last step", "after it", "loads alike", "nearly idle", "answers"],
)
def test_promotion_counts_what_was_seen_under_equal_loads(
    weight: int, stable_pods: int, metric: str, counts: bool
) -> None:
    rows = [row(5.0, "candidate", 40, weight_candidate=weight)]
    rows += [
        row(5.0, "stable", 40, weight_candidate=weight, pod=f"stable-{pod}")
        for pod in range(stable_pods)
    ]
    blocks = closed_blocks(without_repeats(rows), TTFT, SPEC)
    assert counts_for_promotion(blocks, metric, SPEC).tolist() == [counts]
