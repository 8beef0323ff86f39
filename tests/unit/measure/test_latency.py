from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest

from trainyard.measure.latency import arguments, figures_of
from trainyard.spec.model import Bound, LatencyMetric, LoadLevel


def level(**changes: Any) -> LoadLevel:
    values: dict[str, Any] = {
        "name": "busy",
        "max_concurrency": 4,
        "num_prompts": 40,
        "input_len": 16,
        "output_len": 64,
        "bounds": {"failed_requests": Bound(max=0)},
    }
    return LoadLevel(**{**values, **changes})


def result(**changes: Any) -> dict[str, Any]:
    """Return a result as the benchmark gives it."""
    values: dict[str, Any] = {
        "duration": 1.5,
        "completed": 40,
        "failed": 0,
        "output_throughput": 1700.0,
        "request_throughput": 26.5,
        "request_goodput": None,
    }
    for number, name in enumerate(("ttft", "tpot", "itl", "e2el"), start=1):
        values |= {f"p{percent}_{name}_ms": number * 100.0 + percent for percent in (50, 90, 99)}
    return {**values, **changes}


def words(**changes: Any) -> list[str]:
    return arguments(
        level(**changes),
        base_url="http://127.0.0.1:8000",
        served_model_name="adder",
        model_dir=Path("/models/adder"),
    )


def test_every_figure_of_a_spec_is_measured() -> None:
    figures = figures_of(result(), level()).figures
    assert set(figures) == set(get_args(LatencyMetric))


def test_figures_have_our_names() -> None:
    found = figures_of(result(), level())
    assert found.figures["ttft_p99_ms"] == 199.0
    assert found.figures["tpot_p50_ms"] == 250.0
    assert found.figures["itl_p99_ms"] == 399.0
    assert found.figures["e2e_p50_ms"] == 450.0
    assert found.figures["output_tokens_per_s"] == 1700.0
    assert found.figures["failed_requests"] == 0.0
    assert (found.name, found.duration_s, found.completed) == ("busy", 1.5, 40)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_figure_without_a_value_is_left_out(value: float | None) -> None:
    found = figures_of(result(p99_tpot_ms=value), level())
    assert "tpot_p99_ms" not in found.figures
    assert "tpot_p90_ms" in found.figures


def test_without_a_completed_request_only_failures_are_told() -> None:
    found = figures_of(result(completed=0, failed=40, p50_ttft_ms=0.0), level())
    assert found.figures == {"failed_requests": 40.0}


def test_a_level_becomes_the_benchmarks_command_line() -> None:
    found = words()
    for word in (
        "--base-url=http://127.0.0.1:8000",
        "--model=adder",
        "--tokenizer=/models/adder",
        "--random-input-len=16",
        "--random-output-len=64",
        "--num-prompts=40",
        "--max-concurrency=4",
        "--ignore-eos",
    ):
        assert word in found
    assert not any(word.startswith("--request-rate") for word in found)
    assert "--request-rate=2.5" in words(request_rate=2.5)


def test_prompts_are_the_same_for_every_release_and_differ_between_levels() -> None:
    def seed(name: str) -> str:
        (found,) = [word for word in words(name=name) if word.startswith("--seed=")]
        return found

    assert seed("busy") == seed("busy")
    assert seed("busy") != seed("one")
