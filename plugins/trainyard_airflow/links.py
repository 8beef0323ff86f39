"""Links on tasks to what they are about, in the Trainyard page.

A link is made in the worker when the task has run, and kept; the interface only shows it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey


REQUEST = "{{ params | tojson }}"
"""Template of what a run asks for: links of operators that keep it as `request` are made of it."""


def airflow_url() -> str:
    """Return Airflow's own address without a slash at its end; empty if it is not configured."""
    from airflow.configuration import conf

    return str(conf.get("api", "base_url", fallback="") or "").rstrip("/")


def page_url(path: str) -> str:
    """Return the address of a page of Trainyard inside Airflow's interface.

    Args:
        path: below the page's own root, such as `channels/production/adder`.
    """
    return f"{airflow_url()}/plugin/trainyard/trainyard/{path}"


class RunLink(BaseOperatorLink):
    """The tab of the run: what the run is about, as it happens."""

    name = "What this run does"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address."""
        dag_id, run_id = quote(ti_key.dag_id, safe=""), quote(ti_key.run_id, safe="")
        return f"{airflow_url()}/dags/{dag_id}/runs/{run_id}/plugin/trainyard-run"


class ChannelLink(BaseOperatorLink):
    """The channel that a task moves: the rollout with its evidence, and the buttons."""

    name = "The rollout"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address; empty if the request cannot be read."""
        model = _params(operator).get("model")
        environment = getattr(operator, "environment", "")
        return page_url(f"channels/{environment}/{model}") if model and environment else ""


class ReleaseLink(BaseOperatorLink):
    """The release that a task is about, or has made."""

    name = "The release"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address; empty as long as there is no release."""
        key = str(getattr(operator, "output_key", "") or "")
        if key.startswith("releases/"):
            return page_url(key.removesuffix(".json"))
        params = _params(operator)
        model, release = params.get("model"), params.get("release")
        return page_url(f"releases/{model}/{release}") if model and release else ""


class ReportLink(BaseOperatorLink):
    """The report of a gate, or of a release that was published: figures, bounds and plots."""

    name = "The report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address; empty for steps without one."""
        key = str(getattr(operator, "output_key", "") or "")
        if key.startswith("releases/"):
            return page_url(f"{key.removesuffix('.json')}/report")
        if not key.startswith("verdicts/"):
            return ""
        _, plan_id, target, name = key.split("/")
        return page_url(f"reports/{plan_id}/{target}/{name.removesuffix('.json')}")


def _params(operator: Any) -> dict[str, Any]:
    """Return the params of the run, as far as the operator keeps them."""
    try:
        found = json.loads(getattr(operator, "request", "") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
