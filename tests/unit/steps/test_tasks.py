"""The step `tasks`: what an image says of the harness's own tasks, before a device is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit import yard
from tests.unit.lanes.neuron_targets import native
from tests.unit.yard import Silent

from trainyard.documents.harness import HarnessReport
from trainyard.documents.plan import Plan
from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.steps.context import StepContext
from trainyard.steps.tasks import check_tasks
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import tasks_key

IMAGE = "registry.example/trainyard@sha256:0a1b"
Says = Callable[..., StepContext]


def plan(*names: str) -> Plan:
    """Return a plan for a Neuron target, whose server returns no log-probs of prompts."""
    tasks = [{"name": "addition", "path": "adder/addition.yaml", "min": 0.5}]
    tasks += [{"name": name, "min": 0.5} for name in names]
    made = yard.plan(model_spec=yard.spec_with_tasks(tasks))
    target = made.targets[0].model_copy(update={"target": native(name="trn2")})
    return made.model_copy(update={"targets": (target,)})


@pytest.fixture
def says(tmp_path: Path) -> Says:
    """Return what makes an image whose harness answers so."""

    def image(*answers: dict[str, object], last: str = "exit 0") -> StepContext:
        python = tmp_path / "python"
        lines = "\n".join(json.dumps(answer) for answer in answers)
        python.write_text(
            f"#!/bin/sh\necho \"$@\" >{tmp_path}/asked\ncat <<'END'\n{lines}\nEND\n{last}\n"
        )
        python.chmod(0o755)
        settings = Settings(home=tmp_path, serve_python=python, image=IMAGE)
        return StepContext(settings, FolderStore(tmp_path / "store"), Silent(), tmp_path)

    return image


def known(name: str, kind: str = "generate_until", problem: str = "") -> dict[str, object]:
    return {"name": name, "output_types": [kind], "problem": problem}


def test_tasks_that_it_knows_are_noted_with_the_image(says: Says, tmp_path: Path) -> None:
    made = plan("gsm8k_cot", "ifeval")
    context = says(known("gsm8k_cot"), known("ifeval"))
    result = check_tasks(made, "trn2", context)

    assert result.key == tasks_key(made.targets[0].measurement_id)
    report = read_document(context.store, result.key, HarnessReport)
    assert report.image == IMAGE
    assert report.tasks == {"gsm8k_cot": ("generate_until",), "ifeval": ("generate_until",)}
    # Not the one that is a file: `trainyard check` has read that.
    asked = (tmp_path / "asked").read_text()
    assert asked.strip().endswith("trainyard.measure.tasks gsm8k_cot ifeval")
    assert "gsm8k_cot, ifeval" in result.message


def test_they_are_asked_once_for_a_measurement(says: Says, tmp_path: Path) -> None:
    made = plan("gsm8k_cot")
    first = check_tasks(made, "trn2", says(known("gsm8k_cot")))
    (tmp_path / "asked").unlink()
    again = check_tasks(made, "trn2", says(known("gsm8k_cot", problem="It is gone.")))
    assert (again.key, again.reused) == (first.key, True)
    assert not (tmp_path / "asked").exists()


def test_everything_that_is_wrong_is_told_and_nothing_stored(says: Says) -> None:
    context = says(
        known("gsm8k_kot", problem="lm-evaluation-harness knows no such task."),
        known("ifeval", problem="It cannot be loaded with its data set: ConnectionError: no."),
        known("mmlu", kind="multiple_choice"),
    )
    with pytest.raises(BadInput) as refused:
        check_tasks(plan("gsm8k_kot", "ifeval", "mmlu"), "trn2", context)
    said = str(refused.value)
    assert "gsm8k_kot: lm-evaluation-harness knows no such task" in said
    assert "ifeval: It cannot be loaded with its data set" in said
    assert "mmlu compares given answers (multiple_choice)" in said
    assert not list(context.store.list("samples"))


def test_an_image_without_the_harness_is_told(says: Says) -> None:
    context = says(last="echo 'No module named lm_eval' >&2; exit 1")
    with pytest.raises(BadInput, match="cannot be asked about accuracy tasks: No module"):
        check_tasks(plan("gsm8k_cot"), "trn2", context)
