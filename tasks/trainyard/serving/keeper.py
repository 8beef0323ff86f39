"""The life of one server: started from its release, watched, restarted, drained and removed.

::

    wished, no process ──start──> starting ──healthy, bundle used──> ready <──> unhealthy
           ^                         │                                 │            │
           └──── retry, later and ───┴── exit, refusal, no answer ─────┴────────────┘
                 later: `failed` from the third time on
    not wished: stopping (drain, SIGTERM, SIGKILL), then nothing of it is left but its log

Every step is short and is written down before and after, so whoever comes after a kill -9 goes on
from the record: it adopts the process that is there, or ends what the record does not explain.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import Protocol

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.release import Release
from trainyard.errors import CacheMiss, NotFound, TrainyardError
from trainyard.lanes.protocol import Lane
from trainyard.lanes.start_check import refuse_misfit
from trainyard.serving.process import ServerProcess, explain_exit
from trainyard.serving.records import (
    DesiredServers,
    ObservedServer,
    ServingPaths,
    StartRecord,
    choose_port,
    observed_servers,
    write_record,
)
from trainyard.settings import Settings
from trainyard.store.documents import read_document
from trainyard.store.layout import bundle_manifest_key
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 2.0
HEALTH_TIMEOUT_S = 10.0
"""Long: a machine that compiles meanwhile is slow, and nobody is to lose a release by that."""
UNHEALTHY_AFTER = 3
"""Unanswered questions in a row after which a server gets no more traffic."""
REPLACE_AFTER = 6
"""And after which it is started again."""
FAILED_AFTER = 3
"""Failures in a row after which a server counts as `failed`; it is tried again all the same."""
PROVEN_AFTER_S = 60.0
"""A server that was ready for so long has left its earlier failures behind."""
BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0
REFUSED_RETRY_S = 300.0
"""After a failure that trying again cannot mend; somebody may have mended its cause meanwhile."""
TERMINATE_TIMEOUT_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""


class Files(Protocol):
    """What materialising a release gives."""

    @property
    def model_dir(self) -> Path:
        """The checkpoint."""

    @property
    def cache_dir(self) -> Path:
        """The bundle, to write to."""


@dataclass(frozen=True)
class Means:
    """What keepers work with."""

    settings: Settings
    store: Store
    paths: ServingPaths
    load_release: Callable[[str, str], Release]
    """By model and release id; raises for what may not be served."""
    materialize: Callable[[Release, Path], Files]
    lane: Callable[[str], Lane]
    clock: Callable[[], datetime]
    http: httpx.Client
    choosing: Lock = field(default_factory=Lock)
    """Held from the choice of a port until it is on record."""


@dataclass
class Keeper:
    """Keeps one server as it is wished."""

    means: Means
    record: ObservedServer
    finished: bool = False
    """Nothing of the server is left."""
    _process: ServerProcess | None = None
    _misses: int = 0
    """Health questions in a row without a good answer."""
    _next_question: datetime | None = None
    _idle: int = 0
    """Questions in a row at which a draining server had no requests."""
    _folder: Path = field(init=False)
    _log_path: Path = field(init=False)

    def __post_init__(self) -> None:
        """Find the server's folders, and its process if it has one."""
        place = (self.record.environment, self.record.name)
        self._folder = self.means.paths.server_folder(*place)
        self._log_path = self.means.paths.server_log(*place)
        if self.record.identity is not None:
            self._process = ServerProcess.adopt(self.record.identity)

    def tick(self, wish: DesiredServers | None) -> None:
        """Do what is due now; `wish` is None if the server is not wanted any more."""
        if wish is None:
            self._stop()
        elif self.record.state == "stopping":
            self._wanted_again(wish)
        elif self._process is None:
            self._start_if_due(wish)
        elif self._process.alive():
            self._watch(self._process)
        else:
            self._lost(self._process)

    # --- starting ---------------------------------------------------------------------------------

    def _start_if_due(self, wish: DesiredServers) -> None:
        if self.record.wished_at != wish.wished_at:
            self._save(wished_at=wish.wished_at, failures=0, retry_at=None)
        if self.record.retry_at is not None and self.means.clock() < self.record.retry_at:
            return
        try:
            self._start()
        except TrainyardError as error:
            self._failed(f"It cannot start: {error}", final=not error.retryable)
        except OSError as error:
            self._failed(f"It cannot start: {error}", final=False)

    def _start(self) -> None:
        means, record = self.means, self.record
        self._say("Its release is being verified and copied.")
        self._end_all()
        release = means.load_release(record.model, record.release_id)
        self._folder.mkdir(parents=True, exist_ok=True)
        files = means.materialize(release, self._folder)
        lane = means.lane(release.lane)
        refuse_misfit(lane, release.target, files.cache_dir)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._log_path.replace(self._log_path.with_name("previous.log"))
        with means.choosing:
            taken = frozenset(s.port for s in observed_servers(means.paths) if s.port is not None)
            port = choose_port(avoid=taken)
            self._save(
                port=port,
                cache_dir=str(files.cache_dir),
                cache_before=tuple(sorted(lane.snapshot(files.cache_dir))),
                log_path=str(self._log_path),
                log_offset=0,
                start_proof=None,
                ready_at=None,
                retry_at=None,
            )
        command = lane.command(
            release.target,
            python=means.settings.serving_interpreter,
            model_dir=files.model_dir,
            cache_dir=files.cache_dir,
            served_model_name=release.served_model_name,
            port=port,
            cache_only=True,
        )
        self._process = ServerProcess.start(
            command.argv, command.env, port=port, log_path=self._log_path, detached=True
        )
        started = self._process.identity.started_at
        self._misses = 0
        self._next_question = None
        self._save(
            pid=self._process.identity.pid,
            process_started=started,
            started_at=datetime.fromtimestamp(started, tz=UTC),
            restarts=record.restarts + (record.started_at is not None),
            message=self._after_failures("It starts."),
        )

    def _lost(self, process: ServerProcess) -> None:
        if self.record.ready_at is None:
            message = str(explain_exit(process.log_text(), process.exit_code))
        else:
            code = process.exit_code
            message = "It ended by itself" + ("." if code is None else f" with exit code {code}.")
        self._failed(f"{message} Its log: {self.record.log_path}.", final=False)

    def _failed(self, message: str, *, final: bool) -> None:
        """Note a failure, end what is left of the process, and say when the next start is."""
        self._end_all()
        failures = self._failures_so_far() + 1
        delay_s = REFUSED_RETRY_S if final else backoff_s(failures)
        log.warning("%s: %s Next start in %.1f s.", self.record.name, message, delay_s)
        self._save(
            state="failed" if final or failures >= FAILED_AFTER else "starting",
            message=f"{message} Failure {failures} in a row; next start in {delay_s:g} s.",
            failures=failures,
            retry_at=self.means.clock() + timedelta(seconds=delay_s),
            pid=None,
            process_started=None,
            port=None,
        )

    def _end_all(self) -> None:
        """End the server's session, and whatever else works in its folder."""
        if self._process is not None:
            self._process.stop(drain_s=0)
            self._process = None
        end_processes(self._log_path.parent)

    def _failures_so_far(self) -> int:
        ready_at = self.record.ready_at
        if (
            ready_at is not None
            and (self.means.clock() - ready_at).total_seconds() > PROVEN_AFTER_S
        ):
            return 0
        return self.record.failures

    def _after_failures(self, message: str) -> str:
        if self.record.failures == 0:
            return message
        return f"{message} {self.record.failures} failures before; the last: {self.record.message}"

    # --- watching ---------------------------------------------------------------------------------

    def _watch(self, process: ServerProcess) -> None:
        now = self.means.clock()
        if self._next_question is not None and now < self._next_question:
            return
        healthy = self._is_healthy()
        if self.record.state in ("starting", "failed"):
            self._watch_start(process, healthy, now)
            return
        self._next_question = now + timedelta(seconds=HEALTH_INTERVAL_S)
        if healthy:
            self._misses = 0
            if self.record.state == "unhealthy":
                self._save(state="ready", message="It answers again.")
            return
        self._misses += 1
        if self._misses >= REPLACE_AFTER:
            self._failed(f"It did not answer {self._misses} health checks in a row.", final=False)
        elif self._misses >= UNHEALTHY_AFTER:
            message = f"It did not answer {self._misses} health checks in a row."
            self._save(state="unhealthy", message=message)

    def _watch_start(self, process: ServerProcess, healthy: bool, now: datetime) -> None:
        if healthy and listens(process):
            self._prove(now)
            return
        assert self.record.started_at is not None
        timeout_s = self.means.settings.server_start_timeout_s
        if (now - self.record.started_at).total_seconds() > timeout_s:
            self._failed(
                f"It was not healthy {timeout_s:g} s after its start; see {self.record.log_path}.",
                final=False,
            )

    def _prove(self, now: datetime) -> None:
        """Let a healthy server have traffic, if its start used its bundle."""
        try:
            proof = self._proof()
        except (TrainyardError, OSError) as error:
            if isinstance(error, TrainyardError) and not error.retryable:
                self._failed(f"Its start cannot be judged: {error}", final=True)
            else:
                log.warning("%s: its start cannot be judged yet: %s", self.record.name, error)
            return
        if not proof.used_bundle:
            miss = CacheMiss(
                f"It compiled instead of using its bundle: {proof.reason}",
                hint="Release the model again with the toolchain that is installed now.",
            )
            self._failed(str(miss), final=not miss.retryable)
            # Its caches hold what it compiled; the next start begins with what was released.
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        log.info("%s is ready on port %s: %s", self.record.name, self.record.port, proof.reason)
        self._save(state="ready", message=proof.reason, start_proof=proof, ready_at=now)

    def _proof(self) -> StartRecord:
        record, means = self.record, self.means
        release = means.load_release(record.model, record.release_id)
        lane = means.lane(release.lane)
        bundle: BundleManifest | None = None
        with contextlib.suppress(NotFound):
            key = bundle_manifest_key(release.compile_key)
            bundle = read_document(means.store, key, BundleManifest)
        proof = lane.prove_start(
            log=Path(record.log_path).read_text(errors="replace"),
            before=frozenset(record.cache_before),
            after=lane.snapshot(Path(record.cache_dir)),
            bundle=bundle,
        )
        return StartRecord(
            used_bundle=proof.used_bundle,
            reason=proof.reason,
            engine_init_s=proof.engine_init_s,
            new_files=proof.new_files,
        )

    def _is_healthy(self) -> bool:
        try:
            return self.means.http.get(f"{self.record.url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    # --- stopping ---------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Take the server out of the route, let it finish its requests, and end it."""
        if self._process is None or not self._process.alive():
            self._clear_away()
            return
        now = self.means.clock()
        if self.record.state != "stopping":
            served = self.record.state in ("ready", "unhealthy")
            self._idle = 0
            self._save(state="stopping", stopping_since=now, message="It finishes its requests.")
            if not served:
                self._terminate(self._process, now)
        elif self.record.terminated_at is not None:
            if (now - self.record.terminated_at).total_seconds() > TERMINATE_TIMEOUT_S:
                self._end_all()
        elif self._is_drained(now):
            self._terminate(self._process, now)

    def _is_drained(self, now: datetime) -> bool:
        settings = self.means.settings
        assert self.record.stopping_since is not None
        waited_s = (now - self.record.stopping_since).total_seconds()
        if waited_s > settings.drain_timeout_s:
            log.warning("%s still has requests after %.0f s", self.record.name, waited_s)
            return True
        # Requests may still be on their way until the proxy has seen the new state.
        if waited_s < max(1.0, 3 * settings.guard_interval_s):
            return False
        self._idle = self._idle + 1 if self._requests() == 0 else 0
        return self._idle >= 2

    def _requests(self) -> int | None:
        """Return how many requests the engine has; None if it does not say."""
        try:
            text = self.means.http.get(f"{self.record.url}/metrics").text
            return requests_in(text)
        except (httpx.HTTPError, ValueError):
            return None

    def _terminate(self, process: ServerProcess, now: datetime) -> None:
        self._save(terminated_at=now, message="It was told to end.")
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process.identity.pid).terminate()

    def _clear_away(self) -> None:
        self._end_all()
        # The record goes last: while it is there, a later agent knows what to clear away.
        shutil.rmtree(self._folder, ignore_errors=True)
        path = self.means.paths.observed(self.record.environment, self.record.name)
        path.unlink(missing_ok=True)
        self.finished = True
        log.info("%s is gone", self.record.name)

    def _wanted_again(self, wish: DesiredServers) -> None:
        """Keep a draining server after all; one that was told to end must end first."""
        running = self._process is not None and self._process.alive()
        if self.record.terminated_at is not None or not running:
            self._stop()
            return
        self._misses = 0
        self._save(
            state="ready",
            message="It was wished for again while it finished its requests.",
            stopping_since=None,
            wished_at=wish.wished_at,
        )

    # --- the record -------------------------------------------------------------------------------

    def _say(self, message: str) -> None:
        if self.record.failures == 0:
            self._save(state="starting", message=message)

    def _save(self, **changes: object) -> None:
        changed = self.record.model_copy(update=changes)
        path = self.means.paths.observed(changed.environment, changed.name)
        if changed != self.record or not path.exists():
            write_record(path, changed)
            self.record = changed


