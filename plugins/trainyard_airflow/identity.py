"""Who asked for a run."""

from __future__ import annotations

from typing import Any


def requested_by(context: Any) -> str:
    """Return who asked for the run of this task, or an empty string if Airflow does not know."""
    return getattr(context["dag_run"], "triggering_user_name", None) or ""
