"""
### Control a rollout

Lets a person step in while a rollout is under way: pause it, let it go on, take it to the bake
without the judge's proof, or abort it. The Trainyard page's buttons start this DAG, so that each
step has a run with the user who asked, a reason, and the rights of its environment.

| action | does |
|---|---|
| `pause` | the weights stay where they are; looks go on, and harm still rolls back |
| `resume` | it goes on from there |
| `promote_now` | the candidate goes to the bake without the judge's proof; you answer for it |
| `abort` | all traffic goes back to stable; nothing is held against the candidate |

**Runbook.** *It is refused:* the log says why, such as that nothing is under way. *No worker is
free:* `trainyard pause`, `resume`, `abort` on a machine with access to the store do the same. *Who
may:* whoever may promote there, and for `abort` whoever may roll back (`docs/permissions.md`).
"""

from __future__ import annotations

from airflow.sdk import DAG, Param

from trainyard_airflow.control_operator import ACTIONS, ControlOperator
from trainyard_airflow.dag_defaults import (
    DEFAULT_ARGS,
    START_DATE,
    Tag,
    environments,
    model_param,
    reason_param,
)
from trainyard_airflow.permits import access_control
from trainyard_airflow.retries import STEP_RETRIES, STEP_RETRY_POLICY

for name, environment in environments().items():
    with DAG(
        f"neuron_control__{name}",
        dag_display_name=f"Neuron control: {name}",
        description=f"Pause, resume, finish or abort the rollout under way in {name}.",
        doc_md=__doc__,
        schedule=None,
        start_date=START_DATE,
        catchup=False,
        max_active_runs=16,
        default_args=DEFAULT_ARGS,
        tags=[Tag.TRAINYARD, Tag.TRAFFIC],
        access_control=access_control([environment.allowed.promote, environment.allowed.rollback]),
        params={
            "model": model_param(),
            "action": Param(
                "pause",
                type="string",
                enum=list(ACTIONS),
                values_display={
                    "pause": "Pause: keep the weights where they are",
                    "resume": "Resume: go on",
                    "promote_now": "Promote now: bake without the judge's proof",
                    "abort": "Abort: all traffic back to stable",
                },
                title="Action",
                description_md="What is to happen to the rollout under way. *Promote now* is "
                "refused while the judge sees harm.",
                section="What",
            ),
            "reason": reason_param(
                "Needed to pause and to promote now; kept in the channel's history."
            ),
        },
    ):
        ControlOperator(
            task_id="control",
            task_display_name="Control the rollout",
            environment=name,
            retries=STEP_RETRIES,
            retry_policy=STEP_RETRY_POLICY,
            doc_md="Look whether whoever asked may, then write the wish into the channel.",
        )
