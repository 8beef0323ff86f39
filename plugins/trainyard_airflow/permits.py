"""The environments file's permissions as rights of DAGs, and as the first task of a rollback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from airflow.sdk import BaseOperator, Context

from trainyard.permissions import Act
from trainyard.spec.ways import Allowed
from trainyard_airflow.identity import demand_permission, requested_by, uses_fab
from trainyard_airflow.links import REQUEST, ChannelLink
from trainyard_airflow.requests import refuse_unknown_keys
from trainyard_airflow.results import reported

AccessControl = dict[str, dict[str, set[str]]]


class PermitOperator(BaseOperator):
    """Refuse what whoever asked for the run may not do; the first task where nothing else checks.

    Args:
        environment: name of the environment.
        act: what they want to do there.
    """

    template_fields = ("request",)
    operator_extra_links = (ChannelLink(),)

    def __init__(self, *, environment: str, act: Act, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.environment = environment
        self.request = REQUEST
        self.act = act

    def execute(self, context: Context) -> str:
        """Raise StepRefused with the reason, or return who asked."""
        about = {"model": context["params"]["model"], "environment": self.environment}
        with reported(context, **about):
            refuse_unknown_keys(context["dag_run"].conf, context["dag"].params)
            demand_permission(context, self.act, self.environment)
        return requested_by(context)


def needs_task(allowed: Allowed | None) -> bool:
    """Tell whether a task has to look who asked: not if Airflow's own rights say all there is."""
    if allowed is None:
        return False
    only_roles = not (allowed.users or allowed.groups)
    return not (only_roles and allowed.roles and uses_fab())


def access_control(
    starts: Sequence[Allowed | None], *, answers: Allowed | None = None
) -> AccessControl | None:
    """Return the rights of a DAG that the roles of these lines get, for FAB's auth manager.

    Args:
        starts: who may start its runs.
        answers: who may answer what its runs ask; that needs no right to start one.

    None, also with any other auth manager, leaves the DAG to the general rights.
    """
    if not uses_fab():
        return None
    rights: AccessControl = {
        role: {"DAGs": {"can_read", "can_edit"}, "DAG Runs": {"can_read"}}
        for role in _roles([answers])
    }
    for role in _roles(starts):
        rights[role] = {"DAGs": {"can_read", "can_edit"}, "DAG Runs": {"can_read", "can_create"}}
    return rights or None


def _roles(allowed: Iterable[Allowed | None]) -> tuple[str, ...]:
    return tuple(role for each in allowed if each is not None for role in each.roles)
