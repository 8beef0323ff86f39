"""
### Promote a release

Moves an environment's traffic to a release, a step at a time, while the judge compares it with the
stable release. There is one such DAG for each environment, because Airflow grants rights by DAG.

**Tasks.** `verify` checks who asks, signature, target, rejections and devices before anything is
touched. `approve` is there only if the environments file asks for approval: it waits until people
have answered, and takes no worker meanwhile. `rollout` waits in the triggerer: deploy, warm up,
shift traffic, look, bake. `settle` runs whatever happened: if the rollout is unfinished it sends
all traffic back to the stable release, and the run succeeds only if the release was promoted.

**Runbook.** *It waits for approval:* answer on the Trainyard page, or under *Required actions*; if
nobody does in time, or somebody rejects it, the run fails and nothing was touched. *Stop a
rollout:* mark `rollout` as failed; `settle` returns the traffic. *Wait for people:* `trainyard
pause`, `resume`, `abort` and `promote-now MODEL ENVIRONMENT --reason …`, from any terminal.
*Another rollout is under way:* this one is refused, or waits for its turn, as `concurrent_requests`
of the environment says; its log shows what it waits for. *It holds:* the judge cannot tell; give it
more traffic or time, or mark it failed. *It was rolled back:* the log of `settle` has the figures
of both sides; the release is remembered as rejected and comes back only with `force` and a reason.
*It is refused for a freeze or quiet hours:* promote it again when they are over, or now with *Wait
for a window*, or with `force` and a reason. *The triggerer died:* the next one goes on; if none
does within the lease, the guard returns the traffic by itself.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from trainyard_airflow.approve_operator import TASK as APPROVE_TASK
from trainyard_airflow.approve_operator import ApproveOperator
from trainyard_airflow.dag_defaults import (
    DEFAULT_ARGS,
    START_DATE,
    Tag,
    environments,
    model_param,
    promotion_stuck_after,
    reason_param,
    release_param,
    stuck_alert,
    wait_for_window_param,
)
from trainyard_airflow.permits import access_control
from trainyard_airflow.retries import STEP_RETRIES, STEP_RETRY_POLICY
from trainyard_airflow.rollout_operator import (
    RolloutOperator,
    SettleOperator,
    VerifyReleaseOperator,
)

EXAMPLE_RELEASE = "model-0123456789ab"

for name, environment in environments().items():
    with DAG(
        f"neuron_promote__{name}",
        dag_display_name=f"Neuron promote: {name}",
        description=environment.description or f"Move the traffic of {name} to a release.",
        doc_md=__doc__,
        schedule=None,
        start_date=START_DATE,
        catchup=False,
        max_active_runs=16,
        default_args=DEFAULT_ARGS,
        deadline=stuck_alert(promotion_stuck_after(environment), name),
        tags=[Tag.TRAINYARD, Tag.PROMOTE, Tag.TRAFFIC],
        access_control=access_control(
            [environment.allowed.promote], answers=environment.allowed.approve
        ),
        params={
            "model": model_param(),
            "release": release_param(EXAMPLE_RELEASE, optional=False),
            "wait_for_window": wait_for_window_param(),
            "force": Param(
                False,
                type="boolean",
                title="Force",
                description_md="Promote even if this release was rejected before, or the "
                "environment is frozen or in its quiet hours. **Needs a reason below**; without "
                "one the run is refused.",
                section="Why",
            ),
            "reason": reason_param("Needed with *Force*; kept in the channel's history."),
        },
    ):
        verify = VerifyReleaseOperator(
            task_id="verify",
            task_display_name="Verify the release",
            environment=name,
            doc_md="Check signature, target, rejections and devices before anything is touched.",
        )
        rollout = RolloutOperator(
            task_id="rollout",
            task_display_name="Roll out",
            environment=name,
            kind="promote",
            execution_timeout=None,
            doc_md="Deploy, warm up, shift traffic, look, bake. The log has one line an event.",
        )
        settle = SettleOperator(
            task_id="settle",
            task_display_name="Settle",
            environment=name,
            # Retried while the store is away; that a release was not promoted is final.
            retries=STEP_RETRIES,
            retry_policy=STEP_RETRY_POLICY,
            doc_md="Leave the channel with a proven release; tell whether this one was promoted.",
        ).as_teardown(on_failure_fail_dagrun=True)
        verify >> rollout >> settle
        if environment.approval is not None:
            approve = ApproveOperator(
                task_id=APPROVE_TASK,
                task_display_name="Wait for approval",
                environment=name,
                response_timeout=timedelta(seconds=environment.approval.timeout_s),
                retries=STEP_RETRIES,
                retry_policy=STEP_RETRY_POLICY,
                doc_md="Wait until people have approved. No answer in time is a no.",
            )
            verify >> approve >> rollout
