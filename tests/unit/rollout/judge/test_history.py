from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trainyard.documents.evidence import Block, Covariance, JudgeSpec
from trainyard.rollout.judge import judge, replay
from trainyard.rollout.judge.history import Bins, dispersion_of, fit, learn

MakeLog = Callable[..., list[Block]]


def stable_rows(
    *,
    pods: int = 6,
    hours: float = 4.0,
    pod_sd: float = 0.03,
    noise_sd: float = 0.1,
    rho: float = 0.6,
    n: int = 40,
    bad: Callable[[int, int], int] = lambda pod, i: 0,
    seed: int = 1,
) -> list[Block]:
    """Return rows of stable alone before exposure."""
    rng = np.random.default_rng(seed)
    count = int(hours * 120)
    rows = []
    for pod in range(pods):
        lasting, passing = rng.normal(0, pod_sd), rng.normal(0, noise_sd)
        for i in range(count):
            passing = rho * passing + np.sqrt(1 - rho**2) * rng.normal(0, noise_sd)
            level = 0.2 * np.exp(lasting + passing + rng.normal(0, np.sqrt(0.4 / n)))
            common = {
                "t": 30.0 * (i + 1 - count),
                "duration_s": 30.0,
                "release": "m-stable",
                "track": "stable",
                "pod": f"stable-{pod}",
                "requests": n,
                "weight_candidate": 0,
            }
            rows += [
                Block.model_validate(
                    {**common, "metric": "ttft", "kind": "mean", "total": n * level}
                ),
                Block.model_validate(
                    {**common, "metric": "errors", "kind": "count", "bad": bad(pod, i)}
                ),
            ]
    return rows


def covariance_of(spec: JudgeSpec, name: str) -> Covariance:
    (metric,) = (metric for metric in spec.metrics if metric.name == name)
    return metric.covariance or spec.covariance


def test_the_noise_of_stables_pods_is_learned_from_their_history(spec: JudgeSpec) -> None:
    quiet = covariance_of(learn(stable_rows(noise_sd=0.05), spec), "ttft")
    loud = covariance_of(learn(stable_rows(noise_sd=0.2, rho=0.95), spec), "ttft")
    assert quiet.sa2 == pytest.approx(0.05**2, rel=0.5)
    assert loud.sa2 == pytest.approx(0.2**2, rel=0.5)
    assert loud.rho >= 0.9
    assert quiet.se2 == pytest.approx(0.4, rel=0.3)


def test_pods_that_differ_for_good_raise_the_lasting_part(spec: JudgeSpec) -> None:
    alike = covariance_of(learn(stable_rows(pods=8, pod_sd=0.0), spec), "ttft")
    unlike = covariance_of(learn(stable_rows(pods=8, pod_sd=0.2), spec), "ttft")
    assert unlike.sb2 > 5 * alike.sb2
    assert unlike.sb2 > 0.1**2


@pytest.mark.parametrize(("pods", "hours"), [(1, 4.0), (6, 0.4)])
def test_one_pod_or_a_short_history_leaves_the_documented_defaults(
    spec: JudgeSpec, pods: int, hours: float
) -> None:
    assert learn(stable_rows(pods=pods, hours=hours), spec) == spec


def test_a_covariance_fixed_by_hand_is_kept(spec: JudgeSpec) -> None:
    own = Covariance(sa2=0.3)
    fixed = spec.model_copy(
        update={"metrics": tuple(m.model_copy(update={"covariance": own}) for m in spec.metrics)}
    )
    assert covariance_of(learn(stable_rows(), fixed), "ttft") == own
    off = spec.model_copy(update={"learn_from_history": False})
    assert learn(stable_rows(), off) == off


def test_nothing_after_exposure_changes_what_was_learned(
    spec: JudgeSpec, make_log: MakeLog
) -> None:
    history = stable_rows()
    assert learn([*history, *make_log(ttft=3.0)], spec) == learn(history, spec)


def test_history_is_neither_a_look_nor_exposure(spec: JudgeSpec, make_log: MakeLog) -> None:
    log = make_log(weights=(10, 10))
    with_history = judge([*stable_rows(hours=1.0), *log], spec)
    without = judge(log, spec)
    assert with_history.exposed_requests == without.exposed_requests
    assert with_history.looks == without.looks
    assert [v.at for v in replay([*stable_rows(hours=1.0), *log], spec)] == [30.0, 60.0]


def test_a_loud_history_makes_the_judge_slower_to_call_harm(
    spec: JudgeSpec, make_log: MakeLog
) -> None:
    log = make_log(ttft=1.3)
    loud = stable_rows(pod_sd=0.3, noise_sd=0.2, rho=0.95)
    assert judge(log, spec).outcome == "HARM"
    assert judge([*loud, *log], spec).outcome == "UNDECIDED"


def test_failures_that_gather_on_one_pod_lower_the_weight_of_counts(spec: JudgeSpec) -> None:
    def gathered(pod: int, i: int) -> int:
        return 2 if pod == 0 and i % 10 < 5 else 0

    errors = {m.name: m for m in learn(stable_rows(bad=gathered), spec).metrics}["errors"]
    assert errors.dispersion > 5
    spread = np.random.default_rng(1).poisson(0.2, (400, 6)).astype(float)
    singly = Bins(30.0, np.full((400, 6), 40.0), spread)
    assert dispersion_of(singly, least_share=0.005) == pytest.approx(1, abs=0.4)


def test_an_autocovariance_is_taken_apart_into_its_parts() -> None:
    lag = np.arange(60)
    found = fit(
        0.01 + 0.04 * 0.9**lag + 0.01 * (lag == 0),
        np.full(60, 1000.0),
        length_s=30.0,
        mean_inverse_n=1 / 40,
        pods=100,
        default=Covariance(),
    )
    assert found.rho == 0.9
    assert found.sa2 == pytest.approx(0.04, rel=1e-6)
    assert found.se2 == pytest.approx(0.4, rel=1e-6)
    assert found.sb2 == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize(("burst", "least", "most"), [(1, 1.0, 1.3), (2, 1.5, 3.0)])
def test_a_router_that_counts_for_all_pods_shows_bursts_too(
    burst: int, least: float, most: float
) -> None:
    bad = burst * np.random.default_rng(2).poisson(0.2, (960, 1)).astype(float)
    found = dispersion_of(Bins(30.0, np.full((960, 1), 240.0), bad), least_share=0.005)
    assert least <= found <= most
