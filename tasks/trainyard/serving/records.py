"""What the local platform writes down about servers: small JSON files below `<home>/run`.

::

    run/desired/<environment>/<release id>.json     what a host was asked for
    run/observed/<environment>/<server name>.json   what the agent made of it
    run/servers/<environment>/<server name>/        the files a server serves, and its caches
    run/leases/<environment>/<model>.json           signs of life of rollouts (`serving.lease`)
    run/guard/<environment>/<model>.json            what the guard must not forget
    run/proxy.json                                  where the proxy listens
    logs/servers/<environment>/<server name>/       a server's working folder: what it printed

Each record is replaced as a whole, so that a reader never sees half of one, whoever dies when.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from trainyard.documents.base import Frozen
from trainyard.errors import BadInput, Busy, OutOfCapacity
from trainyard.names import check_name, check_release_id
from trainyard.serving.process import ServerIdentity, ServerProcess
from trainyard.serving.protocol import ServerState
from trainyard.settings import Settings

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

PORTS = range(20000, 30000)
"""Below the ports that systems hand out to outgoing connections, so that none of those can take a
port while the process it belongs to is being restarted."""


class DesiredServers(Frozen):
    """A wish: so many servers of one release in one environment."""

    environment: str
    model: str
    release_id: str
    replicas: int
    wished_at: datetime
    """When this wish was first made; a new wish makes failed servers start again at once."""


class StartRecord(Frozen):
    """How a server showed that it started from its bundle."""

    used_bundle: bool
    reason: str
    engine_init_s: float | None
    new_files: tuple[str, ...]


class ObservedServer(Frozen):
    """One server as the agent last saw it."""

    name: str
    environment: str
    model: str
    release_id: str
    state: ServerState
    message: str = ""
    pid: int | None = None
    process_started: float | None = None
    """When the kernel started the process, in seconds since 1970; tells it from a later one with
    the same pid."""
    port: int | None = None
    started_at: datetime | None = None
    ready_at: datetime | None = None
    restarts: int = 0
    """Starts after the first."""
    failures: int = 0
    """Failed starts and early crashes in a row."""
    retry_at: datetime | None = None
    """When the next start is due, if it waits for one."""
    wished_at: datetime | None = None
    """The wish that its last start served."""
    cache_dir: str = ""
    cache_before: tuple[str, ...] = ()
    """The compiler's outputs in its caches before this start."""
    log_path: str = ""
    log_offset: int = 0
    start_proof: StartRecord | None = None
    stopping_since: datetime | None = None
    terminated_at: datetime | None = None
    """When it was told to end."""

    @property
    def identity(self) -> ServerIdentity | None:
        """What finds its process again; None if it has none."""
        if self.pid is None or self.process_started is None or self.port is None:
            return None
        return ServerIdentity(
            pid=self.pid,
            started_at=self.process_started,
            port=self.port,
            log_path=self.log_path,
            log_offset=self.log_offset,
        )

    @property
    def alive(self) -> bool:
        """Tell whether its process runs now, whatever the record says of it."""
        return self.identity is not None and ServerProcess.adopt(self.identity).alive()

    @property
    def url(self) -> str:
        """Where it listens; empty until known."""
        return f"http://{LOOPBACK}:{self.port}" if self.port is not None else ""


class ProxyRecord(Frozen):
    """Where the proxy listens."""

    port: int
    """On loopback; kept for later starts, so that clients keep their URL."""
    socket: str
    """Path of the Unix socket that tells the route's status."""
    pid: int
    epoch: str
    """Changes at each start."""


@dataclass(frozen=True)
class ServingPaths:
    """Files and folders of one home that belong to serving."""

    home: Path

    @classmethod
    def of(cls, settings: Settings) -> ServingPaths:
        """Return the paths of the home that `settings` names."""
        return cls(settings.home.resolve())

    @property
    def run(self) -> Path:
        """Everything that describes what runs."""
        return self.home / "run"

    @property
    def proxy(self) -> Path:
        """The proxy's record."""
        return self.run / "proxy.json"

    @property
    def agent_lock(self) -> Path:
        """Held by the one agent of this home."""
        return self.run / "agent.lock"

    @property
    def proxy_lock(self) -> Path:
        """Held by the one proxy of this home."""
        return self.run / "proxy.lock"

    def desired(self, environment: str, release_id: str) -> Path:
        """The wish for servers of a release."""
        name = f"{check_release_id(release_id)}.json"
        return self.run / "desired" / check_name(environment, "Environment") / name

    def observed(self, environment: str, name: str) -> Path:
        """The record of a server."""
        return self.run / "observed" / check_name(environment, "Environment") / f"{name}.json"

    def server_folder(self, environment: str, name: str) -> Path:
        """The files of a server: its model, its caches."""
        return self.run / "servers" / check_name(environment, "Environment") / name

    def server_log(self, environment: str, name: str) -> Path:
        """What a server printed since its last start; its folder is the server's working folder,
        and nobody else's."""
        folder = self.home / "logs" / "servers" / check_name(environment, "Environment")
        return folder / name / "server.log"

    def lease(self, environment: str, model: str) -> Path:
        """The sign of life of the rollout of a channel."""
        return self._of_channel("leases", environment, model)

    def guard(self, environment: str, model: str) -> Path:
        """What the guard of a channel must not forget."""
        return self._of_channel("guard", environment, model)

    def _of_channel(self, kind: str, environment: str, model: str) -> Path:
        folder = self.run / kind / check_name(environment, "Environment")
        return folder / f"{check_name(model, 'Model')}.json"


