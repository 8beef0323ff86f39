"""What a spec asks of its gates can be measured, on every lane that it names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.unit.lanes.neuron_targets import BASES

from trainyard.lanes.registry import get_lane
from trainyard.spec.assets import asset_files
from trainyard.spec.check import Problem, check_files
from trainyard.spec.loader import load_spec
from trainyard.spec.model import Target
from trainyard.spec.tasks import missing_data, output_type, task_config

FILES = Path(__file__).parent / "files" / "models"
PARITY = """
    parity:
      num_prompts: 4
      max_tokens: 16
      bounds:
        agreement: {min: 0.99}
        error_ratio: {max: 2}
"""


def check(
    folder: Path, *changes: tuple[str, str], parity: str = "", silent: bool = False
) -> list[Problem]:
    """Return the problems of the example with a parity check and some changes."""
    text = (
        (FILES / "adder.yaml")
        .read_text()
        .replace("        max_drop: 0.05\n", f"        max_drop: 0.05\n{parity}")
    )
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    if not (folder / "adder").exists():
        shutil.copytree(FILES / "adder", folder / "adder")
    (folder / "adder.yaml").write_text(text)
    return check_files([folder / "adder.yaml"], prompt_logprobs=lambda target: not silent)


def test_a_parity_check_needs_only_bounds(tmp_path: Path) -> None:
    assert check(tmp_path, parity=PARITY) == []


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("num_prompts: 4\n      max_tokens: 16", "num_prompts: 1500\n      max_tokens: 64",
         "gates.accuracy.parity.num_prompts", "96000 positions"),
        ("max_tokens: 16", "max_tokens: 256",
         "gates.accuracy.parity.max_tokens", "no room for a prompt"),
        ("agreement: {min: 0.99}", "agreement: {min: 99}",
         "gates.accuracy.parity.bounds.agreement.min", "never 99"),
        ("agreement: {min: 0.99}", "agreement: {min: 0.99, max: 0.9}",
         "gates.accuracy.parity.bounds.agreement.min", "nothing can pass"),
        ("error_ratio: {max: 2}", "error_ratio: {}",
         "gates.accuracy.parity.bounds.error_ratio", "neither min nor max"),
        ("max_tokens: 16", "max_tokens: 16\n      dtype: bfloat16",
         "gates.accuracy.parity.bounds.error_ratio", "rounding of its own"),
        ("dtype: bfloat16", "dtype: float32",
         "gates.accuracy.parity.bounds.error_ratio", "rounds alike"),
        ("prompts: adder/prompts.jsonl\n", "", "gates.accuracy.parity.prompts", "no prompts"),
        ("max_tokens: 16", "max_tokens: 16\n      prompts: adder/none.jsonl",
         "gates.accuracy.parity.prompts", "no file"),
        ("max_tokens: 16", "max_tokens: 16\n      near_tie: -1",
         "gates.accuracy.parity.near_tie", "out of range"),
        ("agreement:", "agreeing:", "gates.accuracy.parity.bounds.agreeing", "not possible"),
    ],
)  # fmt: skip
def test_a_parity_check_that_cannot_be_made(
    tmp_path: Path, old: str, new: str, key: str, words: str
) -> None:
    problems = check(tmp_path, (old, new), parity=PARITY)

    assert [problem.key for problem in problems] == [key]
    assert words in problems[0].message


def test_prompts_of_the_parity_check_go_with_the_release(tmp_path: Path) -> None:
    changes = (("max_tokens: 16", "max_tokens: 16\n      prompts: own/p.jsonl"),)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "p.jsonl").write_text('{"prompt": "1+1="}\n')
    assert check(tmp_path, *changes, parity=PARITY) == []
    files, _ = asset_files(load_spec(tmp_path / "adder.yaml"), tmp_path)
    assert "own/p.jsonl" in files


def write_task(folder: Path, **keys: Any) -> None:
    """Give the example's task other keys."""
    if not (folder / "adder").exists():
        shutil.copytree(FILES / "adder", folder / "adder")
    path = folder / "adder" / "addition.yaml"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0] not in keys]
    path.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in keys.items())]) + "\n")


def test_a_task_that_compares_answers_needs_a_lane_with_log_probs(tmp_path: Path) -> None:
    write_task(tmp_path, output_type="multiple_choice")
    assert check(tmp_path) == []
    (problem,) = check(tmp_path, silent=True)
    assert problem.key == "gates.accuracy.tasks[0].path"
    assert "compares given answers (multiple_choice)" in problem.message
    assert "(target cpu)" in problem.message
    assert "generate_until" in problem.remedy


def test_a_generating_task_runs_on_every_lane(tmp_path: Path) -> None:
    assert check(tmp_path, silent=True) == []


def test_the_kind_of_a_task_may_be_in_a_file_that_it_includes(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("output_type: loglikelihood\ntask: base\n")
    path = tmp_path / "task.yaml"
    path.write_text("include: base.yaml\ntask: own\n")
    assert output_type(task_config(path)) == "loglikelihood"
    path.write_text("include: base.yaml\ntask: own\noutput_type: generate_until\n")
    assert output_type(task_config(path)) == "generate_until"
    path.write_text("task: own\n")
    assert output_type(task_config(path)) == "generate_until"
    path.write_text("include: task.yaml\ntask: own\n")
    assert output_type(task_config(path)) == "generate_until"
    path.write_text("group: all\ntask: [a, b]\n")
    assert output_type(task_config(path)) == ""


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ("here.jsonl", []),
        ("gone.jsonl", ["gone.jsonl"]),
        ({"test": ["here.jsonl", "gone.jsonl"]}, ["gone.jsonl"]),
        ("*.jsonl", []),
        ("https://example.org/x.jsonl", []),
        (None, []),
    ],
)
def test_data_files_of_a_task_are_in_its_folder(
    tmp_path: Path, files: Any, missing: list[str]
) -> None:
    (tmp_path / "here.jsonl").write_text("{}\n")
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    assert missing_data(config, tmp_path) == missing
    assert missing_data({**config, "dataset_path": "gsm8k"}, tmp_path) == []


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    check(tmp_path)
    (tmp_path / "adder" / "addition.jsonl").unlink()
    (problem,) = check(tmp_path)
    assert "reads addition.jsonl, which is not in its folder" in problem.message


def test_no_neuron_lane_returns_log_probs_of_prompts() -> None:
    found = {
        name: get_lane(name).returned(Target.model_validate(base)) for name, base in BASES.items()
    }
    assert {name: each.prompt_logprobs for name, each in found.items()} == {
        "cpu": True,
        "neuron-native": False,
        "neuron-nxdi": False,
    }
    assert all(bool(each.why) == (not each.prompt_logprobs) for each in found.values())


def test_the_native_lane_returns_log_probs_where_it_samples_on_the_cpu() -> None:
    on_device = dict(BASES["neuron-native"])
    on_cpu = {**on_device, "native": {"neuron_config": {}}}
    lane = get_lane("neuron-native")
    assert lane.returned(Target.model_validate(on_device)).top_logprobs == 0
    assert lane.returned(Target.model_validate(on_cpu)).top_logprobs >= 10
