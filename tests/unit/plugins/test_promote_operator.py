"""A release's promotion is started once, however often the task that wants it is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.serving_world import make_channel, make_release, put_channel
from tests.unit.plugins.conftest import Memory, make_context
from tests.unit.yard import Yard

DAG = "neuron_promote__production"
RELEASE = "adder-0123456789ab"


@dataclass
class FakeAirflow:
    """The runs that Airflow knows, by id, with their states."""

    runs: dict[str, str] = field(default_factory=dict)
    started: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)

    def run_state(self, dag_id: str, run_id: str) -> str | None:
        assert dag_id == DAG
        return self.runs.get(run_id)

    def start_run(self, dag_id: str, run_id: str, conf: dict[str, Any], *, note: str) -> bool:
        assert dag_id == DAG
        if run_id in self.runs:
            return False
        self.started.append((run_id, conf, note))
        self.runs[run_id] = "running"
        return True


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> FakeAirflow:
    made = FakeAirflow()
    monkeypatch.setattr("trainyard_airflow.dag_runs.run_state", made.run_state)
    monkeypatch.setattr("trainyard_airflow.dag_runs.start_run", made.start_run)
    return made


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Any:
    from trainyard_airflow.promote_operator import EnsurePromotionOperator

    made = EnsurePromotionOperator(
        task_id="production", environment="production", plan_id="adder-plan"
    )
    at(made, 4, monkeypatch)
    return made


def at(operator: Any, generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the channel be at a generation."""
    channel = make_channel(environment="production", generation=generation)
    monkeypatch.setattr(type(operator), "_subject", lambda self: (RELEASE, channel), raising=True)


def execute(operator: Any, memory: Memory) -> Any:
    """Run the task until it waits, and return what it waits for."""
    from airflow.sdk.exceptions import TaskDeferred

    context = make_context({"environments": ["staging", "production"]}, memory=memory)
    with pytest.raises(TaskDeferred) as deferred:
        operator.execute(context)
    assert deferred.value.method_name == "finish"
    return deferred.value


def test_it_starts_the_promotion_and_waits_for_its_end(operator: Any, airflow: FakeAirflow) -> None:
    memory = Memory()
    deferred = execute(operator, memory)
    run_id = f"promote__{RELEASE}__g4"
    assert airflow.started == [
        (run_id, {"model": "adder", "release": RELEASE}, "Started by neuron_release manual-1")
    ]
    path, kwargs = deferred.trigger.serialize()
    assert path.endswith("DagStateTrigger")
    assert (kwargs["dag_id"], kwargs["run_ids"]) == (DAG, [run_id])
    assert sorted(map(str, kwargs["states"])) == ["failed", "success"]
    assert deferred.kwargs == {"run_id": run_id, "release_id": RELEASE}
    assert memory == {"promote_run_id": run_id}


@pytest.mark.parametrize("state", ["queued", "running", "success"])
def test_a_retry_attaches_to_the_run_of_before(
    operator: Any, airflow: FakeAirflow, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    run_id = execute(operator, memory).kwargs["run_id"]
    airflow.runs[run_id] = state
    at(operator, 9, monkeypatch)  # the rollout has changed the channel meanwhile
    assert execute(operator, memory).kwargs["run_id"] == run_id
    assert len(airflow.started) == 1


def test_a_run_that_was_started_just_before_a_crash_is_found(
    operator: Any, airflow: FakeAirflow
) -> None:
    airflow.runs[f"promote__{RELEASE}__g4"] = "running"
    assert execute(operator, Memory()).kwargs["run_id"] == f"promote__{RELEASE}__g4"
    assert airflow.started == []


def test_a_success_in_a_channel_that_is_gone_is_no_answer(
    operator: Any, airflow: FakeAirflow
) -> None:
    """The store was emptied, and Airflow still knows the promotion of before."""
    stale = f"promote__{RELEASE}__g4"
    airflow.runs |= {stale: "success", f"{stale}__2": "success"}
    assert execute(operator, Memory()).kwargs["run_id"] == f"{stale}__3"
    assert [run for run, _, _ in airflow.started] == [f"{stale}__3"]


def test_a_release_that_is_stable_already_needs_no_second_run(
    operator: Any, airflow: FakeAirflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = make_channel(environment="production", generation=4, stable=RELEASE)
    monkeypatch.setattr(type(operator), "_subject", lambda self: (RELEASE, channel))
    airflow.runs[f"promote__{RELEASE}__g4"] = "success"
    assert execute(operator, Memory()).kwargs["run_id"] == f"promote__{RELEASE}__g4"
    assert airflow.started == []


def test_a_cleared_task_starts_anew_after_a_failure(
    operator: Any, airflow: FakeAirflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    first = execute(operator, memory).kwargs["run_id"]
    airflow.runs[first] = "failed"
    at(operator, 12, monkeypatch)
    second = execute(operator, memory).kwargs["run_id"]
    assert second == f"promote__{RELEASE}__g12"
    assert [run for run, _, _ in airflow.started] == [first, second]
    assert memory == {"promote_run_id": second}


def test_a_failure_that_changed_nothing_is_not_repeated(
    operator: Any, airflow: FakeAirflow
) -> None:
    memory = Memory()
    first = execute(operator, memory).kwargs["run_id"]
    airflow.runs[first] = "failed"
    assert execute(operator, memory).kwargs["run_id"] == first
    assert len(airflow.started) == 1


def test_a_run_that_somebody_deleted_is_started_again(operator: Any, airflow: FakeAirflow) -> None:
    memory = Memory()
    first = execute(operator, memory).kwargs["run_id"]
    del airflow.runs[first]
    assert execute(operator, memory).kwargs["run_id"] == first
    assert [run for run, _, _ in airflow.started] == [first, first]


def test_an_environment_that_nobody_asked_for_is_skipped(
    operator: Any, airflow: FakeAirflow
) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    for environments in ([], None, ["staging"]):
        with pytest.raises(AirflowSkipException, match="not asked for production"):
            operator.execute(make_context({"environments": environments}))
    assert airflow.started == []


def test_a_promoted_release_is_the_result(operator: Any, airflow: FakeAirflow) -> None:
    airflow.runs["p"] = "success"
    found = operator.finish(make_context(), {"any": "event"}, run_id="p", release_id=RELEASE)
    assert found == RELEASE


def test_a_failed_promotion_points_to_its_log(operator: Any, airflow: FakeAirflow) -> None:
    from trainyard_airflow.exceptions import StepRefused

    airflow.runs["p"] = "failed"
    with pytest.raises(StepRefused, match=rf"the run p of {DAG} is failed. Its task `settle`"):
        operator.finish(make_context(), {}, run_id="p", release_id=RELEASE)


def test_the_subject_is_what_the_plan_published_and_the_channel_now(
    yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainyard_airflow.promote_operator import EnsurePromotionOperator

    release = make_release(yard.settings, yard.store)
    put_channel(
        yard.store, make_channel(environment="production", stable=release.release_id, generation=6)
    )
    asked: list[tuple[Any, ...]] = []

    def of_plan(store: Any, plan_id: str, target: str, settings: Any) -> Any:
        asked.append((store.url, plan_id, target))
        return release

    monkeypatch.setattr("trainyard.releases.release_of_plan", of_plan)
    operator = EnsurePromotionOperator(
        task_id="production", environment="production", plan_id="adder-plan"
    )
    release_id, channel = operator._subject()
    assert release_id == release.release_id
    assert (channel.model, channel.environment, channel.generation) == ("adder", "production", 6)
    assert asked == [(yard.store.url, "adder-plan", "cpu")]
