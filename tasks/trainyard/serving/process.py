"""One server process: start it, find it again, wait until it answers, stop all of it.

No policy lives here: whoever calls decides how often to try, how long to wait and what it means.

A server leads a session of its own, so that all processes it starts can be found by the session
even after the leader died. It is known by pid and start time together (a pid alone may have been
given to somebody else). A detached server outlives its parent and can be adopted by another
process; an attached one ends with its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from trainyard.documents.base import Frozen
from trainyard.errors import OutOfCapacity, Refused, StorageFull, TrainyardError, Transient
from trainyard.failures.recognise import recognise_log

BASE_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LOGNAME", "TMPDIR", "TZ", "USER")
"""All that a server gets of our environment; the rest may hold secrets."""

_POLL_S = 0.2
_KILL_TIMEOUT_S = 30.0
_KILL_POLL_S = 0.05
_TRACKER_S = 2.0
"""Seconds for Python's resource trackers to clean up after processes that were killed."""
_START_TIME_TOLERANCE_S = 1.0
"""The kernel counts in ticks and psutil adds the boot time, which clock changes shift a little."""


class PortTaken(Transient):
    """Somebody else took the port between our choice and the server's start."""


class ServerIdentity(Frozen):
    """All that is needed to find a server again; may be stored as JSON."""

    pid: int
    started_at: float
    """Seconds since 1970, as the operating system tells them."""
    port: int
    log_path: str
    log_offset: int
    """Bytes of the log that belong to earlier starts."""


