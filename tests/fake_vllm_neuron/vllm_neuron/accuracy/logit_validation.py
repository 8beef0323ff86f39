"""The comparison of three, with the fields that AWS Neuron SDK 2.32 documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TOLERANCE = 0.011


@dataclass
class MultiPromptValidationResult:
    passed: bool
    per_prompt_results: list[tuple[bool, Any]]
    aggregate_metrics: dict[str, Any] = field(default_factory=dict)


def multi_prompt_logit_validation(
    prompts_input_ids: list[list[list[int]]],
    generate_fn: Callable[[list[list[int]]], np.ndarray],
    prompts_expected_logits: list[np.ndarray],
    prompts_baseline_logits: list[np.ndarray],
) -> MultiPromptValidationResult:
    results, target, base = [], [], []
    for ids, expected, exact in zip(
        prompts_input_ids, prompts_expected_logits, prompts_baseline_logits, strict=True
    ):
        assert all(isinstance(token, int) for row in ids for token in row)
        found = generate_fn(ids)
        assert found.shape == exact.shape
        target.append(found - exact)
        base.append(expected - exact)
        error = float(np.abs(found - exact).max() / np.abs(exact).max())
        results.append((error < TOLERANCE, None))
    sigma = float(np.std(target) / np.std(base))
    return MultiPromptValidationResult(
        passed=all(passed for passed, _ in results),
        per_prompt_results=results,
        aggregate_metrics={
            "agg_sigma_ratio": sigma,
            "agg_bc": "PASS" if sigma < 1.1 else "FAIL",
            "per_token": np.ones(4),
            "undefined": float("nan"),
        },
    )
