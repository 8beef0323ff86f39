"""Latency through vLLM's own serving benchmark, against the server's own HTTP interface."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainyard.documents.measurement import LevelFigures
from trainyard.errors import Refused
from trainyard.spec.model import LoadLevel

_FIGURES = {
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p90_ms": "p90_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "p50_tpot_ms",
    "tpot_p90_ms": "p90_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "itl_p99_ms": "p99_itl_ms",
    "e2e_p50_ms": "p50_e2el_ms",
    "e2e_p99_ms": "p99_e2el_ms",
    "output_tokens_per_s": "output_throughput",
    "requests_per_s": "request_throughput",
    "failed_requests": "failed",
}
"""Our names (`trainyard.spec.model.LatencyMetric`) and the benchmark's."""


def arguments(
    level: LoadLevel, *, base_url: str, served_model_name: str, model_dir: Path
) -> list[str]:
    """Return the benchmark's command line for `level`.

    Prompts are random tokens, the same for every release (the seed is made from the level's name)
    and different at each level, so that no level finds the prompts of another one in the prefix
    cache. Answers run to their full length, whatever the model says.
    """
    words = [
        "--backend=openai",
        "--endpoint=/v1/completions",
        f"--base-url={base_url}",
        f"--model={served_model_name}",
        f"--tokenizer={model_dir}",
        "--dataset-name=random",
        f"--random-input-len={level.input_len}",
        f"--random-output-len={level.output_len}",
        f"--num-prompts={level.num_prompts}",
        f"--max-concurrency={level.max_concurrency}",
        f"--num-warmups={max(2, level.max_concurrency)}",
        f"--seed={zlib.crc32(level.name.encode())}",
        "--ignore-eos",
        "--temperature=0",
        "--percentile-metrics=ttft,tpot,itl,e2el",
        "--metric-percentiles=50,90,99",
        "--disable-tqdm",
    ]
    if level.request_rate is not None:
        words.append(f"--request-rate={level.request_rate}")
    return words


def run_level(
    level: LoadLevel, *, base_url: str, served_model_name: str, model_dir: Path
) -> LevelFigures:
    """Put one load on a server and return the figures.

    Raises:
        Refused: the benchmark failed. Requests that fail are a figure, not an error.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = arguments(
        level, base_url=base_url, served_model_name=served_model_name, model_dir=model_dir
    )
    try:
        result = main(parser.parse_args(words))
    except Exception as error:
        raise Refused(
            f"The benchmark failed at load level {level.name}: {type(error).__name__}: {error}",
            hint="The log of the measurement has the details.",
        ) from error
    return figures_of(result, level)


def figures_of(result: Mapping[str, Any], level: LoadLevel) -> LevelFigures:
    """Return the benchmark's result under our names.

    A figure that has no finite value (no request was completed) is left out.
    """
    figures = {
        ours: float(result[theirs])
        for ours, theirs in _FIGURES.items()
        if isinstance(result.get(theirs), int | float) and math.isfinite(result[theirs])
    }
    completed = int(result["completed"])
    if completed == 0:
        figures = {"failed_requests": float(level.num_prompts)}
    return LevelFigures(
        name=level.name,
        figures=figures,
        duration_s=float(result["duration"]),
        completed=completed,
    )
