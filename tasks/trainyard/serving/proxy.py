"""The proxy of the local platform: one address for every channel, weights between its releases.

`http://127.0.0.1:<port>/<environment>/<model>/v1/...` goes to a ready server of one of the
channel's releases as `/v1/...`. Answers are passed on piece by piece as they come, and a client
that goes away ends its request at the server. The guard runs in the same process, beside it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from pathlib import Path

import uvicorn

from trainyard.errors import BadInput, TrainyardError
from trainyard.serving import status_socket
from trainyard.serving.guard_loop import Guard
from trainyard.serving.process_log import log_to_stderr
from trainyard.serving.proxy_app import ProxyApp
from trainyard.serving.proxy_metrics import ProxyMetrics
from trainyard.serving.proxy_server import server_config
from trainyard.serving.records import (
    LOOPBACK,
    ProxyRecord,
    ServingPaths,
    bind_port,
    choose_port,
    only_one,
    read_record,
    write_record,
)
from trainyard.settings import Settings
from trainyard.spec.loader import load_environments
from trainyard.store.factory import open_store
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)

PORT_WAIT_S = 5.0
"""Seconds to wait for the port of the last start, before clients must be given another."""


def run_proxy(settings: Settings, store: Store | None = None) -> None:
    """Run the proxy and its guard until SIGTERM or SIGINT.

    Raises:
        Busy: another proxy runs for this home.
        BadInput: the port that the settings name is taken.
    """
    log_to_stderr()
    paths = ServingPaths.of(settings)
    with only_one(paths.proxy_lock, "proxy"):
        earlier = read_record(paths.proxy, ProxyRecord)
        sock = _listen(settings, earlier)
        wanted = paths.run / "proxy.sock"
        socket_path = status_socket.socket_path(wanted, earlier.socket if earlier else None)
        record = ProxyRecord(
            port=sock.getsockname()[1],
            socket=str(socket_path),
            pid=os.getpid(),
            epoch=uuid.uuid4().hex,
        )
        guard = Guard(settings, store or open_store(settings), _elsewhere(settings))
        app = ProxyApp(guard, ProxyMetrics(), record.epoch)
        config = server_config(app, settings)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(uvicorn.Server(config), app, guard, sock, record, paths))
        status_socket.forget_socket(socket_path, wanted)


async def _serve(
    server: uvicorn.Server,
    app: ProxyApp,
    guard: Guard,
    sock: socket.socket,
    record: ProxyRecord,
    paths: ServingPaths,
) -> None:
    """Serve until a signal comes; an error of the guard ends the proxy, which is then restarted."""
    guard.apply(await asyncio.to_thread(guard.look))
    control = await status_socket.serve(status_socket.bind(Path(record.socket)), app.status)
    write_record(paths.proxy, record)
    log.info("The proxy listens on http://%s:%s", LOOPBACK, record.port)
    async with control, asyncio.TaskGroup() as group:
        loop = group.create_task(_guard_loop(guard, guard.settings.guard_interval_s))
        await server.serve(sockets=[sock])
        loop.cancel()


async def _guard_loop(guard: Guard, interval_s: float) -> None:
    while True:
        try:
            sights = await asyncio.to_thread(guard.look)
            guard.apply(sights)
            await asyncio.to_thread(guard.persist)
        except OSError as error:
            # A full disk or too many open files: routing goes on, and so do the attempts.
            log.warning("The guard could not read or write: %s", error)
        for upstream in guard.closable():
            await upstream.transport.aclose()
        await asyncio.sleep(interval_s)


def _elsewhere(settings: Settings) -> frozenset[str]:
    """Return the environments that are not on this machine; none if nobody can tell.

    Their channels are in the same store, and here they would have neither servers nor a lease.
    """
    try:
        found = load_environments(settings.environments).environments
    except TrainyardError as error:
        log.warning("All channels count as local: %s", error)
        return frozenset()
    return frozenset(name for name, each in found.items() if each.platform != "local")


def _listen(settings: Settings, earlier: ProxyRecord | None) -> socket.socket:
    """Return a socket on the port that is set, or that of the last start, or a free one.

    Raises:
        BadInput: the port that the settings name is taken.
    """
    wanted = settings.proxy_port or (earlier.port if earlier else 0)
    host = settings.listen_host or LOOPBACK
    if not wanted:
        return bind_port(choose_port(), host)
    deadline = time.monotonic() + PORT_WAIT_S
    while True:
        try:
            return bind_port(wanted, host)
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            if settings.proxy_port:
                raise BadInput(
                    f"Port {wanted} of {host} is taken: {error.strerror}.",
                    hint="Stop what listens there, or set TRAINYARD_PROXY_PORT to another port.",
                ) from error
            log.warning("Port %s was taken by somebody else: clients need the new URL", wanted)
            return bind_port(choose_port(), host)
