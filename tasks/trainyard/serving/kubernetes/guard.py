"""The guard in a cluster: the only one who changes weights.

Several run, one leads (`lease.Election`); the others look on, so that they know how old each lease
is when they take over. What the leader decides it takes from

* the channels in the store, while that answers; else what is written on the route, if that is newer
  than what it read itself;
* the rollout's lease, the servers' pods and the routes, from the cluster's API;
* the data plane's counts, for the fuse.

Only the cluster's API is needed to take traffic back: every other source has a thread of its own,
and its silence changes nothing. A patch is planned on the route as it is at that moment, and if the
route has changed in between, it is read and planned again.
"""

from __future__ import annotations

import logging
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from trainyard.errors import Conflict, TrainyardError
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import HTTP_ROUTE, LEASE, POD, Kind
from trainyard.kubernetes.labels import ENVIRONMENT, GUARD_MANAGER, RELEASE, owned, server_labels
from trainyard.kubernetes.mirror import Mirror
from trainyard.serving.guard import (
    ReleaseHealth,
    RouteDecision,
    Wish,
    decide,
    wish_to_follow,
)
from trainyard.serving.guard_events import GuardMemory, remember
from trainyard.serving.guard_loop import ChannelName
from trainyard.serving.kubernetes.arrivals import (
    DataPlane,
    FuseCounts,
    is_ready,
    open_data_plane,
)
from trainyard.serving.kubernetes.guard_feed import StoreFeed, TrafficFeed, Watched, Wishes
from trainyard.serving.kubernetes.guard_metrics import GuardMetrics, serve_pages
from trainyard.serving.kubernetes.lease import COMPONENT as LEASES
from trainyard.serving.kubernetes.lease import Election, LeaseClock
from trainyard.serving.kubernetes.places import ServingPlaces
from trainyard.serving.kubernetes.route import (
    ROUTE,
    Operation,
    RouteRecord,
    channel_of,
    is_channel_route,
    plan_patch,
    record_of,
    wanted_route,
)
from trainyard.serving.lease import LeaseState
from trainyard.serving.process_log import log_to_stderr
from trainyard.settings import Settings
from trainyard.store.factory import open_store

log = logging.getLogger(__name__)

ELECTION = "trainyard-guard"
"""Name of the lease of the guards of a namespace."""
PLAN_ATTEMPTS = 3
HUNG_S = 30.0
"""Seconds without a look after which a guard counts as hung; it is then to be restarted."""


@dataclass
class ChannelSight:
    """What a guard keeps in mind about one channel; all of it can be lost."""

    fuse_counts: FuseCounts = field(default_factory=FuseCounts)
    generation: int = -1
    """Of the wish on the route."""
    seen_at: float = 0.0
    """Monotonic seconds at which that generation was first seen on the route."""
    health: Mapping[str, ReleaseHealth] = field(default_factory=dict)
    """What the data plane's counts say, by release id."""


def newest_wish(
    recorded: Wish | None, seen_at: float, wishes: Wishes, name: ChannelName
) -> Wish | None:
    """Return the wish that holds.

    The store's is the truth, but it may have been read before another guard read a newer one and
    wrote it on the route. A channel that is gone from the store keeps its route: an empty store
    must take no model off the air.

    Args:
        recorded: on the route.
        seen_at: monotonic seconds at which it was first seen there.
        wishes: of the store.
        name: of the channel.
    """
    stored = wishes.by_channel.get(name)
    if stored is None or recorded is None:
        return stored or recorded
    if stored.generation >= recorded.generation or wishes.asked_at > seen_at:
        return stored
    return recorded


