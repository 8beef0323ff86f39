"""The guard against another mix of prompts and a cold cache: it holds, and never acts."""

from __future__ import annotations

import numpy as np
import pytest

from trainyard.documents.evidence import Block, JudgeSpec, Track, default_metrics
from trainyard.rollout.judge import judge, replay
from trainyard.rollout.judge.drift import find_drift, now_drifting

METRICS = tuple(
    # Wide enough for half an hour to prove that nothing changed, with one pod a side.
    metric.model_copy(update={"promote_margin": 0.3}) if metric.kind == "mean" else metric
    for metric in default_metrics()
)
SPEC = JudgeSpec(metrics=METRICS, max_duration_s=1800.0)


def log(
    *,
    slices: int = 60,
    slower: float = 1.0,
    prompts: float = 1.0,
    hits: tuple[float, float] = (0.3, 0.3),
    until: int = 10**9,
    errors: float = 0.001,
    requests: int = 120,
    seed: int = 1,
) -> list[Block]:
    """Return a log at 50 %: the candidate's prompts and cache differ until a slice."""
    rng = np.random.default_rng(seed)
    rows: list[Block] = []
    for index in range(slices):
        drifts = index < until
        for track, release in (("stable", "adder-a"), ("candidate", "adder-b")):
            mine = track == "candidate"
            n = int(rng.poisson(requests))
            tokens = 500 * (prompts if mine and drifts else 1.0)
            latency = 0.2 * (slower if mine and drifts else 1.0)
            share = hits[1] if mine and drifts else hits[0]
            total_tokens = rng.lognormal(0, 0.8, n).sum() / np.exp(0.32) * tokens
            queries = int(total_tokens)
            rows += [
                row(index, track, release, "ttft", n, total=rng.gamma(4 * n, latency / 4)),
                row(index, track, release, "tpot", n, total=rng.gamma(4 * n, 0.02 / 4)),
                row(index, track, release, "errors", n, bad=int(rng.binomial(n, errors))),
                row(index, track, release, "ttft_tail", n, bad=int(rng.binomial(n, 0.008))),
                row(index, track, release, "prompts", n, total=total_tokens),
                row(
                    index, track, release, "prefix_hits", queries,
                    bad=int(np.clip(queries * (share + rng.normal(0, 0.03)), 0, queries)),
                ),
            ]  # fmt: skip
    return rows


def row(
    index: int,
    track: str,
    release: str,
    metric: str,
    requests: int,
    *,
    total: float = 0.0,
    bad: int = 0,
) -> Block:
    mean = metric in {"ttft", "tpot", "prompts"}
    side: Track = "stable" if track == "stable" else "candidate"
    return Block(
        t=30.0 * (index + 1),
        duration_s=30.0,
        release=release,
        track=side,
        pod=f"{release}-0",
        metric=metric,
        kind="mean" if mean else "count",
        requests=requests,
        total=total,
        bad=bad,
        weight_candidate=50,
    )


def without_covariates(rows: list[Block]) -> list[Block]:
    return [one for one in rows if one.metric not in {"prompts", "prefix_hits"}]


def test_alike_prompts_change_no_verdict() -> None:
    rows = log()
    assert judge(rows, SPEC) == judge(without_covariates(rows), SPEC)
    assert judge(rows, SPEC).outcome == "NON_INFERIOR"


def test_longer_prompts_are_not_called_harm() -> None:
    rows = log(slower=1.5, prompts=1.5)
    assert judge(without_covariates(rows), SPEC).outcome == "HARM"
    verdict = judge(rows, SPEC)
    assert verdict.outcome == "UNDECIDED"
    assert "prompts differ from stable's by +" in verdict.reason


def test_shorter_prompts_do_not_promote() -> None:
    rows = log(prompts=0.6)
    assert judge(without_covariates(rows), SPEC).outcome == "NON_INFERIOR"
    assert judge(rows, SPEC).outcome == "UNDECIDED"


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_another_cache_holds_what_depends_on_it(share: float) -> None:
    verdict = judge(log(hits=(0.3, share)), SPEC)
    outcomes = {one.metric: one.outcome for one in verdict.metrics}
    assert verdict.outcome == "UNDECIDED"
    assert outcomes["tpot"] == outcomes["errors"] == "NON_INFERIOR"
    assert outcomes["ttft"] == "UNDECIDED"
    assert "percentage points" in verdict.reason


def test_a_cache_that_warms_up_is_forgiven() -> None:
    rows = log(hits=(0.3, 0.05), slower=1.4, until=12, slices=80)
    verdict = judge(rows, SPEC)
    assert verdict.outcome == "NON_INFERIOR"


def test_real_harm_under_alike_prompts_is_still_harm() -> None:
    assert judge(log(slower=1.5), SPEC).outcome == "HARM"


def test_errors_do_not_depend_on_prompts() -> None:
    rows = log(prompts=2.0)
    bad = [
        one.model_copy(update={"bad": one.requests // 5})
        if one.metric == "errors" and one.track == "candidate"
        else one
        for one in rows
    ]
    assert judge(bad, SPEC).outcome == "HARM"


def test_harm_that_was_shown_before_the_drift_stays() -> None:
    early = log(slower=2.0, slices=30)
    late = [
        one.model_copy(update={"t": one.t + 900}) for one in log(prompts=2.0, slices=30, seed=2)
    ]
    assert judge(early, SPEC).outcome == "HARM"
    assert judge([*early, *late], SPEC).outcome == "HARM"


def test_each_look_knows_the_past_only() -> None:
    rows = log(prompts=1.5, until=30, slices=40)
    whole = find_drift(rows, SPEC)[0].beyond
    for cut in (5, 20, 40):
        part = [one for one in rows if one.t <= 30.0 * cut]
        assert find_drift(part, SPEC)[0].beyond == tuple(s for s in whole if s[1] <= 30.0 * cut)


def test_margins_of_zero_look_away() -> None:
    """As for a checkpoint whose tokenizer counts otherwise."""
    spec = SPEC.model_copy(update={"prompt_drift": 0.0, "prefix_drift": 0.0})
    rows = log(prompts=1.5)
    assert find_drift(rows, spec) == ()
    assert judge(rows, spec).outcome == "NON_INFERIOR"


@pytest.mark.parametrize("requests", [25, 120])
def test_chance_rarely_holds(requests: int) -> None:
    held = sum(
        bool(drift.beyond)
        for seed in range(15)
        for drift in find_drift(log(requests=requests, seed=seed, slices=40), SPEC)
    )
    assert held <= 1


def test_tokens_are_no_requests() -> None:
    verdict = judge(log(slices=10), SPEC)
    assert 900 < verdict.exposed_requests < 1500


def test_a_look_says_that_it_waits_for_alike_prompts() -> None:
    *_, last = replay(log(prompts=1.5, slices=20), SPEC)
    assert last.reason.count("Held:") == 1
    assert now_drifting(find_drift(log(slices=20), SPEC)) == ""
