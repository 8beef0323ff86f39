"""
### Roll back

Returns an environment's traffic to its previous release, or to one you name that was stable
before: traffic first, everything else after. It starts in the triggerer and needs no free worker.

**Tasks.** `permit` is there only if the environments file names people who may roll back: it looks
who asked. `rollback` waits in the triggerer until traffic and servers are back.

**Runbook.** Trigger it with the model; leave the release empty to undo the last
promotion. If the judge or somebody else has undone that already, it is refused: name the release.
While a promotion is under way, this ends it first. If the old servers are gone they are started
again from the store, which takes as long as a cached start.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from trainyard_airflow.dag_defaults import (
    DEFAULT_ARGS,
    START_DATE,
    Tag,
    environments,
    model_param,
    reason_param,
    release_param,
    stuck_alert,
)
from trainyard_airflow.permits import PermitOperator, access_control, needs_task
from trainyard_airflow.rollout_operator import RolloutOperator

for name, environment in environments().items():
    allowed = environment.allowed.rollback
    with DAG(
        f"neuron_rollback__{name}",
        dag_display_name=f"Neuron rollback: {name}",
        description=f"Return the traffic of {name} to an earlier release.",
        doc_md=__doc__,
        schedule=None,
        start_date=START_DATE,
        catchup=False,
        max_active_runs=16,
        default_args=DEFAULT_ARGS,
        deadline=stuck_alert(timedelta(seconds=environment.stuck_after_s), name),
        tags=[Tag.TRAINYARD, Tag.ROLLBACK, Tag.TRAFFIC],
        access_control=access_control([allowed]),
        params={
            "model": model_param(),
            "release": release_param(None, optional=True),
            "reason": reason_param("Why; kept in the channel's history."),
        },
    ):
        rollback = RolloutOperator(
            task_id="rollback",
            task_display_name="Roll back",
            environment=name,
            kind="rollback",
            execution_timeout=None,
            doc_md="Weights first, then servers. The log has one line an event.",
        )
        if needs_task(allowed):
            permit = PermitOperator(
                task_id="permit",
                task_display_name="May they?",
                environment=name,
                act="rollback",
                doc_md="Look whether whoever asked may roll back here.",
            )
            permit >> rollback
