"""Runs the examples of docs/api.md as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def examples() -> dict[str, str]:
    """Return the marked examples by name."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"^```\w+ example=(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def run_examples(
    folder: Path, *, url: str, username: str, password: str, release: str, environment: str
) -> list[dict[str, str]]:
    """Ask for a promotion that fails: with curl twice, wait for it, and ask with Python as well.

    Returns the states that `wait` printed.
    """
    (folder / "login.json").write_text(json.dumps({"username": username, "password": password}))
    found = examples()
    env = {
        "PATH": os.environ["PATH"],
        "AIRFLOW": url,
        "ENVIRONMENT": environment,
        "RELEASE": release,
        "REQUEST": "an-example-of-the-docs",
    }

    def shell(*names: str) -> str:
        script = "\n".join(["set -euo pipefail", *(found[name] for name in names)])
        return _run(["bash", "-c", script], folder, env)

    assert shell("setup", "promote").strip() == "200"
    assert json.loads((folder / "answer.json").read_text())["dag_run_id"] == env["REQUEST"]
    assert shell("setup", "promote").strip() == "409"
    states = [json.loads(line) for line in shell("setup", "wait").splitlines()]
    assert states[-1]["state"] == "failed"

    said = _run([sys.executable, "-c", found["python"]], folder, env)
    assert said.split() == ["asked", "for", "already", "failed"]
    return states


def _run(command: list[str], folder: Path, env: dict[str, str]) -> str:
    result = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout
