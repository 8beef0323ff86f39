from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from trainyard.errors import OutOfCapacity, Refused, StorageFull, TrainyardError, Transient
from trainyard.serving.process import (
    PortTaken,
    ServerIdentity,
    ServerProcess,
    explain_exit,
    free_port,
    plain_line,
)

SERVER = """
    import http.server, os, subprocess, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        def log_message(self, *words):
            pass

    print("environment:", *sorted(os.environ), flush=True)
    # Like vLLM: a second process, which does not watch its parent.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

Start = Callable[..., ServerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a small server, or a program of one's own."""
    started: list[ServerProcess] = []

    def start(program: str = SERVER, *, detached: bool = False, **env: str) -> ServerProcess:
        port = free_port()
        argv = [sys.executable, "-c", textwrap.dedent(program), str(port)]
        process = ServerProcess.start(
            argv, env, port=port, log_path=tmp_path / "server" / "log", detached=detached
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.stop(0)


def runs(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that ended may still wait for its parent to notice."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("detached", [False, True])
def test_a_server_starts_answers_and_ends_with_all_it_started(start: Start, detached: bool) -> None:
    process = start(detached=detached)
    seconds = process.wait_healthy(30)
    assert 0 < seconds < 30
    assert process.alive()
    assert process.exit_code is None
    members = process.processes()
    assert len(members) >= 2
    process.stop(drain_s=10)
    assert not process.alive()
    assert not process.healthy()
    assert not [member for member in members if runs(member)]
    process.stop(drain_s=10)


def test_what_a_killed_leader_leaves_behind_is_found_and_ended(start: Start) -> None:
    process = start(detached=True)
    process.wait_healthy(30)
    orphans = [p for p in process.processes() if p.pid != process.identity.pid]
    os.kill(process.identity.pid, signal.SIGKILL)
    wait_until(lambda: not process.alive())
    assert process.exit_code == -signal.SIGKILL
    assert {p.pid for p in process.processes()} == {p.pid for p in orphans}
    process.stop()
    assert process.processes() == []


def test_an_adopted_server_is_the_same_server(start: Start) -> None:
    process = start(detached=True)
    process.wait_healthy(30)
    identity = ServerIdentity.model_validate_json(process.identity.model_dump_json())
    adopted = ServerProcess.adopt(identity)
    assert adopted.alive()
    assert adopted.healthy()
    assert adopted.exit_code is None
    assert adopted.log_text() == process.log_text()
    adopted.stop(drain_s=10)
    assert not adopted.alive()
    assert not process.alive()


def test_a_pid_that_was_given_to_somebody_else_is_left_alone(start: Start) -> None:
    stranger = start(detached=True)
    stranger.wait_healthy(30)
    old = stranger.identity.model_copy(update={"started_at": stranger.identity.started_at - 60})
    mistaken = ServerProcess.adopt(old)
    assert not mistaken.alive()
    assert mistaken.processes() == []
    mistaken.stop()
    assert stranger.alive()


def test_a_server_that_never_was_is_dead(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    identity = ServerIdentity(
        pid=gone.pid, started_at=1.0, port=1, log_path=str(tmp_path / "none"), log_offset=0
    )
    process = ServerProcess.adopt(identity)
    assert not process.alive()
    assert process.log_text() == ""
    assert process.last_line() == ""
    process.stop()


def test_an_attached_server_dies_with_its_parent(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            from pathlib import Path
            from trainyard.serving.process import ServerProcess

            argv = [sys.executable, {str(tmp_path / "server.py")!r}, "{port}"]
            process = ServerProcess.start(argv, {{}}, port={port}, log_path=Path("log"))
            process.wait_healthy(30)
            print(process.identity.model_dump_json(), flush=True)
            time.sleep(600)
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(parent)], cwd=tmp_path, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        process = ServerProcess.adopt(ServerIdentity.model_validate_json(child.stdout.readline()))
        assert process.healthy()
        child.kill()
    wait_until(lambda: not process.processes())
    process.stop()


def test_a_server_sees_only_the_allow_list_and_its_own(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    process = start(LANE_SETTING="1")
    process.wait_healthy(30)
    (line,) = [line for line in process.log_text().splitlines() if line.startswith("environment")]
    seen = set(line.split()[1:])
    assert {"LANE_SETTING", "PATH", "TMPDIR", "PYTHONUNBUFFERED"} <= seen
    assert not {"AWS_SECRET_ACCESS_KEY", "PYTHONDONTWRITEBYTECODE", "TRAINYARD_HOME"} & seen


def test_temporary_files_go_with_the_server(start: Start) -> None:
    process = start(
        """
    import tempfile
    handle, name = tempfile.mkstemp()
    print("made", name, flush=True)
        """
        + SERVER
    )
    process.wait_healthy(30)
    (line,) = [line for line in process.log_text().splitlines() if line.startswith("made")]
    left = Path(line.split()[1])
    assert left.exists()
    assert len(str(left.parent)) < 60, "vLLM puts sockets there, whose paths must be short"
    process.stop()
    assert not left.parent.exists()


def test_the_log_of_earlier_starts_is_kept_but_not_read(start: Start) -> None:
    first = start("print('first')")
    wait_until(lambda: not first.alive())
    second = start("print('second')")
    wait_until(lambda: not second.alive())
    assert second.log_text() == "second\n"
    assert second.log_tail() == ("second",)
    assert Path(second.identity.log_path).read_text() == "first\nsecond\n"


def test_waiting_reports_and_gives_up(start: Start) -> None:
    process = start("import time; print('thinking', flush=True); time.sleep(600)")
    wait_until(lambda: process.last_line() == "thinking")
    told: list[tuple[float, str]] = []
    with pytest.raises(Transient, match="thinking"):
        process.wait_healthy(0.1, lambda seconds, line: told.append((seconds, line)))
    assert told
    assert told[0][1] == "thinking"


@pytest.mark.parametrize("detached", [False, True])
def test_a_server_that_ends_early_is_explained(start: Start, detached: bool) -> None:
    process = start("raise ValueError('no such layer')", detached=detached)
    with pytest.raises(Refused, match="exit code 1: ValueError: no such layer"):
        process.wait_healthy(30)


@pytest.mark.parametrize("detached", [False, True])
def test_a_server_that_is_killed_early_points_to_memory(start: Start, detached: bool) -> None:
    process = start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", detached=detached)
    with pytest.raises(OutOfCapacity, match="memory"):
        process.wait_healthy(30)


def test_a_taken_port_is_told_apart(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = start(SERVER.replace("int(sys.argv[1])", str(other.getsockname()[1])))
        with pytest.raises(PortTaken):
            process.wait_healthy(30)


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Refused, match="nowhere"):
        ServerProcess.start(
            [str(tmp_path / "nowhere")], {}, port=1, log_path=tmp_path / "log", detached=True
        )
    assert not list(tmp_path.glob("trainyard-*"))


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="file"):
        ServerProcess.start(
            [sys.executable], {}, port=1, log_path=tmp_path / "file" / "log", detached=True
        )


def test_a_scratch_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log = tmp_path / "log"
    process = ServerProcess.start([sys.executable, "-c", ""], {}, port=1, log_path=log)
    (scratch,) = tmp_path.glob("trainyard-*")
    process.stop(0)
    (tmp_path / "elsewhere").mkdir()
    scratch.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="belongs to somebody else"):
        ServerProcess.start([sys.executable], {}, port=1, log_path=log)


def test_free_ports_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_resource_trackers_clean_up_after_killed_processes(start: Start, tmp_path: Path) -> None:
    process = start(
        """
    import multiprocessing.shared_memory
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=8)
    print("made", memory.name, flush=True)
        """
        + SERVER
    )
    process.wait_healthy(30)
    (line,) = [line for line in process.log_text().splitlines() if line.startswith("made")]
    left = Path("/dev/shm", line.split()[1])
    assert left.exists()
    process.stop(0)
    assert not left.exists()


VLLM_LOG = """\
(APIServer pid=1) INFO 11-22 12:45:39 [api_utils.py:286] non-default args
(EngineCore pid=2) ERROR 11-22 12:46:48 [core.py:900] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-22 12:46:48 [core.py:900] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-22 12:46:48 [core.py:900]   File "model.py", line 5, in load
(EngineCore pid=2) ERROR 11-22 12:46:48 [core.py:900] {cause}
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.mark.parametrize(
    ("cause", "code", "kind", "word"),
    [
        ("KeyError: 'lm_head.weight'", 1, Refused, "lm_head.weight"),
        ("OSError: [Errno 98] Address already in use", 1, PortTaken, "port"),
        ("OSError: [Errno 28] No space left on device", 1, StorageFull, "disk"),
        ("MemoryError", 1, OutOfCapacity, "memory"),
        (
            "ValueError: Available memory on node 0 (1.0/24.0 GiB) on kv cache allocation is less "
            "than requested memory for kv (8.0 GiB).",
            1,
            OutOfCapacity,
            "8.0 GiB",
        ),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 8589934592 bytes.",
            1,
            OutOfCapacity,
            "8589934592",
        ),
    ],
)
def test_the_root_cause_of_an_early_end_is_found(
    cause: str, code: int, kind: type[TrainyardError], word: str
) -> None:
    error = explain_exit(VLLM_LOG.format(cause=cause), code)
    assert type(error) is kind
    assert word in error.message
    assert "See root cause above" not in error.message
    assert error.hint


def test_the_reason_of_a_refused_setting_is_on_the_line_below() -> None:
    log = (
        "(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for "
        "ModelConfig\n(APIServer pid=1)   Value error, User-specified max_model_len (4096) is "
        "greater than the derived max_model_len (2048). [type=value_error, input_value=x]\n"
    )
    error = explain_exit(log, 1)
    assert "(4096) is greater" in error.message
    assert "type=value_error" not in error.message


@pytest.mark.parametrize(
    ("code", "kind", "word"),
    [
        (-signal.SIGILL, Refused, "SIGILL"),
        (-signal.SIGSEGV, Refused, "SIGSEGV"),
        (-signal.SIGKILL, OutOfCapacity, "SIGKILL"),
        (-signal.SIGTERM, Transient, "from outside"),
        (3, Refused, "exit code 3: the end"),
        (None, Refused, "the end"),
    ],
)
def test_signals_and_exit_codes_are_told(
    code: int | None, kind: type[TrainyardError], word: str
) -> None:
    error = explain_exit("the beginning\nthe end\n\n", code)
    assert type(error) is kind
    assert word in error.message


def test_silence_is_told() -> None:
    assert "wrote nothing" in explain_exit("", 0).message


def test_lines_lose_their_prefix() -> None:
    line = "(Worker pid=16832) INFO 11-22 12:46:19 [base_loader.py:82] Initializing took 0.2 s"
    assert plain_line(line) == "Initializing took 0.2 s"
    assert plain_line("INFO:     Waiting for application startup.").startswith("INFO:")
