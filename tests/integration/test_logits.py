"""The step `logits` in an image that has AWS's tool, or stand-ins with its interfaces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from tests.neuron_world import NeuronWorld

from trainyard.documents.logits import LogitFigures, LogitReport, logits_digest
from trainyard.documents.plan import Plan
from trainyard.errors import BadInput, OutOfCapacity, Refused
from trainyard.lanes import neuron_device
from trainyard.measure.logits import single_values
from trainyard.settings import Settings
from trainyard.spec.check import check_files
from trainyard.steps.logits import validate_logits
from trainyard.steps.plan import explain
from trainyard.store.documents import read_document
from trainyard.store.layout import logits_key

pytestmark = pytest.mark.integration
FAKES = Path(__file__).parents[1] / "fake_vllm_neuron"
TASKS = Path(__file__).parents[2] / "tasks"


class LogitWorld(NeuronWorld):
    """A Neuron target whose spec asks for the validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        path = self.root / "dags" / "models" / "adder.yaml"
        spec = yaml.safe_load(path.read_text())
        spec["prompts"] = "prompts.jsonl"
        spec["gates"]["accuracy"]["logit_validation"] = {"num_prompts": 2, "output_tokens": 8}
        path.write_text(yaml.safe_dump(spec))
        lines = "".join(f'{{"prompt": "{number}+1="}}\n' for number in range(4))
        path.with_name("prompts.jsonl").write_text(lines)

    def in_the_image(self, **variables: str) -> None:
        """Let steps run in an image with the tool; `variables` are what the stand-ins look at."""
        python = self.root / "image-python"
        words = {"PYTHONPATH": f"{FAKES}:{TASKS}", **variables}
        exports = "".join(f"export {name}='{value}'\n" for name, value in words.items())
        python.write_text(f'#!/bin/sh\n{exports}exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        changed = {**self.settings.model_dump(), "serve_python": python}
        self.settings = Settings.model_validate(changed)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LogitWorld:
    version = tmp_path / "driver-version"
    version.write_text("2.31.7.0\n")
    monkeypatch.setattr(neuron_device, "VERSION_FILE", version)
    return LogitWorld(tmp_path)


@pytest.fixture
def plan(world: LogitWorld) -> Plan:
    return world.stored()


def test_the_plan_says_what_it_costs(world: LogitWorld, plan: Plan) -> None:
    assert plan.golden_gib == 1.0
    (line,) = [line for line in explain(plan) if line.step == "logits"]
    assert (line.target, line.will_run) == (world.target, True)
    assert "not the served graph" in line.reason
    assert "the devices of target trn2 (trn2.48xlarge) once more" in line.reason
    assert "1 GiB of memory for the goldens in float32 on the CPU" in line.reason


def test_a_device_that_rounds_like_a_cpu_is_reported_once(world: LogitWorld, plan: Plan) -> None:
    world.in_the_image()
    context = world.context("logits")
    result = validate_logits(plan, world.target, context)
    report = read_document(world.store, result.key, LogitReport)
    settings = plan.spec.gates.accuracy.logit_validation
    assert settings is not None
    measurement_id = world.planned(plan).measurement_id
    assert result.key == logits_key(measurement_id, logits_digest(settings))
    assert report.label == "not the served graph"
    assert "not the served graph" in result.message
    assert report.figures.within
    assert len(report.figures.prompts) == 2
    assert set(report.figures.metrics) == {"agg_bc", "agg_sigma_ratio"}
    assert (context.work_dir / "goldens").is_dir()
    again = validate_logits(plan, world.target, world.context("again"))
    assert (again.key, again.reused) == (result.key, True)


def test_logits_that_are_off_are_a_finding_and_no_error(world: LogitWorld, plan: Plan) -> None:
    world.in_the_image(FAKE_LOGITS="0.5")
    result = validate_logits(plan, world.target, world.context("logits"))
    report = read_document(world.store, result.key, LogitReport)
    assert not report.figures.within
    assert report.figures.prompts == (False, False)
    assert "not alike (0 of 2 prompts" in result.message


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        ("engine", Refused, "no Neuron device was found"),
        ("no logits", Refused, "the engine returned no logits"),
        ("memory", OutOfCapacity, "not enough memory"),
    ],
)
def test_what_fails_is_told_and_stores_nothing(
    world: LogitWorld, plan: Plan, failure: str, kind: type[Exception], words: str
) -> None:
    world.in_the_image(FAKE_FAILURE=failure)
    with pytest.raises(kind, match=words):
        validate_logits(plan, world.target, world.context("logits"))
    assert not list(world.store.list("samples"))


def test_an_image_without_the_tool_is_named(world: LogitWorld, plan: Plan) -> None:
    world.in_the_image(PYTHONPATH=str(TASKS))
    with pytest.raises(BadInput, match="This image has no logit validation of AWS"):
        validate_logits(plan, world.target, world.context("logits"))


def test_a_spec_that_does_not_ask_is_refused_and_has_no_such_step(
    world: LogitWorld, tmp_path: Path
) -> None:
    path = world.settings.catalogue / "adder.yaml"
    spec = yaml.safe_load(path.read_text())
    del spec["gates"]["accuracy"]["logit_validation"]
    path.write_text(yaml.safe_dump(spec))
    made = world.stored()
    assert (made.golden_gib, [step for step in made.steps if step.step == "logits"]) == (0.0, [])
    with pytest.raises(BadInput, match="are not to be validated"):
        validate_logits(made, world.target, world.context("logits"))


def test_goldens_that_do_not_fit_are_refused_by_the_plan(
    world: LogitWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        total = 2**29

    monkeypatch.setattr("trainyard.steps.plan.psutil.virtual_memory", Memory)
    with pytest.raises(BadInput, match=r"goldens of gates\.accuracy\.logit_validation take 1\.0"):
        world.plan()


def test_on_another_lane_check_refuses_it(world: LogitWorld) -> None:
    path = world.settings.catalogue / "adder.yaml"
    spec = yaml.safe_load(path.read_text())
    spec["targets"] = [{"name": "cpu", "lane": "cpu"}]
    path.write_text(yaml.safe_dump(spec))
    (problem,) = check_files([path])
    assert "is part of the image of lane neuron-native" in str(problem)
    assert "no target is of that lane (cpu)" in str(problem)


@pytest.mark.parametrize(
    ("passed", "metrics", "within"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"agg_sigma_ratio": 1.0}, True),
        (False, {"agg_sigma_ratio": 1.01, "agg_bc": "FAIL"}, False),
        (False, {"agg_sigma_ratio": 1.01, "agg_bc": "PASS"}, True),
        (False, {"agg_sigma_ratio": True}, False),
    ],
)
def test_one_of_three_ways_is_enough(
    passed: bool, metrics: dict[str, float | bool | str], within: bool
) -> None:
    figures = LogitFigures(
        passed=passed, prompts=(False,), metrics=metrics, made_with={}, seconds=1.0
    )
    assert figures.within is within


def test_only_single_finite_values_are_kept() -> None:
    given = {"a": 1, "b": float("inf"), "c": "PASS", "d": [1.0, 2.0], "e": True, "f": None}
    assert dict(single_values(given)) == {"a": 1.0, "c": "PASS", "e": True}
