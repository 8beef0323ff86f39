"""The agent with real processes: started, watched, adopted, drained, never compiled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from tests.serving_world import (
    ENVIRONMENT,
    MODEL,
    PATIENCE_S,
    FakeLane,
    environment_of,
    eventually,
    make_release,
)

from trainyard.documents.release import Release
from trainyard.errors import Busy
from trainyard.serving.agent import Agent, means_of, stop_all_servers
from trainyard.serving.keeper import processes_in
from trainyard.serving.local_host import LocalHost
from trainyard.serving.protocol import ServerState, ServerStatus
from trainyard.serving.records import ObservedServer, ServingPaths, observed_servers, read_record
from trainyard.settings import Settings
from trainyard.store.folder import FolderStore
from trainyard.store.layout import release_key

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[3]

RUN_AGENT = """
from tests.serving_world import FakeLane
from trainyard.serving.agent import means_of, run_agent
from trainyard.settings import get_settings
settings = get_settings()
run_agent(settings, means_of(settings, lane=lambda name: FakeLane()))
"""


@dataclass
class Yard:
    """A home with an agent in a thread, whose lane starts fake servers."""

    settings: Settings
    lane: FakeLane = field(default_factory=FakeLane)

    def __post_init__(self) -> None:
        self.store = FolderStore(self.settings.store_root)
        self.paths = ServingPaths.of(self.settings)
        self.host = LocalHost(self.settings)
        self.means = means_of(self.settings, self.store, lambda name: self.lane)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start_agent(self) -> None:
        """Run an agent in a thread."""
        self._stop.clear()
        self._thread = threading.Thread(target=Agent(self.means).run, args=(self._stop,))
        self._thread.start()

    def end_agent(self) -> None:
        """End the thread; servers go on."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=PATIENCE_S)
            assert not self._thread.is_alive()
            self._thread = None

    def servers(self) -> list[ServerStatus]:
        """Return all servers of the model."""
        return list(self.host.servers(ENVIRONMENT, MODEL))

    def wait_for(self, *states: ServerState) -> list[ServerStatus]:
        """Return the servers once they have these states."""
        return eventually(
            lambda: self.servers() if [s.state for s in self.servers()] == list(states) else None,
            why=f"servers are {states}",
        )

    def wait_until_none(self) -> None:
        """Wait until there are no servers."""
        eventually(lambda: not self.servers(), why="no servers are left")

    def record(self, index: int = 0) -> ObservedServer:
        """Return a server's record."""
        return observed_servers(self.paths)[index]

    def end(self) -> None:
        """Leave nothing running."""
        self.end_agent()
        stop_all_servers(self.settings)
        self.means.http.close()


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    # Nobody here wants a drain to be given up, however long a busy machine makes it.
    made = Yard(
        Settings(home=tmp_path / "home", guard_interval_s=0.1, drain_timeout_s=2 * PATIENCE_S)
    )
    yield made
    made.end()
    logs = made.paths.home / "logs" / "servers"
    assert not [p for folder in logs.glob("*/*") for p in processes_in(folder)]


@pytest.fixture
def release(yard: Yard) -> Release:
    return make_release(yard.settings, yard.store)


def is_alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_wish_becomes_a_server_that_proved_its_start(yard: Yard, release: Release) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 2)
    first, second = yard.wait_for("ready", "ready")
    assert first.url != second.url
    assert first.message == "No file is new."
    assert (first.release_id, first.restarts) == (release.release_id, 0)
    told = httpx.get(f"{first.url}/v1/told", timeout=PATIENCE_S).json()
    assert told["environment"].get("FAKE") == "1"
    record = yard.record()
    assert record.start_proof is not None
    assert record.start_proof.used_bundle
    assert record.pid == told["pid"]
    assert Path(record.log_path).read_text().startswith("fake starts")


