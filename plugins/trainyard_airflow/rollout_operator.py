"""Operators of a rollout: the checks before it, the wait while it runs, the settling after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from airflow.providers.standard.triggers.temporal import DateTimeTrigger
from airflow.sdk import BaseOperator, Context
from airflow.triggers.base import StartTriggerArgs

from trainyard_airflow.assets import promoted, promoted_asset, release_extra
from trainyard_airflow.exceptions import StepRefused
from trainyard_airflow.identity import demand_permission, requested_by
from trainyard_airflow.links import REQUEST, ChannelLink, ReleaseLink, RunLink
from trainyard_airflow.requests import refuse_unknown_keys
from trainyard_airflow.results import Result, push_result, refusal_of, reported

if TYPE_CHECKING:
    from trainyard.documents.channel import Channel

Kind = Literal["promote", "rollback"]


class RolloutOperator(BaseOperator):
    """Wait for a rollout that the triggerer drives; it needs a worker only to report the end.

    Args:
        environment: name of the environment.
        kind: `promote` moves to a candidate under the judge, `rollback` back to a proven release.

    Returns how it ended: `outcome`, and `reason`, the sentence that sums it up. Raises StepRefused
    unless it was promoted.
    """

    template_fields: Sequence[str] = ("request", "requested_by", "run_id")
    operator_extra_links = (ChannelLink(), ReleaseLink(), RunLink())

    def __init__(self, *, environment: str, kind: Kind, **kwargs: Any) -> None:
        super().__init__(outlets=[promoted(environment)], **kwargs)
        self.environment = environment
        self.kind = kind
        self.request = REQUEST
        self.requested_by = "{{ dag_run.triggering_user_name or '' }}"
        self.run_id = "{{ dag.dag_id }}/{{ run_id }}"
        # Nobody else looks at the conf of a rollback before traffic moves.
        dag = self.get_dag()
        self.known_keys = sorted(dag.params) if dag is not None else []
        self.returns_dag_result = kind == "rollback"
        self.start_from_trigger = True
        self.start_trigger_args = StartTriggerArgs(
            trigger_cls="trainyard_airflow.rollout_trigger.RolloutTrigger",
            trigger_kwargs={
                "environment": environment,
                "kind": kind,
                "request": self.request,
                "requested_by": self.requested_by,
                "run_id": self.run_id,
                "known_keys": self.known_keys,
            },
            next_method="finish",
        )

    def execute(self, context: Context) -> str:
        """Start in the triggerer where Airflow did not do so by itself (`dag.test`)."""
        from trainyard_airflow.rollout_trigger import RolloutTrigger

        self.defer(
            trigger=RolloutTrigger(
                environment=self.environment,
                kind=self.kind,
                request=self.request,
                requested_by=self.requested_by,
                run_id=self.run_id,
                known_keys=self.known_keys,
            ),
            method_name="finish",
        )

    def finish(self, context: Context, event: dict[str, str]) -> Result:
        """Report the outcome."""
        channel = self._note_requester(context)
        outcome, message = event["outcome"], event["message"]
        about = {"model": context["params"]["model"], "environment": self.environment}
        if outcome != "promoted":
            with reported(context, outcome=outcome, **about):
                raise StepRefused(message)
        self.log.info("%s", message)
        if channel is not None:
            self._tell_asset(context, channel)
        if self.kind == "rollback":
            outcome = "rolled_back"
        return {"outcome": outcome, "reason": message, **about}

    def _tell_asset(self, context: Context, channel: Channel) -> None:
        """Have an event of the asset say what is served now, if this run has changed that."""
        from trainyard.errors import TrainyardError
        from trainyard.rollout.driver import number_of_run
        from trainyard.settings import get_settings
        from trainyard_airflow.aws_connection import open_task_store

        run_id = f"{context['dag'].dag_id}/{context['run_id']}"
        if channel.stable is None or number_of_run(channel, run_id) is None:
            return
        settings = get_settings()
        model, release_id = channel.model, channel.stable.release_id
        extra: dict[str, Any] = {
            "model": model,
            "release": release_id,
            "environment": self.environment,
        }
        try:
            extra = release_extra(
                open_task_store(settings), settings, model, release_id, environment=self.environment
            )
        except TrainyardError as error:
            # An adopted release has no manifest; a store that is away is no reason to fail.
            self.log.warning("The event of %s says less than usual: %s", release_id, error)
        outlet = context["outlet_events"][promoted(self.environment)]
        outlet.add(promoted_asset(model, self.environment), extra=extra)

    def _note_requester(self, context: Context) -> Channel | None:
        """Write down who asked, and return the channel if it can be read. Airflow tells workers who
        it was, but not its triggerer."""
        from trainyard.errors import TrainyardError
        from trainyard.settings import get_settings
        from trainyard.wiring import open_rollout

        who = requested_by(context)
        try:
            return open_rollout(get_settings()).note_requester(
                model=context["params"]["model"],
                environment=self.environment,
                run_id=f"{context['dag'].dag_id}/{context['run_id']}",
                who=who,
            )
        except TrainyardError as error:
            # The rollout is over; its outcome matters more than the name of who asked.
            self.log.warning("That %s asked for it could not be written down: %s", who, error)
            return None


class VerifyReleaseOperator(BaseOperator):
    """Check a promotion before anything is touched: conf, who asks, signature, rejections, target,
    devices.

    While the environment is frozen, or in its quiet hours, it refuses as well, or waits in the
    triggerer if the run's `wait_for_window` says so, and then checks everything again.

    Args:
        environment: name of the environment.

    Returns the release id.
    """

    template_fields: Sequence[str] = ("request",)
    operator_extra_links = (ReleaseLink(), ChannelLink())

    def __init__(self, *, environment: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.environment = environment
        self.request = REQUEST

    def execute(self, context: Context) -> str:
        """Raise StepRefused with the reason if the rollout would be refused."""
        params = context["params"]
        with reported(
            context,
            model=params["model"],
            environment=self.environment,
            release=params["release"],
        ):
            refuse_unknown_keys(context["dag_run"].conf, context["dag"].params)
            demand_permission(context, "promote", self.environment)
            return self._check(context)

    def resume(self, context: Context, event: Any) -> str:
        """Check again after a window."""
        return self.execute(context)

    def _check(self, context: Context) -> str:
        from trainyard.errors import Closed, TrainyardError
        from trainyard.settings import get_settings
        from trainyard.wiring import open_rollout

        params = context["params"]
        try:
            summary = open_rollout(get_settings()).check(
                model=params["model"],
                environment=self.environment,
                release_id=params["release"],
                force=bool(params["force"]),
                reason=params["reason"] or "",
                run_id=f"{context['dag'].dag_id}/{context['run_id']}",
            )
        except TrainyardError as error:
            if error.retryable:
                raise
            if isinstance(error, Closed) and params.get("wait_for_window"):
                self.log.info("%s Waiting until %s.", error.message, error.until)
                self.defer(trigger=DateTimeTrigger(moment=error.until), method_name="resume")
            raise StepRefused(str(error)) from error
        self.log.info("%s", summary)
        return str(params["release"])


class SettleOperator(BaseOperator):
    """The teardown of a promotion: whatever happened, the channel ends with a proven release.

    A person may mark the rollout failed or succeeded, or Airflow may lose it. This reads the
    channel, sends all traffic to the stable release if the rollout of this run is unfinished, and
    fails unless the release was promoted, so that the run's state tells the truth.

    Args:
        environment: name of the environment.

    Returns how it ended: `outcome` and `reason`, with `model`, `environment` and `release`.
    """

    template_fields: Sequence[str] = ("request",)
    operator_extra_links = (ChannelLink(), RunLink())

    def __init__(self, *, environment: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.environment = environment
        self.returns_dag_result = True
        self.request = REQUEST

    def execute(self, context: Context) -> Result:
        """Settle the channel; raise StepRefused with the evidence unless it was promoted."""
        from functools import partial

        from trainyard.settings import get_settings
        from trainyard.wiring import open_rollout
        from trainyard_airflow.notify import tell_rollout_event

        params = context["params"]
        run_id = f"{context['dag'].dag_id}/{context['run_id']}"
        notify = partial(tell_rollout_event, run=run_id)
        result = open_rollout(get_settings(), notify=notify).settle(
            model=params["model"],
            environment=self.environment,
            release_id=params["release"],
            run_id=run_id,
        )
        found: Result = {
            "outcome": result.outcome or "nothing",
            "reason": result.summary,
            "model": params["model"],
            "environment": self.environment,
            "release": params["release"],
        }
        self._close_question(params["model"], params["release"], run_id)
        if result.outcome != "promoted":
            # Where nothing began, the reason is what was refused before.
            refusals = (refusal_of(context, task_id) for task_id in ("verify", "approve"))
            refusal = next(filter(None, refusals), None) if result.outcome is None else None
            push_result(context, refusal or found)
            raise StepRefused(result.summary)
        self.log.info("%s", result.summary)
        return found

    def _close_question(self, model: str, release_id: str, run_id: str) -> None:
        """Ask nobody any longer to approve what this run wanted; it is over."""
        from datetime import UTC, datetime

        from trainyard.approvals import close_round
        from trainyard.errors import TrainyardError
        from trainyard.settings import get_settings
        from trainyard.spec.loader import load_environments
        from trainyard_airflow.aws_connection import open_task_store

        settings = get_settings()
        try:
            environment = load_environments(settings.environments).environments[self.environment]
            if environment.approval is not None:
                close_round(
                    open_task_store(settings),
                    model,
                    release_id,
                    environment=self.environment,
                    run_id=run_id,
                    at=datetime.now(UTC),
                    note="its run has ended",
                )
        except (TrainyardError, KeyError) as error:
            # The question ends by itself when its time is up.
            self.log.warning("The question for approval stays open: %s", error)
