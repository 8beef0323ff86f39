"""Hosts, routers and leases of several environments, each opened at its first use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from trainyard.documents.release import Release
from trainyard.serving.protocol import (
    Host,
    Lease,
    LeaseSight,
    Router,
    RouteStatus,
    ServerStatus,
)

PartT = TypeVar("PartT")


class _Opened(Generic[PartT]):
    """What has been opened, by environment."""

    def __init__(self, open_one: Callable[[str], PartT]) -> None:
        self._open_one = open_one
        self._opened: dict[str, PartT] = {}
        self._guard = threading.Lock()

    def of(self, environment: str) -> PartT:
        with self._guard:
            if environment not in self._opened:
                self._opened[environment] = self._open_one(environment)
            return self._opened[environment]


class HostByEnvironment:
    """The `Host` that uses each environment's own."""

    def __init__(self, open_host: Callable[[str], Host]) -> None:
        """Open hosts by the name of their environment."""
        self._hosts = _Opened(open_host)

    def deploy(self, environment: str, release: Release, replicas: int) -> None:
        """Wish for `replicas` servers of `release`; also scales an existing deployment."""
        self._hosts.of(environment).deploy(environment, release, replicas)

    def scale(self, environment: str, release_id: str, replicas: int) -> None:
        """Wish for `replicas` servers of an adopted release."""
        self._hosts.of(environment).scale(environment, release_id, replicas)

    def remove(self, environment: str, release_id: str) -> None:
        """Wish for no servers of the release: drain, then stop."""
        self._hosts.of(environment).remove(environment, release_id)

    def hold_autoscaling(self, environment: str, model: str) -> None:
        """Let nothing but us change the number of the model's servers."""
        self._hosts.of(environment).hold_autoscaling(environment, model)

    def resume_autoscaling(self, environment: str, model: str, release_id: str) -> None:
        """Let autoscalers work again, on the servers of `release_id`."""
        self._hosts.of(environment).resume_autoscaling(environment, model, release_id)

    def servers(self, environment: str, model: str) -> Sequence[ServerStatus]:
        """Return every server of the model in the environment, of whatever release."""
        return self._hosts.of(environment).servers(environment, model)


class RouterByEnvironment:
    """The `Router` that asks each environment's own."""

    def __init__(self, open_router: Callable[[str], Router]) -> None:
        """Open routers by the name of their environment."""
        self._routers = _Opened(open_router)

    def status(self, environment: str, model: str) -> RouteStatus | None:
        """Return what the environment's router does now; None if it cannot be asked."""
        return self._routers.of(environment).status(environment, model)


class LeaseByEnvironment:
    """The `Lease` that uses each environment's own."""

    def __init__(self, open_lease: Callable[[str], Lease]) -> None:
        """Open leases by the name of their environment."""
        self._leases = _Opened(open_lease)

    def look(self, environment: str, model: str) -> LeaseSight:
        """Return whether somebody drives the rollout, as far as its lease tells."""
        return self._leases.of(environment).look(environment, model)

    def renew(self, environment: str, model: str, *, holder: str, duration_s: float) -> None:
        """Say that `holder` drives the rollout for another `duration_s`."""
        lease = self._leases.of(environment)
        lease.renew(environment, model, holder=holder, duration_s=duration_s)

    def release(self, environment: str, model: str, *, holder: str) -> None:
        """End the lease, if `holder` has it."""
        self._leases.of(environment).release(environment, model, holder=holder)
