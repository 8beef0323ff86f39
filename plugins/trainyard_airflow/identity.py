"""Names that DAG runs give to what they make, the same for every retry."""

from __future__ import annotations

from typing import Any

from trainyard.canonical import digest, short


def plan_id(model: str, dag_id: str, run_id: str) -> str:
    """Return the id of the plan that a run of `neuron_release` makes."""
    return f"{model}-{short(digest([dag_id, run_id]))}"


def requested_by(context: Any) -> str:
    """Return who asked for the run of this task, or an empty string if Airflow does not know."""
    return getattr(context["dag_run"], "triggering_user_name", None) or ""
