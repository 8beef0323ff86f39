"""One DAG for each model that is refreshed: its own schedule, its own switch, its own mistakes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from tests.integration.dags.conftest import REPOSITORY
from tests.refresh_world import write_spec

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def dags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    catalogue = tmp_path_factory.mktemp("models")
    write_spec(catalogue, "nightly")
    write_spec(catalogue, "weekly", cron="30 4 * * mon")
    write_spec(catalogue, "broken", cron="30 4 * *")
    write_spec(catalogue, "by-hand", cron=None)
    names = {
        "TRAINYARD_HOME": str(tmp_path_factory.mktemp("home")),
        "TRAINYARD_CATALOGUE": str(catalogue),
        "TRAINYARD_ENVIRONMENTS": str(REPOSITORY / "dags" / "environments.yaml"),
        "AIRFLOW__DAG_PROCESSOR__DAG_VERSION_INFLATION_CHECK_LEVEL": "error",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        from trainyard.settings import get_settings

        get_settings.cache_clear()
        from airflow.dag_processing.dagbag import DagBag

        bag = DagBag(os.fspath(REPOSITORY / "dags" / "neuron_refresh.py"))
        assert bag.import_errors == {}
        assert bag.captured_warnings == {}
        yield bag.dags
        get_settings.cache_clear()


def test_each_model_that_is_refreshed_has_a_dag_with_its_own_schedule(dags: dict[str, Any]) -> None:
    assert {dag_id: dag.schedule for dag_id, dag in dags.items()} == {
        "neuron_refresh__nightly": "0 3 * * *",
        "neuron_refresh__weekly": "30 4 * * mon",
        # A mistake in a spec costs its schedule, and no other model anything.
        "neuron_refresh__broken": None,
    }
    (check,) = dags["neuron_refresh__weekly"].tasks
    assert (check.model, check.cron, check.problem) == ("weekly", "30 4 * * mon", "")
    (check,) = dags["neuron_refresh__broken"].tasks
    assert "has 4 fields" in check.problem
    assert dags["neuron_refresh__broken"].description == check.problem


def test_it_never_makes_up_for_checks_that_it_missed(dags: dict[str, Any]) -> None:
    for dag in dags.values():
        assert dag.catchup is False
        assert dag.max_active_runs == 2


def test_they_are_documented_bounded_and_can_be_stored(dags: dict[str, Any]) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    from trainyard_airflow.dag_defaults import OWNER, Tag
    from trainyard_airflow.retries import STEP_RETRY_POLICY

    for dag in dags.values():
        assert "Runbook" in dag.doc_md
        assert dag.tags == {str(Tag.TRAINYARD), str(Tag.REFRESH)}
        assert dag.description
        dag.params.validate()
        (check,) = dag.tasks
        assert check.owner == OWNER
        assert check.execution_timeout is not None
        assert check.retry_policy == STEP_RETRY_POLICY
        assert check.returns_dag_result
        again = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag))
        assert [task.task_id for task in again.tasks] == ["check"]
