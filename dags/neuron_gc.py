"""
### Collect garbage

Frees what nobody needs in the store: releases that no channel has any more and that are past their
time, the checkpoints, bundles and measurements that only they named, what cut steps left behind,
old plans, logs and locks. Runs once a day, one run at a time, beside everything else.

**What is kept.** What a channel serves or may go back to, recent releases, whatever a plan names
that was active lately, whatever a running step works on, everything young, everything unknown, and
for good what was found out about releases. The settings `TRAINYARD_GC_*` say for how long.

**Runbook.** *What would go?* Trigger it with *Dry run*, or `trainyard store gc`: the log has each
object with the reason. *The store is full:* `trainyard store du` shows where the bytes are and what
this run frees. *It fails with a document that cannot be read:* nothing was deleted; `trainyard
store verify` names what is damaged; bring it back from a backup or remove it. *It was killed:* the
next run finishes. *Something must stay:* promote it, or lengthen `TRAINYARD_GC_KEEP_RELEASES_S`.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from trainyard_airflow.dag_defaults import DEFAULT_ARGS, START_DATE, Tag
from trainyard_airflow.retries import STEP_RETRIES, STEP_RETRY_POLICY
from trainyard_airflow.store_operator import CollectGarbageOperator

with DAG(
    "neuron_gc",
    dag_display_name="Neuron garbage collection",
    description="Free what nobody needs in the store.",
    doc_md=__doc__,
    schedule="@daily",
    start_date=START_DATE,
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    tags=[Tag.TRAINYARD, Tag.STORE],
    params={
        "dry_run": Param(
            False,
            type="boolean",
            title="Dry run",
            description_md="Only say what would go and why the rest stays. Nothing is changed.",
            section="What",
        ),
    },
):
    CollectGarbageOperator(
        task_id="collect",
        look_only="{{ params.dry_run }}",
        retries=STEP_RETRIES,
        retry_policy=STEP_RETRY_POLICY,
        execution_timeout=timedelta(hours=6),
        doc_md="Look twice with a pause between, then delete; the log has a line for each object.",
    )
