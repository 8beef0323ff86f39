from __future__ import annotations

from typing import Any

import pytest

from trainyard.errors import BadInput
from trainyard.measure import accuracy as module
from trainyard.measure.accuracy import samples_of, score_of
from trainyard.spec.model import AccuracyTask


def results(**figures: Any) -> dict[str, Any]:
    return {
        "results": {"addition": {"alias": "addition", **figures}},
        "n-samples": {"addition": {"original": 500, "effective": 200}},
        "versions": {"addition": 1.0},
    }


def task(metric: str = "exact_match") -> AccuracyTask:
    return AccuracyTask(name="addition", metric=metric, min=0.9)


def test_the_score_of_a_task_comes_with_samples_and_version() -> None:
    found = results(**{"exact_match,none": 0.94, "exact_match_stderr,none": 0.0168})
    score = score_of(found, task())
    assert score.model_dump() == {
        "name": "addition",
        "metric": "exact_match",
        "score": 0.94,
        "stderr": 0.0168,
        "samples": 200,
        "version": "1.0",
    }


def test_a_filter_can_be_named_and_need_not_be() -> None:
    found = results(
        **{
            "exact_match,flexible-extract": 0.8,
            "exact_match_stderr,flexible-extract": 0.02,
            "exact_match,strict-match": 0.7,
            "exact_match_stderr,strict-match": 0.03,
        }
    )
    assert score_of(found, task("exact_match,strict-match")).score == 0.7
    assert score_of(found, task("exact_match,strict-match")).stderr == 0.03
    assert score_of(found, task()).score == 0.8


def test_a_metric_without_error_has_none() -> None:
    found = results(**{"acc,none": 0.5, "acc_stderr,none": "N/A"})
    assert score_of(found, task("acc")).stderr is None


def test_an_unknown_metric_is_refused_with_those_that_exist() -> None:
    found = results(**{"acc,none": 0.5, "acc_stderr,none": 0.1})
    with pytest.raises(BadInput, match="exact_match") as caught:
        score_of(found, task())
    assert caught.value.hint == "It gives: acc,none."


def test_results_without_the_task_are_refused() -> None:
    with pytest.raises(BadInput) as caught:
        score_of({}, task())
    assert caught.value.hint == "It gives: nothing."


def logged(number: int, score: Any, **changes: Any) -> dict[str, Any]:
    hashes = {"prompt_hash": "a" * 64, "target_hash": "b" * 64}
    return {"doc_id": number, "filter": "none", "exact_match": score, **hashes, **changes}


def with_samples(*samples: dict[str, Any], task: str = "addition") -> dict[str, Any]:
    return {**results(**{"exact_match,none": 0.94}), "samples": {task: list(samples)}}


def test_scores_of_single_samples_are_known_by_number_prompt_and_target() -> None:
    found = samples_of(with_samples(logged(0, 1.0), logged(7, 0.0)), task())
    assert found is not None
    assert (found.name, found.metric) == ("addition", "exact_match")
    assert found.scores == {"0-aaaaaaaa-bbbbbbbb": 1.0, "7-aaaaaaaa-bbbbbbbb": 0.0}


def test_samples_of_another_filter_are_other_scores() -> None:
    found = samples_of(with_samples(logged(0, 1.0), logged(0, 0.0, filter="strict")), task())
    assert found is not None
    assert list(found.scores.values()) == [1.0]


def test_samples_of_the_tasks_of_a_group_keep_their_names() -> None:
    found = samples_of(with_samples(logged(0, 1.0), task="addition_hard"), task())
    assert found is not None
    assert list(found.scores) == ["addition_hard/0-aaaaaaaa-bbbbbbbb"]


@pytest.mark.parametrize(
    "made",
    [
        results(**{"exact_match,none": 0.94}),
        with_samples(),
        with_samples(logged(0, ("hypothesis", "target"))),
        with_samples(logged(0, float("nan"))),
    ],
    ids=["none", "empty", "a score of the whole corpus", "NaN"],
)
def test_without_a_score_for_each_sample_none_are_kept(made: dict[str, Any]) -> None:
    assert samples_of(made, task()) is None


def test_too_many_samples_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SAMPLES", 1)
    assert samples_of(with_samples(logged(0, 1.0)), task()) is not None
    assert samples_of(with_samples(logged(0, 1.0), logged(1, 1.0)), task()) is None
