"""Passing one request on to one server, and its answer back, piece by piece."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import anyio
import httpx
from starlette.responses import JSONResponse, Response
from starlette.types import Send

from trainyard.serving.proxy_metrics import ReleaseMetrics
from trainyard.serving.route import Outcome, Traffic, Upstream

log = logging.getLogger(__name__)

RELEASE_HEADER = "x-trainyard-release"
"""In every answer: the release that gave it."""
TRACK_HEADER = "x-trainyard-track"
"""In a request: the track that shall answer, whatever the weights. For smoke tests; not counted."""

RETRY_AFTER_S = 2
CONNECT_TIMEOUT_S = 2.0
WRITE_TIMEOUT_S = 60.0

BUSY = frozenset((408, 429))
"""Statuses by which a server says that it cannot take a request now."""

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_NOT_PASSED_ON = _HOP_BY_HOP | {b"host", b"content-length", b"expect", TRACK_HEADER.encode()}


@dataclass
class Exchange:
    """One request of a client, and how far its answer is."""

    method: str
    target: bytes
    """Path and query for the server."""
    headers: list[tuple[bytes, bytes]]
    body: bytes
    send: Send
    pinned: bool
    arrived: float
    """time.perf_counter()"""
    started: bool = False
    """The client has the head of its answer."""
    timed: bool = True
    """Does its time to the first token say something about the release that was chosen?"""
    outcome: Outcome = "unanswered"
    server: str = ""
    """Name of the server that was chosen first, which answers for the outcome; empty: none."""


async def relay(
    exchange: Exchange, upstream: Upstream, release_id: str, metrics: ReleaseMetrics
) -> Response | None:
    """Send the request to a server and its answer to the client.

    Returns:
        An answer of our own if the server broke off before its answer began.

    Raises:
        httpx.ConnectError, httpx.ConnectTimeout: nobody is there; nothing was sent.
    """
    upstream.in_flight += 1
    try:
        response = await upstream.transport.handle_async_request(_request(exchange, upstream))
        try:
            await _stream(exchange, response, release_id, metrics)
        finally:
            # Also when the client has gone: closing the connection is what tells the server.
            with anyio.CancelScope(shield=True):
                await response.aclose()
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise
    except httpx.TransportError as error:
        exchange.outcome = "error"
        log.warning("A request to %s on port %s broke off: %r", release_id, upstream.port, error)
        if not exchange.started:
            return refusal(502, "broken_off", f"A server of {release_id} broke off.", release_id)
    finally:
        upstream.in_flight -= 1
    return None


def _request(exchange: Exchange, upstream: Upstream) -> httpx.Request:
    headers = [(name, value) for name, value in exchange.headers if name not in _NOT_PASSED_ON]
    headers.append((b"host", upstream.host.encode()))
    if exchange.body or exchange.method not in {"GET", "HEAD", "OPTIONS", "DELETE"}:
        headers.append((b"content-length", b"%d" % len(exchange.body)))
    return httpx.Request(
        exchange.method,
        _server_url(upstream.endpoint.host, upstream.port),
        headers=headers,
        stream=httpx.ByteStream(exchange.body),
        # No limit for reading: an engine may be silent for as long as its queue is long.
        extensions={
            "target": exchange.target,
            "timeout": {"connect": CONNECT_TIMEOUT_S, "write": WRITE_TIMEOUT_S},
        },
    )


@functools.lru_cache(maxsize=256)
def _server_url(host: str, port: int) -> httpx.URL:
    return httpx.URL(scheme="http", host=host, port=port)


async def _stream(
    exchange: Exchange, response: httpx.Response, release_id: str, metrics: ReleaseMetrics
) -> None:
    head = [
        (name.lower(), value)
        for name, value in response.headers.raw
        if name.lower() not in _HOP_BY_HOP
    ]
    head.append((RELEASE_HEADER.encode(), release_id.encode()))
    streamed = response.headers.get("content-type", "").startswith("text/event-stream")
    await exchange.send(
        {"type": "http.response.start", "status": response.status_code, "headers": head}
    )
    exchange.started = True
    waiting = exchange.timed and streamed and response.status_code < 400
    assert isinstance(response.stream, httpx.AsyncByteStream)
    async for piece in response.stream:
        if waiting:
            metrics.ttft.observe(time.perf_counter() - exchange.arrived)
            waiting = False
        if piece and exchange.outcome == "unanswered":
            # The head is no answer: servers send that of a stream before they have a token.
            exchange.outcome = "cancelled"
        await exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
    await exchange.send({"type": "http.response.body", "body": b""})
    exchange.outcome = outcome_of(response.status_code)


def outcome_of(status: int) -> Outcome:
    """Return what an answer that came to its end was."""
    if status in BUSY:
        return "busy"
    if 400 <= status < 500:
        return "refused"
    return "error" if status >= 500 else "ok"


@contextlib.contextmanager
def counted(exchange: Exchange, traffic: Traffic, metrics: ReleaseMetrics) -> Iterator[None]:
    """Count a request while it runs and when it ends, unless it is pinned."""
    if exchange.pinned:
        metrics.pinned.inc()
        yield
        return
    traffic.arrivals += 1
    traffic.in_flight += 1
    metrics.in_flight.inc()
    try:
        yield
    finally:
        traffic.in_flight -= 1
        metrics.in_flight.dec()
        traffic.note(exchange.outcome, exchange.server)
        metrics.ended(exchange.outcome)
        if exchange.outcome == "ok":
            metrics.duration.observe(time.perf_counter() - exchange.arrived)


def refusal(
    status: int, code: str, message: str, release_id: str | None = None, *, hint: str = ""
) -> Response:
    """Return an error in the form that clients of OpenAI-like servers know."""
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == 503 else {}
    if release_id is not None:
        headers[RELEASE_HEADER] = release_id
    error = {"message": f"{message} {hint}".strip(), "type": "trainyard_proxy", "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)
