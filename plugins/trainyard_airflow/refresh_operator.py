"""Checks one model for a new revision, and starts or finds the one run that releases it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.triggers.temporal import DateTimeTrigger
from airflow.sdk import BaseOperator, Context

from trainyard_airflow.exceptions import StepRefused, outcome_exception
from trainyard_airflow.identity import requested_by
from trainyard_airflow.requests import refuse_unknown_keys
from trainyard_airflow.results import reported

if TYPE_CHECKING:
    from trainyard.refresh.check import Check, Refresher


class ReleaseRuns:
    """The runs of `neuron_release`, asked for as a task of Airflow asks."""

    def state(self, run_id: str) -> str:
        """Return the state of a run; empty if there is none. Raises StepTransient."""
        from trainyard.refresh.check import RELEASE_DAG
        from trainyard_airflow.dag_runs import run_state

        return run_state(RELEASE_DAG, run_id) or ""

    def start(self, run_id: str, conf: Mapping[str, Any], note: str) -> bool:
        """Start a run; False if it exists already."""
        from trainyard.refresh.check import RELEASE_DAG
        from trainyard_airflow.dag_runs import start_run

        return start_run(RELEASE_DAG, run_id, conf, note=note)


class RefreshOperator(BaseOperator):
    """Check a model once: its source, its toolchain, and what was asked for before.

    Returns what became of it: `outcome` (`nothing_new`, `started`, `under_way`, `given_up`,
    `deferred`), `reason`, `revision`, and `run_id` or `until` where there is one.

    A new revision that must wait for a window is checked again when the window is over, in the
    triggerer until then, if the schedule does not bring another check before; that one, like every
    run by hand, only says until when.

    Args:
        model: name of the model.
        cron: when its DAG runs; tells whether another check comes in time.
        problem: what is wrong with its spec; empty: nothing that was seen when the DAG was parsed.
    """

    def __init__(self, *, model: str, cron: str = "", problem: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model
        self.cron = cron
        self.problem = problem
        self.returns_dag_result = True

    def execute(self, context: Context) -> dict[str, Any]:
        """Check the model."""
        with reported(context, model=self.model):
            refuse_unknown_keys(context["dag_run"].conf, context["dag"].params)
            if self.problem:
                raise StepRefused(f"The spec of {self.model} is wrong. {self.problem}")
            return self._check(context)

    def resume(self, context: Context, event: Any) -> dict[str, Any]:
        """Check again after a window."""
        return self.execute(context)

    def _check(self, context: Context) -> dict[str, Any]:
        from trainyard.errors import TrainyardError

        try:
            check = self._refresher(context).check(
                self.model, again=bool(context["params"].get("again"))
            )
        except TrainyardError as error:
            raise outcome_exception(error.exit_code)(str(error)) from error
        found = result_of(check)
        self.log.info("%s", found["reason"])
        if found["outcome"] == "given_up":
            self.log.warning("Nobody releases revision %s of %s.", check.revision, self.model)
        until = check.decision.until if check.decision else None
        if until is not None and self._is_last_before(until, context):
            self.log.info("No other check comes before; waiting until %s.", until)
            self.defer(trigger=DateTimeTrigger(moment=until), method_name="resume")
        return found

    def _refresher(self, context: Context) -> Refresher:
        from trainyard.refresh.check import Refresher
        from trainyard.settings import get_settings
        from trainyard.spec.loader import load_environments
        from trainyard_airflow.aws_connection import connection_environment, open_task_store
        from trainyard_airflow.hub_credentials import hub_settings

        settings = hub_settings(get_settings())
        # This process is the task's own. A source in a bucket finds credentials as a step would.
        os.environ.update(connection_environment(settings))
        run = f"{context['dag'].dag_id}/{context['run_id']}"
        who = requested_by(context)
        return Refresher(
            settings,
            open_task_store(settings),
            load_environments(settings.environments),
            ReleaseRuns(),
            asked_by=f"{run} ({who})" if who else run,
        )

    def _is_last_before(self, until: datetime, context: Context) -> bool:
        """Tell whether this is a scheduled run and the schedule brings none until then."""
        if not self.cron or not str(context["run_id"]).startswith("scheduled__"):
            return False
        from airflow.sdk import timezone
        from airflow.timetables.base import TimeRestriction
        from airflow.timetables.trigger import CronTriggerTimetable

        now = timezone.coerce_datetime(datetime.now(UTC))
        following = CronTriggerTimetable(self.cron, timezone="UTC").next_dagrun_info(
            last_automated_data_interval=None,
            restriction=TimeRestriction(earliest=now, latest=None, catchup=True),
        )
        return following is None or following.run_after >= until


def result_of(check: Check) -> dict[str, Any]:
    """Return what became of a model as the result of a run."""
    decision = check.decision
    assert decision is not None
    outcome = decision.outcome
    if outcome == "start":
        # Somebody else may have started the run a moment before.
        outcome = "started" if check.started else "under_way"  # type: ignore[assignment]
    found: dict[str, Any] = {
        "model": check.model,
        "revision": check.revision,
        "outcome": outcome,
        "reason": decision.reason,
    }
    if decision.run_id:
        found["run_id"] = decision.run_id
    if decision.until is not None:
        found["until"] = decision.until.isoformat()
    return found
