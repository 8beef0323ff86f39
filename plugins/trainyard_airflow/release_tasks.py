"""The small Python tasks of `neuron_release`: they read documents and decide nothing."""

from __future__ import annotations

import logging
from typing import Any

from airflow.sdk import result, task

from trainyard_airflow.assets import PUBLISHED, published_asset, release_extra
from trainyard_airflow.exceptions import StepRefused

log = logging.getLogger(__name__)


@task(task_display_name="List the targets")
def plan_targets(plan_id: str, kind: str = "") -> list[str]:
    """Return the names of the plan's targets, for one mapped task group each.

    Args:
        plan_id: the plan.
        kind: of device; only the targets that compute on it. Empty: all.
    """
    from trainyard.documents.plan import Plan
    from trainyard.kubernetes.step_size import kind_of
    from trainyard.settings import get_settings
    from trainyard.steps.plan import explain
    from trainyard.store.documents import read_document
    from trainyard.store.layout import plan_key
    from trainyard_airflow.aws_connection import open_task_store

    plan = read_document(open_task_store(get_settings()), plan_key(plan_id), Plan)
    for row in explain(plan):
        log.info("%s", row)
    return [
        planned.target.name for planned in plan.targets if kind in ("", kind_of(planned.target))
    ]


@result
@task(
    task_display_name="Collect the releases",
    trigger_rule="all_done",
    multiple_outputs=False,
    outlets=[PUBLISHED],
)
def collect_releases(plan_id: str, outlet_events: Any = None) -> dict[str, str]:
    """Return the release of each target, the run's result; fail if a required target has none.

    Runs whatever became of the targets, because one that is not required may fail. Each release
    gets an event of its model's asset.

    Args:
        plan_id: the plan.
        outlet_events: of the task; Airflow gives it.
    """
    from trainyard.documents.plan import Plan
    from trainyard.releases import published_by_plan
    from trainyard.settings import get_settings
    from trainyard.store.documents import read_document
    from trainyard.store.layout import plan_key
    from trainyard_airflow.aws_connection import open_task_store

    settings = get_settings()
    store = open_task_store(settings)
    plan = read_document(store, plan_key(plan_id), Plan)
    releases = published_by_plan(store, plan, settings)
    missing = [
        planned.target.name
        for planned in plan.targets
        if planned.target.required and planned.target.name not in releases
    ]
    if missing:
        raise StepRefused(
            f"No release for the required target {', '.join(missing)}: see its tasks."
        )
    for target, release_id in releases.items():
        log.info("Target %s: release %s", target, release_id)
        if outlet_events is not None:
            extra = release_extra(store, settings, plan.spec.model, release_id)
            outlet_events[PUBLISHED].add(published_asset(plan.spec.model), extra=extra)
    return releases
