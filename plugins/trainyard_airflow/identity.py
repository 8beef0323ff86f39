"""Who asked for a run, and whether they may have what they asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard_airflow.exceptions import StepRefused

if TYPE_CHECKING:
    from trainyard.permissions import Act, Asker

FAB = "airflow.providers.fab.auth_manager.fab_auth_manager.FabAuthManager"
"""The auth manager that makes rights of a DAG's `access_control`."""


def requested_by(context: Any) -> str:
    """Return who asked for the run of this task, or an empty string if Airflow does not know.

    A run that another run has started carries the name of whoever asked for that one.
    """
    return getattr(context["dag_run"], "triggering_user_name", None) or ""


def asker_of(context: Any) -> Asker:
    """Return who asked for the run of this task, and what Airflow has checked about them."""
    from trainyard.permissions import Asker

    run_type = getattr(context["dag_run"], "run_type", "")
    kind = str(getattr(run_type, "value", run_type))
    return Asker(
        requested_by(context),
        checked_roles=kind == "manual" and uses_fab(),
        through_run=kind == "operator_triggered",
    )


def demand_permission(context: Any, act: Act, environment: str = "") -> None:
    """Raise StepRefused with the reason if whoever asked for this run may not do this."""
    from trainyard.permissions import refusal
    from trainyard.settings import get_settings
    from trainyard.spec.loader import load_environments

    environments = load_environments(get_settings().environments)
    why = refusal(environments, act, asker_of(context), environment)
    if why is not None:
        raise StepRefused(str(why))


def uses_fab() -> bool:
    """Tell whether Airflow's rights come from its FAB auth manager."""
    from airflow.configuration import conf

    return bool(conf.get("core", "auth_manager", fallback="") == FAB)
