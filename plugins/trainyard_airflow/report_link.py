"""The button of a task that leads to its report on Trainyard's page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseOperator, BaseOperatorLink

from trainyard_airflow.page.plugin import PREFIX, base_path

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

LINKED_STEPS = frozenset({"gate", "publish"})
"""Steps that leave something to look at."""


class ReportLink(BaseOperatorLink):
    """To the report of a gate, or of the release that was published.

    It is made where the task ran, at its end, and needs nothing but what the task was given.
    """

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address, below Airflow's own."""
        step: Any = operator
        parts = [step.plan_id, step.target]
        if step.step == "gate":
            # Of `--gate NAME`.
            parts.append(step.arguments[1])
        return f"{base_path()}{PREFIX}/reports/" + "/".join(quote(part, safe="") for part in parts)
