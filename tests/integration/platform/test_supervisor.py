"""The supervisor with real processes: it restarts what ends, leaves no leftovers, stops it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainyard.platform.paths import PlatformPaths
from trainyard.platform.supervisor import read_components, restart_delay_s, session_members

pytestmark = pytest.mark.integration

PROGRAM = """
import sys
from trainyard.platform import supervisor
from trainyard.platform.components import Component
from trainyard.platform.paths import PlatformPaths
from trainyard.settings import Settings
from pathlib import Path

home = Path(sys.argv[1])
settings = Settings(home=home, airflow_database="sqlite")
# A component with a child of its own, as the scheduler has its workers.
parts = (
    Component("parent", ("/bin/sh", "-c", "sleep 600 & exec sleep 601"), {}, home),
    Component("other", ("/bin/sleep", "602"), {}, home),
)
supervisor.service_components = lambda settings: parts
supervisor.migrate_argv = lambda: ("/bin/true",)
sys.exit(supervisor.main_with(settings))
"""


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def pid_of(paths: PlatformPaths, name: str) -> int | None:
    record = read_components(paths).get(name, {})
    pid = record.get("pid")
    return pid if isinstance(pid, int) and psutil.pid_exists(pid) else None


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def start(home: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start_one() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(home)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "TRAINYARD_HOME": str(home)},
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait()
    for record in read_components(PlatformPaths(home)).values():
        pid = record.get("pid")
        if isinstance(pid, int):
            for member in session_members(pid):
                member.kill()


@pytest.mark.parametrize("victim", ["parent", "other"])
def test_a_killed_component_comes_back_without_its_old_children(
    home: Path, start: Callable[[], subprocess.Popen[bytes]], victim: str
) -> None:
    paths = PlatformPaths(home)
    start()
    first = wait_for(lambda: pid_of(paths, victim), "the first start")
    old = session_members(first)
    os.kill(first, signal.SIGKILL)

    def restarted() -> int | None:
        pid = pid_of(paths, victim)
        return pid if pid != first else None

    wait_for(restarted, "the restart")
    assert not any(process.is_running() for process in old)
    assert read_components(paths)[victim]["restarts"] == 1


def test_it_stops_everything(home: Path, start: Callable[[], subprocess.Popen[bytes]]) -> None:
    paths = PlatformPaths(home)
    supervisor = start()
    leader = wait_for(lambda: pid_of(paths, "parent"), "the start")
    wait_for(lambda: pid_of(paths, "other"), "the start")
    members = session_members(leader)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=600) == 0
    assert not any(process.is_running() for process in members)
    assert {record["pid"] for record in read_components(paths).values()} == {None}


def test_only_one_runs_a_home(home: Path, start: Callable[[], subprocess.Popen[bytes]]) -> None:
    start()
    wait_for(lambda: pid_of(PlatformPaths(home), "other"), "the start")
    assert start().wait(timeout=600) == 75


def test_a_successor_ends_what_a_killed_supervisor_left(
    home: Path, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    paths = PlatformPaths(home)
    first = start()
    left = wait_for(lambda: pid_of(paths, "parent"), "the start")
    first.kill()
    first.wait()
    members = session_members(left)
    assert members

    start()

    def taken_over() -> bool:
        record = json.loads(paths.supervisor_file.read_text())
        return bool(record["components"]["parent"]["pid"] not in (left, None))

    wait_for(taken_over, "the successor")
    assert not any(process.is_running() for process in members)


def test_restarts_slow_down_but_never_stop() -> None:
    delays = [restart_delay_s(failures) for failures in range(1, 20)]
    assert delays[0] == 0.5
    assert delays == sorted(delays)
    assert delays[-1] == 30.0
