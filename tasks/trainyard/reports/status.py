"""The steps of a plan as a table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from trainyard.documents.status import StepStatus


def status_table(statuses: Iterable[StepStatus]) -> Table:
    """Return one row a step."""
    table = Table("Step", "Target", "State", "Took", "What", box=None, pad_edge=False)
    for status in statuses:
        seconds = (status.updated_at - status.started_at).total_seconds()
        state = "reused" if status.reused else status.state
        what = f"{status.reason} {status.hint}".strip()
        table.add_row(status.step, status.target, state, f"{seconds:.0f} s", what)
    return table
