"""The benchmark of transfers runs, with files so few that its figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]


def test_everybody_brings_everything(tmp_path: Path) -> None:
    script = REPOSITORY / "tests" / "benchmarks" / "transfers.py"
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [
            sys.executable,
            script,
            *("--short", "--share=0.005", "--without-aws"),
            f"--folder={tmp_path}",
            f"--json={figures}",
        ],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tasks'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for what, found in json.loads(figures.read_text()).items():
        assert found["ratio"] > 0, what
        assert found.get("memory_mib", 0) < 512, what
    assert "end to end" in done.stdout
    assert "The server by itself" in done.stdout
    assert "of this machine's own limit" in done.stdout