def free_port() -> int:
    """Return a TCP port that nobody on loopback uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def base_environment() -> dict[str, str]:
    """Return the few variables of our environment that a server may see."""
    return {name: os.environ[name] for name in BASE_VARIABLES if name in os.environ}


class ServerProcess:
    """A server that was started or adopted; not safe for use by several threads at once."""

    def __init__(
        self, identity: ServerIdentity, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.identity = identity
        self._child = child

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        port: int,
        log_path: Path,
        detached: bool = False,
    ) -> ServerProcess:
        """Start a server; its output is appended to `log_path`.

        Args:
            argv: the command, absolute program first.
            env: the lane's variables; they win over the base environment.
            port: where the command listens on loopback.
            log_path: file of the server's output; its folder becomes the working folder. No two
                running servers have the same.
            detached: let the server outlive this process.

        Raises:
            Refused: the program cannot be run, or its folders cannot be written.
            StorageFull: the disk is full.
        """
        log_path = log_path.absolute()
        command = list(argv)
        if not detached:
            command = [sys.executable, "-P", "-m", "trainyard.serving.leash", *command]
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as log:
                offset = log.tell()
                own = {"PYTHONUNBUFFERED": "1", "TMPDIR": str(_make_scratch(log_path))}
                child = subprocess.Popen(
                    command,
                    env={**base_environment(), **own, **env},
                    cwd=log_path.parent,
                    stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            with contextlib.suppress(OSError):
                _scratch(log_path).rmdir()
            raise _cannot_start(argv, log_path, error) from error
        try:
            started_at = psutil.Process(child.pid).create_time()
        except psutil.NoSuchProcess:
            # It ended already and was not waited for by us, so only its time is unknown.
            started_at = time.time()
        identity = ServerIdentity(
            pid=child.pid,
            started_at=started_at,
            port=port,
            log_path=str(log_path),
            log_offset=offset,
        )
        return cls(identity, child)

    @classmethod
    def adopt(cls, identity: ServerIdentity) -> ServerProcess:
        """Return the server of that identity, which another process may have started.

        It may have ended meanwhile; `alive` tells.
        """
        return cls(identity)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.identity.port}"

    def alive(self) -> bool:
        """Tell whether the server's leading process runs."""
        if self._child is not None:
            return self._child.poll() is None
        try:
            process = psutil.Process(self.identity.pid)
            return self._is_ours(process) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def exit_code(self) -> int | None:
        """Exit code (negative: the signal), if the server ended and was started by us."""
        code = self._child.poll() if self._child is not None else None
        return 128 - code if code is not None and code > 128 else code

    def healthy(self, *, timeout_s: float = 2.0) -> bool:
        """Tell whether `/health` answers with 200 now."""
        try:
            # No proxy of the environment may come between us and loopback.
            with httpx.Client(trust_env=False, timeout=timeout_s) as client:
                return client.get(f"{self.url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    def wait_healthy(
        self, timeout_s: float, on_wait: Callable[[float, str], None] | None = None
    ) -> float:
        """Wait until the server answers and return the seconds that took.

        Args:
            timeout_s: seconds to wait at most.
            on_wait: called now and then with the seconds so far and the last line of the log.

        Raises:
            PortTaken, OutOfCapacity, Refused, StorageFull, Transient: the server ended, or did not
            answer in time; see `explain_exit`. The caller still has to `stop` it.
        """
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            if not self.alive():
                raise explain_exit(self.log_text(), self.exit_code)
            if self.healthy():
                return time.monotonic() - began
            if waited > timeout_s:
                raise Transient(
                    f"The server did not answer within {timeout_s:.0f} s; "
                    f"its last words: {self.last_line() or '(none)'}",
                    hint=f"Read {self.identity.log_path}; the limit is "
                    "TRAINYARD_SERVER_START_TIMEOUT_S.",
                )
            if on_wait is not None:
                on_wait(waited, self.last_line())
            time.sleep(_POLL_S)

    def stop(self, drain_s: float = 30.0) -> None:
        """End the server and everything it started; returns when nothing of it is left.

        It is asked first (SIGTERM; vLLM then finishes running requests as far as its own
        `--shutdown-timeout` allows) and forced after `drain_s`. Stopping twice is fine.

        Raises:
            Transient: a process does not end, whatever one does.
        """
        if drain_s > 0 and self.alive():
            self._signal_leader(signal.SIGTERM)
            deadline = time.monotonic() + drain_s
            while self.alive() and time.monotonic() < deadline:
                time.sleep(_POLL_S / 2)
        began = time.monotonic()
        while left := self.processes():
            waited = time.monotonic() - began
            if waited > _KILL_TIMEOUT_S:
                raise Transient(
                    f"Process {left[0].pid} of the server does not end, not even by SIGKILL.",
                    hint="It hangs in the kernel, most likely on a disk; look at `dmesg`.",
                )
            for process in left:
                _kill(process, spare_trackers=waited < _TRACKER_S)
            self._reap()
            time.sleep(_KILL_POLL_S)
        self._reap()
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
        shutil.rmtree(_scratch(Path(self.identity.log_path)), ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of the server's session, the leader included."""
        return list(self._session())

    def memory_bytes(self) -> int:
        """Return the resident memory that all its processes have together now."""
        size = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                size += process.memory_info().rss
        return size

    def log_text(self, max_bytes: int = 1 << 20) -> str:
        """Return what this start wrote to its log, or the last `max_bytes` of it."""
        try:
            with Path(self.identity.log_path).open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self.identity.log_offset, size - max_bytes))
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def log_tail(self, lines: int = 40) -> tuple[str, ...]:
        """Return the last lines of the log, oldest first."""
        return tuple(self.log_text(1 << 16).splitlines()[-lines:])

    def last_line(self) -> str:
        """Return the last line of the log that says something, without its prefix."""
        for line in reversed(self.log_text(1 << 14).splitlines()):
            text = plain_line(line)
            if text:
                return text
        return ""

    def _is_ours(self, process: psutil.Process) -> bool:
        difference = process.create_time() - self.identity.started_at
        return abs(difference) <= _START_TIME_TOLERANCE_S

    def _session(self) -> Iterator[psutil.Process]:
        leader = self.identity.pid
        try:
            if not self._is_ours(psutil.Process(leader)):
                # The kernel gives a pid away only when no session of that number is left.
                return
        except psutil.NoSuchProcess:
            pass
        for process in psutil.process_iter():
            try:
                inside = os.getsid(process.pid) == leader
                if inside and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (ProcessLookupError, PermissionError, psutil.Error):
                continue

    def _reap(self) -> None:
        """Take note of the end of a child, which psutil would take from us."""
        if self._child is not None:
            self._child.poll()

    def _signal_leader(self, number: signal.Signals) -> None:
        try:
            process = psutil.Process(self.identity.pid)
            if self._is_ours(process):
                process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def _kill(process: psutil.Process, *, spare_trackers: bool) -> None:
    """Kill `process`.

    Python's resource trackers remove the semaphores of the processes that they track once these
    are gone, and then end by themselves, if they are spared.
    """
    with contextlib.suppress(psutil.Error):
        if not (spare_trackers and "multiprocessing.resource_tracker" in str(process.cmdline())):
            process.kill()


