"""Starting runs of other DAGs from a task: the only module that uses Airflow's task messages.

`TriggerDagRunOperator` with a fixed run id fails when that run exists, so a cleared or retried task
could never go on; asking first and starting only what is missing needs the messages below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk.exceptions import AirflowException, ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse, GetDagRunState, TriggerDagRun

from trainyard_airflow.exceptions import StepTransient


def _send(message: Any) -> Any:
    from airflow.sdk.exceptions import AirflowRuntimeError
    from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS

    try:
        return SUPERVISOR_COMMS.send(message)
    except AirflowRuntimeError as error:
        return error.error


def run_state(dag_id: str, run_id: str) -> str | None:
    """Return the state of a run, or None if there is no such run.

    Raises:
        StepTransient: Airflow does not answer. That must not look like a run that does not exist,
            or a second one would be started.
    """
    answer = _send(GetDagRunState(dag_id=dag_id, run_id=run_id))
    if isinstance(answer, ErrorResponse):
        if (answer.detail or {}).get("status_code") == 404:
            return None
        raise StepTransient(
            f"Airflow did not tell the state of {run_id} of {dag_id}: {answer.detail}"
        )
    # An enumeration in some answers, a plain string in others.
    return str(getattr(answer.state, "value", answer.state))


def start_run(dag_id: str, run_id: str, conf: Mapping[str, Any], *, note: str) -> bool:
    """Start a run; False if it exists already. Raises AirflowException if Airflow refuses it."""
    answer = _send(
        TriggerDagRun(
            dag_id=dag_id,
            run_id=run_id,
            logical_date=None,
            run_after=None,
            conf=dict(conf),
            reset_dag_run=False,
            note=note,
        )
    )
    if isinstance(answer, ErrorResponse):
        if answer.error == ErrorType.DAGRUN_ALREADY_EXISTS:
            return False
        raise AirflowException(f"Airflow refused to start {run_id} of {dag_id}: {answer.detail}")
    return True