def backoff_s(failures: int) -> float:
    """Return the seconds to wait before the next start after so many failures in a row."""
    return float(min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** min(failures - 1, 16)))


def requests_in(metrics: str) -> int | None:
    """Return how many requests an engine runs and queues, by its `/metrics`; None if unsaid."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in names:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return int(sum(found.values())) if len(found) == len(names) else None


def listens(process: ServerProcess) -> bool:
    """Tell whether it is the server itself that answers on its port, and nobody else."""
    port = process.identity.port
    for member in process.processes():
        with contextlib.suppress(psutil.Error):
            for connection in member.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def processes_in(folder: Path) -> Iterator[psutil.Process]:
    """Yield the processes whose working folder is `folder`.

    A server and all it starts work in the folder of its log; names and arguments tell nothing,
    since vLLM rewrites them.
    """
    wanted = os.fspath(folder.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # A folder that was removed meanwhile has a mark behind its name.
            if process.cwd().removesuffix(" (deleted)") != wanted:
                continue
            # Whoever looks around there in a terminal is no part of the server.
            if process.terminal() is None and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def end_processes(folder: Path, *, timeout_s: float = 5.0) -> None:
    """Kill every process that works in `folder`, and wait until they are gone."""
    for _ in range(10):
        found = list(processes_in(folder))
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=timeout_s)