class ClusterGuard:
    """One guard of one namespace."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        data_planes: Mapping[str, DataPlane],
        store: StoreFeed,
        *,
        identity: str,
        metrics: GuardMetrics,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Guard the routes of some environments.

        Args:
            cluster: with a short timeout: a request must not outlast our leadership.
            namespace: of routes, leases and pods.
            data_planes: by environment; routes of others are left alone.
            store: of the channels.
            identity: that no other guard has.
            metrics: what is told to Prometheus.
            now: for the record, and for what was there before us.
            monotonic: for all that takes time.
        """
        self._cluster = cluster
        self._namespace = namespace
        self._data_planes = data_planes
        self._store = store
        self._metrics = metrics
        self._now = now
        self._monotonic = monotonic
        self.traffic = TrafficFeed()
        self.election = Election(
            cluster, namespace, ELECTION, identity, monotonic=monotonic, wall=now
        )
        self.wake = threading.Event()
        """Set when there is something new."""
        self._leases = LeaseClock(monotonic=monotonic, wall=now)
        self._sights: dict[ChannelName, ChannelSight] = {}
        self.ticked_at = monotonic()
        """Monotonic seconds at the last tick's end."""
        self._routes = self._mirror(HTTP_ROUTE, owned(ROUTE))
        self._lease_objects = self._mirror(LEASE, owned(LEASES))
        self._pods = self._mirror(POD, server_labels())

    def _mirror(self, kind: Kind, labels: Mapping[str, str]) -> Mirror:
        return Mirror(
            self._cluster,
            kind,
            self._namespace,
            labels=labels,
            changed=self.wake.set,
        )

    @property
    def mirrors(self) -> tuple[Mirror, ...]:
        """All that it watches."""
        return (self._routes, self._lease_objects, self._pods)

    @property
    def synced(self) -> bool:
        """Has it seen everything that decisions need?"""
        return all(mirror.synced for mirror in self.mirrors)

    def start(self) -> None:
        """Begin to watch and to read."""
        for mirror in self.mirrors:
            mirror.start()
        self._store.start()
        self.traffic.start()

    def stop(self) -> None:
        """End all of that and let another guard lead."""
        for mirror in self.mirrors:
            mirror.stop()
        self._store.stop()
        self.traffic.stop()
        self.election.resign()

    def tick(self) -> None:
        """Look at everything once, and make the routes follow if we lead."""
        try:
            self.election.take_part()
        except TrainyardError as error:
            log.warning("The election must wait: %s", error)
        if self.synced:
            watched: dict[ChannelName, Watched] = {}
            for name, route in self._own_routes().items():
                wish = self._look_at(name, route)
                if wish is not None and wish.weight > 0 and wish.candidate is not None:
                    watched[name] = Watched(route, self._data_planes[name[0]])
                if self.election.leads:
                    self._reconcile(name, route)
            self.traffic.want(watched)
        self._metrics.leads.set(self.election.leads)
        self._metrics.store_age.set(self._monotonic() - self._store.wishes.asked_at)
        self._metrics.api_age.set(max(mirror.age_s for mirror in self.mirrors))
        self.ticked_at = self._monotonic()

    def _own_routes(self) -> dict[ChannelName, Object]:
        routes = filter(is_channel_route, self._routes.objects.values())
        named = {channel_of(route): route for route in routes}
        return {name: route for name, route in named.items() if name[0] in self._data_planes}

    def _look_at(self, name: ChannelName, route: Object) -> Wish | None:
        """Note what a guard must have seen in time to lead one day; return the present wish."""
        self._leases.state(route["metadata"]["name"], self._lease_of(route))
        wish = self._wish(name, record_of(route))
        sight = self._sights[name]
        exposed = wish.candidate if wish is not None and wish.weight > 0 else None
        sight.health = sight.fuse_counts.health(
            wish.rollout if wish else None, exposed, self.traffic.sight(name)
        )
        return wish

    def _wish(self, name: ChannelName, record: RouteRecord) -> Wish | None:
        sight = self._sights.setdefault(name, ChannelSight())
        if record.wish is not None and record.wish.generation != sight.generation:
            sight.generation, sight.seen_at = record.wish.generation, self._monotonic()
        wish = newest_wish(record.wish, sight.seen_at, self._store.wishes, name)
        if wish is None:
            return None
        pods = self._pods_of(name[0])
        return wish_to_follow(
            wish, record.wish, lambda release: any(map(is_ready, pods.get(release, ())))
        )

    def _lease_of(self, route: Object) -> Object | None:
        return self._lease_objects.objects.get(route["metadata"]["name"])

    # --- leading ----------------------------------------------------------------------------------

    def _reconcile(self, name: ChannelName, route: Object) -> None:
        """Make a route follow; whatever stands in the way is tried again at the next tick."""
        try:
            if not self._plan(name, route)[0]:
                return
            for _ in range(PLAN_ATTEMPTS):
                # What was planned on the copy is planned again on the route as it is now.
                present = self._cluster.get(HTTP_ROUTE, route["metadata"]["name"], self._namespace)
                if present is None or self._write(name, present):
                    return
        except TrainyardError as error:
            self._metrics.patches.labels("failed").inc()
            log.warning("The route of %s/%s must wait: %s", *name, error)

    def _plan(
        self, name: ChannelName, route: Object
    ) -> tuple[list[Operation], RouteDecision | None]:
        """Return the patch for a route, and the decision behind it."""
        record = record_of(route)
        wish = self._wish(name, record)
        if wish is None:
            return [], None
        decision, memory = self._decide(name, route, record, wish)
        self._metrics.show(name, decision, self._leases.age_s(route["metadata"]["name"]))
        wanted = wanted_route(wish, decision, memory, set(self._pods_of(name[0])))
        return plan_patch(route, wanted), decision

    def _write(self, name: ChannelName, route: Object) -> bool:
        """Change a route that was just read; return False if it has changed in between."""
        operations, decision = self._plan(name, route)
        if not operations or not self.election.leads:
            return True
        try:
            self._cluster.json_patch(
                HTTP_ROUTE,
                route["metadata"]["name"],
                operations,
                namespace=self._namespace,
                manager=GUARD_MANAGER,
            )
        except Conflict:
            self._metrics.patches.labels("conflict").inc()
            return False
        self._metrics.patches.labels("done").inc()
        if decision is not None and dict(record_of(route).weights) != dict(decision.weights):
            log.info("%s/%s: %s", *name, dict(decision.weights))
        return True

    def _decide(
        self, name: ChannelName, route: Object, record: RouteRecord, wish: Wish
    ) -> tuple[RouteDecision, GuardMemory]:
        now = self._now()
        lease = self._lease_state(route, wish)
        decision = decide(wish, lease, self._health(name), record.memory.fuse, now)
        # Only what is on the route has happened, and is told.
        stored = self._store.hand_over(record.memory.unwritten)
        left = tuple(event for event in record.memory.unwritten if event.key not in stored)
        memory = record.memory.model_copy(update={"unwritten": left})
        return decision, remember(memory, wish, decision, now)

    def _lease_state(self, route: Object, wish: Wish) -> LeaseState:
        """Judge the rollout's lease; before it counts as dead, the API itself is asked.

        A watch that has stood still for a while must not end a rollout.
        """
        name = route["metadata"]["name"]
        state = self._leases.state(name, self._lease_of(route))
        if state != "alive" and wish.in_progress and wish.weight > 0:
            state = self._leases.state(name, self._cluster.get(LEASE, name, self._namespace))
        return state

    def _pods_of(self, environment: str) -> dict[str, list[Object]]:
        """Return the pods of an environment's servers by release id."""
        found: dict[str, list[Object]] = {}
        for pod in self._pods.objects.values():
            labels = pod["metadata"]["labels"]
            if labels.get(ENVIRONMENT) == environment and labels.get(RELEASE):
                found.setdefault(labels[RELEASE], []).append(pod)
        return found

    def _health(self, name: ChannelName) -> dict[str, ReleaseHealth]:
        pods, counted = self._pods_of(name[0]), self._sights[name].health
        found = {}
        for release_id in pods.keys() | counted.keys():
            seen = counted.get(release_id, ReleaseHealth())
            ready = sum(map(is_ready, pods.get(release_id, ())))
            found[release_id] = ReleaseHealth(
                ready, seen.answers, seen.failures, seen.connection_failures
            )
        return found


