"""A step as a subprocess of a task: what it is started with, and what becomes of its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.serving_world import eventually
from tests.unit.plugins.conftest import REPOSITORY, make_context
from tests.unit.yard import Yard
from tests.unit.yard import plan as made_plan

from trainyard.documents.plan import PlannedStep
from trainyard.settings import get_settings

FAKE_STEP = f"""#!{sys.executable}
import json, os, sys, time
from datetime import datetime, timezone
from pathlib import Path

home = Path(os.environ["TRAINYARD_HOME"])
told = json.loads((home / "told.json").read_text())
(home / "heard.json").write_text(
    json.dumps({{"argv": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}})
)
print("first line of the step", flush=True)
print("second line of the step", file=sys.stderr, flush=True)
if told.get("status"):
    from trainyard.documents.status import StepStatus
    from trainyard.store.folder import FolderStore
    from trainyard.store.layout import status_key

    now = datetime.now(timezone.utc)
    status = StepStatus(
        plan_id="adder-plan", started_at=now, updated_at=now, **told["status"]
    )
    key = status_key(status.plan_id, status.step, status.target)
    FolderStore(Path(os.environ["TRAINYARD_STORE"])).put(key, status.to_bytes())
if told.get("waits"):
    sys.stdin.read()
    (home / "stdin-closed").touch()
if told.get("signal"):
    os.kill(os.getpid(), told["signal"])
sys.exit(told.get("exit_code", 0))
"""


@pytest.fixture
def tell(yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what tells the step how to end; it is started in place of the serving Python."""
    program = tmp_path / "step"
    program.write_text(FAKE_STEP)
    program.chmod(0o755)
    monkeypatch.setenv("TRAINYARD_SERVE_PYTHON", str(program))
    yard.home.mkdir(parents=True)

    def tell_it(**how: Any) -> None:
        (yard.home / "told.json").write_text(json.dumps(how))

    return tell_it


def heard(yard: Yard) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((yard.home / "heard.json").read_text())
    return found


def operator(**changes: Any) -> Any:
    from trainyard_airflow.step_operator import StepOperator

    values = {
        "task_id": "compile",
        "step": "compile",
        "plan_id": "adder-plan",
        "target": "cpu",
        "interpreter": "serve",
        **changes,
    }
    return StepOperator(**values)


def status(state: str, **more: Any) -> dict[str, Any]:
    return {"step": "compile", "target": "cpu", "state": state, **more}


class TestOptional:
    @pytest.mark.parametrize(("step", "skipped"), [("measure", False), ("logits", True)])
    def test_a_step_that_nobody_asked_for_is_skipped(
        self, yard: Yard, step: str, skipped: bool
    ) -> None:
        from airflow.sdk.exceptions import AirflowSkipException

        planned = PlannedStep(step="measure", target="cpu", key="k", exists=False, reason="")
        yard.keep_plan(made_plan("adder-plan").model_copy(update={"steps": (planned,)}))
        task = operator(step=step, optional=True)
        if not skipped:
            task.pre_execute(make_context())
            return
        with pytest.raises(AirflowSkipException, match="no step logits"):
            task.pre_execute(make_context())

    def test_any_other_step_needs_no_plan_yet(self) -> None:
        operator(plan_id="none-yet").pre_execute(make_context())


class TestCommand:
    def test_a_step_of_the_serving_environment(self) -> None:
        assert operator().command(Path("/serve/python")) == [
            "/serve/python",
            "-m",
            "trainyard",
            "compile",
            "--plan",
            "adder-plan",
            "--target",
            "cpu",
            "--die-with-parent",
        ]

    def test_a_step_beside_airflow(self) -> None:
        gate = operator(step="gate", interpreter="control", arguments=("--gate", "accuracy"))
        command = gate.command(Path("/serve/python"))
        assert command[0] == sys.executable
        assert command[3:] == [
            "gate",
            "--plan",
            "adder-plan",
            "--target",
            "cpu",
            "--gate",
            "accuracy",
            "--die-with-parent",
        ]

    def test_a_step_for_all_targets(self) -> None:
        assert "--target" not in operator(step="download", target="").command(Path("python"))

    @pytest.mark.parametrize(
        "changes",
        [
            {"step": "plan", "target": "", "arguments": ("--request", '{"model": "adder"}')},
            {"step": "download", "target": ""},
            {"step": "compile"},
            {"step": "measure"},
            {"step": "gate", "arguments": ("--gate", "accuracy")},
            {"step": "gate", "arguments": ("--gate", "latency")},
            {"step": "publish"},
        ],
    )
    def test_the_command_line_takes_every_command(self, changes: dict[str, Any]) -> None:
        """The arguments belong to the real command: parsing them fails for nothing but help."""
        from typer.testing import CliRunner

        from trainyard.cli import app

        arguments = operator(**changes).command(Path("python"))[3:]
        result = CliRunner().invoke(app, [*arguments, "--help"])
        assert result.exit_code == 0
        assert "No such option" not in result.output