def test_secrets_of_the_agent_do_not_reach_servers(
    yard: Yard, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("TRAINYARD_SIGNING_KEY", "secret")
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    (server,) = yard.wait_for("ready")
    told = httpx.get(f"{server.url}/v1/told", timeout=PATIENCE_S).json()
    assert "secret" not in told["environment"].values()


def test_a_start_that_compiled_is_never_ready(yard: Yard, release: Release) -> None:
    yard.lane = CompilingLane()
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    (server,) = yard.wait_for("failed")
    assert "compiled instead of using its bundle" in server.message
    assert "made-now.so" in server.message
    assert server.url == ""
    assert yard.record().ready_at is None


class CompilingLane(FakeLane):
    """A lane whose servers add a file to their caches."""

    def command(self, target, *, cache_dir: Path, port: int, **others):  # type: ignore[no-untyped-def]
        self.arguments = [f"--compile={cache_dir}"]
        return super().command(target, cache_dir=cache_dir, port=port, **others)


def test_an_unsigned_release_is_never_started(yard: Yard) -> None:
    release = make_release(yard.settings, yard.store, signed=False)
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    (server,) = yard.wait_for("failed")
    assert "is not signed as an in-toto statement" in server.message
    assert yard.record().started_at is None


def test_a_mended_failure_is_tried_again_at_the_next_wish(yard: Yard, release: Release) -> None:
    key = release_key(MODEL, release.release_id)
    stored = yard.store.read(key)
    yard.store.put(key, stored.data.swapcase())
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    yard.wait_for("failed")
    yard.store.put(key, stored.data)
    yard.host.remove(ENVIRONMENT, release.release_id)
    yard.host.deploy(ENVIRONMENT, release, 1)
    yard.wait_for("ready")


def test_a_crashed_server_comes_back_under_its_name(yard: Yard, release: Release) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    (before,) = yard.wait_for("ready")
    kill(yard.record().pid)
    after = eventually(
        lambda: next((s for s in yard.servers() if s.restarts == 1 and s.state == "ready"), None),
        why="it is restarted",
    )
    assert after.name == before.name
    assert after.started_at != before.started_at
    assert httpx.get(f"{after.url}/health", timeout=PATIENCE_S).status_code == 200


def test_a_server_that_keeps_ending_is_failed_and_says_why(yard: Yard, release: Release) -> None:
    yard.lane.arguments = ["--exit-code=3"]
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    (server,) = yard.wait_for("failed")
    assert "told to end" in server.message
    assert "exit code 3" in server.message
    assert "next start in" in server.message
    assert str(yard.record().log_path) in server.message
    yard.lane.arguments = []
    # It is tried again all the same.
    yard.wait_for("ready")


def test_a_server_that_does_not_answer_is_replaced(yard: Yard, release: Release) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    (server,) = yard.wait_for("ready")
    httpx.post(f"{server.url}/sick", timeout=PATIENCE_S)
    (sick,) = yard.wait_for("unhealthy")
    assert "health checks" in sick.message
    after = eventually(
        lambda: next((s for s in yard.servers() if s.restarts == 1 and s.state == "ready"), None),
        why="it is replaced",
    )
    assert after.name == server.name


def stream_that_waits(server: ServerStatus) -> AbstractContextManager[httpx.Response]:
    """Ask a server for two tokens, of which it makes the second one when it is told to."""
    asked = {"stream": True, "tokens": 2, "told": True}
    return httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=PATIENCE_S)


def test_removal_lets_requests_end_first(yard: Yard, release: Release) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    (server,) = yard.wait_for("ready")
    folder = yard.paths.server_folder(ENVIRONMENT, server.name)
    assert folder.is_dir()
    with stream_that_waits(server) as response:
        lines = response.iter_lines()
        next(lines)
        yard.host.remove(ENVIRONMENT, release.release_id)
        yard.wait_for("stopping")
        httpx.post(f"{server.url}/go-on", timeout=PATIENCE_S)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    yard.wait_until_none()
    assert not folder.exists()
    assert observed_servers(yard.paths) == []


def test_a_server_that_is_wished_again_while_it_drains_stays(yard: Yard, release: Release) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    (server,) = yard.wait_for("ready")
    with stream_that_waits(server) as response:
        lines = response.iter_lines()
        next(lines)
        yard.host.remove(ENVIRONMENT, release.release_id)
        yard.wait_for("stopping")
        yard.host.deploy(ENVIRONMENT, release, 1)
        (kept,) = yard.wait_for("ready")
    assert (kept.started_at, kept.restarts) == (server.started_at, 0)


