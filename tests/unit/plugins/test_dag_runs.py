"""Runs of other DAGs, asked for by a task: what Airflow's answers mean."""

from __future__ import annotations

from typing import Any

import pytest


class FakeSupervisor:
    """Takes a task's messages and gives the answers it was told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.messages: list[Any] = []

    def send(self, message: Any) -> Any:
        self.messages.append(message)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> FakeSupervisor:
    from airflow.sdk.execution_time import task_runner

    supervisor = FakeSupervisor(answer)
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", supervisor, raising=False)
    return supervisor


def refusal(kind: str, **detail: Any) -> Any:
    from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
    from airflow.sdk.execution_time.comms import ErrorResponse

    return AirflowRuntimeError(ErrorResponse(error=ErrorType[kind], detail=detail))


@pytest.mark.parametrize("state", ["queued", "running", "success", "failed"])
def test_the_state_of_a_run(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    from airflow.sdk.execution_time.comms import DagRunStateResult

    from trainyard_airflow.dag_runs import run_state

    supervisor = answering(monkeypatch, DagRunStateResult(state=state))
    assert run_state("d", "r") == state
    assert (supervisor.messages[0].dag_id, supervisor.messages[0].run_id) == ("d", "r")


def test_a_run_that_does_not_exist_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard_airflow.dag_runs import run_state

    answering(monkeypatch, refusal("API_SERVER_ERROR", status_code=404, message="Not Found"))
    assert run_state("d", "r") is None


def test_a_run_is_started_with_its_conf(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk.execution_time.comms import OKResponse

    from trainyard_airflow.dag_runs import start_run

    supervisor = answering(monkeypatch, OKResponse(ok=True))
    assert start_run("d", "r", {"model": "adder"}, note="Why.") is True
    message = supervisor.messages[0]
    assert (message.dag_id, message.run_id, message.conf) == ("d", "r", {"model": "adder"})
    assert (message.logical_date, message.reset_dag_run, message.note) == (None, False, "Why.")


def test_a_run_that_exists_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard_airflow.dag_runs import start_run

    answering(monkeypatch, refusal("DAGRUN_ALREADY_EXISTS"))
    assert start_run("d", "r", {}, note="") is False


def test_a_refusal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk.exceptions import AirflowException

    from trainyard_airflow.dag_runs import start_run

    answering(monkeypatch, refusal("API_SERVER_ERROR", status_code=400, message="No such param"))
    with pytest.raises(AirflowException, match=r"refused to start r of d: .*No such param"):
        start_run("d", "r", {}, note="")


@pytest.mark.parametrize("status_code", [None, 500, 503])
def test_an_airflow_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, status_code: int | None
) -> None:
    """It must not look like a run that does not exist: that would start a second promotion."""
    from trainyard_airflow.dag_runs import run_state
    from trainyard_airflow.exceptions import StepTransient

    answering(monkeypatch, refusal("API_SERVER_ERROR", status_code=status_code, message="Away"))
    with pytest.raises(StepTransient, match="Away"):
        run_state("d", "r")
