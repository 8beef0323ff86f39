"""Pause, resume, finish or abort the rollout under way, as whoever asked for the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from airflow.sdk import BaseOperator, Context

from trainyard.permissions import Act
from trainyard_airflow.exceptions import StepRefused, StepTransient
from trainyard_airflow.identity import demand_permission, requested_by
from trainyard_airflow.links import REQUEST, ChannelLink
from trainyard_airflow.requests import refuse_unknown_keys
from trainyard_airflow.results import reported

if TYPE_CHECKING:
    from trainyard.documents.channel import Channel

Action = Literal["pause", "resume", "promote_now", "abort"]
ACTIONS: tuple[Action, ...] = get_args(Action)

NEEDS: dict[Action, Act] = {
    "pause": "promote",
    "resume": "promote",
    "promote_now": "promote",
    "abort": "rollback",
}
"""What somebody must be allowed to do, for each."""


class ControlOperator(BaseOperator):
    """Write one wish of a person into the channel; the rollout's driver and the guard follow it.

    Args:
        environment: name of the environment.

    Returns one sentence about where the rollout stands now.
    """

    template_fields = ("request",)
    operator_extra_links = (ChannelLink(),)

    def __init__(self, *, environment: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.environment = environment
        self.request = REQUEST

    def execute(self, context: Context) -> str:
        """Raise StepRefused with the reason if it may not or cannot be done."""
        with reported(context, model=context["params"]["model"], environment=self.environment):
            return self._act(context)

    def _act(self, context: Context) -> str:
        from trainyard.errors import TrainyardError
        from trainyard.rollout.driver import summary_of
        from trainyard.settings import get_settings
        from trainyard.wiring import open_rollout

        params = context["params"]
        refuse_unknown_keys(context["dag_run"].conf, context["dag"].params)
        action: Action = params["action"]
        demand_permission(context, NEEDS[action], self.environment)
        rollouts = open_rollout(get_settings())
        wishes: dict[Action, Callable[..., Channel]] = {
            "pause": rollouts.pause,
            "resume": rollouts.resume,
            "promote_now": rollouts.promote_now,
            "abort": rollouts.abort,
        }
        try:
            channel = wishes[action](
                model=params["model"],
                environment=self.environment,
                reason=params["reason"] or "",
                who=requested_by(context),
            )
        except TrainyardError as error:
            raise (StepTransient if error.retryable else StepRefused)(str(error)) from error
        held = rollouts.what_a_pause_holds(channel) if action == "pause" else ()
        summary = " ".join((summary_of(channel), *held))
        self.log.info("%s", summary)
        return summary
