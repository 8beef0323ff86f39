"""Airflow's real API server and the page, with both of its auth managers: who gets what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each user got, by auth manager and name."""
    home = tmp_path_factory.mktemp("permissions") / "home"
    done = subprocess.run(
        [sys.executable, "-m", "tests.permission_world", str(home)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["tasks", "plugins"])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=["simple", "fab"])
def found(request: pytest.FixtureRequest, answers: Any) -> Any:
    """What each user got, by name; the one without a name has not logged in."""
    return answers[request.param]


def test_nobody_gets_anything_without_a_login(found: Any) -> None:
    for environment in ("staging", "production"):
        assert found[""][f"page {environment}"] == 401
        assert found[""][f"promote {environment}"] == 401


def test_viewers_see_everything_and_get_no_action(found: Any) -> None:
    for environment in ("staging", "production"):
        assert found["vic"][f"page {environment}"] == 200
        assert found["vic"][f"buttons {environment}"] == []
        assert found["vic"][f"promote {environment}"] == 403


def test_who_may_gets_the_buttons_and_the_run_carries_their_name(found: Any) -> None:
    for environment in ("staging", "production"):
        assert {"promote", "rollback"} >= set(found["ada"][f"buttons {environment}"]) - {"abort"}
        assert "promote" in found["ada"][f"buttons {environment}"]
        assert found["ada"][f"promote {environment}"] == 200
        assert found["ada"][f"user {environment}"] == "ada"


@pytest.mark.parametrize("name", ["eve", "ola"])
def test_who_may_start_dags_but_not_promote_here_gets_no_button(found: Any, name: str) -> None:
    """Airflow lets them start the run; its first task refuses it by the name that it carries."""
    assert found[name]["buttons production"] == []
    assert found[name]["promote production"] == 200
    assert found[name]["user production"] == name


def test_a_role_of_fab_gives_rights_where_the_file_names_it_and_nowhere_else(found: Any) -> None:
    if "stu" not in found:
        assert found["eve"]["buttons staging"] == []  # no role counts: ada alone may
        return
    assert set(found["stu"]["buttons staging"]) == {"promote", "rollback"}
    assert found["stu"]["promote staging"] == 200
    assert found["stu"]["page production"] == 403
    assert found["stu"]["promote production"] == 403


def test_every_run_has_the_deadline_of_its_environment(answers: Any) -> None:
    started = {
        (name, environment)
        for manager in ("simple", "fab")
        for name, got in answers[manager].items()
        for environment in ("staging", "production")
        if got[f"promote {environment}"] == 200
    }
    deadlines = answers["deadlines_s"]
    assert len(deadlines) >= len(started)
    for run, after_s in deadlines.items():
        expected = 7200 if run.startswith("neuron_promote__staging/") else 86400
        assert after_s == pytest.approx(expected, abs=60), run
