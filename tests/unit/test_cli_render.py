"""`trainyard render`: prints what would be applied, and nothing else goes to standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from trainyard import cli
from trainyard.deploy.manifests import load_overlay
from trainyard.errors import BadInput
from trainyard.settings import get_settings

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENTS: dict[str, Any] = {
    "schema": "trainyard/v1",
    "environments": {
        "production": {
            "platform": "kubernetes",
            "target": "trn2",
            "kubernetes": {"namespace": "trainyard-production"},
        }
    },
    "steps": {"namespace": "trainyard-steps", "slots": {"trn2": 2}},
}


@pytest.fixture(autouse=True)
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with one environment in a cluster."""
    path = tmp_path / "environments.yaml"
    path.write_text(yaml.safe_dump(ENVIRONMENTS))
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRAINYARD_ENVIRONMENTS", str(path))
    monkeypatch.setenv("TRAINYARD_MANIFESTS", str(REPOSITORY / "k8s"))
    get_settings.cache_clear()
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["render", *arguments])


def test_what_is_printed_is_what_would_be_applied() -> None:
    done = run("kubernetes", "production")

    assert done.exit_code == 0
    applied = list(yaml.safe_load_all(done.stdout))
    assert applied == list(load_overlay(REPOSITORY / "k8s", "production").objects)
    assert "still those of the example" in done.stderr


def test_an_overlay_without_examples_needs_no_warning() -> None:
    done = run("kubernetes", "cpu")

    assert done.exit_code == 0
    assert done.stderr == ""


def test_policies_are_printed_as_json() -> None:
    printed = json.loads(run("iam", "staging", "production").stdout)

    assert set(printed) == {"roles", "bucket_policy"}
    assert "main-trainyard-publish" in printed["roles"]


def test_pools_count_deferred_tasks() -> None:
    pools = json.loads(run("pools").stdout)

    assert pools["trainyard_pods_trn2"]["slots"] == 2
    assert all(pool["include_deferred"] for pool in pools.values())


def test_values_of_a_chart_are_printed() -> None:
    values = yaml.safe_load(run("values", "airflow", "production").stdout)

    assert values["executor"] == "KubernetesExecutor"


def test_an_autoscaler_is_printed_for_a_release() -> None:
    done = run(
        "autoscaler", "llama", "production", "--release", "llama-0123456789ab", "--kind", "hpa"
    )

    (printed,) = yaml.safe_load_all(done.stdout)
    assert printed["spec"]["scaleTargetRef"]["name"] == "llama-0123456789ab-production"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("kubernetes", "nothing"), "neither an overlay nor an environment"),
        (("iam", "cpu"), "roles"),
        (("rights", "nothing"), "neither an overlay nor an environment"),
        (("values", "redis", "production"), "no values"),
        (("values", "airflow", "nothing"), "no overlay"),
        (("autoscaler", "llama", "elsewhere"), "no environment on platform kubernetes"),
        (("autoscaler", "llama", "production"), "no stable release"),
    ],
)
def test_what_cannot_be_rendered_is_refused(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)

    assert done.exit_code == BadInput.exit_code
    assert said in done.stderr
    assert done.stdout == ""
