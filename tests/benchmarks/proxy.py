"""What the proxy adds to a request, and how many it can pass on, beside other reverse proxies.

    python tests/benchmarks/proxy.py [--requests 2000] [--concurrency 16]

One small server answers at once; it is asked directly, through our proxy, and through nginx and
HAProxy where they are installed. Client, server and proxies share this machine's cores, so figures
say most as ratios to the direct way. The load is made with bare asyncio streams: a slow client
would hide what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.serving_world import (
    ENVIRONMENT,
    MODEL,
    OLD,
    environment_of,
    eventually,
    make_channel,
    observed,
    put_channel,
)

from trainyard.serving.process import ServerProcess
from trainyard.serving.records import ServingPaths, choose_port, proxy_url, write_record
from trainyard.settings import Settings
from trainyard.store.folder import FolderStore

BODY = b'{"model": "adder", "prompt": "12+34=", "max_tokens": 8, "stream": true}'
EVENTS = 16
EVENT = b'data: {"id": "cmpl-1", "choices": [{"index": 0, "text": "640"}]}\n\n'

SERVER = """
import asyncio, sys
EVENT, EVENTS = {event!r}, {events}
CHUNK = b"%x\\r\\n" % len(EVENT) + EVENT + b"\\r\\n"
HEAD = (b"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n"
        b"transfer-encoding: chunked\\r\\n\\r\\n")

async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            length = 0
            for line in head.lower().split(b"\\r\\n"):
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            await reader.readexactly(length)
            writer.write(HEAD)
            for _ in range(EVENTS):
                writer.write(CHUNK)
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(b"0\\r\\n\\r\\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
"""

RUN_PROXY = """

import logging
logging.basicConfig(level=logging.WARNING)
from trainyard.serving.proxy import run_proxy
from trainyard.settings import get_settings
run_proxy(get_settings())
"""

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream engine {{ server 127.0.0.1:{server}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    keepalive_requests 1000000;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""

HAPROXY = """
global
  nbthread 1
defaults
  mode http
  option http-no-delay
  timeout connect 2s
  timeout client 60s
  timeout server 60s
frontend in
  bind 127.0.0.1:{port}
  default_backend engine
backend engine
  http-reuse always
  server engine 127.0.0.1:{server}
"""


@dataclass(frozen=True)
class Figures:
    """One way to the server."""

    name: str
    first_ms: float
    """Median time to the first event, one request at a time."""
    whole_ms: float
    """Median time of a whole answer, one request at a time."""
    whole_p99_ms: float
    requests_per_s: float
    """Of so many clients at once that the proxy, not the client, is the limit."""
    cpu_ms: float
    """Processor time of the proxy for one request, under that load."""


async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> float:
    """Send a request, read the whole answer, and return the seconds to its first event."""
    began = time.perf_counter()
    writer.write(head + BODY)
    status = await reader.readuntil(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 200"), status
    first = 0.0
    while True:
        size = int(await reader.readuntil(b"\r\n"), 16)
        await reader.readexactly(size + 2)
        if size == 0:
            return first
        first = first or time.perf_counter() - began


async def client(port: int, path: str, requests: int) -> tuple[list[float], list[float]]:
    """Send requests one after the other; returns seconds to first events and to ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(BODY)}\r\n\r\n"
    ).encode()
    firsts, wholes = [], []
    for _ in range(requests):
        began = time.perf_counter()
        firsts.append(await one(reader, writer, head))
        wholes.append(time.perf_counter() - began)
    writer.close()
    return firsts, wholes


