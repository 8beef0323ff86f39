"""Loads, SLO, search and cost that contradict each other are refused with their line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.yard import SPEC

from trainyard.spec.check import check_files
from trainyard.spec.loader import load_spec

SLO = {"ttft_ms": 400}
COST = {"bounds": {"usd_per_million_output_tokens": {"max": 5}}}


def write(folder: Path, level: dict[str, Any], latency: dict[str, Any], **gates: Any) -> Path:
    """Write the spec with some keys changed; None removes one."""
    data = copy.deepcopy(SPEC)
    own = data["gates"]["latency"]["levels"][0]
    for part, changes in (
        (own, level),
        (data["gates"]["latency"], latency),
        (data["gates"], gates),
    ):
        part.update(changes)
        for key in [key for key, value in part.items() if value is None]:
            del part[key]
    path = folder / "adder.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("level", "latency", "gates"),
    [
        ({"max_concurrency": None, "request_rate": 2.5}, {}, {}),
        ({"input_range": 0.5, "output_range": 0.25, "repeats": 5, "warm_up_requests": 0}, {}, {}),
        ({}, {"slo": SLO, "search": {"level": "busy", "bound": {"min": 2}}}, {"cost": COST}),
        ({"bounds": {"slo_attainment": {"min": 0.99}}}, {"slo": {"tpot_ms": 30}}, {}),
    ],
)
def test_loads_may_be_described_in_many_ways(
    tmp_path: Path, level: dict[str, Any], latency: dict[str, Any], gates: dict[str, Any]
) -> None:
    path = write(tmp_path, level, latency, **gates)

    assert [str(problem) for problem in check_files([path])] == []
    load_spec(path)


@pytest.mark.parametrize(
    ("level", "latency", "gates", "key", "words"),
    [
        ({"max_concurrency": None}, {}, {}, "levels[0].max_concurrency", "neither how many"),
        ({"input_len": None}, {}, {}, "levels[0].input_len", "'input_len' is missing"),
        (
            {"output_len": 1500, "output_range": 0.9},
            {},
            {},
            "levels[0].output_len",
            "+ 90% is 2866",
        ),
        ({"prompts": "p.jsonl"}, {}, {}, "levels[0].input_len", "brings the prompts"),
        (
            {"bounds": {"ttft_p50_ms": {"min": 300}, "ttft_p90_ms": {"max": 200}}},
            {},
            {},
            "levels[0].bounds.ttft_p50_ms.min",
            "never below ttft_p50_ms; nothing can pass",
        ),
        (
            {"bounds": {"ttft_p50_ms": {"min": 30, "max": 20}}},
            {},
            {},
            "levels[0].bounds.ttft_p50_ms.min",
            "nothing can pass",
        ),
        (
            {"bounds": {"failed_requests": {"max": -1}}},
            {},
            {},
            "levels[0].bounds.failed_requests.max",
            "is below 0",
        ),
        (
            {"bounds": {"slo_attainment": {"min": 99}}},
            {"slo": SLO},
            {},
            "levels[0].bounds.slo_attainment.min",
            "share of 1",
        ),
        (
            {"bounds": {"good_requests_per_s": {"min": 1}}},
            {},
            {},
            "levels[0].bounds.good_requests_per_s",
            "keep the SLO, and there is none",
        ),
        ({}, {"slo": {"attainment": 0.9}}, {}, "slo", "limits nothing"),
        ({}, {"slo": SLO, "levels": None}, {}, "slo", "no load level"),
        ({}, {"search": {"level": "busy"}}, {}, "search", "Without an SLO"),
        (
            {},
            {"slo": {"tpot_ms": 30}, "search": {"level": "busy"}},
            {},
            "search",
            "does not tell how many requests wait",
        ),
        (
            {},
            {"slo": SLO, "search": {"level": "bussy"}},
            {},
            "search.level",
            "Did you mean busy?",
        ),
        (
            {},
            {"slo": SLO, "search": {"level": "busy", "min_rate": 9, "max_rate": 3}},
            {},
            "search.min_rate",
            "above max_rate",
        ),
        (
            {},
            {"slo": SLO, "search": {"level": "busy", "max_rate": 3, "bound": {"min": 4}}},
            {},
            "search.bound.min",
            "the highest that is tried",
        ),
        ({}, {}, {"cost": COST}, "gates.cost", "the load that the SLO allows, and there is none"),
        (
            {},
            {"slo": SLO},
            {"cost": {"bounds": {"usd_per_million_input_tokens": {"min": 2, "max": 1}}}},
            "gates.cost.bounds.usd_per_million_input_tokens.min",
            "nothing can pass",
        ),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path,
    level: dict[str, Any],
    latency: dict[str, Any],
    gates: dict[str, Any],
    key: str,
    words: str,
) -> None:
    problems = check_files([write(tmp_path, level, latency, **gates)])

    found = {problem.key: f"{problem.message} {problem.remedy}" for problem in problems}
    where = key if key.startswith("gates") else f"gates.latency.{key}"
    assert where in found, found
    assert words in found[where]


REAL = {"input_len": None, "output_len": None, "prompts": "adder/load.jsonl"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no file adder/load.jsonl."),
        ("", "is empty"),
        ('{"prompt": "1+1="}', "line 1: there is no number of output_tokens"),
        ('{"prompt": "1+1=", "output_tokens": true}', "no number of output_tokens"),
        ('{"prompt": "1+1=", "output_tokens": 4}\n{"text": "2"}', "line 2: there is no prompt"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "adder").mkdir()
        (tmp_path / "adder" / "load.jsonl").write_text(content)

    (problem,) = check_files([write(tmp_path, REAL, {})])

    assert problem.key == "gates.latency.levels[0].prompts"
    assert words in problem.message


def test_real_prompts_go_with_the_release(tmp_path: Path) -> None:
    from trainyard.spec.assets import asset_files

    (tmp_path / "adder").mkdir()
    (tmp_path / "adder" / "load.jsonl").write_text('{"prompt": "1+1="}\n')
    path = write(tmp_path, {**REAL, "output_len": 8}, {})

    files, findings = asset_files(load_spec(path), tmp_path)

    assert findings == []
    assert list(files) == ["adder/load.jsonl"]
