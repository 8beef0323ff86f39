"""What a canary will take: rehearsed with the judge, at the traffic that was seen."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.rollout.machine import NOW, make_plan

from trainyard.documents.channel import ProbePlan, RolloutPlan
from trainyard.documents.evidence import (
    Covariance,
    JudgeSpec,
    default_metrics,
    ending_metrics,
    quality_metric,
)
from trainyard.documents.forecast import Traffic
from trainyard.documents.look import ReleaseCounters, RouteCounters, Snapshot
from trainyard.rollout.forecast import (
    enough_margin,
    enough_probes,
    enough_time,
    rehearse,
    steps_of,
    traffic_of,
)
from trainyard.spec.model import Probes, RolloutStep

QUIET = Covariance(sb2=0.0, sa2=0.0, pod_floor=0.0)
STEPS = (RolloutStep(weight=10, hold_s=240), RolloutStep(weight=50, hold_s=600))


def plan_with(covariance: Covariance = QUIET, **changes: Any) -> RolloutPlan:
    judge = JudgeSpec(metrics=default_metrics(), max_duration_s=1800.0, covariance=covariance)
    return make_plan(steps=STEPS, max_duration_s=1800.0, judge=judge, **changes)


def snapshot(
    seconds: float, arrivals: int, *, errors: int = 0, epoch: str = "one", route: bool = True
) -> Snapshot:
    counters = ReleaseCounters(arrivals=arrivals, errors=errors, in_flight=0)
    empty = ReleaseCounters(arrivals=0, errors=0, in_flight=0)
    return Snapshot(
        at=NOW + timedelta(seconds=seconds),
        phase="holding",
        step_index=0,
        pods=(),
        route=RouteCounters(epoch=epoch, weights={}, releases={"old": counters, "new": empty})
        if route
        else None,
    )


def test_more_traffic_brings_the_verdict_sooner() -> None:
    slow, fast = (
        rehearse(plan_with(), Traffic(requests_per_s=rate), runs=10) for rate in (2.0, 20.0)
    )
    assert slow.promoted_share <= fast.promoted_share == 1.0
    assert fast.median_s == sum(step.hold_s for step in STEPS)
    assert slow.median_s is None or slow.median_s > fast.median_s
    # A tenth of the first step's requests and half of the others.
    assert fast.candidate_requests == pytest.approx(20 * (24 + 300), rel=0.1)


def test_hardly_any_traffic_proves_nothing() -> None:
    found = rehearse(plan_with(), Traffic(requests_per_s=0.05), runs=5)
    assert (found.promoted_share, found.median_s, found.candidate_requests) == (0.0, None, None)


def test_noisy_pods_make_proof_rarer_and_more_of_them_make_it_surer() -> None:
    noisy = Covariance(sb2=0.1**2)
    traffic = Traffic(requests_per_s=20.0)
    one, eight = (
        rehearse(plan_with(noisy, replicas=count, stable_replicas=count), traffic, runs=10)
        for count in (1, 8)
    )
    assert one.promoted_share < eight.promoted_share


def test_what_can_only_show_harm_makes_nothing_later() -> None:
    plan, traffic = plan_with(), Traffic(requests_per_s=8.0)
    metrics = (*plan.judge.metrics, *ending_metrics({}))
    more = plan.model_copy(update={"judge": plan.judge.model_copy(update={"metrics": metrics})})
    found = rehearse(more, traffic, runs=4)
    assert found == rehearse(plan, traffic, runs=4)
    assert found.promoted_share > 0


def test_the_same_question_has_the_same_answer() -> None:
    asked = (plan_with(), Traffic(requests_per_s=5.0))
    assert rehearse(*asked, runs=5) == rehearse(*asked, runs=5)


def test_steps_say_how_many_requests_they_get() -> None:
    first, last = steps_of(plan_with(), 8.0)
    assert (first.candidate_requests, last.candidate_requests) == (192, 2400)
    assert steps_of(plan_with(), None)[0].candidate_requests is None


def test_traffic_is_what_arrived_between_the_first_and_the_last_look() -> None:
    found = traffic_of([snapshot(0, 100, errors=1), snapshot(30, 150), snapshot(60, 400, errors=4)])
    assert found is not None
    assert found.requests_per_s == 5.0
    assert found.error_share == pytest.approx(0.01)
    assert (found.seen_at, found.seen_for_s) == (NOW + timedelta(seconds=60), 60.0)


def test_counters_of_a_router_that_was_restarted_are_not_compared() -> None:
    before, after = snapshot(0, 900, epoch="zero"), snapshot(60, 100)
    assert traffic_of([before, after]) is None
    found = traffic_of([before, snapshot(30, 70), after])
    assert found is not None
    assert found.requests_per_s == 1.0


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [snapshot(0, 5)],
        [snapshot(0, 5), snapshot(60, 5)],
        [snapshot(0, 5), snapshot(60, 50, route=False)],
    ],
)
def test_without_two_moments_and_requests_between_them_traffic_is_not_known(
    seen: list[Snapshot],
) -> None:
    assert traffic_of(seen) is None


# --- probes ---------------------------------------------------------------------------------------


def probed(rate: float) -> ProbePlan:
    return ProbePlan(settings=Probes(prompts="p.jsonl", pairs_per_s=rate), comparing=None)


def test_probes_bring_a_proof_that_users_requests_cannot() -> None:
    traffic = Traffic(requests_per_s=0.5)
    without = rehearse(plan_with(), traffic, runs=6)
    with_probes = rehearse(plan_with(probes=probed(4.0)), traffic, runs=6)
    assert without.promoted_share == 0.0
    assert with_probes.promoted_share >= 0.8


def test_figures_that_lag_leave_less_of_users_latencies() -> None:
    asked = plan_with(probes=probed(0.25)), Traffic(requests_per_s=3.0)
    fresh, late = (rehearse(*asked, runs=8, lag_s=lag) for lag in (0.0, 120.0))
    assert late.median_s is None or (fresh.median_s is not None and fresh.median_s < late.median_s)


def test_answers_must_be_proven_as_well() -> None:
    plan = plan_with(probes=probed(0.5))
    judge = plan.judge.model_copy(
        update={"metrics": (*plan.judge.metrics, quality_metric("answers"))}
    )
    strict = quality_metric("answers").model_copy(update={"promote_ceiling": 0.0051})
    never = plan.judge.model_copy(update={"metrics": (*plan.judge.metrics, strict)})
    traffic = Traffic(requests_per_s=20.0)
    proven, not_proven = (
        rehearse(plan.model_copy(update={"judge": spec}), traffic, runs=6)
        for spec in (judge, never)
    )
    assert proven.promoted_share > not_proven.promoted_share


def test_the_least_rate_that_is_enough_is_told() -> None:
    traffic = Traffic(requests_per_s=0.5)
    rate = enough_probes(plan_with(), traffic, share=0.8, runs=4)
    assert rate is not None
    enough = rehearse(plan_with(probes=probed(rate)), traffic, runs=4)
    assert enough.promoted_share >= 0.8
    # Pods that differ by half are beyond what any number of requests can tell.
    assert enough_probes(plan_with(Covariance(sb2=0.5**2)), traffic, share=0.8, runs=3) is None


def test_a_longer_time_that_is_enough_is_told() -> None:
    traffic = Traffic(requests_per_s=1.0)
    assert rehearse(plan_with(), traffic, runs=4).promoted_share < 0.8
    assert enough_time(plan_with(), traffic, share=0.8, runs=4) == 2 * plan_with().max_duration_s
    assert enough_time(plan_with(Covariance(sb2=0.5**2)), traffic, share=0.8, runs=3) is None


def test_a_wider_margin_that_is_enough_is_told() -> None:
    traffic = Traffic(requests_per_s=8.0)
    lasting = Covariance(sb2=0.04**2, sa2=0.0)
    assert rehearse(plan_with(lasting), traffic, runs=8).promoted_share < 0.8
    margin = enough_margin(plan_with(lasting), traffic, share=0.8, runs=8)
    assert margin is not None
    assert margin > 0.15
    assert enough_margin(plan_with(Covariance(sb2=0.5**2)), traffic, share=0.8, runs=3) is None
