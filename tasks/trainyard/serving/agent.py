"""The agent of the local platform: has the servers that are wished for, and no others.

It compares wishes and servers twice a second and lets one keeper a server do what is due, side by
side, so that a slow start holds up nobody. Servers are detached: when the agent ends, however it
ends, they go on, and the next agent adopts them.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime

import httpx

from trainyard.lanes.protocol import Lane
from trainyard.lanes.registry import get_lane
from trainyard.materialize import materialize_release
from trainyard.releases import load_release
from trainyard.serving.keeper import (
    HEALTH_TIMEOUT_S,
    TERMINATE_TIMEOUT_S,
    Keeper,
    Means,
    end_processes,
)
from trainyard.serving.local_host import LocalHost, slots
from trainyard.serving.process import ServerProcess
from trainyard.serving.process_log import log_to_stderr
from trainyard.serving.records import (
    DesiredServers,
    ObservedServer,
    ServingPaths,
    desired_servers,
    observed_servers,
    only_one,
)
from trainyard.settings import Settings
from trainyard.store.factory import open_store
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)

INTERVAL_S = 0.5
WORKERS = 16

Slot = tuple[str, str]
"""Environment and name of a server."""


def means_of(
    settings: Settings, store: Store | None = None, lane: Callable[[str], Lane] = get_lane
) -> Means:
    """Return what keepers work with: the real things, with other lanes if a test brings some."""
    store = store or open_store(settings)
    return Means(
        settings=settings,
        store=store,
        paths=ServingPaths.of(settings),
        load_release=lambda model, release_id: load_release(store, model, release_id, settings),
        materialize=lambda release, folder: materialize_release(store, release, folder),
        lane=lane,
        clock=lambda: datetime.now(UTC),
        http=httpx.Client(verify=False, trust_env=False, timeout=HEALTH_TIMEOUT_S),
    )


class Agent:
    """Compares wishes and servers, and sets keepers to work."""

    def __init__(self, means: Means) -> None:
        """Adopt the servers that are on record."""
        self._means = means
        self._keepers: dict[Slot, Keeper] = {}
        self._work: dict[Slot, Future[None]] = {}
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="keeper")

    def run(self, stop: threading.Event) -> None:
        """Reconcile until `stop` is set; servers go on."""
        self._clear_leftovers()
        try:
            while not stop.is_set():
                self.reconcile()
                stop.wait(INTERVAL_S)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def reconcile(self) -> None:
        """Look once at wishes and servers, and let every keeper without work do what is due."""
        wishes = self._wishes()
        for server in observed_servers(self._means.paths):
            slot = (server.environment, server.name)
            if slot not in self._keepers:
                self._keepers[slot] = Keeper(self._means, server)
        for slot, wish in wishes.items():
            if slot not in self._keepers:
                self._keepers[slot] = Keeper(self._means, _new_record(slot, wish))
        for slot, keeper in list(self._keepers.items()):
            if not self._is_idle(slot):
                continue
            if keeper.finished:
                del self._keepers[slot]
            else:
                self._work[slot] = self._pool.submit(keeper.tick, wishes.get(slot))

    def _wishes(self) -> dict[Slot, DesiredServers]:
        return {
            (wish.environment, name): wish
            for wish in desired_servers(self._means.paths)
            for name in slots(wish)
        }

    def _is_idle(self, slot: Slot) -> bool:
        work = self._work.get(slot)
        if work is None:
            return True
        if not work.done():
            return False
        del self._work[slot]
        error = work.exception()
        if error is not None:
            log.error("%s/%s: a step failed and is tried again", *slot, exc_info=error)
        return True

    def _clear_leftovers(self) -> None:
        """End and remove what has a folder, but neither record nor wish."""
        known = {(s.environment, s.name) for s in observed_servers(self._means.paths)}
        known |= set(self._wishes())
        for folder in (self._means.paths.run / "servers").glob("*/*"):
            slot = (folder.parent.name, folder.name)
            if slot not in known:
                log.warning("Nobody knows of %s: its processes are ended", folder)
                end_processes(self._means.paths.server_log(*slot).parent)
                shutil.rmtree(folder, ignore_errors=True)


def _new_record(slot: Slot, wish: DesiredServers) -> ObservedServer:
    environment, name = slot
    return ObservedServer(
        name=name,
        environment=environment,
        model=wish.model,
        release_id=wish.release_id,
        state="starting",
        wished_at=wish.wished_at,
    )


def run_agent(settings: Settings, means: Means | None = None) -> None:
    """Run the agent until SIGTERM or SIGINT; the servers go on without it.

    Raises:
        Busy: another agent runs for this home.
    """
    log_to_stderr()
    stop = threading.Event()
    with only_one(ServingPaths.of(settings).agent_lock, "agent"):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        means = means or means_of(settings)
        with means.http:
            Agent(means).run(stop)


def remove_servers(settings: Settings, environment: str, model: str) -> None:
    """Wish for no servers of any release of the model in the environment; the agent ends them."""
    host = LocalHost(settings)
    for wish in desired_servers(ServingPaths.of(settings)):
        if (wish.environment, wish.model) == (environment, model):
            host.remove(environment, wish.release_id)


def stop_all_servers(settings: Settings) -> None:
    """End every server at once, without draining; wishes stay, so the next agent starts them again.

    Raises:
        Busy: an agent runs and would start them again.
    """
    paths = ServingPaths.of(settings)
    with only_one(paths.agent_lock, "agent"):
        servers = observed_servers(paths)
        processes = [ServerProcess.adopt(s.identity) for s in servers if s.identity is not None]
        with ThreadPoolExecutor(max_workers=WORKERS) as pool:
            list(pool.map(lambda process: process.stop(TERMINATE_TIMEOUT_S), processes))
        for server in servers:
            end_processes(paths.server_log(server.environment, server.name).parent)
            paths.observed(server.environment, server.name).unlink(missing_ok=True)
