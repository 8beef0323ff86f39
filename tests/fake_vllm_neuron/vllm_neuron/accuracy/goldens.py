"""Goldens, as `get_cached_reference_goldens` of AWS Neuron SDK 2.32 returns them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 12
ROUNDING = 0.05
"""What bfloat16 is off by."""


def exact_logits(tokens: list[int], count: int) -> np.ndarray:
    """Return logits that follow from the prompt: (tokens, vocabulary)."""
    return np.random.default_rng(sum(tokens)).normal(0.0, 4.0, (count, VOCABULARY))


def get_cached_reference_goldens(
    *,
    model_id: str,
    model_checkpoint: str,
    model_config: Any,
    tokenizer: Any,
    prompts: list[str],
    output_length: int,
) -> dict[str, list[Any]]:
    if os.environ.get("FAKE_FAILURE") == "memory":
        raise MemoryError
    assert model_id
    assert Path(model_checkpoint, "model.safetensors").exists()
    assert model_config.vocab_size == VOCABULARY
    # Kept where the step looks after it, not in somebody's home.
    Path(os.environ["VLLM_NEURON_GOLDEN_CACHE_DIR"]).mkdir(parents=True)
    ids = [tokenizer(each) for each in prompts]
    exact = [exact_logits(each, output_length)[:, None, :] for each in ids]
    rounding = np.random.default_rng(2)
    return {
        "input_ids": [np.array([each]) for each in ids],
        "fp32_logits": exact,
        "dtype_logits": [each + rounding.normal(0.0, ROUNDING, each.shape) for each in exact],
    }
