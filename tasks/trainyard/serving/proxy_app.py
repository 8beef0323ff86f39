"""The proxy's ASGI application: finds the route of a request, and has it relayed and counted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Protocol, cast

import anyio
import httpx
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from trainyard.serving.guard_loop import ChannelName
from trainyard.serving.protocol import RouteStatus
from trainyard.serving.proxy_metrics import ProxyMetrics, ReleaseMetrics
from trainyard.serving.relay import TRACK_HEADER, Exchange, counted, refusal, relay
from trainyard.serving.route import Route, Track

LONGEST_BODY = 64 << 20
"""Bytes of a request. Requests are held whole, so that one can be sent a second time."""


class TooLong(Exception):
    """A request's body is longer than `LONGEST_BODY`."""


class RouteKeeper(Protocol):
    """Keeps the routes: the guard of this machine, or who follows those of a cluster."""

    @property
    def routes(self) -> Mapping[ChannelName, Route]:
        """By environment and model."""


class ProxyApp:
    """The ASGI application."""

    def __init__(
        self,
        keeper: RouteKeeper,
        metrics: ProxyMetrics,
        epoch: str,
        *,
        own_port: int | None = None,
    ) -> None:
        """Serve the routes of `keeper`.

        Args:
            keeper: of the routes.
            metrics: of the requests.
            epoch: of this start.
            own_port: where the proxy's own pages are, which clients have no business with. None:
                beside everything else, but for the status.
        """
        self._keeper = keeper
        self._metrics = metrics
        self._epoch = epoch
        self._own_port = own_port

    def status(self, environment: str, model: str) -> RouteStatus | None:
        """Return what `Router.status` tells of a channel, or None if it is unknown."""
        route = self._keeper.routes.get((environment, model))
        return None if route is None else route.status(self._epoch)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http"
        own_port = self._own_port is not None and scope["server"][1] == self._own_port
        if own_port or (self._own_port is None and scope["path"].startswith("/-/")):
            await self._own_page(scope["path"])(scope, receive, send)
            return
        answer = await self._proxy(scope, receive, send)
        if answer is not None:
            await answer(scope, receive, send)

    def _own_page(self, path: str) -> Response:
        if path == "/-/health":
            return JSONResponse({"status": "ok", "epoch": self._epoch})
        if path == "/-/metrics":
            return PlainTextResponse(self._metrics.text(self._keeper.routes.values()))
        if path == "/-/targets":
            routes = self._keeper.routes.values()
            return JSONResponse([target for route in routes for target in route.targets()])
        _, _, page, *names = path.split("/")[:5] + [""] * 5
        if self._own_port is not None and page == "status":
            return self._status_page(names[0], names[1])
        return refusal(404, "not_found", f"The proxy has no page {path}.")

    def _status_page(self, environment: str, model: str) -> Response:
        route = self._keeper.routes.get((environment, model))
        if route is None:
            return refusal(404, "not_found", f"There is no route for {model} in {environment}.")
        health = {name: asdict(seen) for name, seen in route.health().items()}
        return JSONResponse({"status": asdict(route.status(self._epoch)), "health": health})

    async def _proxy(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Pass a request on; returns an answer of our own if that is not possible."""
        arrived = time.perf_counter()
        parts = scope["path"].split("/", 4)
        route = self._keeper.routes.get((parts[1], parts[2])) if len(parts) > 2 else None
        target = server_target(scope)
        if route is None or target is None:
            return refusal(
                404,
                "not_found",
                f"Nothing is served at {scope['path']}.",
                hint="Paths are /<environment>/<model>/v1/..., for channels that exist.",
            )
        headers = Headers(scope=scope)
        wished = headers.get(TRACK_HEADER)
        if wished is not None and wished not in ("stable", "candidate"):
            return refusal(400, "bad_track", f"{TRACK_HEADER} is stable or candidate.")
        try:
            body = await read_body(receive)
        except TooLong:
            return refusal(413, "too_long", f"A request may have {LONGEST_BODY} bytes at most.")
        if body is None:
            return None
        track = cast("Track | None", wished)
        release_id = route.next_release() if track is None else route.release_on(track)
        if release_id is None:
            return refusal(503, "no_release", f"No release serves {route.model} here now.")
        exchange = Exchange(
            method=scope["method"],
            target=target,
            headers=scope["headers"],
            body=body,
            send=send,
            pinned=track is not None,
            arrived=arrived,
            timed=track is None,
        )
        metrics = self._metrics.of(route.environment, route.model, release_id)
        return await self._exchange(exchange, route, release_id, metrics, receive)

    async def _exchange(
        self,
        exchange: Exchange,
        route: Route,
        release_id: str,
        metrics: ReleaseMetrics,
        receive: Receive,
    ) -> Response | None:
        """Relay one exchange and count it, also when the client goes away."""
        traffic = route.traffic_of(release_id)
        answer: Response | None = None
        with counted(exchange, traffic, metrics):
            async with anyio.create_task_group() as group:
                group.start_soon(_cancel_on_disconnect, receive, group.cancel_scope)
                answer = await self._relay_or_retry(exchange, route, release_id, metrics)
                group.cancel_scope.cancel()
        return answer

    async def _relay_or_retry(
        self, exchange: Exchange, route: Route, release_id: str, metrics: ReleaseMetrics
    ) -> Response | None:
        upstream = route.server_of(release_id)
        if upstream is None:
            exchange.outcome = "unreachable"
            return refusal(503, "no_server", f"{release_id} has no ready server.", release_id)
        exchange.server = upstream.endpoint.name
        if exchange.server and not exchange.pinned:
            route.traffic_of(release_id).sent_to(exchange.server)
        try:
            return await relay(exchange, upstream, release_id, metrics)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            # Nothing was sent, so another server may get the same request. It counts as an error
            # of the server that was chosen, and so of its release: that one was not there.
            exchange.outcome = "unreachable"
            exchange.timed = False
        second = None if exchange.pinned else route.stand_in(release_id, upstream)
        if second is not None:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                answer = await relay(
                    exchange, second, route.release_of(second, release_id), metrics
                )
                exchange.outcome = "unreachable"
                return answer
        return refusal(503, "no_server", f"No server of {release_id} answers.", release_id)


async def _cancel_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            scope.cancel()
            return


async def read_body(receive: Receive) -> bytes | None:
    """Return a request's whole body, or None if the client went away before its end.

    Raises:
        TooLong: it is longer than `LONGEST_BODY`.
    """
    pieces: list[bytes] = []
    length = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        length += len(piece)
        if length > LONGEST_BODY:
            raise TooLong
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def server_target(scope: Scope) -> bytes | None:
    """Return path and query for the server; None unless the path leads to its `/v1/`.

    Paths with `.` or `..` are refused in any spelling: a server that resolves them would give
    access to its other pages.
    """
    decoded = scope["path"].split("/")
    raw = scope["raw_path"].split(b"/", 3)
    if len(raw) < 4 or len(decoded) < 5 or decoded[3] != "v1" or {".", ".."} & set(decoded):
        return None
    target: bytes = b"/" + raw[3]
    query: bytes = scope["query_string"]
    return target + b"?" + query if query else target