def test_scaling_down_ends_the_last_servers_only(yard: Yard, release: Release) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 2)
    first, _ = yard.wait_for("ready", "ready")
    yard.host.deploy(ENVIRONMENT, release, 1)
    (left,) = yard.wait_for("ready")
    assert (left.name, left.started_at) == (first.name, first.started_at)


def test_the_next_agent_adopts_what_runs_and_ends_what_nobody_wants(
    yard: Yard, release: Release
) -> None:
    other = make_release(yard.settings, yard.store, "v2")
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    yard.host.deploy(ENVIRONMENT, other, 1)
    yard.wait_for("ready", "ready")
    pids = {record.release_id: record.pid for record in observed_servers(yard.paths)}
    yard.end_agent()
    yard.host.remove(ENVIRONMENT, other.release_id)
    yard.start_agent()
    (server,) = yard.wait_for("ready")
    assert yard.record().pid == pids[release.release_id]
    assert server.restarts == 0
    assert not is_alive(pids[other.release_id])


def test_a_process_that_no_record_explains_is_ended(yard: Yard, release: Release) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    yard.wait_for("ready")
    record = yard.record()
    yard.end_agent()
    # As if the agent had been killed between the start and its record.
    path = yard.paths.observed(ENVIRONMENT, record.name)
    lost = record.model_copy(update={"pid": None, "process_started": None, "state": "starting"})
    path.write_text(lost.model_dump_json())
    yard.start_agent()
    yard.wait_for("ready")
    assert yard.record().pid != record.pid
    assert not is_alive(record.pid)


def test_stopping_all_keeps_the_wishes(yard: Yard, release: Release) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    yard.wait_for("ready")
    pid = yard.record().pid
    yard.end_agent()
    stop_all_servers(yard.settings)
    assert not is_alive(pid)
    yard.start_agent()
    (server,) = yard.wait_for("ready")
    assert server.restarts == 0


def start_agent_process(yard: Yard) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **environment_of(yard.settings), "PYTHONPATH": str(REPOSITORY)}
    with (yard.settings.home / "agent.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", RUN_AGENT],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def test_servers_outlive_kill_9_of_the_agent_and_are_adopted(yard: Yard, release: Release) -> None:
    agent = start_agent_process(yard)
    try:
        yard.host.deploy(ENVIRONMENT, release, 1)
        (before,) = yard.wait_for("ready")
        pid = yard.record().pid
        with pytest.raises(Busy, match="agent already runs"):
            stop_all_servers(yard.settings)
        os.killpg(agent.pid, signal.SIGKILL)
        agent.wait(timeout=PATIENCE_S)
        assert httpx.get(f"{before.url}/health", timeout=PATIENCE_S).status_code == 200

        agent = start_agent_process(yard)
        eventually(
            lambda: (yard.settings.home / "run" / "agent.lock").read_text() == str(agent.pid),
            why="the next agent runs",
        )
        (after,) = yard.wait_for("ready")
        assert (yard.record().pid, after.restarts) == (pid, 0)
        # Adopted, so watched: it is not the new agent's child.
        kill(pid)
        eventually(
            lambda: [s for s in yard.servers() if s.restarts == 1 and s.state == "ready"],
            why="it is restarted",
        )
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(timeout=PATIENCE_S) == 0
        assert yard.servers()[0].state == "ready"
    finally:
        if agent.poll() is None:
            agent.kill()
            agent.wait()


def test_a_record_in_the_middle_of_a_stop_is_finished_by_the_next_agent(
    yard: Yard, release: Release
) -> None:
    yard.start_agent()
    yard.host.deploy(ENVIRONMENT, release, 1)
    yard.wait_for("ready")
    yard.end_agent()
    record = yard.record()
    yard.host.remove(ENVIRONMENT, release.release_id)
    then = yard.means.clock() - timedelta(minutes=1)
    stopping = record.model_copy(
        update={"state": "stopping", "stopping_since": then, "terminated_at": then}
    )
    path = yard.paths.observed(ENVIRONMENT, record.name)
    path.write_text(stopping.model_dump_json())
    yard.start_agent()
    yard.wait_until_none()
    assert read_record(path, ObservedServer) is None
    assert not is_alive(record.pid)
