"""Guard and proxy as `k8s/` has them, with the image, the mounts and the store of the tests."""

from __future__ import annotations

import copy
import json

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


ENDPOINT_SLICE = Kind("discovery.k8s.io/v1", "EndpointSlice", "endpointslices")
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
REACH = """
import os, socket
host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
socket.create_connection((host, int(port)), timeout=10).close()
"""


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


def way_to_the_api(here: Place) -> dict[str, str]:
    """Return what pods must be told to reach the API server: nothing where Services work.

    On a bare node without kube-proxy nothing forwards the address of the Service `kubernetes`, so
    they get a kubeconfig with the server's own address, and their own token as before.
    """
    try:
        here.run("reach-api", [here.python, "-c", REACH])
        return {}
    except AssertionError:
        pass
    labels = {"kubernetes.io/service-name": "kubernetes"}
    (found,), _ = here.cluster.list(ENDPOINT_SLICE, "default", labels=labels)
    address, port = found["endpoints"][0]["addresses"][0], found["ports"][0]["port"]
    name = here.context or "pods"
    server = {
        "server": f"https://{address}:{port}",
        "certificate-authority": f"{TOKEN}/ca.crt",
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "clusters": [{"name": name, "cluster": server}],
        "users": [{"name": name, "user": {"tokenFile": f"{TOKEN}/token"}}],
    }
    file = here.shared / "kubeconfig-of-pods"
    file.write_text(json.dumps(config))
    return {"TRAINYARD_KUBECONFIG": str(file)}


def deployed(here: Place, variables: dict[str, str]) -> list[Object]:
    """Return guard and proxy of the overlay `cpu`, with the tests' image, mounts and store."""
    variables = {**variables, **way_to_the_api(here)}
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
