"""`trainyard doctor neuron` on lane `cpu` with real vLLM: the procedure, without a device."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.unit.yard import Silent

from trainyard.doctor.neuron import STEPS, Wanted, prove
from trainyard.settings import Settings

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.soak,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the serving environment: `make setup`"),
]


def test_lane_cpu_goes_through_all_that_it_has(tmp_path: Path) -> None:
    models = tmp_path / "home" / "demo" / "models" / "adder"
    command = ["-m", "trainyard.demo.training", "--out", models, "--revisions", "r1"]
    subprocess.run([PYTHON, *command, "--steps", "3"], check=True, timeout=600)
    shutil.copytree(REPOSITORY / "dags" / "models", tmp_path / "models")
    settings = Settings(
        home=tmp_path / "home",
        catalogue=tmp_path / "models",
        environments=REPOSITORY / "dags" / "environments.yaml",
        serve_python=PYTHON,
    )
    proof = prove(settings, Wanted("adder", "cpu", revision="r1"), Silent())
    found = {step.name: (step.state, step.detail) for step in proof.steps}
    assert proof.proven, found
    assert [*found] == [*STEPS]
    skipped = [name for name, (state, _) in found.items() if state == "skipped"]
    assert skipped == ["compile on a CPU", "compare the keys"]
    assert "noticed" in found["a start that lacks code"][1]
