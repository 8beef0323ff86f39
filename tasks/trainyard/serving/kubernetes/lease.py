"""Leases in a cluster (`coordination.k8s.io/v1`): the driver's sign of life, the guard's leader.

Clocks of machines differ. So whoever judges a lease does as client-go does: it notes on its own
monotonic clock when the lease was last seen to change, and gives it its duration from then: a
renewal that is seen late counts for longer, never for less. Only
what the first look finds, which may be long dead, is judged by the wall clock, with `SKEW_S` for
the clocks' difference. Its holder renews it every third of its duration at the latest, so even a
clock that is wrong by more than that is believed for one renewal only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from trainyard.errors import Conflict, TrainyardError
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import LEASE
from trainyard.kubernetes.labels import owned, route_name
from trainyard.serving.lease import LeaseState
from trainyard.serving.protocol import LeaseSight

SKEW_S = 10.0
"""Seconds by which the clocks of driver and guard may differ when a guard begins."""
COMPONENT = "lease"


def micro_time(moment: datetime) -> str:
    """Return a moment as the API writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: object) -> datetime | None:
    """Return the moment that the API wrote; None if it is none."""
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


class KubernetesLease:
    """The `Lease` of platform `kubernetes`: one object a channel, of the channel's name."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Keep leases in a namespace."""
        self._cluster = cluster
        self._namespace = namespace
        self._now = now

    def renew(self, environment: str, model: str, *, holder: str, duration_s: float) -> None:
        """Say that `holder` drives the rollout for another `duration_s`.

        The channel, not the lease, says who may drive: the last to renew has the lease.
        """
        body: Object = {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": {
                "name": route_name(model, environment),
                "namespace": self._namespace,
                "labels": owned(COMPONENT, model=model, environment=environment),
            },
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": math.ceil(duration_s),
                "renewTime": micro_time(self._now()),
            },
        }
        self._cluster.apply(LEASE, body)

    def look(self, environment: str, model: str) -> LeaseSight:
        """Return whether somebody drives the rollout, by the wall clock: one look is all there is.

        Raises:
            TrainyardError: the API server does not answer, or refuses.
        """
        name = route_name(model, environment)
        found = self._cluster.get(LEASE, name, self._namespace)
        state = LeaseClock(wall=self._now).state(name, found)
        spec = (found or {}).get("spec") or {}
        return LeaseSight(
            state,
            spec.get("holderIdentity") or "",
            str(spec.get("renewTime")),
            left_s=_left_s(spec, self._now()),
        )

    def release(self, environment: str, model: str, *, holder: str) -> None:
        """End the lease, if `holder` has it."""
        found = self._cluster.get(LEASE, route_name(model, environment), self._namespace)
        if found is None or (found.get("spec") or {}).get("holderIdentity") != holder:
            return
        try:
            # With the version that was read: whoever has renewed it since keeps it.
            self._cluster.replace(LEASE, {**found, "spec": {**found["spec"], "holderIdentity": ""}})
        except Conflict:
            return


def _left_s(spec: Mapping[str, object], now: datetime) -> float | None:
    """Return the seconds until a lease ends, by the wall clock; None if it does not say."""
    renewed, duration = parse_time(spec.get("renewTime")), spec.get("leaseDurationSeconds")
    if renewed is None or not isinstance(duration, int):
        return None
    return duration - (now - renewed).total_seconds()


@dataclass(frozen=True)
class _Seen:
    """A lease as it was last seen to change."""

    mark: tuple[object, ...]
    version: int
    """Of the object; a copy may be older than what was seen already."""
    ends: float
    """Monotonic seconds."""
    duration_s: float


