"""
### Watch what serves

Looks after every channel once its rollout is over, by the objectives of the release that serves
(`rollout.slo` of its spec): failed requests, time to the first token, time per output token. Runs
every two minutes; a channel without objectives is not watched, one with a rollout under way is the
judge's.

**What it does.** It counts how fast the objectives' allowance burns, over a long and a short window
each (1 h and 5 min at 14.4 times, 6 h and 30 min at 6 times, 3 d and 6 h at once). When a fast one
burns and the servers of the release before are still warm (`rollback_window_s` of the environment),
it starts `neuron_rollback__<environment>`, once for each rollout. Otherwise it raises an alarm:
this run fails, and the channel's history has it. What cannot be read is neither good nor bad; after
15 minutes without figures that is an alarm of its own. It also ends rollouts whose driver went
away: at once if they were decided, else after `deploy_timeout_s`; people are told 5 minutes after
it saw that nobody drives.

**Runbook.** *A run failed:* its log has every figure. Nothing is told twice; the alarm is over when
the history says so. *It was rolled back:* see the run `watch__…` of the rollback DAG; the release
is not rejected, promote it again when you know why it failed. *Too late for that:* `trainyard
rollback MODEL ENVIRONMENT --reason …` starts the old servers again. *Blind:* are the servers'
metrics and the router reachable from Airflow's workers? *Airflow is down:* `trainyard watch` does
the same once, from any terminal or cron.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from trainyard_airflow.dag_defaults import DEFAULT_ARGS, START_DATE, Tag
from trainyard_airflow.watch_operator import WatchOperator

with DAG(
    "neuron_watch",
    dag_display_name="Neuron watch",
    description="Look after what serves; roll back while the old servers are warm.",
    doc_md=__doc__,
    schedule="*/2 * * * *",
    start_date=START_DATE,
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    tags=[Tag.TRAINYARD, Tag.TRAFFIC, Tag.ROLLBACK],
):
    WatchOperator(
        task_id="watch",
        execution_timeout=timedelta(minutes=10),
        doc_md="One look at every channel; fails if there is something that people must hear of.",
    )
