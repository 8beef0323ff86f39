"""Deployments that Trainyard did not make: found by their marks, their pods marked like ours.

A Deployment's template cannot be marked without new pods, so its pods are marked one by one, with
keys of ours only: a label that the team itself selects by is never changed. New pods are marked
when the rollout next says how many it wants, which it does at every tick.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import DEPLOYMENT, POD
from trainyard.kubernetes.labels import ADOPTED, CONTAINER, ENVIRONMENT, MODEL, PORT, RELEASE
from trainyard.serving.kubernetes.manifests import SERVER, SERVER_PORT
from trainyard.serving.kubernetes.pod_status import server_status
from trainyard.serving.protocol import ServerStatus


def is_adopted(deployment: Object) -> bool:
    """Tell whether a Deployment was adopted."""
    labels = deployment["metadata"].get("labels") or {}
    return labels.get(ADOPTED) == "true"


def find_adopted(
    cluster: Cluster, namespace: str, environment: str, release_id: str
) -> Object | None:
    """Return the Deployment that was adopted as a release."""
    labels = {ADOPTED: "true", ENVIRONMENT: environment, RELEASE: release_id}
    found, _ = cluster.list(DEPLOYMENT, namespace, labels=labels)
    return found[0] if found else None


def pods_of(cluster: Cluster, deployment: Object) -> list[Object]:
    """Return the pods of a Deployment, which select by labels alone."""
    labels = deployment["spec"]["selector"]["matchLabels"]
    pods, _ = cluster.list(POD, deployment["metadata"]["namespace"], labels=labels)
    return pods


def mark_pods(cluster: Cluster, deployment: Object) -> None:
    """Mark the pods of an adopted Deployment, so that traffic and metrics are told apart."""
    labels = deployment["metadata"]["labels"]
    marks = {key: labels[key] for key in (MODEL, ENVIRONMENT, RELEASE)}
    where = {PORT: deployment["metadata"]["annotations"][PORT]}
    for pod in pods_of(cluster, deployment):
        metadata = pod["metadata"]
        if not marks.items() <= (metadata.get("labels") or {}).items():
            body = {"metadata": {"labels": marks, "annotations": where}}
            cluster.merge_patch(POD, metadata["name"], body, namespace=metadata["namespace"])


def adopted_servers(cluster: Cluster, deployment: Object) -> Iterator[ServerStatus | None]:
    """Yield the servers of an adopted Deployment; None for pods that have ended for good."""
    metadata = deployment["metadata"]
    annotations = metadata.get("annotations") or {}
    for pod in pods_of(cluster, deployment):
        yield server_status(
            pod,
            metadata["labels"][RELEASE],
            container=annotations.get(CONTAINER, SERVER),
            port=int(annotations.get(PORT, SERVER_PORT)),
        )
