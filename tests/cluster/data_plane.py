"""Guard and proxy as `k8s/` has them, with the image, the mounts and the store of the tests."""

from __future__ import annotations

import copy

from tests.cluster.place import REPOSITORY, Place, wait_for

from trainyard.deploy.manifests import load_overlay
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import DEPLOYMENT, SERVICE, Kind
from trainyard.serving.kubernetes.arrivals import is_ready

KINDS = {
    "ServiceAccount": Kind("v1", "ServiceAccount", "serviceaccounts"),
    "Role": Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    "RoleBinding": Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
    "ConfigMap": Kind("v1", "ConfigMap", "configmaps"),
    "Deployment": DEPLOYMENT,
    "Service": SERVICE,
}
"""What is taken from the manifests: guard and proxy with all that they need."""


def all_ready(here: Place, component: str) -> None:
    """Wait until all pods of a component may get requests."""
    labels = {"app.kubernetes.io/component": component}

    def ready() -> bool:
        pods = here.pods(labels)
        return bool(pods) and all(map(is_ready, pods))

    wait_for(
        ready,
        f"pods of {component}",
        explain=lambda: [(p["metadata"]["name"], p["status"]) for p in here.pods(labels)],
    )


def deployed(here: Place, variables: dict[str, str]) -> list[Object]:
    """Return guard and proxy of the overlay `cpu`, with the tests' image, mounts and store."""
    overlay = load_overlay(REPOSITORY / "k8s", "cpu")
    found = []
    for each in overlay.objects:
        metadata = each["metadata"]
        if each["kind"] not in KINDS or metadata.get("namespace") != overlay.parameter("namespace"):
            continue
        if metadata["name"] == "trainyard-rollouts":
            # Its holders live in a namespace of their own.
            continue
        body = copy.deepcopy(each)
        body["metadata"]["namespace"] = here.namespace
        for subject in body.get("subjects", []):
            subject["namespace"] = here.namespace
        if body["kind"] == "ConfigMap":
            body["data"] = variables
        if body["kind"] == "Deployment":
            fit(here, body)
        found.append(body)
    return found


def fit(here: Place, deployment: Object) -> None:
    """Let a Deployment of the manifests run with the tests' image and mounts."""
    spec = deployment["spec"]["template"]["spec"]
    if "guard" in deployment["metadata"]["name"]:
        deployment["spec"]["replicas"] = 2
    spec.pop("priorityClassName", None)
    # Folders of this machine may belong to root alone.
    spec["securityContext"] = {}
    mounts, volumes = here.volumes
    (container,) = spec["containers"]
    container["image"] = here.image
    container["imagePullPolicy"] = here.pull_policy
    container["command"][0] = here.python
    container["volumeMounts"] += mounts
    spec["volumes"] += volumes
