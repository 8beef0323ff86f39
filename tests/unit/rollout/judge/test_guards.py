from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trainyard.documents.evidence import Block, Covariance, JudgeSpec
from trainyard.rollout.judge import judge
from trainyard.rollout.judge.blocks import closed_blocks, without_repeats
from trainyard.rollout.judge.guards import (
    first_comparison,
    scatters,
    share_is_off,
    stable_is_sick,
    windows,
)

MakeLog = Callable[..., list[Block]]

START_S, END_S = np.arange(40) * 30.0, np.arange(1, 41) * 30.0
N = np.full((40, 8), 30.0)
ONE = np.zeros(40, dtype=np.int64)


def totals(pod_sd: float, *, se2: float = 0.4, seed: int = 1) -> np.ndarray:
    """Return sums of 8 pods over 40 blocks, whose lasting effects have `pod_sd`."""
    rng = np.random.default_rng(seed)
    lasting = rng.normal(0, pod_sd, 8)
    return N * np.exp(lasting + rng.normal(0, np.sqrt(se2 / 30), (40, 8)))


def errors_of(log: list[Block], spec: JudgeSpec):  # type: ignore[no-untyped-def]
    (metric,) = (metric for metric in spec.metrics if metric.name == "errors")
    return closed_blocks(without_repeats(log), metric, spec)


def test_pods_that_are_as_alike_as_stables_hold_nothing() -> None:
    held = [
        scatters(N, totals(0.03, seed=seed), START_S, END_S, ONE, Covariance())
        for seed in range(100)
    ]
    assert np.any(held, axis=1).mean() <= 0.02


def test_pods_that_differ_far_more_than_stables_hold() -> None:
    held = [
        scatters(N, totals(0.4, seed=seed), START_S, END_S, ONE, Covariance())[-1]
        for seed in range(50)
    ]
    assert np.mean(held) >= 0.9


def test_noisy_requests_are_no_scatter_of_pods() -> None:
    noisy = [
        scatters(N, totals(0.03, se2=4.0, seed=seed), START_S, END_S, ONE, Covariance())
        for seed in range(100)
    ]
    assert np.mean([each[-1] for each in noisy]) <= 0.05


def test_later_blocks_do_not_change_what_was_held_before() -> None:
    sums = totals(0.25)
    whole = scatters(N, sums, START_S, END_S, ONE, Covariance())
    for count in (5, 12, 30):
        part = scatters(
            N[:count], sums[:count], START_S[:count], END_S[:count], ONE[:count], Covariance()
        )
        assert part.tolist() == whole[:count].tolist()


def test_one_pod_cannot_scatter() -> None:
    assert not scatters(N[:, :1], totals(0.4)[:, :1], START_S, END_S, ONE, Covariance()).any()


def few_requests(rng: np.random.Generator, *, slow: float) -> tuple[np.ndarray, np.ndarray]:
    """Return requests and sums of 8 pods with about 3 requests a block; the first is `slow`."""
    n = rng.poisson(3.0, (40, 8)).astype(float)
    level = np.where(np.arange(8) == 0, slow, 1.0)
    sums = np.array([[rng.gamma(2.5 * k, 0.4) if k else 0.0 for k in row] for row in n])
    return n, sums * level


def test_pods_with_few_requests_are_compared_over_several_blocks() -> None:
    for slow, least, most in ((1.0, 0.0, 0.05), (4.0, 0.95, 1.0)):
        held = []
        for seed in range(40):
            n, sums = few_requests(np.random.default_rng(seed), slow=slow)
            held.append(scatters(n, sums, START_S, END_S, ONE, Covariance())[10])
        assert least <= np.mean(held) <= most, slow


def test_nobody_can_say_whether_pods_are_alike_before_each_had_some_requests() -> None:
    n = np.full((40, 8), 2.0)
    assert first_comparison(n, ONE) == 2
    assert first_comparison(n[:2], ONE[:2]) == 2
    assert first_comparison(n[:, :1], ONE) == 0
    assert first_comparison(N, ONE) == 0


def test_a_pod_that_is_gone_or_hardly_asked_is_not_waited_for_forever() -> None:
    n = np.full((40, 3), 6.0)
    n[:, 0] = 0
    n[0, 0] = 2
    assert [window.last for window in windows(n)[:2]] == [5, 6]
    n[:, 0] = np.where(np.arange(40) % 4 == 0, 1, 0)
    first = windows(n)[0]
    assert (first.last, first.pods.tolist()) == (9, [False, True, True])


def test_strata_with_other_latencies_are_no_scatter_of_pods() -> None:
    strata = np.arange(40) % 2
    n = np.full((40, 8), 4.0)
    n[strata == 1, 0] = 12.0
    sums = n * np.where(strata == 1, 100.0, 1.0)[:, None]
    assert not scatters(n, sums, START_S, END_S, strata, Covariance()).any()
    assert scatters(n, sums, START_S, END_S, ONE, Covariance()).any()


def slowed(log: list[Block], factor: float, pods: tuple[str, ...]) -> list[Block]:
    return [
        row.model_copy(update={"total": row.total * factor})
        if row.metric == "ttft" and row.pod in pods
        else row
        for row in log
    ]


def test_one_slow_pod_is_not_taken_for_a_slow_release(spec: JudgeSpec, make_log: MakeLog) -> None:
    log = make_log(pods=3, rate=40.0)
    one = judge(slowed(log, 4.0, ("candidate-0",)), spec)
    every = judge(slowed(log, 4.0, ("candidate-0", "candidate-1", "candidate-2")), spec)
    assert every.outcome == "HARM"
    assert one.outcome == "UNDECIDED"
    (ttft,) = (metric for metric in one.metrics if metric.metric == "ttft")
    assert ttft.note.startswith("held: the candidate's pods differ among themselves")


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_requests_that_do_not_follow_the_weights_hold_a_promotion(
    spec: JudgeSpec, make_log: MakeLog, factor: float
) -> None:
    log = make_log()
    assert judge(log, spec).outcome == "NON_INFERIOR"
    skewed = [
        row.model_copy(
            update={
                "requests": max(1, round(row.requests * factor)),
                "total": row.total * factor,
                "bad": min(row.bad, max(1, round(row.requests * factor))),
            }
        )
        if row.track == "candidate"
        else row
        for row in log
    ]
    verdict = judge(skewed, spec)
    assert verdict.outcome == "UNDECIDED"
    assert "not its weight" in verdict.reason
    assert share_is_off(errors_of(skewed, spec))
    assert not share_is_off(errors_of(log, spec))


def test_a_stable_release_that_fails_itself_promotes_nothing(
    spec: JudgeSpec, make_log: MakeLog
) -> None:
    log = [
        row.model_copy(update={"bad": round(0.2 * row.requests)})
        if row.metric == "errors" and row.track == "stable"
        else row
        for row in make_log()
    ]
    assert stable_is_sick(errors_of(log, spec))
    verdict = judge(log, spec)
    assert verdict.outcome == "UNDECIDED"
    assert "stable release fails" in verdict.reason


def test_a_guard_holds_no_harm_by_counts(spec: JudgeSpec, make_log: MakeLog) -> None:
    log = slowed(make_log(pods=3, rate=40.0, errors=0.1), 4.0, ("candidate-0",))
    assert judge(log, spec).outcome == "HARM"
