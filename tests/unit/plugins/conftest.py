"""What tests of operators start from: a home, and the part of Airflow's context that we read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tests.unit.yard import Yard

from trainyard.settings import get_settings

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _outside_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Airflow lets nobody but its task runner call `execute`, unless it is being tested."""
    from airflow.sdk.bases.operator import ExecutorSafeguard

    monkeypatch.setattr(ExecutorSafeguard, "test_mode", True)


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    """A home that the operators find by their settings."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRAINYARD_CATALOGUE", str(REPOSITORY / "dags" / "models"))
    monkeypatch.setenv("TRAINYARD_ENVIRONMENTS", str(REPOSITORY / "dags" / "environments.yaml"))
    get_settings.cache_clear()
    yield Yard(tmp_path / "home")
    get_settings.cache_clear()


def write_environments(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, Any]
) -> None:
    """Have the operators find an environments file: the repository's, with `production` and the
    file itself changed.

    Args:
        folder: where to write it.
        monkeypatch: of the test.
        changes: keys of `production`; those of the file are below `file`.
    """
    file = yaml.safe_load((REPOSITORY / "dags" / "environments.yaml").read_text())
    production = dict(changes)
    file |= production.pop("file", {})
    file["environments"]["production"] |= production
    path = folder / "environments.yaml"
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    monkeypatch.setenv("TRAINYARD_ENVIRONMENTS", str(path))
    get_settings.cache_clear()


class Memory(dict[str, Any]):
    """What a task keeps for its next try."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value


class FakeInstance:
    """A task instance that keeps what is pushed to it, and has what other tasks pushed."""

    def __init__(self) -> None:
        self.task = SimpleNamespace(returns_dag_result=False)
        self.pushed: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        """Results of other tasks of the run, by task."""

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value

    def xcom_pull(self, task_ids: str, key: str) -> Any:
        assert key == "return_value"
        return self.others.get(task_ids)


def make_context(
    params: Mapping[str, Any] | None = None,
    *,
    conf: Mapping[str, Any] | None = None,
    dag_id: str = "neuron_release",
    run_id: str = "manual-1",
    user: str | None = "ada",
    memory: Memory | None = None,
    run_type: str = "manual",
) -> Any:
    """Return the context of a task as far as our operators look at it.

    Like Airflow does, it puts the keys of a run's conf among the params, the DAG's own or not.
    """
    return {
        "ti": FakeInstance(),
        "params": {**(params or {}), **(conf or {})},
        "dag": SimpleNamespace(dag_id=dag_id, params=dict(params or {})),
        "run_id": run_id,
        "dag_run": SimpleNamespace(
            conf=dict(conf or {}), triggering_user_name=user, run_type=run_type
        ),
        "task_state_store": memory if memory is not None else Memory(),
    }
