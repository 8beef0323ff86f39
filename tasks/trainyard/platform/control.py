"""Starting, asking and stopping the embedded platform from outside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from trainyard.errors import Transient
from trainyard.platform.airflow_api import AirflowApi
from trainyard.platform.environment import base_environment, trainyard_environment
from trainyard.platform.paths import PlatformPaths, load_choices
from trainyard.platform.pools import pools_of
from trainyard.platform.supervisor import kill_session, read_components
from trainyard.serving.agent import stop_all_servers
from trainyard.serving.records import proxy_url
from trainyard.settings import Settings
from trainyard.spec.loader import load_environments

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Address:
    """Where people and programs find the platform."""

    airflow_url: str
    username: str
    password: str
    proxy_url: str


def is_running(paths: PlatformPaths) -> bool:
    """Tell whether a supervisor holds this home."""
    if not paths.supervisor_lock.exists():
        return False
    with paths.supervisor_lock.open("r") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def up(settings: Settings, say: Say) -> Address:
    """Start the platform unless it runs, wait until all of it is healthy, and tell where it is.

    Raises:
        Transient: it did not become healthy; the message names the log to read.
    """
    paths = PlatformPaths(settings.home.resolve())
    paths.make()
    if is_running(paths):
        say("The platform already runs.")
    else:
        say("Starting PostgreSQL, Airflow, the agent and the proxy.")
        _start_supervisor(settings, paths)
    address = _wait_until_healthy(settings, paths, say)
    api = AirflowApi(address.airflow_url, address.username, address.password, embedded=True)
    for pool in pools_of(load_environments(settings.environments).steps):
        api.ensure_pool(pool)
    return address


def _start_supervisor(settings: Settings, paths: PlatformPaths) -> None:
    with (paths.logs / "supervisor.log").open("ab") as stream:
        subprocess.Popen(
            [sys.executable, "-m", "trainyard.platform.supervisor"],
            env=base_environment() | trainyard_environment(settings),
            cwd=paths.run,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def address(settings: Settings) -> Address | None:
    """Return where the running platform is, or None if it does not run."""
    url = proxy_url(settings)
    if url is None or not is_running(PlatformPaths(settings.home.resolve())):
        return None
    choices = load_choices(settings)
    return Address(choices.api_url, "admin", choices.admin_password, url)


def _wait_until_healthy(settings: Settings, paths: PlatformPaths, say: Say) -> Address:
    deadline = time.monotonic() + START_TIMEOUT_S
    said = ""
    missing = "the supervisor"
    seen_running = False
    while time.monotonic() < deadline:
        running = is_running(paths)
        if seen_running and not running:
            missing = "the supervisor"
            break
        seen_running = seen_running or running
        missing = _missing_part(settings) if running else "the supervisor"
        if not missing:
            found = address(settings)
            if found is not None:
                return found
        if missing != said:
            say(f"Waiting for {missing}.")
            said = missing
        time.sleep(0.5)
    raise Transient(
        f"The platform did not become healthy: {missing} is missing.",
        hint=f"Read the logs in {paths.logs}; the last lines of supervisor.log: "
        + _tail(paths.logs / "supervisor.log"),
    )


def _tail(path: Path) -> str:
    try:
        return " / ".join(path.read_text(errors="replace").splitlines()[-3:])
    except OSError:
        return "(no such file)"


def _missing_part(settings: Settings) -> str:
    """Return what is not healthy yet, or an empty string."""
    url = proxy_url(settings)
    if url is None or not _answers(f"{url}/-/health"):
        return "the proxy"
    choices = load_choices(settings)
    try:
        health = httpx.get(f"{choices.api_url}/api/v2/monitor/health", timeout=5).json()
    except (httpx.HTTPError, json.JSONDecodeError):
        return "Airflow's API server"
    for part in ("metadatabase", "scheduler", "dag_processor", "triggerer"):
        if (health.get(part) or {}).get("status") != "healthy":
            return f"Airflow's {part.replace('_', ' ')}"
    return ""


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def down(settings: Settings, say: Say) -> int:
    """Stop every process the platform started; return how many had to be killed as leftovers."""
    paths = PlatformPaths(settings.home.resolve())
    supervisor = _supervisor_process(paths)
    if supervisor is not None:
        say("Stopping Airflow, the proxy, the agent and PostgreSQL.")
        supervisor.send_signal(signal.SIGTERM)
        with contextlib.suppress(psutil.TimeoutExpired):
            supervisor.wait(timeout=STOP_TIMEOUT_S)
        if supervisor.is_running():
            kill_session(supervisor.pid)
    for record in read_components(paths).values():
        _kill_recorded(record)
    say("Stopping the servers of all releases.")
    stop_all_servers(settings)
    leftovers = list(processes_of(paths))
    for process in leftovers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(leftovers, timeout=5)
    say("Nothing of the platform runs any more.")
    return len(leftovers)


def remove_database(settings: Settings) -> None:
    """Remove the PostgreSQL cluster of a platform that is stopped, wherever it lies.

    Root's lies outside the home (`PlatformPaths.postgres`): removing the home alone would leave it,
    and the next platform in the same folder would find the runs of the one before.
    """
    shutil.rmtree(PlatformPaths(settings.home.resolve()).postgres, ignore_errors=True)


def _supervisor_process(paths: PlatformPaths) -> psutil.Process | None:
    try:
        record = json.loads(paths.supervisor_file.read_text())
        process = psutil.Process(record["pid"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, psutil.NoSuchProcess):
        return None
    return process if abs(process.create_time() - record["created"]) < 1 else None


def _kill_recorded(record: dict[str, object]) -> None:
    pid, created = record.get("pid"), record.get("created")
    if isinstance(pid, int) and isinstance(created, float):
        with contextlib.suppress(psutil.NoSuchProcess):
            if abs(psutil.Process(pid).create_time() - created) < 1:
                kill_session(pid)


def processes_of(paths: PlatformPaths) -> Iterator[psutil.Process]:
    """Yield the processes whose working folder is inside this home or its database cluster.

    Every component and server is started with such a working folder, and what they start inherits
    it; names and arguments tell nothing, since Airflow and vLLM rewrite theirs.
    """
    own = os.getpid()
    roots = (paths.home, paths.postgres)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            cwd = Path(process.cwd())
            if process.pid != own and any(cwd == r or r in cwd.parents for r in roots):
                yield process
