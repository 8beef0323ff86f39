"""Runs one step of a release as a subprocess on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowSkipException

from trainyard_airflow.exceptions import outcome_exception
from trainyard_airflow.hub_credentials import SOURCE_STEPS, hub_credentials
from trainyard_airflow.identity import demand_permission, requested_by
from trainyard_airflow.links import ReleaseLink, ReportLink, RunLink
from trainyard_airflow.results import reported

Interpreter = Literal["control", "serve"]


class StepOperator(BaseOperator):
    """Run `trainyard STEP` and turn its status document into the outcome of the task.

    The same command runs on a laptop and in a pod; only this operator knows that it is a subprocess
    here. The step shares the task's process group, so that whatever ends the task ends the step,
    and it watches its standard input, which closes when this process is killed outright.

    Args:
        step: name of the step, as in `trainyard STEP`.
        plan_id: the plan it works on (templated).
        target: the target it works on, if it works on one (templated).
        arguments: further command-line arguments (templated).
        interpreter: `control` runs it beside Airflow, `serve` in the environment that has vLLM.
        status_name: name of the step's status document, where it is not the step's own.
        optional: the task is skipped where the plan does not have the step.

    Returns the key of the document that the step made or found.
    """

    template_fields: Sequence[str] = ("plan_id", "target", "arguments")
    operator_extra_links = (ReportLink(), ReleaseLink(), RunLink())

    def __init__(
        self,
        *,
        step: str,
        plan_id: str,
        target: str = "",
        arguments: Sequence[str] = (),
        interpreter: Interpreter = "control",
        status_name: str = "",
        optional: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.step = step
        self.optional = optional
        self.plan_id = plan_id
        self.target = target
        self.arguments = arguments
        self.interpreter = interpreter
        self.status_name = status_name or step
        self.output_key = ""
        """Key of the document that the step has made, for links."""
        self._process: subprocess.Popen[str] | None = None

    def pre_execute(self, context: Context) -> None:
        """Skip the task if it is optional and nobody asked for it."""
        if self.optional and not self._is_planned():
            raise AirflowSkipException(f"The plan has no step {self.step} for this target.")

    def _is_planned(self) -> bool:
        from trainyard.documents.plan import Plan
        from trainyard.settings import get_settings
        from trainyard.store.documents import read_document
        from trainyard.store.layout import plan_key
        from trainyard_airflow.aws_connection import open_task_store

        plan = read_document(open_task_store(get_settings()), plan_key(self.plan_id), Plan)
        return any((each.step, each.target) == (self.step, self.target) for each in plan.steps)

    def execute(self, context: Context) -> str:
        """Run the step; the run's result says why it failed, if it does."""
        with self.reported(context):
            return self.run_step(context)

    def reported(self, context: Context) -> AbstractContextManager[None]:
        """Let the run's result say why this step fails."""
        return reported(context, outcome="failed", step=self.step, target=self.target)

    def run_step(self, context: Context) -> str:
        """Run the step, log what it prints, and raise what its exit code means."""
        from trainyard.settings import get_settings
        from trainyard.steps.status import read_status
        from trainyard_airflow.aws_connection import open_task_store

        if self.target:
            context["target"] = self.target  # type: ignore[typeddict-unknown-key]
        settings = get_settings()
        exit_code = self._run(self.command(settings.serving_interpreter), context)
        status = read_status(open_task_store(settings), self.plan_id, self.status_name, self.target)
        self.output_key = status.output_key if status is not None else ""
        if exit_code == 0 and status is not None and status.output_key:
            return status.output_key
        if status is not None and status.state == "failed":
            message = f"{status.reason} {status.hint}".strip()
            raise outcome_exception(exit_code)(message, code=status.code)
        raise outcome_exception(exit_code)(
            f"Step {self.step} ended with exit code {exit_code} and left no report."
        )

    def command(self, serving_interpreter: Path) -> list[str]:
        """Return the command line of the step."""
        python = str(serving_interpreter) if self.interpreter == "serve" else sys.executable
        command = [python, "-m", "trainyard", self.step, "--plan", self.plan_id]
        if self.target:
            command += ["--target", self.target]
        return [*command, *self.arguments, "--die-with-parent"]

    def _run(self, command: list[str], context: Context) -> int:
        from trainyard.platform.environment import base_environment, trainyard_environment
        from trainyard.settings import get_settings
        from trainyard_airflow.aws_connection import connection_environment

        settings = get_settings()
        env = base_environment() | trainyard_environment(settings)
        env |= connection_environment(settings)
        if self.step in SOURCE_STEPS:
            env |= hub_credentials(settings.hub_connection)
        else:
            env.pop("TRAINYARD_HUB_TOKEN", None)
        env["TRAINYARD_DAG_RUN"] = f"{context['dag'].dag_id}/{context['run_id']}"
        env["TRAINYARD_REQUESTED_BY"] = requested_by(context)
        self.log.info("Running: %s", " ".join(command))
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        # Leaving the block closes the step's standard input: a step that is still there then ends.
        with self._process as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.log.info("%s", line.rstrip())
        return process.returncode

    def on_kill(self) -> None:
        """End the step when a person or a timeout ends the task."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()


class PlanOperator(StepOperator):
    """Make the plan of a release from the run's params; returns the key of the plan."""

    def __init__(self, *, plan_id: str, **kwargs: Any) -> None:
        super().__init__(step="plan", plan_id=plan_id, **kwargs)

    def execute(self, context: Context) -> str:
        """Refuse a conf that holds anything but the DAG's params, and what whoever asks may not do
        (also what only comes last, the promotions); then plan."""
        from trainyard_airflow.requests import release_request

        with reported(context, model=context["params"]["model"]):
            request = release_request(context)
            demand_permission(context, "release")
            for environment in request.environments:
                demand_permission(context, "promote", environment)
        self.arguments = ("--request", json.dumps(request.model_dump(mode="json")))
        return super().execute(context)
