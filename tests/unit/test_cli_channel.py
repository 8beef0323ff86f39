"""`trainyard channel init`, and that `trainyard channel MODEL ENVIRONMENT` still shows one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster_world import NAME, put_gateway
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster
from tests.unit.yard import SPEC
from typer.testing import CliRunner, Result

from trainyard.cli import app
from trainyard.kubernetes.kinds import HTTP_ROUTE
from trainyard.settings import get_settings

ENVIRONMENTS = {
    "schema": "trainyard/v1",
    "environments": {
        "here": {"target": "cpu"},
        "staging": {"target": "cpu", "platform": "kubernetes", "kubernetes": {"namespace": NS}},
    },
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        put_gateway(fake)
        catalogue = tmp_path / "models"
        catalogue.mkdir()
        (catalogue / "adder.yaml").write_text(json.dumps(SPEC))
        (tmp_path / "environments.yaml").write_text(json.dumps(ENVIRONMENTS))
        (tmp_path / "kubeconfig").write_text(fake.kubeconfig())
        for name, value in {
            "HOME": tmp_path / "home",
            "CATALOGUE": catalogue,
            "ENVIRONMENTS": tmp_path / "environments.yaml",
            "KUBECONFIG": tmp_path / "kubeconfig",
        }.items():
            monkeypatch.setenv(f"TRAINYARD_{name}", str(value))
        get_settings.cache_clear()
        yield fake
        get_settings.cache_clear()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["channel", *arguments])


def test_init_makes_the_route(fake: FakeCluster) -> None:
    result = run("init", "adder", "staging", "--path", "/v1", "--no-timeouts")
    assert result.exit_code == 0, result.output
    assert "is made" in result.output
    route = fake.get(HTTP_ROUTE, NAME)
    assert route is not None
    (match,) = route["spec"]["rules"][-1]["matches"]
    assert match["path"]["value"] == "/v1"
    assert "is there already" in run("init", "adder", "staging").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["adder", "here"], "has no servers in a cluster"),
        (["adder", "moon"], "There is no environment"),
        (["nobody", "staging"], "There is no model"),
    ],
)
def test_init_says_what_is_wrong(fake: FakeCluster, arguments: list[str], said: str) -> None:
    result = run("init", *arguments)
    assert result.exit_code == 10
    assert said in " ".join(result.output.split())


def test_without_a_verb_a_channel_is_shown(fake: FakeCluster) -> None:
    for arguments in (["adder", "staging"], ["show", "adder", "staging"]):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert "No rollout yet" in result.output