def run_guard(settings: Settings, names: Sequence[str] = ()) -> None:
    """Guard the routes of a namespace until SIGTERM or SIGINT.

    Args:
        settings: of this installation.
        names: of environments; empty: all that are in a cluster.

    Raises:
        BadInput: there is no such environment, or no cluster.
    """
    log_to_stderr()
    places = ServingPlaces.load(settings, names)
    # A request must not outlast the leadership that it relies on.
    timeout_s = min(settings.kube_timeout_s, Election.RENEW_WITHIN_S / 2)
    cluster = places.connect(settings.model_copy(update={"kube_timeout_s": timeout_s}))
    metrics, stopped = GuardMetrics(), threading.Event()
    guard = ClusterGuard(
        cluster,
        places.namespace,
        {name: open_data_plane(cluster, place) for name, place in places.by_name.items()},
        StoreFeed(lambda: open_store(settings), interval_s=settings.guard_store_interval_s),
        identity=f"{platform.node()}-{uuid.uuid4().hex[:8]}",
        metrics=metrics,
    )
    pages = serve_pages(
        settings.listen_host,
        settings.guard_port,
        metrics,
        {
            "/healthz": lambda: time.monotonic() - guard.ticked_at < HUNG_S,
            "/readyz": lambda: guard.synced,
        },
    )

    def stop(*_: object) -> None:
        stopped.set()
        guard.wake.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    log.info("%s guards %s", guard.election.identity, ", ".join(places.by_name))
    guard.start()
    while not stopped.is_set():
        guard.tick()
        guard.wake.wait(settings.guard_interval_s)
        guard.wake.clear()
    guard.stop()
    pages.shutdown()
    pages.server_close()