class TestOutcome:
    def test_done_returns_the_key_of_what_was_made(
        self, yard: Yard, tell: Callable[..., None]
    ) -> None:
        tell(status=status("done", exit_code=0, output_key="bundles/x/manifest.json"))
        context = make_context()
        assert operator().execute(context) == "bundles/x/manifest.json"
        assert context["target"] == "cpu"

    def test_a_gate_reads_the_status_of_that_gate(
        self, yard: Yard, tell: Callable[..., None]
    ) -> None:
        tell(status=status("done", step="accuracy-gate", output_key="verdicts/x.json"))
        gate = operator(step="gate", status_name="accuracy-gate")
        assert gate.execute(make_context()) == "verdicts/x.json"

    @pytest.mark.parametrize(
        ("code", "name"),
        [
            (10, "StepRefused"),
            (20, "StepRefused"),
            (30, "StepTransient"),
            (40, "StepCapacity"),
            (75, "StepTransient"),
            (1, "StepDefect"),
            (99, "StepDefect"),
        ],
    )
    def test_a_failure_says_why_and_whether_to_try_again(
        self, yard: Yard, tell: Callable[..., None], code: int, name: str
    ) -> None:
        from trainyard_airflow import exceptions

        tell(
            status=status("failed", exit_code=code, reason="It went wrong.", hint="Mend it."),
            exit_code=code,
        )
        with pytest.raises(getattr(exceptions, name)) as raised:
            operator().execute(make_context())
        assert str(raised.value) == "It went wrong. Mend it."

    def test_a_killed_step_left_no_report(self, yard: Yard, tell: Callable[..., None]) -> None:
        from trainyard_airflow.exceptions import StepDefect

        tell(status=status("running", reason="Compiling."), signal=signal.SIGKILL)
        with pytest.raises(StepDefect, match="compile ended with exit code -9 and left no report"):
            operator().execute(make_context())

    def test_an_end_without_a_result_is_a_defect(
        self, yard: Yard, tell: Callable[..., None]
    ) -> None:
        from trainyard_airflow.exceptions import StepDefect

        tell(exit_code=0)
        with pytest.raises(StepDefect, match="exit code 0 and left no report"):
            operator().execute(make_context())

    def test_what_it_prints_is_in_the_log(self, yard: Yard, tell: Callable[..., None]) -> None:
        from structlog.testing import capture_logs

        tell(status=status("done", output_key="k"))
        with capture_logs() as log:
            operator().execute(make_context())
        lines = [entry["event"] for entry in log]
        assert lines[0].startswith("Running: ")
        assert {"first line of the step", "second line of the step"} <= set(lines)