def measure(
    name: str, port: int, path: str, process: psutil.Process | None, requests: int, clients: int
) -> Figures:
    """Measure one way to the server."""
    asyncio.run(client(port, path, 100))
    firsts, wholes = asyncio.run(client(port, path, requests))

    async def together() -> None:
        await asyncio.gather(*(client(port, path, requests // clients) for _ in range(clients)))

    before = sum(process.cpu_times()[:2]) if process else 0.0
    began = time.perf_counter()
    asyncio.run(together())
    took_s = time.perf_counter() - began
    sent = requests // clients * clients
    cpu_s = sum(process.cpu_times()[:2]) - before if process else 0.0
    return Figures(
        name,
        statistics.median(firsts) * 1000,
        statistics.median(wholes) * 1000,
        statistics.quantiles(wholes, n=100)[98] * 1000,
        sent / took_s,
        cpu_s / sent * 1000,
    )


@contextlib.contextmanager
def running(argv: list[str], ready: Callable[[], bool], **more: object) -> Iterator[psutil.Process]:
    """Run a command until the block ends."""
    process = subprocess.Popen(argv, **more)  # type: ignore[call-overload]
    try:
        eventually(lambda: process.poll() is None and ready(), why=f"{argv[0]} answers")
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)


def answers(url: str) -> Callable[[], bool]:
    """Return a question: does anything answer at the URL?"""

    def ask() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(url, timeout=1)
            return True
        return False

    return ask


@contextlib.contextmanager
def our_proxy(home: Path, server: ServerProcess) -> Iterator[tuple[int, str, psutil.Process]]:
    """Run our proxy in front of the server."""
    settings = Settings(home=home)
    record = observed(OLD, 0, process=server)
    write_record(ServingPaths.of(settings).observed(ENVIRONMENT, record.name), record)
    put_channel(FolderStore(settings.store_root), make_channel(weight=0, phase=None))

    def ready() -> bool:
        url = proxy_url(settings)
        return url is not None and answers(f"{url}/-/health")()

    environment = {**os.environ, **environment_of(settings), "TRAINYARD_GUARD_INTERVAL_S": "0.5"}
    with running([sys.executable, "-c", RUN_PROXY], ready, env=environment) as process:
        port = int((proxy_url(settings) or "").rpartition(":")[2])
        yield port, f"/{ENVIRONMENT}/{MODEL}/v1/completions", process


@contextlib.contextmanager
def other_proxy(
    program: str, template: str, folder: Path, server: int
) -> Iterator[tuple[int, str, psutil.Process]]:
    """Run nginx or HAProxy in front of the server."""
    port = choose_port()
    config = folder / f"{program}.conf"
    config.write_text(template.format(folder=folder, port=port, server=server))
    flag = "-c" if program == "nginx" else "-f"
    with running([program, flag, str(config)], answers(f"http://127.0.0.1:{port}/")) as process:
        yield port, "/v1/completions", process


def table(rows: list[Figures]) -> str:
    """Return the figures, and how each compares with the direct way."""
    direct = rows[0]
    lines = [
        f"{'way':10} {'first event':>12} {'whole answer':>13} {'p99':>8} {'added':>9} "
        f"{'requests/s':>11} {'of direct':>9} {'CPU/request':>12}"
    ]
    for row in rows:
        added_ms = row.whole_ms - direct.whole_ms
        share = row.requests_per_s / direct.requests_per_s
        lines.append(
            f"{row.name:10} {row.first_ms:9.2f} ms {row.whole_ms:10.2f} ms "
            f"{row.whole_p99_ms:5.2f} ms {added_ms:6.2f} ms "
            f"{row.requests_per_s:11.0f} {share:8.2f}x {row.cpu_ms:9.2f} ms"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What the proxy costs.")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="trainyard-bench-") as name:
        folder, port = Path(name), choose_port()
        script = folder / "server.py"
        script.write_text(SERVER.format(event=EVENT, events=EVENTS))
        server = ServerProcess.start(
            (sys.executable, str(script), str(port)), {}, port=port, log_path=folder / "server.log"
        )
        eventually(answers(f"http://127.0.0.1:{port}/"), why="the server answers")
        load = (args.requests, args.concurrency)
        try:
            rows.append(measure("direct", port, "/v1/completions", None, *load))
            with our_proxy(folder / "home", server) as way:
                rows.append(measure("trainyard", *way, *load))
            for program, template in (("nginx", NGINX), ("haproxy", HAPROXY)):
                if shutil.which(program):
                    with other_proxy(program, template, folder, port) as way:
                        rows.append(measure(program, *way, *load))
        finally:
            server.stop(0)
    print(
        f"{args.requests} answers of {EVENTS} events; {args.concurrency} clients at once for rates"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
