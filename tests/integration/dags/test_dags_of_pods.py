"""The same DAG files, with an environments file that says that heavy steps are pods."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.dags.conftest import REPOSITORY

pytestmark = pytest.mark.integration

STEPS = """
steps:
  namespace: steps
  image: registry.example/trainyard:1
  slots: {cpu: 2, trn2: 1}
  service_accounts: {publish: trainyard-publish}
"""


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("environments") / "environments.yaml"
    path.write_text((REPOSITORY / "dags" / "environments.yaml").read_text() + STEPS)
    return path


@pytest.fixture(scope="module")
def release(environments: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    names = {
        "TRAINYARD_HOME": str(tmp_path_factory.mktemp("home")),
        "TRAINYARD_CATALOGUE": str(REPOSITORY / "dags" / "models"),
        "TRAINYARD_ENVIRONMENTS": str(environments),
        "AIRFLOW__DAG_PROCESSOR__DAG_VERSION_INFLATION_CHECK_LEVEL": "error",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        from trainyard.settings import get_settings

        get_settings.cache_clear()
        from airflow.dag_processing.dagbag import DagBag

        bag = DagBag(os.fspath(REPOSITORY / "dags" / "neuron_release.py"))
        assert bag.import_errors == {}
        assert bag.captured_warnings == {}
        yield bag.dags["neuron_release"]
        get_settings.cache_clear()


def test_heavy_steps_are_pods_and_small_ones_where_they_have_rights_of_their_own(
    release: Any,
) -> None:
    kinds = {task.task_id: task.task_type for task in release.tasks}
    pods = {task for task, kind in kinds.items() if kind == "PodStepOperator"}
    assert pods == {
        "download",
        *(
            f"target_{kind}.{step}"
            for kind in ("cpu", "trn2")
            for step in ("check_tasks", "compile", "measure", "logit_validation", "publish")
        ),
    }
    assert kinds["plan"] == "PlanOperator"
    assert kinds["target_cpu.accuracy_gate"] == "StepOperator"


def test_each_kind_of_device_has_a_pool_that_counts_deferred_pods(release: Any) -> None:
    from trainyard.platform.pools import pools_of
    from trainyard.settings import get_settings
    from trainyard.spec.loader import load_environments

    pools = pools_of(load_environments(get_settings().environments).steps)
    assert {pool.name: pool.slots for pool in pools} == {
        "trainyard_local_devices": 1,
        "trainyard_pods_cpu": 2,
        "trainyard_pods_trn2": 1,
    }
    assert {task.task_id: task.pool for task in release.tasks if task.pool != "default_pool"} == {
        f"target_{kind}.{step}": f"trainyard_pods_{kind}"
        for kind in ("cpu", "trn2")
        for step in ("compile", "measure", "logit_validation")
    }


def test_the_image_is_asked_about_tasks_before_a_device_is_taken(release: Any) -> None:
    asked = release.get_task("target_trn2.check_tasks")
    assert asked.downstream_task_ids == {"target_trn2.compile"}
    assert asked.pool == "default_pool"
    assert release.get_task("target_trn2.compile").trigger_rule == "none_failed"


def test_each_kind_lists_its_own_targets(release: Any) -> None:
    lists = [release.get_task(f"targets_{kind}") for kind in ("cpu", "trn2")]
    assert [list(task.op_args) for task in lists] == [
        ["{{ plan_id(params.model, dag.dag_id, run_id) }}", kind] for kind in ("cpu", "trn2")
    ]
    assert all("plan" in task.upstream_task_ids for task in lists)


def test_it_survives_serialization(release: Any) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    again = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(release))
    assert {task.task_id for task in again.tasks} == {task.task_id for task in release.tasks}


def test_parsing_loads_nothing_heavy(environments: Path) -> None:
    """Not even the client of Kubernetes: the pod operator is made when a task runs."""
    heavy = ("great_expectations", "pandas", "kubernetes", "kubernetes_asyncio", "boto3", "torch")
    program = (
        "import sys, runpy\n"
        "runpy.run_path(sys.argv[1])\n"
        f"print(','.join(name for name in {heavy!r} if name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(REPOSITORY / "dags" / "neuron_release.py")],
        cwd=REPOSITORY,
        env=os.environ | {"TRAINYARD_ENVIRONMENTS": str(environments)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""
