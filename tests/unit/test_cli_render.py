"""`trainyard render`: prints what would be applied, and nothing else goes to standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.serving.kubernetes.serving_cases import release
from typer.testing import CliRunner, Result

from trainyard import cli
from trainyard.deploy.manifests import load_overlay
from trainyard.errors import BadInput
from trainyard.serving.kubernetes.manifests import server_manifests
from trainyard.settings import get_settings
from trainyard.spec.kubernetes import KubernetesServing

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
    "steps": {"namespace": "trainyard-steps"},
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


def test_values_of_a_chart_are_printed() -> None:
    values = yaml.safe_load(run("values", "airflow", "production").stdout)

    assert values["executor"] == "KubernetesExecutor"


def test_an_autoscaler_is_printed_for_a_release() -> None:
    done = run(
        "autoscaler", "llama", "production", "--release", "llama-0123456789ab", "--kind", "hpa"
    )

    (printed,) = yaml.safe_load_all(done.stdout)
    assert printed["spec"]["scaleTargetRef"]["name"] == "llama-0123456789ab-production"


def test_the_servers_of_a_release_are_printed_as_they_would_be_applied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRAINYARD_STORE", "s3://models/yard")
    get_settings.cache_clear()
    made = release("neuron-native")
    monkeypatch.setattr("trainyard.releases.load_release", lambda *_: made)

    done = run("servers", made.model, "production", "--release", made.release_id)

    assert done.exit_code == 0, done.stderr
    printed = list(yaml.safe_load_all(done.stdout))
    place = KubernetesServing.model_validate(
        ENVIRONMENTS["environments"]["production"]["kubernetes"]
    )
    expected = server_manifests(
        made, "production", place, 1, get_settings(), priority_class=place.stable_priority_class
    )
    assert printed == json.loads(json.dumps(expected.objects))


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
        (("servers", "llama", "elsewhere"), "no environment on platform kubernetes"),
    ],
)
def test_what_cannot_be_rendered_is_refused(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)

    assert done.exit_code == BadInput.exit_code
    assert said in done.stderr
    assert done.stdout == ""
