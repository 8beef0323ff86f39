"""Runs the care of the store as a subprocess on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow.sdk import Context

from trainyard_airflow.exceptions import outcome_exception
from trainyard_airflow.requests import refuse_unknown_keys
from trainyard_airflow.step_operator import StepOperator


class CollectGarbageOperator(StepOperator):
    """Run `trainyard store gc`, and fail with what its exit code means.

    It is a step without a plan: the same subprocess, tied to its task in the same way.

    Args:
        look_only: `True` only says what would go (templated).
    """

    template_fields: Sequence[str] = ("look_only",)

    def __init__(self, *, look_only: str, **kwargs: Any) -> None:
        super().__init__(step="store gc", plan_id="", **kwargs)
        self.look_only = look_only

    def execute(self, context: Context) -> str:
        """Collect, log what the command prints, and return what was done, for people."""
        from trainyard.settings import get_settings

        # A misspelt `dry_run` would delete.
        refuse_unknown_keys(context["dag_run"].conf, context["dag"].params)
        command = self.command(get_settings().serving_interpreter)
        exit_code = self._run(command, context)
        if exit_code:
            raise outcome_exception(exit_code)(
                f"Garbage collection ended with exit code {exit_code}; its last lines say why."
            )
        return "dry run" if self._is_dry else "collected"

    def command(self, serving_interpreter: Path) -> list[str]:
        """Return the command line; it needs nothing of the serving environment."""
        mode = [] if self._is_dry else ["--delete", "--die-with-parent"]
        return [sys.executable, "-m", "trainyard", "store", "gc", *mode]

    @property
    def _is_dry(self) -> bool:
        return str(self.look_only).lower() != "false"
