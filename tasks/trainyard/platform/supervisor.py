"""The supervisor: starts the platform's components and restarts whichever ends.

Every component leads its own session. Before a component is started again, what is left of its old
session is killed, so that two generations never run side by side. The servers of releases are not
its children: the agent starts them in sessions of their own, and they outlive all of this.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

import psutil

from trainyard.errors import Busy, TrainyardError, Transient
from trainyard.platform import postgres
from trainyard.platform.components import (
    Component,
    database_components,
    migrate_argv,
    service_components,
)
from trainyard.platform.environment import airflow_environment, write_passwords
from trainyard.platform.paths import PlatformPaths, load_choices
from trainyard.settings import Settings, get_settings

log = logging.getLogger(__name__)

POLL_S = 0.25
BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0
STABLE_AFTER_S = 60.0
"""A component that ran this long starts anew with the shortest backoff."""
STOP_TIMEOUT_S = 15.0


def restart_delay_s(quick_failures: int) -> float:
    """Return how long to wait before the next start after so many quick failures in a row."""
    return float(min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** max(0, quick_failures - 1)))


def session_members(session: int) -> list[psutil.Process]:
    """Return the processes of a session, its leader included."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error, PermissionError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def kill_session(session: int, *, timeout_s: float = 5.0) -> None:
    """Kill every process of a session and wait until they are gone."""
    members = session_members(session)
    for process in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(members, timeout=timeout_s)


@dataclass
class Running:
    """A component and the process that runs it now."""

    component: Component
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    """time.monotonic() of the last start."""
    restarts: int = 0
    quick_failures: int = 0
    next_start: float = 0.0
    """time.monotonic() before which it is not started again."""

    def as_record(self) -> dict[str, object]:
        """Return what `run/supervisor.json` says about it."""
        pid = self.process.pid if self.process and self.process.poll() is None else None
        created = None
        if pid is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                created = psutil.Process(pid).create_time()
        return {"pid": pid, "created": created, "restarts": self.restarts}


@dataclass
class Supervisor:
    """Keeps a set of components alive until it is told to stop."""

    settings: Settings
    paths: PlatformPaths
    running: dict[str, Running] = field(default_factory=dict)
    stopping: bool = False
    _lock: IO[str] | None = None

    def run(self) -> None:
        """Start everything and keep it running until SIGTERM or SIGINT.

        Raises:
            Busy: another supervisor runs this home.
            Transient: the database could not be prepared.
        """
        self.paths.make()
        self._take_lock()
        self._end_leftovers()
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            if self.settings.airflow_database == "postgresql":
                postgres.initialise(self.paths)
            self._add(database_components(self.settings))
            self._tick()
            self._migrate()
            self._add(service_components(self.settings))
            while not self.stopping:
                self._tick()
                time.sleep(POLL_S)
        finally:
            self._stop_all()

    def _take_lock(self) -> None:
        self._lock = self.paths.supervisor_lock.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"Another supervisor already runs {self.paths.home}.",
                hint="`trainyard down` stops it.",
            ) from None

    def _end_leftovers(self) -> None:
        """Kill components of an earlier supervisor that was killed itself."""
        for record in read_components(self.paths).values():
            pid, created = record.get("pid"), record.get("created")
            if not isinstance(pid, int) or not isinstance(created, float):
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                if abs(psutil.Process(pid).create_time() - created) < 1:
                    kill_session(pid)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _add(self, components: Sequence[Component]) -> None:
        for component in components:
            self.running[component.name] = Running(component)

    def _migrate(self) -> None:
        if self.settings.airflow_database == "postgresql":
            postgres.ensure_database(self.paths)
        choices = load_choices(self.settings)
        write_passwords(self.settings, choices)
        log_path = self.paths.logs / "migrate.log"
        with log_path.open("ab") as stream:
            done = subprocess.run(
                migrate_argv(),
                env=airflow_environment(self.settings, choices),
                cwd=self.paths.airflow,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0 and not self.stopping:
            raise Transient(
                f"`airflow db migrate` failed with exit code {done.returncode}.",
                hint=f"Read {log_path}.",
            )

    def _tick(self) -> None:
        changed = False
        now = time.monotonic()
        for running in self.running.values():
            if running.process is not None and running.process.poll() is not None:
                self._note_end(running, now)
                changed = True
            if running.process is None and now >= running.next_start:
                self._start(running, now)
                changed = True
        if changed:
            self._write_record()

    def _note_end(self, running: Running, now: float) -> None:
        assert running.process is not None
        code = running.process.returncode
        kill_session(running.process.pid)
        lasted_s = now - running.started
        running.quick_failures = 1 if lasted_s > STABLE_AFTER_S else running.quick_failures + 1
        running.restarts += 1
        delay_s = restart_delay_s(running.quick_failures)
        running.next_start = now + delay_s
        running.process = None
        log.warning(
            "%s ended with code %s after %.0f s; starting it again in %.1f s",
            running.component.name,
            code,
            lasted_s,
            delay_s,
        )

    def _start(self, running: Running, now: float) -> None:
        component = running.component
        with (self.paths.logs / f"{component.name}.log").open("ab") as stream:
            running.process = subprocess.Popen(
                component.argv,
                env=dict(component.env),
                cwd=component.cwd,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running.started = now
        log.info("%s started, pid %s", component.name, running.process.pid)

    def _write_record(self) -> None:
        me = psutil.Process()
        record = {
            "pid": me.pid,
            "created": me.create_time(),
            "components": {name: r.as_record() for name, r in self.running.items()},
        }
        temporary = self.paths.supervisor_file.with_suffix(".new")
        temporary.write_text(json.dumps(record, indent=2))
        temporary.replace(self.paths.supervisor_file)

    def _stop_all(self) -> None:
        """Stop everything; the database goes last, for what others still write."""
        log.info("stopping")
        services = [r for name, r in self.running.items() if name != "postgres"]
        self._stop(services, signal.SIGTERM)
        # SIGINT is PostgreSQL's fast shutdown: it ends sessions instead of waiting for them.
        self._stop([r for name, r in self.running.items() if name == "postgres"], signal.SIGINT)
        self._write_record()

    def _stop(self, group: list[Running], signum: signal.Signals) -> None:
        alive = [r for r in group if r.process is not None and r.process.poll() is None]
        for running in alive:
            assert running.process is not None
            with contextlib.suppress(ProcessLookupError):
                running.process.send_signal(signum)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for running in alive:
            assert running.process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            kill_session(running.process.pid)
            running.process.wait()


def read_components(paths: PlatformPaths) -> dict[str, dict[str, object]]:
    """Return the records of the components, by name; empty if nothing ever ran."""
    try:
        record = json.loads(paths.supervisor_file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    components = record.get("components", {})
    assert isinstance(components, dict)
    return components


def main_with(settings: Settings) -> int:
    """Run the supervisor of a home until it is told to stop; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    try:
        Supervisor(settings, PlatformPaths(settings.home.resolve())).run()
    except TrainyardError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main_with(get_settings()))
