from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from trainyard.documents.evidence import (
    Block,
    Covariance,
    JudgeSpec,
    MetricSpec,
    default_metrics,
)

BLOCK: dict[str, Any] = {
    "t": 30.0,
    "duration_s": 30.0,
    "release": "m-1",
    "track": "stable",
    "pod": "a",
    "metric": "errors",
    "kind": "count",
    "requests": 10,
    "bad": 1,
    "weight_candidate": 10,
}


def test_a_block_survives_its_line_of_json() -> None:
    block = Block.model_validate(BLOCK)
    assert Block.model_validate_json(block.model_dump_json()) == block


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bad", 11),
        ("requests", -1),
        ("total", float("nan")),
        ("t", float("inf")),
        ("duration_s", 0),
        ("weight_candidate", 101),
        ("unknown", 1),
    ],
)
def test_a_block_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        Block.model_validate({**BLOCK, field: value})


def test_margins_of_counts_are_ratios() -> None:
    with pytest.raises(ValidationError, match="ratios to stable"):
        MetricSpec(name="e", kind="count", harm_margin=0.5, promote_margin=2, harm_alpha=0.01)


def test_a_metric_is_judged_once() -> None:
    metric = default_metrics()[0]
    with pytest.raises(ValidationError, match="named twice: ttft, ttft"):
        JudgeSpec(metrics=(metric, metric), max_duration_s=60)


def test_the_default_metrics_stay_inside_one_percent_of_false_rollbacks() -> None:
    assert sum(metric.harm_alpha for metric in default_metrics()) <= 0.01


def test_block_noise_is_added_to_what_is_known_already() -> None:
    noisy = Covariance(nug=0.01).with_block_noise(0.1)
    assert noisy.nug == pytest.approx(0.02)
    assert noisy.model_copy(update={"nug": 0.01}) == Covariance(nug=0.01)
