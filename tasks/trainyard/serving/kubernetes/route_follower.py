"""Our proxy in a cluster: it does what the HTTPRoutes say and changes none of them.

It stands in for a gateway where there is none (`data_plane: proxy`). Routes and servers come from
the cluster's API; while that is away, everything stays as it was last seen. Clients ask as on one
machine: `http://<proxy>/<environment>/<model>/v1/...`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import uvicorn

from trainyard.errors import TrainyardError
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import HTTP_ROUTE, POD
from trainyard.kubernetes.labels import ENVIRONMENT, MODEL, RELEASE, owned, server_labels
from trainyard.kubernetes.mirror import Mirror
from trainyard.serving.guard import RouteDecision
from trainyard.serving.guard_loop import ChannelName
from trainyard.serving.kubernetes.arrivals import (
    is_ready,
    port_of,
)
from trainyard.serving.kubernetes.listening import listen
from trainyard.serving.kubernetes.manifests import PORT_NAME, SERVER_PORT
from trainyard.serving.kubernetes.places import ServingPlaces
from trainyard.serving.kubernetes.route import (
    ROUTE,
    channel_of,
    is_channel_route,
    record_of,
    split_weights,
)
from trainyard.serving.process_log import log_to_stderr
from trainyard.serving.proxy_app import ProxyApp
from trainyard.serving.proxy_metrics import ProxyMetrics
from trainyard.serving.proxy_server import server_config
from trainyard.serving.route import Endpoint, Route, Upstream, take_idle
from trainyard.settings import Settings

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 1.0
"""Seconds between two looks at the copies of the routes when nothing is heard of a change."""


@dataclass
class RouteFollower:
    """Keeps a proxy's routes in line with the HTTPRoutes of some environments."""

    environments: frozenset[str]
    routes: dict[ChannelName, Route] = field(default_factory=dict)
    retired: list[Upstream] = field(default_factory=list)
    """Upstreams that get no new requests; to be closed once they have none."""

    def apply(self, routes: Mapping[str, Object], pods: Mapping[str, Object]) -> None:
        """Change all routes to what was seen. Never waits: for the event loop."""
        seen = {channel_of(r): r for r in routes.values() if is_channel_route(r)}
        seen = {name: route for name, route in seen.items() if name[0] in self.environments}
        for name in set(self.routes) - set(seen):
            gone = self.routes.pop(name)
            self.retired += [up for ups in gone.upstreams.values() for up in ups]
        endpoints = _endpoints(pods)
        for name, body in seen.items():
            self._take(name, body, endpoints.get(name, []))

    def _take(self, name: ChannelName, body: Object, endpoints: Sequence[Endpoint]) -> None:
        record = record_of(body)
        if record.wish is None:
            # The guard has not seen a channel for it yet.
            return
        route = self.routes.setdefault(name, Route(*name))
        self.retired += route.update(record.wish, endpoints)
        try:
            weights = split_weights(body)
        except TrainyardError as error:
            log.warning("The route of %s/%s stays as it was: %s", *name, error)
            return
        route.decision = RouteDecision(weights, record.memory.guard, record.reason)


def _endpoints(pods: Mapping[str, Object]) -> dict[ChannelName, list[Endpoint]]:
    """Return where ready servers listen, by channel."""
    found: dict[ChannelName, list[Endpoint]] = {}
    for pod in pods.values():
        labels = pod["metadata"]["labels"]
        if not is_ready(pod) or not labels.get(RELEASE):
            continue
        port = port_of(pod, PORT_NAME, SERVER_PORT)
        endpoint = Endpoint(
            labels[RELEASE],
            pod["metadata"]["uid"],
            pod["status"]["podIP"],
            port,
            pod["metadata"]["name"],
        )
        found.setdefault((labels.get(ENVIRONMENT, ""), labels.get(MODEL, "")), []).append(endpoint)
    return found


def run_follower(settings: Settings, names: Sequence[str] = ()) -> None:
    """Run the proxy until SIGTERM or SIGINT.

    Args:
        settings: of this installation.
        names: of environments; empty: all that have their routes in one namespace of a cluster.

    Raises:
        BadInput: there is no such environment, or no cluster.
    """
    log_to_stderr()
    places = ServingPlaces.load(settings, names)
    cluster = places.connect(settings)
    sockets = [
        listen(settings.listen_host, port) for port in (settings.follow_port, settings.guard_port)
    ]
    follower = RouteFollower(frozenset(places.by_name))
    own_port = sockets[1].getsockname()[1]
    app = ProxyApp(follower, ProxyMetrics(), uuid.uuid4().hex, own_port=own_port)
    config = server_config(app, settings)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(uvicorn.Server(config), follower, cluster, places.namespace, sockets))


async def _serve(
    server: uvicorn.Server,
    follower: RouteFollower,
    cluster: Cluster,
    namespace: str,
    sockets: list[socket.socket],
) -> None:
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)

    routes = Mirror(cluster, HTTP_ROUTE, namespace, labels=owned(ROUTE), changed=tell).start()
    pods = Mirror(cluster, POD, namespace, labels=server_labels(), changed=tell).start()
    async with asyncio.TaskGroup() as group:
        following = group.create_task(_follow(follower, routes, pods, changed))
        # Nobody is served before the routes are known: the pod is not ready until it listens.
        waiting = group.create_task(_synced(routes, pods))
        await waiting
        log.info("The proxy listens on port %s", sockets[0].getsockname()[1])
        await server.serve(sockets=sockets)
        following.cancel()
    routes.stop()
    pods.stop()


async def _synced(*mirrors: Mirror) -> None:
    while not all(mirror.synced for mirror in mirrors):
        await asyncio.sleep(0.1)


async def _follow(
    follower: RouteFollower, routes: Mirror, pods: Mirror, changed: asyncio.Event
) -> None:
    while True:
        changed.clear()
        if routes.synced and pods.synced:
            follower.apply(routes.objects, pods.objects)
        for upstream in take_idle(follower.retired):
            await upstream.transport.aclose()
        try:
            async with asyncio.timeout(LONGEST_PAUSE_S):
                await changed.wait()
        except TimeoutError:
            continue
