"""`trainyard refresh`: which models have a new revision, and what becomes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer
from rich.table import Table

from trainyard.console import fail, say, show
from trainyard.errors import BadInput, NotFound, TrainyardError
from trainyard.platform.airflow_api import AirflowApi
from trainyard.refresh.check import RELEASE_DAG, Check, Refresher, exit_code
from trainyard.settings import Settings
from trainyard.spec.loader import Catalogue, load_environments
from trainyard.spec.outline import refresh_outlines
from trainyard.store.factory import open_store

_WOULD = {
    "nothing_new": "nothing new",
    "under_way": "under way",
    "given_up": "given up",
    "deferred": "waits",
    "start": "would start",
}


class ReleaseRuns:
    """The runs of `neuron_release`, asked for over Airflow's REST API."""

    def __init__(self, api: AirflowApi) -> None:
        """Ask this Airflow."""
        self._api = api

    def state(self, run_id: str) -> str:
        """Return the state of a run; empty if there is none."""
        try:
            return self._api.run_state(RELEASE_DAG, run_id)
        except NotFound:
            return ""

    def start(self, run_id: str, conf: Mapping[str, Any], note: str) -> bool:
        """Start a run; False if it exists already."""
        return self._api.trigger(RELEASE_DAG, run_id, conf, note=note)


def run_refresh(
    settings: Settings,
    models: Sequence[str],
    *,
    again: bool,
    as_json: bool,
    connect: Callable[[], AirflowApi] | None,
) -> None:
    """Check models (none: all that are refreshed), print what became of them, and exit.

    Args:
        settings: of this installation.
        models: names.
        again: ask for another run, whatever became of the others.
        as_json: print JSON.
        connect: returns the Airflow to ask; None only looks.
    """
    try:
        if again and not models:
            raise BadInput(
                "--again without a model would release every model again.", hint="Name the models."
            )
        for model in models:
            Catalogue(settings.catalogue).path(model)
        names = list(dict.fromkeys(models)) or [
            each.model for each in refresh_outlines(settings.catalogue)
        ]
        refresher = Refresher(
            settings,
            open_store(settings),
            load_environments(settings.environments),
            ReleaseRuns(connect()) if connect is not None else None,
            asked_by=settings.requested_by or "trainyard refresh",
        )
        checks = refresher.check_all(names, again=again)
    except TrainyardError as error:
        fail(error)
    if as_json:
        rows = [as_row(each) for each in checks]
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    elif not checks:
        say("No model of the catalogue has a `refresh`.")
    else:
        show(refresh_table(checks))
    code = exit_code(checks)
    if code:
        raise typer.Exit(code)


def as_row(check: Check) -> dict[str, Any]:
    """Return what became of a model as plain JSON."""
    row: dict[str, Any] = {"model": check.model, "revision": check.revision}
    if check.decision is None:
        return row | {"outcome": "failed", "reason": str(check.error)}
    decision = check.decision
    return row | {
        "outcome": decision.outcome,
        "reason": decision.reason,
        "run_id": decision.run_id,
        "until": decision.until.isoformat() if decision.until else None,
        "started": check.started,
    }


def refresh_table(checks: Sequence[Check]) -> Table:
    """Return one row a model."""
    table = Table("Model", "Revision", "Outcome", "Why", box=None, pad_edge=False)
    for check in checks:
        if check.decision is None:
            table.add_row(check.model, "", "failed", str(check.error))
            continue
        word = "started" if check.started else _WOULD[check.decision.outcome]
        if check.decision.outcome != "start" or not check.decision.run_id:
            table.add_row(check.model, check.revision, word, check.decision.reason)
            continue
        why = f"{check.decision.reason} Run {check.decision.run_id} of {RELEASE_DAG}."
        table.add_row(check.model, check.revision, word, why)
    return table
