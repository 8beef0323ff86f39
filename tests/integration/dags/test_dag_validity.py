"""Every DAG is what Airflow and its readers expect: it loads, it is documented, it is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.refresh_world import write_spec

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[3]
DAG_IDS = {
    "neuron_release",
    "neuron_promote__staging",
    "neuron_promote__production",
    "neuron_rollback__staging",
    "neuron_rollback__production",
    "neuron_control__staging",
    "neuron_control__production",
    "neuron_gc",
    "neuron_watch",
}
SCHEDULES = {"neuron_gc": "@daily", "neuron_watch": "*/2 * * * *"}
"""All others start when somebody asks."""


def test_every_dag_loads(dag_bag: Any) -> None:
    assert dag_bag.import_errors == {}
    assert set(dag_bag.dags) == DAG_IDS


def test_no_dag_varies_between_two_parses(dag_bag: Any) -> None:
    assert dag_bag.captured_warnings == {}


@pytest.mark.parametrize("dag_id", sorted(DAG_IDS))
class TestOneDag:
    def test_it_is_documented_owned_and_bounded(self, dag_bag: Any, dag_id: str) -> None:
        from trainyard_airflow.dag_defaults import OWNER, Tag

        dag = dag_bag.dags[dag_id]
        assert "Runbook" in dag.doc_md or "When it fails" in dag.doc_md
        assert dag.description
        assert dag.tags <= {str(tag) for tag in Tag}
        assert str(Tag.TRAINYARD) in dag.tags
        assert dag.schedule == SCHEDULES.get(dag_id)
        assert dag.catchup is False
        assert dag.start_date is not None
        assert {task.owner for task in dag.tasks} == {OWNER}

    def test_tasks_wait_no_longer_than_they_say(self, dag_bag: Any, dag_id: str) -> None:
        for task in dag_bag.dags[dag_id].tasks:
            if task.task_type == "RolloutOperator":
                # Its limits are in the state machine: Airflow's would cut a rollout in the middle.
                assert task.execution_timeout is None
            else:
                assert task.execution_timeout is not None, task.task_id

    def test_its_params_have_valid_defaults_and_texts(self, dag_bag: Any, dag_id: str) -> None:
        params = dag_bag.dags[dag_id].params
        params.validate()
        for name in params:
            schema = params.get_param(name).schema
            assert schema["title"], name
            assert schema["description_md"], name
            assert schema["section"], name

    def test_it_survives_serialization(self, dag_bag: Any, dag_id: str) -> None:
        from airflow.serialization.serialized_objects import DagSerialization

        again = DagSerialization.deserialize_dag(
            DagSerialization.serialize_dag(dag_bag.dags[dag_id])
        )
        assert {t.task_id for t in again.tasks} == {t.task_id for t in dag_bag.dags[dag_id].tasks}


def test_garbage_is_collected_by_one_run_at_a_time(dag_bag: Any) -> None:
    dag = dag_bag.dags["neuron_gc"]
    assert dag.max_active_runs == 1
    assert dag.get_task("collect").look_only == "{{ params.dry_run }}"
    assert dag.params["dry_run"] is False


def test_one_watch_looks_at_a_time(dag_bag: Any) -> None:
    dag = dag_bag.dags["neuron_watch"]
    assert dag.max_active_runs == 1
    assert [(task.task_id, task.retries) for task in dag.tasks] == [("watch", 0)]


def test_only_work_on_devices_takes_the_device_pool(dag_bag: Any) -> None:
    from trainyard.platform.pools import pools_of

    pools = {task.task_id: task.pool for dag in dag_bag.dags.values() for task in dag.tasks}
    scarce = {pool.name for pool in pools_of(None)}
    assert {task for task, pool in pools.items() if pool in scarce} == {
        "target.compile",
        "target.logit_validation",
        "target.measure",
    }
    assert set(pools.values()) <= scarce | {"default_pool"}


def test_steps_retry_by_the_one_policy(dag_bag: Any) -> None:
    from trainyard_airflow.retries import STEP_RETRIES, STEP_RETRY_POLICY

    steps = [t for t in dag_bag.dags["neuron_release"].tasks if hasattr(t, "step")]
    names = {"plan", "download", "target.compile", "target.measure", "target.publish"}
    assert names <= {t.task_id for t in dag_bag.dags["neuron_release"].tasks}
    for task in steps:
        assert task.retries == STEP_RETRIES
        assert task.retry_policy == STEP_RETRY_POLICY


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_settling_decides_about_a_promotion(dag_bag: Any, environment: str) -> None:
    """The rollout is the only leaf that is no teardown, and a failed teardown fails the run."""
    from trainyard_airflow.retries import STEP_RETRY_POLICY

    dag = dag_bag.dags[f"neuron_promote__{environment}"]
    settle = dag.get_task("settle")
    assert settle.is_teardown
    assert settle.on_failure_fail_dagrun
    # Without the policy, "it was rolled back" would be tried again for minutes.
    assert settle.retry_policy == STEP_RETRY_POLICY
    leaves = [t for t in dag.tasks if not t.downstream_task_ids - {"settle"} and not t.is_teardown]
    assert [t.task_id for t in leaves] == ["rollout"]


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_rollouts_start_in_the_triggerer(dag_bag: Any, environment: str) -> None:
    """A rollback must not wait for a free worker."""
    task = dag_bag.dags[f"neuron_rollback__{environment}"].get_task("rollback")
    assert task.start_from_trigger
    assert task.start_trigger_args.trigger_kwargs["environment"] == environment


def test_promotions_follow_the_order_of_the_environments(dag_bag: Any) -> None:
    release = dag_bag.dags["neuron_release"]
    assert "promote.production" in release.get_task("promote.staging").downstream_task_ids


PARSE = """
import collections, json, runpy, socket, sys
import yaml

parsed, connected = collections.Counter(), []
real = yaml.parse
yaml.parse = lambda text, *a, **k: parsed.update([text]) or real(text, *a, **k)
socket.socket.connect = lambda self, address: connected.append(str(address))
for path in sys.argv[1:]:
    runpy.run_path(path)
heavy = [name for name in HEAVY if name in sys.modules]
print(json.dumps([heavy, sorted(parsed.values()), connected]))
"""
HEAVY = (
    "great_expectations", "pandas", "kubernetes", "boto3", "torch", "scipy", "huggingface_hub",
)  # fmt: skip


def test_parsing_loads_nothing_heavy_reads_no_file_twice_and_asks_nobody(tmp_path: Path) -> None:
    """All DAG files in one process, with four models of which three are refreshed."""
    for number in range(3):
        write_spec(tmp_path, f"model-{number}")
    write_spec(tmp_path, "by-hand", cron=None)
    files = sorted(map(str, (REPOSITORY / "dags").glob("*.py")))
    done = subprocess.run(
        [sys.executable, "-c", PARSE.replace("HEAVY", repr(HEAVY)), *files],
        cwd=REPOSITORY,
        env=os.environ | {"TRAINYARD_CATALOGUE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    heavy, parsed, connected = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    # The four specs and the environments file.
    assert parsed == [1] * 5
    assert connected == []
