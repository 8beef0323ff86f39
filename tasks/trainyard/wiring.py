"""Puts the parts together: rollouts with this installation's store, servers, route and judge.

Whoever starts a rollout (the trigger in Airflow, the tests) gets it from here. All calls block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from trainyard.documents.base import Provenance
from trainyard.errors import NotFound, TrainyardError
from trainyard.kubernetes.client import Cluster
from trainyard.proofs import read_proofs
from trainyard.releases import load_release
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.judge import judge
from trainyard.rollout.outbox import RolloutEvent
from trainyard.rollout.probes.prober import HttpProber
from trainyard.rollout.readers.choice import MetricsByEnvironment
from trainyard.rollout.rollouts import Kind, Rollouts, Tick
from trainyard.rollout.warm_up import HttpWarmer
from trainyard.serving.by_environment import (
    HostByEnvironment,
    LeaseByEnvironment,
    RouterByEnvironment,
)
from trainyard.serving.guard_events import guard_events
from trainyard.serving.kubernetes.host import KubernetesHost
from trainyard.serving.kubernetes.lease import KubernetesLease
from trainyard.serving.kubernetes.route_status import KubernetesRouter
from trainyard.serving.lease import FileLease
from trainyard.serving.local_host import LocalHost
from trainyard.serving.local_router import LocalRouter
from trainyard.serving.protocol import Host, Lease, Router
from trainyard.settings import Settings
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesServing
from trainyard.spec.loader import load_environments
from trainyard.store.factory import open_store
from trainyard.store.protocol import Store

__all__ = ["Kind", "Rollouts", "Tick", "open_rollout"]


def open_rollout(
    settings: Settings,
    tell: Callable[[str], None] | None = None,
    notify: Callable[[RolloutEvent], None] | None = None,
) -> Rollouts:
    """Return the rollouts of this installation.

    Args:
        settings: of this installation.
        tell: takes each event as a line for people.
        notify: takes each event, for whoever wants to be told of it elsewhere.

    Raises:
        BadInput: store or environments file cannot be used.
    """
    store = open_store(settings)
    environments = load_environments(settings.environments).environments
    # A cluster is connected to at the first use.
    host, router = open_serving(settings)
    return Rollouts(
        RolloutDeps(
            store=store,
            host=host,
            router=router,
            lease=LeaseByEnvironment(partial(_lease, settings, environments)),
            metrics=MetricsByEnvironment(environments, _versions(store, settings)),
            warmer=HttpWarmer(store),
            prober=HttpProber(),
            judge=judge,
            load_release=lambda model, release_id: load_release(store, model, release_id, settings),
            guard_events=partial(guard_events, store),
            environments=environments,
            read_environments=lambda: load_environments(settings.environments).environments,
            drain_timeout_s=settings.drain_timeout_s,
            proven=lambda target: read_proofs(store, settings).of(target) is not None,
            tell=tell or (lambda line: None),
            notify=notify or (lambda event: None),
            provenance=Provenance.of(settings),
        )
    )


def _versions(store: Store, settings: Settings) -> Callable[[str], str | None]:
    """Return what tells the vLLM that serves a release; None for releases without a manifest."""

    known: dict[str, str | None] = {}

    def version_of(release_id: str) -> str | None:
        if release_id not in known:
            try:
                release = load_release(store, release_id.rpartition("-")[0], release_id, settings)
            except NotFound:
                # An adopted release has no manifest.
                known[release_id] = None
            except (TrainyardError, OSError):
                return None
            else:
                known[release_id] = release.toolchain.get("vllm")
        return known[release_id]

    return version_of


def open_serving(settings: Settings) -> tuple[Host, Router]:
    """Return the host and the router of this installation, each for all environments.

    Raises:
        BadInput: the environments file cannot be used.
    """
    environments = load_environments(settings.environments).environments
    hosts: dict[str, Host] = {
        "local": LocalHost(settings),
        "kubernetes": KubernetesHost(settings, environments),
    }
    return (
        HostByEnvironment(partial(_host, hosts, environments)),
        RouterByEnvironment(partial(_router, settings, environments)),
    )


def _host(hosts: Mapping[str, Host], environments: Mapping[str, Environment], name: str) -> Host:
    """Return the host of an environment; `hosts` has one for each platform."""
    if name not in environments:
        raise NotFound(
            f"There is no environment {name}.",
            hint=f"There are: {', '.join(environments) or 'none'}.",
        )
    return hosts[environments[name].platform]


def _router(settings: Settings, environments: Mapping[str, Environment], name: str) -> Router:
    place = _place(environments, name)
    if place is None:
        return LocalRouter(settings)
    return KubernetesRouter(Cluster.connect(settings, place.context), place)


def _lease(settings: Settings, environments: Mapping[str, Environment], name: str) -> Lease:
    place = _place(environments, name)
    if place is None:
        return FileLease(settings)
    return KubernetesLease(Cluster.connect(settings, place.context), place.namespace)


def _place(environments: Mapping[str, Environment], name: str) -> KubernetesServing | None:
    """Return where in a cluster an environment's servers run; None if it is on this machine."""
    return environments[name].kubernetes if name in environments else None