class TestSurroundings:
    def test_it_gets_our_settings_and_who_asked(
        self, yard: Yard, tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        tell(status=status("done", output_key="k"))
        operator().execute(make_context(run_id="manual-7"))
        environment = heard(yard)["environment"]
        assert environment["TRAINYARD_HOME"] == str(yard.home.resolve())
        assert environment["TRAINYARD_STORE"] == str(yard.settings.store_root.resolve())
        assert environment["TRAINYARD_CATALOGUE"] == str(REPOSITORY / "dags" / "models")
        assert environment["TRAINYARD_DAG_RUN"] == "neuron_release/manual-7"
        assert environment["TRAINYARD_REQUESTED_BY"] == "ada"
        assert "AWS_SECRET_ACCESS_KEY" not in environment
        assert "PYTHONDONTWRITEBYTECODE" not in environment

    @pytest.mark.parametrize("step", ["plan", "download"])
    def test_steps_that_read_sources_get_the_hubs_token(
        self, yard: Yard, tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
        monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
        tell(status={"step": step, "state": "done", "output_key": "k"})
        operator(step=step, target="").execute(make_context())
        environment = heard(yard)["environment"]
        assert environment["TRAINYARD_HUB_TOKEN"] == "hf_of_the_environment"
        assert environment["TRAINYARD_HUB_ENDPOINT"] == "https://mirror.example"
        assert "HF_TOKEN" not in environment

    def test_other_steps_get_no_token(
        self, yard: Yard, tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
        monkeypatch.setenv("TRAINYARD_HUB_TOKEN", "hf_of_the_environment")
        tell(status=status("done", output_key="k"))
        operator().execute(make_context())
        assert "hf_of_the_environment" not in heard(yard)["environment"].values()

    def test_the_token_of_a_connection_wins_and_is_seen_by_nobody(
        self, yard: Yard, tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from structlog.testing import capture_logs

        monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
        monkeypatch.setenv(
            "AIRFLOW_CONN_HUB",
            json.dumps({"conn_type": "http", "password": "hf_s3cr3t", "host": "mirror.example"}),
        )
        monkeypatch.setenv("TRAINYARD_HUB_CONNECTION", "hub")
        get_settings.cache_clear()
        tell(status={"step": "download", "state": "done", "output_key": "k"})
        with capture_logs() as log:
            operator(step="download", target="").execute(make_context())
        told = heard(yard)
        assert told["environment"]["TRAINYARD_HUB_TOKEN"] == "hf_s3cr3t"
        assert told["environment"]["TRAINYARD_HUB_ENDPOINT"] == "https://mirror.example"
        assert "hf_s3cr3t" not in json.dumps(told["argv"])
        assert "hf_s3cr3t" not in repr(log)

    @pytest.mark.parametrize(
        ("connection", "words"),
        [(None, "There is no connection 'hub'"), ({"conn_type": "http"}, "has no password")],
    )
    def test_a_connection_that_gives_no_token(
        self,
        yard: Yard,
        tell: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
        connection: Any,
        words: str,
    ) -> None:
        from trainyard_airflow.exceptions import StepRefused

        if connection is not None:
            monkeypatch.setenv("AIRFLOW_CONN_HUB", json.dumps(connection))
        monkeypatch.setenv("TRAINYARD_HUB_CONNECTION", "hub")
        get_settings.cache_clear()
        tell()
        with pytest.raises(StepRefused, match=words):
            operator(step="plan", target="").execute(make_context())

    def test_credentials_of_a_connection_are_in_its_environment_only(
        self, yard: Yard, tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from structlog.testing import capture_logs

        value = {"conn_type": "aws", "login": "AKIAEXAMPLE", "password": "hush-hush"}
        monkeypatch.setenv("AIRFLOW_CONN_YARD_AWS", json.dumps(value))
        monkeypatch.setenv("TRAINYARD_AWS_CONNECTION", "yard_aws")
        get_settings.cache_clear()
        tell(status=status("done", output_key="k"))
        with capture_logs() as log:
            operator().execute(make_context())
        environment = heard(yard)["environment"]
        assert environment["AWS_ACCESS_KEY_ID"] == "AKIAEXAMPLE"
        assert environment["AWS_SECRET_ACCESS_KEY"] == "hush-hush"
        assert "hush-hush" not in json.dumps(heard(yard)["argv"])
        assert "hush-hush" not in repr(log)
        assert not any("AIRFLOW_CONN" in name for name in environment)

    def test_nobody_known_asked(self, yard: Yard, tell: Callable[..., None]) -> None:
        tell(status=status("done", output_key="k"))
        operator().execute(make_context(user=None))
        assert heard(yard)["environment"]["TRAINYARD_REQUESTED_BY"] == ""

    def test_ending_the_task_ends_the_step(self, yard: Yard, tell: Callable[..., None]) -> None:
        from trainyard_airflow.exceptions import StepDefect

        tell(waits=True)
        step = operator()
        errors: list[BaseException] = []

        def execute() -> None:
            try:
                step.execute(make_context())
            except StepDefect as error:
                errors.append(error)

        thread = threading.Thread(target=execute)
        thread.start()
        eventually(lambda: (yard.home / "heard.json").exists(), why="the step runs")
        step.on_kill()
        thread.join(timeout=600)
        assert not thread.is_alive()
        assert "exit code -15" in str(errors[0])

    def test_ending_a_task_whose_step_is_over_does_nothing(
        self, yard: Yard, tell: Callable[..., None]
    ) -> None:
        tell(status=status("done", output_key="k"))
        step = operator()
        step.on_kill()
        step.execute(make_context())
        step.on_kill()

    def test_a_step_notices_that_its_task_was_killed(
        self, yard: Yard, tell: Callable[..., None]
    ) -> None:
        tell(waits=True)
        program = (
            "from tests.unit.plugins.conftest import make_context\n"
            "from tests.unit.plugins.test_step_operator import operator\n"
            "from airflow.sdk.bases.operator import ExecutorSafeguard\n"
            "ExecutorSafeguard.test_mode = True\n"
            "operator().execute(make_context())\n"
        )
        task = subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            step = eventually(lambda: _started(yard), timeout_s=120, why="the step runs")
        finally:
            task.kill()
            task.wait()
        eventually(lambda: (yard.home / "stdin-closed").exists(), why="its input closes")
        psutil.wait_procs([step], timeout=600)
        assert not step.is_running()


def _started(yard: Yard) -> psutil.Process | None:
    try:
        return psutil.Process(heard(yard)["pid"])
    except (FileNotFoundError, json.JSONDecodeError):
        return None


class TestPlan:
    PARAMS = {  # noqa: RUF012
        "model": "adder",
        "revision": "r1",
        "targets": [],
        "environments": ["production"],
        "overrides": {"max_num_seqs": 4},
    }

    @pytest.fixture
    def plan(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        from trainyard_airflow.step_operator import PlanOperator

        # The fake step, though the real one runs beside Airflow.
        monkeypatch.setattr(
            sys, "executable", str(get_settings().serve_python or get_settings().home)
        )
        return PlanOperator(task_id="plan", plan_id="adder-plan")

    def test_it_asks_for_what_the_run_asks_for(
        self, yard: Yard, tell: Callable[..., None], plan: Any
    ) -> None:
        tell(status=status("done", step="plan", target="", output_key="plans/adder-plan.json"))
        context = make_context(self.PARAMS, conf={"model": "adder"})
        assert plan.execute(context) == "plans/adder-plan.json"
        argv = heard(yard)["argv"]
        assert argv[:5] == ["-m", "trainyard", "plan", "--plan", "adder-plan"]
        assert json.loads(argv[argv.index("--request") + 1]) == {
            "model": "adder",
            "revision": "r1",
            "targets": [],
            "environments": ["production"],
            "overrides": {"max_num_seqs": 4},
            "accept_unproven": False,
        }

    def test_it_refuses_keys_that_it_does_not_know(
        self, yard: Yard, tell: Callable[..., None], plan: Any
    ) -> None:
        from trainyard_airflow.exceptions import StepRefused

        tell(status=status("done", step="plan", target="", output_key="k"))
        context = make_context(self.PARAMS, conf={"modle": "adder", "revison": "r2"})
        with pytest.raises(StepRefused, match=r"unknown keys: modle, revison\. Known are: env"):
            plan.execute(context)
        assert not (yard.home / "heard.json").exists()
        result = context["ti"].pushed["return_value"]
        assert (result["outcome"], result["model"]) == ("refused", "adder")
        assert "unknown keys: modle, revison" in result["reason"]

    def test_why_it_refuses_is_in_the_runs_result(
        self, yard: Yard, tell: Callable[..., None], plan: Any
    ) -> None:
        from trainyard_airflow.exceptions import StepRefused

        failed = status("failed", step="plan", target="", reason="No such revision.", exit_code=10)
        tell(status=failed, exit_code=10)
        context = make_context(self.PARAMS)
        with pytest.raises(StepRefused):
            plan.execute(context)
        assert context["ti"].pushed["return_value"] == {
            "outcome": "failed",
            "reason": "No such revision.",
            "step": "plan",
            "target": "",
        }
