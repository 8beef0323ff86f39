"""Labels, annotations and names of the objects that Trainyard owns.

A server's objects carry the release, never its role: a promotion swaps roles in the channel and the
route, and restarts no pod and breaks no series of metrics.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainyard.canonical import digest, short

FIELD_MANAGER = "trainyard"
"""Owner of what we apply (server-side apply)."""
GUARD_MANAGER = "trainyard-guard"
"""Owner of the weights of routes."""

PREFIX = "trainyard.dev"
RELEASE = f"{PREFIX}/release"
MODEL = f"{PREFIX}/model"
ENVIRONMENT = f"{PREFIX}/environment"
TARGET = f"{PREFIX}/target"
STEP = f"{PREFIX}/step"
PLAN = f"{PREFIX}/plan"
LANE = f"{PREFIX}/lane"
ADOPTED = f"{PREFIX}/adopted"
"""`true` on the Deployment of a release that somebody else deployed."""
PORT = f"{PREFIX}/port"
"""Annotation: where the servers of an adopted release listen."""
CONTAINER = f"{PREFIX}/container"
"""Annotation: which container of an adopted release's pods serves."""
MANAGED_BY = "app.kubernetes.io/managed-by"
COMPONENT = "app.kubernetes.io/component"


def owned(component: str, *, model: str = "", environment: str = "") -> dict[str, str]:
    """Return the labels of an object of ours."""
    labels = {MANAGED_BY: "trainyard", COMPONENT: component}
    if model:
        labels[MODEL] = model
    if environment:
        labels[ENVIRONMENT] = environment
    return labels


def selector(labels: Mapping[str, str]) -> str:
    """Return a label selector for the API."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def server_object_name(environment: str, release_id: str) -> str:
    """Return the name of the Deployment and the Service of a release in an environment.

    Unique in a namespace that several environments share; a Service's name has at most 63
    characters, and names of environments and release ids have at most 40 and 53, so long
    environment names are cut and made unique by a digest.
    """
    name = f"{release_id}-{environment}"
    if len(name) <= 63:
        return name
    tail = short(digest(environment))[:6]
    return f"{name[:56]}-{tail}"


def route_name(model: str, environment: str) -> str:
    """Return the name of a channel's HTTPRoute and Lease; the dot keeps it unambiguous."""
    return f"{model}.{environment}"
