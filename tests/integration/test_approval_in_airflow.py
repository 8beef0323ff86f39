"""Approval in Airflow's own task runner, database and API server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.soak]

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_two_people_approve_and_everybody_else_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.approval_world", str(tmp_path / "home")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["tasks", "plugins"])},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["subject"] == f"Promote {found['release']} to production?"
    assert "Accuracy gate: ✓ pass" in found["body"]
    # A viewer, somebody who is not asked, one who is, the same again, the second.
    assert found["answers"] == [
        ["vic", 403],
        ["ola", 403],
        ["ada", 200],
        ["ada", 200],
        ["eve", 200],
    ]
    assert found["state"] == "success"
    assert found["kept"] == [
        ["asked", ""],
        ["approved", "ada"],
        ["ignored", "ada"],
        ["approved", "eve"],
    ]
    assert found["told"] == ["waiting_approval"]
