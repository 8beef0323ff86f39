"""The commands that prepare steps as pods: pools for Airflow, toolchains of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainyard.cli import app
from trainyard.documents.toolchain import ToolchainRecord
from trainyard.lanes.cpu import CpuLane
from trainyard.settings import get_settings
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import toolchain_key


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    monkeypatch.setenv("TRAINYARD_ENVIRONMENTS", str(tmp_path / "environments.yaml"))
    get_settings.cache_clear()
    return tmp_path


def environments(home: Path, steps: str) -> None:
    text = "schema: trainyard/v1\nenvironments: {production: {target: cpu}}\n"
    (home / "environments.yaml").write_text(text + steps)


def test_pools_are_printed_as_airflow_imports_them(home: Path) -> None:
    environments(home, "steps: {namespace: steps, slots: {trn2: 2, cpu: 3}}\n")
    result = CliRunner().invoke(app, ["pools"])
    found = json.loads(result.stdout)
    assert {name: pool["slots"] for name, pool in found.items()} == {
        "trainyard_local_devices": 1,
        "trainyard_pods_trn2": 2,
        "trainyard_pods_cpu": 3,
    }
    assert all(pool["include_deferred"] and pool["description"] for pool in found.values())


def test_without_pods_there_is_the_pool_of_this_machine(home: Path) -> None:
    environments(home, "")
    result = CliRunner().invoke(app, ["pools"])
    assert list(json.loads(result.stdout)) == ["trainyard_local_devices"]


def test_a_mistake_in_the_environments_file_is_told(home: Path) -> None:
    environments(home, "steps: {namespace: steps, slots: {}}\n")
    result = CliRunner().invoke(app, ["pools"])
    assert result.exit_code == 10


def test_a_toolchain_is_recorded_and_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuLane, "toolchain", lambda _lane, _python: {"vllm": "0.32.0"})
    image = "registry.example/trainyard:1"
    result = CliRunner().invoke(app, ["toolchain", "--lane", "cpu", "--image", image])
    assert result.exit_code == 0
    assert "vllm 0.32.0" in result.output
    store = FolderStore(get_settings().store_root)
    record = read_document(store, toolchain_key(image, "cpu"), ToolchainRecord)
    assert record.toolchain == {"vllm": "0.32.0"}


def test_a_toolchain_of_no_image_is_refused(home: Path) -> None:
    result = CliRunner().invoke(app, ["toolchain", "--lane", "cpu"])
    assert result.exit_code == 10
    assert "--image" in result.output
