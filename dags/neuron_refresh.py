"""
### Refresh a model

Looks for a new revision of one model, and releases it once. There is one such DAG for each model
whose spec has a `refresh`, with that spec's schedule and a pause switch of its own.

**What it does.** `check` asks the model's source once which revision is the newest, and what the
toolchain is. If that revision was neither released nor asked for, it starts one run of
`neuron_release`, whose id follows from revision and toolchain, so that however often it is retried
or triggered there is one. While an environment it would go to is frozen, or in its quiet hours, it
waits. It never waits for the release itself.

**Runbook.** *Why did nothing happen?* The task's log and the run's result say so; `trainyard
refresh --dry-run` says it for all models at once. *A revision failed and is left alone:* repair
what was wrong, then trigger this DAG with *Again*. *Stop refreshing a model:* pause its DAG. *The
task says that the spec is wrong:* `trainyard check` names every mistake; the DAG has no schedule
until they are gone. *It must not wait for a window:* trigger `neuron_release`, then the promotion
with *Force* and a reason.
"""

from __future__ import annotations

from airflow.sdk import DAG, Param

from trainyard_airflow.dag_defaults import (
    DEFAULT_ARGS,
    START_DATE,
    Tag,
    may_release,
    refreshed_models,
)
from trainyard_airflow.permits import access_control
from trainyard_airflow.refresh_operator import RefreshOperator
from trainyard_airflow.retries import STEP_RETRIES, STEP_RETRY_POLICY

# Whoever triggers it asks for a release.
RIGHTS = access_control([may_release()])

for outline in refreshed_models():
    cron = outline.refresh.cron if outline.refresh else None
    with DAG(
        f"neuron_refresh__{outline.model}",
        dag_display_name=f"Neuron refresh: {outline.model}",
        description=outline.problem or f"Release each new revision of {outline.model} once.",
        doc_md=__doc__,
        schedule=cron,
        start_date=START_DATE,
        catchup=False,
        # One may wait for a window while others only look.
        max_active_runs=2,
        default_args=DEFAULT_ARGS,
        tags=[Tag.TRAINYARD, Tag.REFRESH],
        access_control=RIGHTS,
        params={
            "again": Param(
                False,
                type="boolean",
                title="Again",
                description_md="Release the newest revision also if it was released, or failed, "
                "before.",
                section="What",
            ),
        },
    ):
        RefreshOperator(
            task_id="check",
            task_display_name="Check for a new revision",
            model=outline.model,
            cron=cron or "",
            problem=outline.problem,
            retries=STEP_RETRIES,
            retry_policy=STEP_RETRY_POLICY,
            doc_md="Ask source and toolchain once; start the one run of a new revision.",
        )
