"""`trainyard doctor`: its words, its exit codes, and JSON for programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.unit.proof_files import IMAGE, proof
from tests.unit.sources.model_files import write_model
from typer.testing import CliRunner

from trainyard import cli
from trainyard.lanes import registry
from trainyard.lanes.cpu import CpuLane
from trainyard.proofs import store_proof
from trainyard.settings import Settings, get_settings
from trainyard.signing.keys import signing_key
from trainyard.store.folder import FolderStore

FILES = Path(__file__).parents[1] / "spec" / "files"


class QuickLane(CpuLane):
    """Lane `cpu` whose toolchain is known at once."""

    def toolchain(self, python: Path) -> dict[str, str]:
        return {"vllm": "0.32.0"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    shutil.copytree(FILES, tmp_path / "dags")
    values = {
        "HOME": tmp_path / "home",
        "CATALOGUE": tmp_path / "dags" / "models",
        "ENVIRONMENTS": tmp_path / "dags" / "environments.yaml",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"TRAINYARD_{name}", str(value))
    monkeypatch.setitem(registry._LANES, "cpu", QuickLane())
    get_settings.cache_clear()
    found = get_settings()
    write_model(found.home / "demo" / "models" / "adder" / "r1")
    return found


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["doctor", *words], env={"COLUMNS": "400"})
    return result.exit_code, result.output


def names(text: str) -> dict[str, str]:
    return {check["name"]: check["state"] for check in json.loads(text)}


def first_environment(settings: Settings) -> str:
    text = settings.environments.read_text()
    line = text.split("environments:", 1)[1].strip().splitlines()[0]
    return line.strip().rstrip(":")


def test_an_environment_is_looked_at_by_its_name_alone(settings: Settings) -> None:
    name = first_environment(settings)
    code, text = run(name, "--no-airflow")
    assert code == 0, text
    assert "store: conditional writes" in text
    assert "0 to mend." in text
    assert run("environment", name, "--no-airflow")[0] == 0


def test_programs_get_json(settings: Settings) -> None:
    code, text = run(first_environment(settings), "--no-airflow", "--json")
    assert code == 0
    found = names(text)
    assert found["store"] == "ok"
    assert found["toolchain: cpu"] == "ok"
    assert found["traffic"] == "warn"


def test_without_a_name_all_are_looked_at(settings: Settings) -> None:
    code, text = run("--no-airflow")
    assert code == 0, text
    assert f"Environment {first_environment(settings)}" in text


def test_an_airflow_that_is_not_there_fails(settings: Settings) -> None:
    code, text = run(first_environment(settings))
    assert code == 10
    assert "No Airflow is named" in text


def test_a_mistake_in_the_catalogue_fails_with_its_place(settings: Settings) -> None:
    path = settings.catalogue / "adder.yaml"
    path.write_text(path.read_text().replace("lane: cpu", "lane: gpu"))
    code, text = run(first_environment(settings), "--no-airflow", "--json")
    assert code == 10
    assert names(text)["catalogue"] == "fail"


def test_names_that_are_not_there_are_told_with_the_nearest(settings: Settings) -> None:
    code, text = run("nowhere", "--no-airflow")
    assert (code, "There is no environment" in text) == (10, True)
    code, text = run(first_environment(settings), "--identity", "root")
    assert (code, "no identity 'root'" in text) == (10, True)


def test_a_store_that_cannot_be_used_is_told_and_the_rest_is_looked_at(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_STORE", "s3://")
    get_settings.cache_clear()
    code, text = run(first_environment(settings), "--no-airflow", "--json")
    assert code == 10
    found = names(text)
    assert found["store"] == "fail"
    assert found["disk"] == "ok"


def test_the_table_says_what_is_proven(settings: Settings) -> None:
    store = FolderStore(settings.store_root)
    store_proof(store, proof(), signing_key(settings))
    code, text = run("table", "--image", IMAGE, "--instance", "trn2.48xlarge", "--json")
    assert code == 0
    rows = json.loads(text)
    assert {row["state"] for row in rows} == {"refused", "proven"}
    code, text = run("table", "--instance", "inf2.8xlarge")
    assert code == 0
    assert "refused" in text
    assert "rows; what is known is of" in text
