"""The same DAG files, with an environments file that names people, and FAB's auth manager."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.integration.dags.conftest import REPOSITORY

pytestmark = pytest.mark.integration

RELEASE = "adder-0123456789ab"
POLICY = {
    "allowed": {
        "promote": {"roles": ["Lead"]},
        "rollback": {"users": ["ada"], "roles": ["Oncall"]},
        "approve": {"roles": ["Owner"]},
    },
    "approval": {"timeout_s": 3600},
    "stuck_after_s": 7200,
}


@pytest.fixture(scope="module")
def dags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The DAGs of promotions, rollbacks and controls, by id."""
    home = tmp_path_factory.mktemp("home")
    file = yaml.safe_load((REPOSITORY / "dags" / "environments.yaml").read_text())
    file["environments"]["production"] |= POLICY
    environments = home / "environments.yaml"
    environments.write_text(yaml.safe_dump(file, sort_keys=False))
    release = home / "store" / "releases" / "adder" / f"{RELEASE}.json"
    release.parent.mkdir(parents=True)
    release.write_text("{}")
    names = {
        "TRAINYARD_HOME": str(home),
        "TRAINYARD_CATALOGUE": str(REPOSITORY / "dags" / "models"),
        "TRAINYARD_ENVIRONMENTS": str(environments),
        "AIRFLOW__DAG_PROCESSOR__DAG_VERSION_INFLATION_CHECK_LEVEL": "error",
        "AIRFLOW__CORE__AUTH_MANAGER": (
            "airflow.providers.fab.auth_manager.fab_auth_manager.FabAuthManager"
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        from trainyard.settings import get_settings

        get_settings.cache_clear()
        from airflow.dag_processing.dagbag import DagBag

        found: dict[str, Any] = {}
        for name in ("promote", "rollback", "control"):
            bag = DagBag(os.fspath(Path(REPOSITORY, "dags", f"neuron_{name}.py")))
            assert bag.import_errors == {}
            found |= bag.dags
        yield found
        get_settings.cache_clear()


def test_approval_stands_between_the_checks_and_the_rollout(dags: dict[str, Any]) -> None:
    dag = dags["neuron_promote__production"]
    approve = dag.get_task("approve")
    assert approve.upstream_task_ids == {"verify"}
    assert approve.downstream_task_ids == {"rollout"}
    assert approve.response_timeout == timedelta(hours=1)
    assert not approve.defaults
    assert list(approve.params) == ["note"]
    leaves = [t for t in dag.tasks if not t.downstream_task_ids - {"settle"} and not t.is_teardown]
    assert [task.task_id for task in leaves] == ["rollout"]


def test_without_approval_there_is_no_such_task(dags: dict[str, Any]) -> None:
    tasks = {task.task_id for task in dags["neuron_promote__staging"].tasks}
    assert tasks == {"verify", "rollout", "settle"}


def test_a_rollback_that_names_people_looks_who_asks(dags: dict[str, Any]) -> None:
    assert dags["neuron_rollback__production"].get_task("permit").downstream_task_ids == {
        "rollback"
    }
    assert {task.task_id for task in dags["neuron_rollback__staging"].tasks} == {"rollback"}


def test_roles_have_rights_on_the_dags_of_their_environment_only(dags: dict[str, Any]) -> None:
    starts = {"can_read", "can_create"}

    def who_starts(dag_id: str) -> set[str]:
        rights = dags[dag_id].access_control or {}
        return {role for role, each in rights.items() if set(each["DAG Runs"]) >= starts}

    assert who_starts("neuron_promote__production") == {"Lead"}
    assert "Owner" in dags["neuron_promote__production"].access_control
    assert who_starts("neuron_rollback__production") == {"Oncall"}
    assert who_starts("neuron_control__production") == {"Lead", "Oncall"}
    assert not any(dag.access_control for name, dag in dags.items() if name.endswith("__staging"))


def test_late_runs_are_told_of_and_the_time_for_an_approval_comes_on_top(
    dags: dict[str, Any],
) -> None:
    intervals = {
        name: [alert.interval for alert in dag.deadline]
        for name, dag in dags.items()
        if dag.deadline
    }
    assert intervals["neuron_promote__production"] == [timedelta(hours=3)]
    assert intervals["neuron_rollback__production"] == [timedelta(hours=2)]
    (alert,) = dags["neuron_promote__production"].deadline
    assert alert.callback.path == "trainyard_airflow.notify.tell_stuck"
    assert alert.callback.kwargs == {"environment": "production"}


def test_forms_suggest_the_releases_that_this_machine_has(dags: dict[str, Any]) -> None:
    for name in ("promote", "rollback"):
        schema = dags[f"neuron_{name}__production"].params.get_param("release").schema
        assert schema["examples"] == [RELEASE]


@pytest.mark.parametrize("kind", ["promote", "rollback", "control"])
def test_they_survive_serialization(dags: dict[str, Any], kind: str) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    dag = dags[f"neuron_{kind}__production"]
    again = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag))
    assert {task.task_id for task in again.tasks} == {task.task_id for task in dag.tasks}
    for task in again.tasks:
        assert [link.name for link in task.operator_extra_links], task.task_id
