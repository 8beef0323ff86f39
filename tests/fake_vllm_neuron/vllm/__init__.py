"""An engine whose logits are the checkpoint's, off by a little."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm_neuron.accuracy.goldens import exact_logits


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    logprobs: int
    detokenize: bool


class LLM:
    def __init__(self, **arguments: Any) -> None:
        if os.environ.get("FAKE_FAILURE") == "engine":
            raise RuntimeError("no Neuron device was found")
        # As AWS documents it: without these no logits come back.
        assert arguments["logprobs_mode"] == "raw_logits"
        assert arguments["max_logprobs"] == -1
        assert arguments["async_scheduling"] is False
        config = arguments["additional_config"]["neuron_config"]
        assert config["kv_segment_size_buckets"] == [arguments["max_model_len"]]
        assert config["num_seqs_buckets"] == [arguments["max_num_seqs"]]

    def generate(
        self, prompts: Sequence[dict[str, list[int]]], sampling: SamplingParams
    ) -> list[Any]:
        assert (sampling.temperature, sampling.logprobs) == (0, -1)
        return [self._answer(each["prompt_token_ids"], sampling.max_tokens) for each in prompts]

    def _answer(self, tokens: list[int], count: int) -> Any:
        off = float(os.environ.get("FAKE_LOGITS", "0.01"))
        exact = exact_logits(tokens, count)
        noise = np.random.default_rng(1).normal(0.0, off, exact.shape)
        rows = None
        if os.environ.get("FAKE_FAILURE") != "no logits":
            rows = [
                {token: SimpleNamespace(logprob=float(value)) for token, value in enumerate(row)}
                for row in exact + noise
            ]
        return SimpleNamespace(outputs=[SimpleNamespace(logprobs=rows)])
