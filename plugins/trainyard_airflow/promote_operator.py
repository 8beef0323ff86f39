"""Starts the promotion of a freshly published release, or attaches to it, and waits for its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.triggers.external_task import DagStateTrigger
from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowSkipException
from airflow.utils.state import DagRunState

from trainyard_airflow.exceptions import StepRefused
from trainyard_airflow.results import reported

if TYPE_CHECKING:
    from trainyard.documents.channel import Channel

FINAL = (DagRunState.SUCCESS, DagRunState.FAILED)
REMEMBERED = "promote_run_id"


class EnsurePromotionOperator(BaseOperator):
    """Make sure that `neuron_promote__<environment>` runs for the release of a plan, once.

    A retry attaches to the run that an earlier try started. A cleared task starts a new run only
    when the earlier one has failed and the channel has changed since; asking twice for the same
    change gives the same run id, and Airflow allows that only once.

    Args:
        environment: where the release is to go.
        plan_id: the plan that made the release (templated).
    """

    template_fields: Sequence[str] = ("plan_id",)

    def __init__(self, *, environment: str, plan_id: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.environment = environment
        self.plan_id = plan_id

    @property
    def promote_dag_id(self) -> str:
        """The DAG that promotes to this operator's environment."""
        return f"neuron_promote__{self.environment}"

    def execute(self, context: Context) -> str:
        """Start or find the run, and wait for it in the triggerer."""
        from trainyard_airflow.dag_runs import run_state, start_run

        params = context["params"]
        if self.environment not in (params["environments"] or ()):
            raise AirflowSkipException(f"This release was not asked for {self.environment}.")
        release_id, channel = self._subject()
        memory = context["task_state_store"]
        remembered = memory.get(REMEMBERED)
        run_id = str(remembered or "")
        if not run_id or run_state(self.promote_dag_id, run_id) in (None, "failed"):
            run_id = self._run_id(release_id, channel)
            memory.set(REMEMBERED, run_id)
            started = start_run(
                self.promote_dag_id,
                run_id,
                {
                    "model": channel.model,
                    "release": release_id,
                    **({"wait_for_window": True} if params.get("wait_for_window") else {}),
                },
                note=f"Started by {context['dag'].dag_id} {context['run_id']}",
            )
            self.log.info("%s run %s", "Started" if started else "Found", run_id)
        else:
            self.log.info("Attached to run %s", run_id)
        self.defer(
            trigger=DagStateTrigger(
                dag_id=self.promote_dag_id,
                run_ids=[run_id],
                states=list(FINAL),
                poll_interval=2.0,
            ),
            method_name="finish",
            kwargs={"run_id": run_id, "release_id": release_id},
        )

    def _run_id(self, release_id: str, channel: Channel) -> str:
        """Return the id of the run for the channel as it is.

        A run of that id which succeeded, while the channel still is of the same generation and
        serves something else, promoted in a channel of the same name that is gone: a store that was
        emptied or replaced under the same Airflow. It is no answer to this request.
        """
        from trainyard_airflow.dag_runs import run_state

        first = run_id = f"promote__{release_id}__g{channel.generation}"
        if channel.stable is not None and channel.stable.release_id == release_id:
            return run_id
        number = 1
        while run_state(self.promote_dag_id, run_id) == "success":
            number += 1
            run_id = f"{first}__{number}"
        return run_id

    def _subject(self) -> tuple[str, Channel]:
        """Return the release that the plan published, and the channel that it is to go to."""
        from trainyard.releases import release_of_plan
        from trainyard.rollout.channel_store import read_channel
        from trainyard.settings import get_settings
        from trainyard.spec.loader import load_environments
        from trainyard_airflow.aws_connection import open_task_store

        settings = get_settings()
        store = open_task_store(settings)
        environment = load_environments(settings.environments).environments[self.environment]
        release = release_of_plan(store, self.plan_id, environment.target, settings)
        return release.release_id, read_channel(store, release.model, self.environment)

    def finish(self, context: Context, event: Any, run_id: str, release_id: str) -> str:
        """Fail with a pointer to the promotion's own log unless it succeeded."""
        from trainyard_airflow.dag_runs import run_state

        state = run_state(self.promote_dag_id, run_id)
        if state != DagRunState.SUCCESS:
            with reported(
                context,
                outcome="not_promoted",
                release=release_id,
                environment=self.environment,
                run_id=run_id,
            ):
                raise StepRefused(
                    f"{release_id} was not promoted to {self.environment}: the run {run_id} of "
                    f"{self.promote_dag_id} is {state}. Its task `settle` says why."
                )
        return release_id
