"""What is known of stable before a rollout: gathered once, stored with the rollout, never changed.

Where it comes from, the better first:

* the source of the metrics, if it has a memory (Prometheus);
* the looks of the rollout in which the release became stable. Nothing is restarted by a promotion,
  so its servers are often the same ones. Looks hold the router's counters as well, so they alone
  tell how failed requests gather on some servers: what a Prometheus has of a router are sums of a
  release (our proxy), or figures of addresses, whose servers of then nobody knows (Envoy).

A recorder that scrapes all the time, for environments without a Prometheus, was left out: it would
be a process more on every machine, and it pays only where a release has at least two servers, whose
owners have a Prometheus anyway. Without history the judge uses its documented defaults.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

from trainyard.documents.channel import Rollout
from trainyard.documents.look import History, PodCounters, RouteCounters, Snapshot
from trainyard.errors import CorruptFile, NotFound
from trainyard.rollout.looks import LookLog
from trainyard.rollout.metrics import MetricReader
from trainyard.serving.protocol import ServerStatus
from trainyard.store.documents import first_document, read_document
from trainyard.store.layout import rollout_prefix
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)

LONGEST_MEMORY_S = 28800.0
"""Looks of the rollout before are of use for so long."""


class HistoryLog:
    """Histories of the rollouts of a store. Each is read once; it never changes."""

    def __init__(self, store: Store) -> None:
        """Keep histories in `store`."""
        self._store = store
        self._known: dict[str, History] = {}

    def read(self, model: str, environment: str, number: int) -> History | None:
        """Return the history of a rollout, or None while there is none. Raises CorruptFile."""
        key = history_key(model, environment, number)
        if key not in self._known:
            try:
                self._known = {key: read_document(self._store, key, History)}
            except NotFound:
                return None
        return self._known[key]

    def gather(
        self,
        model: str,
        environment: str,
        rollout: Rollout,
        metrics: MetricReader,
        servers: Sequence[ServerStatus],
        now: datetime,
    ) -> tuple[Snapshot, ...]:
        """Return the history of a rollout; find and store it if there is none yet.

        Until the candidate has traffic, a source that knows nothing is asked again at the next
        look. From then on the history is what it is, if need be empty.

        Args:
            model: name of the model.
            environment: name of the environment.
            rollout: under way.
            metrics: the source.
            servers: the ready ones, of whatever release.
            now: the end of the history.
        """
        known = self.read(model, environment, rollout.number)
        if known is not None:
            return known.snapshots
        found = self._find(model, environment, rollout, metrics, servers, now)
        if found is None:
            return ()
        source, snapshots = found
        history = History(
            rollout=rollout.number,
            release_id=rollout.reference_id,
            source=source,
            snapshots=snapshots,
        )
        key = history_key(model, environment, rollout.number)
        history = first_document(self._store, key, history)
        self._known = {key: history}
        return history.snapshots

    def _find(
        self,
        model: str,
        environment: str,
        rollout: Rollout,
        metrics: MetricReader,
        servers: Sequence[ServerStatus],
        now: datetime,
    ) -> tuple[Literal["metrics", "looks", "none"], tuple[Snapshot, ...]] | None:
        """Return a source and what it knows; None if that may be better known later."""
        if rollout.exposed_since is not None:
            return "none", ()
        stable = [server for server in servers if server.release_id == rollout.reference_id]
        told = metrics.history(environment, stable, until=now) if stable else None
        if told is None:
            return None
        if told:
            return "metrics", tuple(_idle(at, pods) for at, pods in told)
        if rollout.number < 2:
            return "none", ()
        try:
            looks = LookLog(self._store).read(model, environment, rollout.number - 1)
        except CorruptFile as error:
            # It stays so; the judge has its defaults, and this rollout needs nothing of that one.
            log.warning("The rollout before tells nothing of stable: %s", error)
            return "none", ()
        since = now - timedelta(seconds=LONGEST_MEMORY_S)
        alone = (
            _alone(look.snapshot, rollout.reference_id)
            for look in looks
            if since < look.snapshot.at < rollout.started_at
        )
        kept = tuple(snapshot for snapshot in alone if snapshot.pods)
        return ("looks" if kept else "none"), kept


def history_key(model: str, environment: str, number: int) -> str:
    """Return the key of a rollout's history."""
    return f"{rollout_prefix(model, environment, number)}/history.json"


def _alone(snapshot: Snapshot, release_id: str) -> Snapshot:
    """Return what a look saw of one release."""
    return Snapshot(
        at=snapshot.at,
        phase="idle",
        step_index=0,
        pods=tuple(pod for pod in snapshot.pods if pod.release_id == release_id),
        route=_route_of(snapshot.route, release_id),
        probes=snapshot.probes,
    )


def _route_of(route: RouteCounters | None, release_id: str) -> RouteCounters | None:
    """Return the router's counters of one release; None if it did not know the release."""
    if route is None or release_id not in route.releases:
        return None
    return RouteCounters(
        epoch=route.epoch,
        weights={name: share for name, share in route.weights.items() if name == release_id},
        releases={release_id: route.releases[release_id]},
    )


def _idle(at: datetime, pods: tuple[PodCounters, ...]) -> Snapshot:
    return Snapshot(at=at, phase="idle", step_index=0, pods=pods, route=None)
