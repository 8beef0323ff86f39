"""The whole platform in a home of its own, for tests that take releases through all of it.

PostgreSQL, Airflow, the agent, the proxy and vLLM are the real ones; so are the DAG files. The one
thing that differs from the shipped project is a copy of the model's spec with fewer measurements
and shorter waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from trainyard.demo.traffic import Statistics, read_statistics
from trainyard.documents.channel import Channel
from trainyard.documents.plan import plan_id_of_run
from trainyard.documents.status import StepStatus
from trainyard.platform.airflow_api import AirflowApi
from trainyard.platform.control import Address, down, processes_of, up
from trainyard.platform.environment import base_environment, trainyard_environment
from trainyard.platform.paths import PlatformPaths
from trainyard.rollout.channel_store import read_channel
from trainyard.serving.lease import FileLease, LeaseState
from trainyard.serving.local_router import LocalRouter
from trainyard.serving.protocol import RouteStatus
from trainyard.settings import Settings
from trainyard.steps.status import list_statuses
from trainyard.store.factory import open_store
from trainyard.store.protocol import Store

REPOSITORY = Path(__file__).parents[1]
SERVE_PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"
MODEL = "adder"
ENVIRONMENT = "production"
RELEASE = "neuron_release"
PROMOTE = f"neuron_promote__{ENVIRONMENT}"
ROLLBACK = f"neuron_rollback__{ENVIRONMENT}"
ENDED = {"success", "failed"}
PATIENCE_S = 900.0
"""Seconds to wait for a run: nobody asserts that it is quick, only that it ends."""

needs_everything = pytest.mark.skipif(
    not SERVE_PYTHON.exists(), reason="needs the serving environment: `make setup`"
)


def copy_project(
    folder: Path, *, hold_s: tuple[float, float], bake_s: float, environments: str = ""
) -> Path:
    """Write the DAGs into `folder`, with a spec that waits as long as is said, and return it.

    `environments` is the text of another environments file.
    """
    shutil.copytree(
        REPOSITORY / "dags", folder / "dags", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "plugins").symlink_to(REPOSITORY / "plugins")
    if environments:
        (folder / "dags" / "environments.yaml").write_text(environments)
    path = folder / "dags" / "models" / f"{MODEL}.yaml"
    spec = yaml.safe_load(path.read_text())
    for level, prompts in zip(spec["gates"]["latency"]["levels"], (8, 16), strict=True):
        level["num_prompts"] = prompts
    first, second = hold_s
    spec["rollout"] |= {
        "steps": [{"weight": 20, "hold_s": first}, {"weight": 50, "hold_s": second}],
        "bake_s": bake_s,
    }
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return folder


@dataclass
class Platform:
    """A home, everything that runs in it, and what tests ask of it."""

    folder: Path
    """Short: sockets lie below it, and their paths must not be long."""
    settings: Settings
    store: Store
    address: Address | None = None
    training: subprocess.Popen[bytes] | None = None
    traffic: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(
        cls,
        folder: Path,
        *,
        hold_s: tuple[float, float] = (6, 10),
        bake_s: float = 5,
        environments: str = "",
    ) -> Platform:
        """Make a home in `folder`, or use the one that is there."""
        if not (folder / "dags").exists():
            copy_project(folder, hold_s=hold_s, bake_s=bake_s, environments=environments)
        settings = Settings(
            home=folder / "home",
            catalogue=folder / "dags" / "models",
            environments=folder / "dags" / "environments.yaml",
            serve_python=SERVE_PYTHON,
        )
        return cls(folder, settings, open_store(settings))

    @property
    def paths(self) -> PlatformPaths:
        """Where the platform keeps its files."""
        return PlatformPaths(self.settings.home.resolve())

    # --- starting and stopping --------------------------------------------------------------------

    def start(self) -> None:
        """Start the platform, and the training of the model's revisions beside it."""
        self.models.mkdir(parents=True, exist_ok=True)
        env = base_environment() | trainyard_environment(self.settings)
        with self.training_log.open("wb") as log:
            self.training = subprocess.Popen(
                [str(SERVE_PYTHON), "-m", "trainyard.demo.training", "--out", str(self.models)],
                env=env,
                cwd=self.models,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.address = up(self.settings, note)
        for dag_id in (RELEASE, PROMOTE, ROLLBACK):
            self.api.wait_for_dag(dag_id)

    def need(self, *revisions: str) -> None:
        """Wait until these revisions are trained."""

        def ready() -> bool:
            assert self.training is not None
            assert self.training.poll() in (None, 0), self.training_log.read_text()[-2000:]
            return all((self.models / revision).exists() for revision in revisions)

        wait_for(ready, f"the training of {', '.join(revisions)}", timeout_s=PATIENCE_S)

    @property
    def models(self) -> Path:
        """Where the model's revisions are."""
        return self.settings.home / "demo" / "models" / MODEL

    @property
    def training_log(self) -> Path:
        """What the training prints."""
        return self.settings.home / "demo" / "training.log"

    @property
    def api(self) -> AirflowApi:
        """Airflow's REST API."""
        assert self.address is not None
        return AirflowApi(self.address.airflow_url, self.address.username, self.address.password)

    def start_traffic(self, rate: float) -> None:
        """Let clients send `rate` requests a second, in a process of their own."""
        assert self.address is not None
        assert self.traffic is None
        demo = self.settings.home / "demo"
        with (demo / "traffic.log").open("ab") as log:
            self.traffic = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "trainyard.demo.traffic",
                    f"--url={self.url}",
                    f"--model={MODEL}",
                    f"--rate={rate}",
                    f"--stats={self.statistics_file}",
                ],
                env=base_environment(),
                cwd=demo,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop_traffic(self) -> Statistics:
        """End the clients after what they have in flight, and return what they saw."""
        assert self.traffic is not None
        self.traffic.send_signal(signal.SIGTERM)
        assert self.traffic.wait(timeout=600) == 0
        self.traffic = None
        return self.clients

    def stop(self) -> int:
        """Stop everything; returns how many processes were left over."""
        for process in (self.traffic, self.training):
            if process is not None:
                process.kill()
                process.wait()
        self.traffic = self.training = None
        return down(self.settings, note)

    def remove(self) -> None:
        """Remove the home and the database, which may lie elsewhere."""
        shutil.rmtree(self.paths.postgres, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Return whatever runs in this home or was started for it."""
        found = {process.pid: process for process in processes_of(self.paths)}
        home = str(self.settings.home.resolve())
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TRAINYARD_HOME") == home:
                    found[process.pid] = process
        return [process for process in found.values() if _lives(process)]

    # --- looking ----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where clients find the channel."""
        assert self.address is not None
        return f"{self.address.proxy_url}/{ENVIRONMENT}/{MODEL}"

    @property
    def statistics_file(self) -> Path:
        return self.settings.home / "demo" / "traffic.json"

    @property
    def clients(self) -> Statistics:
        """What the clients have seen so far."""
        return read_statistics(self.statistics_file) or Statistics(started_at=0)

    @property
    def channel(self) -> Channel:
        return read_channel(self.store, MODEL, ENVIRONMENT)

    @property
    def stable(self) -> str:
        """The id of the stable release; empty if there is none."""
        track = self.channel.stable
        return track.release_id if track else ""

    @property
    def route(self) -> RouteStatus | None:
        """What the proxy does now."""
        return LocalRouter(self.settings).status(ENVIRONMENT, MODEL)

    @property
    def lease(self) -> LeaseState:
        """Whether somebody drives the rollout now."""
        return FileLease(self.settings).state(ENVIRONMENT, MODEL)

    def plan_id(self, run_id: str) -> str:
        """The plan of a run of the release DAG."""
        return plan_id_of_run(MODEL, RELEASE, run_id)

    def statuses(self, run_id: str) -> dict[str, StepStatus]:
        """The steps of a run of the release DAG, by name."""
        return {each.step: each for each in list_statuses(self.store, self.plan_id(run_id))}

    def release_of(self, run_id: str) -> str:
        """The release that a run published."""
        key = self.statuses(run_id)["publish"].output_key
        return key.rsplit("/", 1)[-1].removesuffix(".json")

    def ask(self, prompt: str = "12+34=") -> tuple[str, str]:
        """Ask the model through the proxy; returns its answer and the release that gave it."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, "stop": ["."]}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
        text: str = answer.json()["choices"][0]["text"]
        return text.strip(), answer.headers["x-trainyard-release"]

    # --- runs -------------------------------------------------------------------------------------

    def trigger(self, dag_id: str, run_id: str, **conf: Any) -> bool:
        """Start a run over the REST API; False if it exists."""
        note(f"{dag_id} {run_id} {json.dumps(conf)}")
        return self.api.trigger(dag_id, run_id, conf)

    def release(
        self,
        run_id: str,
        revision: str,
        *environments: str,
        overrides: Mapping[str, Any] | None = None,
    ) -> bool:
        """Ask for a release over the REST API."""
        return self.trigger(
            RELEASE,
            run_id,
            model=MODEL,
            revision=revision,
            environments=list(environments),
            overrides=dict(overrides or {}),
        )

    def approve(self, dag_id: str) -> str:
        """Wait until a run of a promotion asks people, approve it, and return the run.

        It answers again whenever it is asked again: Airflow takes an answer that comes before it
        has seen the end of the process that asked for a lost task, and tries that again.
        """

        def question() -> dict[str, Any] | None:
            details = self.api.request("GET", f"/api/v2/dags/{dag_id}/dagRuns/~/hitlDetails")
            for each in details.json()["hitl_details"]:
                instance: dict[str, Any] = each["task_instance"]
                if instance["state"] == "awaiting_input" and not each["response_received"]:
                    return instance
            return None

        asked = wait_for(question, f"a question of {dag_id}", timeout_s=PATIENCE_S)
        run_id: str = asked["dag_run_id"]

        def approved() -> bool:
            again = question()
            if again is not None:
                # People are slower than a program.
                time.sleep(5)
                self._answer(dag_id, again, "Approve")
            return self.tasks(dag_id, run_id)[asked["task_id"]] == "success"

        wait_for(approved, f"the approval of {run_id}", timeout_s=PATIENCE_S)
        return run_id

    def _answer(self, dag_id: str, asked: dict[str, Any], option: str) -> None:
        answer = self.api.request(
            "PATCH",
            f"/api/v2/dags/{dag_id}/dagRuns/{asked['dag_run_id']}/taskInstances/"
            f"{asked['task_id']}/{asked['map_index']}/hitlDetails",
            {"chosen_options": [option], "params_input": {"note": "Approved by a test."}},
        )
        assert answer.is_success, answer.text

    def published(self, run_id: str, *, timeout_s: float = PATIENCE_S) -> None:
        """Wait until a run of the release DAG has published its release."""

        def publication() -> bool:
            state = self.api.run_state(RELEASE, run_id)
            assert state not in ENDED, self.describe(RELEASE, run_id)
            status = self.statuses(run_id).get("publish")
            return status is not None and status.state == "done"

        wait_for(publication, f"the publication by {run_id}", timeout_s=timeout_s)

    def ended(self, dag_id: str, run_id: str, *, timeout_s: float = PATIENCE_S) -> str:
        """Wait for the end of a run and return its state."""
        api = self.api

        def state() -> str | None:
            now = api.run_state(dag_id, run_id)
            return now if now in ENDED else None

        try:
            found = wait_for(state, f"the end of {run_id}", timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe(dag_id, run_id)}") from error
        note(f"{run_id}: {found}")
        return found

    def tasks(self, dag_id: str, run_id: str) -> dict[str, str]:
        """The states of a run's tasks, by id (one target each)."""
        return {
            task["task_id"]: str(task["state"]) for task in self.api.task_states(dag_id, run_id)
        }

    def log(self, dag_id: str, run_id: str, task_id: str) -> str:
        """What a task logged in all its tries."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        api = self.api
        tries = api.request("GET", path).json().get("try_number") or 1
        texts = []
        for number in range(1, tries + 1):
            answer = api.request("GET", f"{path}/logs/{number}?full_content=true").json()
            texts += [json.dumps(line, ensure_ascii=False) for line in answer.get("content", [])]
        return "\n".join(texts)

    def describe(self, dag_id: str, run_id: str) -> str:
        """Tell what a reader of a failed test needs."""
        lines = [f"{dag_id} {run_id}: {self.tasks(dag_id, run_id)}"]
        if dag_id == RELEASE:
            for status in self.statuses(run_id).values():
                lines.append(f"  {status.step}: {status.state} {status.reason} {status.hint}")
        rollout = self.channel.rollout
        if rollout is not None:
            lines.append(f"  rollout {rollout.number}: {rollout.phase} {rollout.reason}")
        route = self.route
        if route is not None:
            lines.append(f"  route: {dict(route.weights)} {route.guard} {route.guard_reason}")
        return "\n".join(lines)


@dataclass
class Watch:
    """Looks at the route, the lease and the channel twice a second, in a thread.

    The invariant: whenever the candidate of an unfinished rollout really has traffic, the rollout
    has a driver's living lease.
    """

    platform: Platform
    interval_s: float = 0.5
    violations: list[str] = field(default_factory=list)
    guards: set[str] = field(default_factory=set)
    samples: int = 0
    exposed_samples: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._stopping.wait(self.interval_s):
            self.look()

    def look(self) -> None:
        """Take one sample."""
        # The channel last: a rollout that ended between the readings is over by then.
        lease, route, channel = self.platform.lease, self.platform.route, self.platform.channel
        self.samples += 1
        if route is None or channel.candidate is None or not channel.in_progress:
            return
        self.guards.add(route.guard)
        weight = route.weights.get(channel.candidate.release_id, 0)
        if weight == 0:
            return
        self.exposed_samples += 1
        if lease != "alive":
            self.violations.append(
                f"{channel.candidate.release_id} has {weight} % while the lease is {lease} "
                f"(guard {route.guard}, generation {channel.generation})"
            )


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def note(line: str) -> None:
    """Tell a reader of the test's output what happens."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def wait_for(
    condition: Callable[[], Any], what: str, *, timeout_s: float, pause_s: float = 0.5
) -> Any:
    """Return what `condition` returns once that is true."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain for {what}"
        time.sleep(pause_s)


@contextlib.contextmanager
def running_platform(**how: Any) -> Iterator[Platform]:
    """Start a platform in a new home; afterwards nothing of it is left, neither process nor file.

    With KEEP_HOME in the environment its files stay, for whoever wants to know why a test failed.
    """
    made = Platform.make(Path(tempfile.mkdtemp(prefix="trainyard-e2e-")), **how)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        if os.environ.get("KEEP_HOME"):
            note(f"kept {made.folder} and {made.paths.postgres}")
        else:
            made.remove()