_LOCK_WAIT_S = 1.0

RecordT = TypeVar("RecordT", bound=Frozen)


def write_record(path: Path, record: Frozen) -> None:
    """Replace the record at `path` durably and as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(record.model_dump_json(indent=2).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise


def read_record(path: Path, kind: type[RecordT]) -> RecordT | None:
    """Return the record at `path`, or None if there is none that this version can read.

    Raises:
        BadInput: this user may not read it.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise _forbidden(path) from error
    except ValidationError as error:
        log.warning("%s is not a %s and is ignored: %s", path, kind.__name__, error)
        return None


def _forbidden(path: Path) -> BadInput:
    return BadInput(
        f"{path} cannot be read: this user may not.",
        hint="Give the command as the user who runs the agent and the proxy of this home, or let "
        "that user give you the right to read and write its folder `run`.",
    )


def may_write(path: Path) -> bool:
    """Tell whether this user may write a record at `path`, whose folders may not be there yet."""
    folder = path.parent
    try:
        while not folder.exists():
            folder = folder.parent
    except PermissionError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _records(folder: Path, kind: type[RecordT]) -> Iterator[tuple[Path, RecordT]]:
    try:
        # A glob passes over what it may not see, and so would tell of no server at all.
        os.scandir(folder).close()
    except PermissionError as error:
        raise _forbidden(folder) from error
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in sorted(folder.glob("*/*.json")):
        record = read_record(path, kind)
        if record is not None:
            yield path, record


def desired_servers(paths: ServingPaths) -> list[DesiredServers]:
    """Return every wish of this home."""
    return [wish for _, wish in _records(paths.run / "desired", DesiredServers)]


def observed_servers(paths: ServingPaths) -> list[ObservedServer]:
    """Return every server's record of this home, as the agent last wrote it."""
    return [server for _, server in _records(paths.run / "observed", ObservedServer)]


def server_name(release_id: str, index: int) -> str:
    """Return the name of a release's server, unique in its environment."""
    return f"{release_id}-{index}"


def proxy_url(settings: Settings) -> str | None:
    """Return the proxy's base URL (`http://127.0.0.1:port`), or None before its first start."""
    record = read_record(ServingPaths.of(settings).proxy, ProxyRecord)
    return None if record is None else f"http://{LOOPBACK}:{record.port}"


@contextlib.contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Be the only holder of `lock`; the kernel frees it when the process ends, however it ends.

    Raises:
        Busy: another process has it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as stream:
        if not _lock(stream.fileno()):
            stream.seek(0)
            raise Busy(
                f"Another {what} already runs for this home (pid {stream.read() or 'unknown'}).",
                hint="There is one for each home; stop that one first.",
            )
        stream.truncate(0)
        stream.write(json.dumps(os.getpid()))
        stream.flush()
        yield


def _lock(descriptor: int) -> bool:
    """Take a lock; those who only look whether it is held have it for moments."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def is_held(lock: Path) -> bool:
    """Tell whether a process holds `lock` (see `only_one`)."""
    try:
        with lock.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except PermissionError as error:
        raise _forbidden(lock) from error
    except BlockingIOError:
        return True
    return False


def bind_port(port: int, host: str = LOOPBACK) -> socket.socket:
    """Return a socket bound to `port`. Raises OSError if somebody else has it."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def choose_port(*, avoid: frozenset[int] = frozenset()) -> int:
    """Return a port of loopback on which nobody listens and that is not in `avoid`.

    Somebody may take it before its user listens on it; that user must then ask again.

    Raises:
        OutOfCapacity: none was found.
    """
    for port in random.sample(PORTS, k=200):
        if port in avoid:
            continue
        with contextlib.suppress(OSError):
            bind_port(port).close()
            return port
    raise OutOfCapacity(
        f"None of 200 ports of {LOOPBACK} between {PORTS.start} and {PORTS.stop} is free.",
        hint="Stop what listens there.",
    )