def _scratch(log_path: Path) -> Path:
    """Return the folder for temporary files of the server with that log.

    It is short, because vLLM puts sockets there, whose paths may have a hundred characters.
    """
    name = hashlib.sha256(str(log_path).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"trainyard-{os.getuid()}-{name}"


def _make_scratch(log_path: Path) -> Path:
    folder = _scratch(log_path)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it belongs to somebody else", str(folder))
    return folder


def _cannot_start(argv: Sequence[str], log_path: Path, error: OSError) -> TrainyardError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StorageFull(
            f"There is no room for the server's log {log_path} or its temporary files.",
            hint="Free some space.",
        )
    if error.filename is not None and str(error.filename) not in {argv[0], sys.executable}:
        return Refused(
            f"The server cannot use {error.filename}: {error.strerror}.",
            hint="Correct the owner and the rights of that folder.",
        )
    return Refused(
        f"The server's program {argv[0]} cannot be run: {error.strerror}.",
        hint="Install the serving environment (`make setup`) or set TRAINYARD_SERVE_PYTHON.",
    )


_PREFIX = re.compile(
    r"^(\([^)]*pid=\d+\)\s*)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?"
)
_PORT_TAKEN = re.compile(r"address already in use|errno 98\b", re.IGNORECASE)
_DISK_FULL = re.compile(r"no space left on device", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"\bMemoryError\b|std::bad_alloc|cannot allocate memory|can't allocate memory"
    r"|not enough memory|Available memory on node"
    r"|No available memory for the cache blocks|shm_broadcast.*No space",
    re.IGNORECASE,
)
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Refused|Exit|Interrupt)\b:? ?.*")
_CONSEQUENCE = re.compile(
    r"EngineDeadError|Engine core initialization failed|WorkerProc initialization failed"
    r"|resource_tracker|CancelledError"
)


def plain_line(line: str) -> str:
    """Return a line of vLLM's log without process name, level, time and module."""
    return _PREFIX.sub("", line).strip()


def explain_exit(log: str, exit_code: int | None) -> TrainyardError:
    """Return the error that says why a server ended that should run.

    Args:
        log: what it wrote.
        exit_code: its exit code, negative for a signal, None if unknown.
    """
    lines = [plain_line(line) for line in log.splitlines()]
    if _PORT_TAKEN.search(log):
        return PortTaken("The server's port was taken by another process.", hint="Try again.")
    if _DISK_FULL.search(log):
        return StorageFull(
            "The server ran out of disk space.", hint="Free some space in the work folder and /tmp."
        )
    known = recognise_log(log)
    if known is not None:
        return known.error()
    cause = _root_cause(lines)
    if exit_code == -signal.SIGKILL or _NO_MEMORY.search(log):
        what = cause or "it was killed (SIGKILL), most likely by the kernel for lack of memory"
        return OutOfCapacity(
            f"The server ran out of memory: {what}.",
            hint="Free memory, or lower the target's kv_cache_gib or max_num_batched_tokens.",
            code="host-out-of-memory",
        )
    if exit_code in {-signal.SIGTERM, -signal.SIGINT} and not cause:
        return Transient("The server was stopped from outside.", hint="Try again.")
    if exit_code in {-signal.SIGILL, -signal.SIGSEGV}:
        name = signal.Signals(-exit_code).name
        return Refused(
            f"The server crashed ({name}).",
            hint="Compiled code that does not fit this processor crashes like this; "
            "look at the end of the server's log.",
        )
    how = "" if exit_code is None else f" with exit code {exit_code}"
    last = next((line for line in reversed(lines) if line), "(it wrote nothing)")
    return Refused(
        f"The server ended{how}: {cause or last}",
        hint="Look at the end of the server's log.",
    )


def _root_cause(lines: Sequence[str]) -> str:
    """Return the first exception that is not merely the consequence of another one."""
    for index, line in enumerate(lines):
        if not _EXCEPTION.match(line) or _CONSEQUENCE.search(line):
            continue
        # pydantic puts the reason on the lines below.
        detail = [part for part in lines[index + 1 : index + 3] if part.startswith("Value error")]
        text = detail[0].removeprefix("Value error, ") if detail else line
        return text.split(" [type=")[0].rstrip(" .")
    return ""