class LeaseClock:
    """Tells whether leases are alive, by one's own clock."""

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Begin without having seen any lease."""
        self._monotonic = monotonic
        self._wall = wall
        self._seen: dict[str, _Seen] = {}

    def state(self, name: str, lease: Object | None) -> LeaseState:
        """Judge a lease as it is now; every look counts, so look often."""
        spec: Mapping[str, object] = (lease or {}).get("spec") or {}
        duration = spec.get("leaseDurationSeconds")
        if not spec.get("holderIdentity") or not isinstance(duration, int):
            self._seen.pop(name, None)
            return "absent"
        now = self._monotonic()
        mark = (spec["holderIdentity"], spec.get("renewTime"), duration)
        version = _version(lease)
        seen = self._seen.get(name)
        if seen is None or (seen.mark != mark and version >= seen.version):
            left_s = self._first_s(spec, duration) if seen is None else float(duration)
            seen = self._seen[name] = _Seen(mark, version, now + left_s, float(duration))
        return "alive" if now < seen.ends else "expired"

    def age_s(self, name: str) -> float | None:
        """Return the seconds since a lease was last seen to change; None if there is none."""
        seen = self._seen.get(name)
        return None if seen is None else seen.duration_s - (seen.ends - self._monotonic())

    def _first_s(self, spec: Mapping[str, object], duration: int) -> float:
        renewed = parse_time(spec.get("renewTime"))
        if renewed is None:
            return 0.0
        left_s = duration + SKEW_S - (self._wall() - renewed).total_seconds()
        return min(float(duration), left_s)


def _version(lease: Object | None) -> int:
    text = str(((lease or {}).get("metadata") or {}).get("resourceVersion", ""))
    return int(text) if text.isdecimal() else 0


class Election:
    """One of several equal processes leads: the holder of a lease.

    A leader that cannot renew stops to lead after `RENEW_WITHIN_S` by its own clock, before
    anybody else may begin, which is after `DURATION_S`.
    """

    DURATION_S = 10
    RENEW_WITHIN_S = 6.0
    RETRY_S = 2.0

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        identity: str,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Take part under the name `identity`, which nobody else has."""
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self.identity = identity
        self._monotonic = monotonic
        self._wall = wall
        self._clock = LeaseClock(monotonic=monotonic, wall=wall)
        self._renewed_at: float | None = None
        self._tried_at: float | None = None

    @property
    def leads(self) -> bool:
        """Are we the leader, without a doubt, now?"""
        renewed = self._renewed_at
        return renewed is not None and self._monotonic() - renewed < self.RENEW_WITHIN_S

    def take_part(self) -> bool:
        """Renew the lease or try to get it, if it is time for that; tell whether we lead.

        Raises:
            TrainyardError: the API server does not answer, or refuses.
        """
        now = self._monotonic()
        if self._tried_at is None or now - self._tried_at >= self.RETRY_S:
            self._tried_at = now
            self._try()
        return self.leads

    def resign(self) -> None:
        """Let somebody else lead at once."""
        if not self.leads:
            return
        self._renewed_at = None
        try:
            found = self._cluster.get(LEASE, self._name, self._namespace)
            if found is not None and found["spec"].get("holderIdentity") == self.identity:
                spec = {**found["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                self._cluster.replace(LEASE, {**found, "spec": spec})
        except TrainyardError:
            # It runs out by itself.
            return

    def _try(self) -> None:
        found = self._cluster.get(LEASE, self._name, self._namespace)
        # A request may take long: leadership counts from before it.
        asked_at = self._monotonic()
        try:
            if found is None:
                self._cluster.create(LEASE, self._body({}))
            elif self._may_take(found):
                self._cluster.replace(LEASE, {**found, "spec": self._spec(found.get("spec") or {})})
            else:
                self._renewed_at = None
                return
        except Conflict:
            self._renewed_at = None
            return
        self._renewed_at = asked_at

    def _may_take(self, lease: Object) -> bool:
        state = self._clock.state(self._name, lease)
        return (lease.get("spec") or {}).get("holderIdentity") == self.identity or state != "alive"

    def _body(self, before: Mapping[str, object]) -> Object:
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": {
                "name": self._name,
                "namespace": self._namespace,
                "labels": owned("guard"),
            },
            "spec": self._spec(before),
        }

    def _spec(self, before: Mapping[str, object]) -> Object:
        now = micro_time(self._wall())
        ours = before.get("holderIdentity") == self.identity
        transitions = before.get("leaseTransitions")
        count = transitions if isinstance(transitions, int) else 0
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self.DURATION_S,
            "acquireTime": before.get("acquireTime") if ours else now,
            "renewTime": now,
            "leaseTransitions": count if ours or not before else count + 1,
        }
