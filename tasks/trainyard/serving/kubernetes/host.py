"""The host of platform kubernetes: applies what is wished, reads what the cluster made of it.

What is applied is applied server-side, so that fields of others (an annotation, a sidecar that
something injected) stay as they are, and applying twice changes nothing. A Deployment that runs
already keeps its template even if a newer Trainyard, or another environments file, would write
another one: wishes are repeated at every tick of a rollout, and none of them may restart what
serves. What is new takes effect with the next release.

A release is removed by deleting its Deployment, in the background: the cluster then ends the pods,
each of which leaves its Service, finishes its requests and stops, and afterwards takes away Service
and PodDisruptionBudget, which belong to the Deployment. One call that may be repeated, and nothing
is left whoever dies. Traffic is taken away before, by route and guard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from trainyard.documents.release import Release
from trainyard.errors import BadInput, NotFound, Transient
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import DEPLOYMENT, DISRUPTION_BUDGET, POD, SERVICE, Kind
from trainyard.kubernetes.labels import (
    ADOPTED,
    CONTAINER,
    ENVIRONMENT,
    MANAGED_BY,
    MODEL,
    PORT,
    RELEASE,
    owned,
    server_object_name,
)
from trainyard.names import check_name, check_release_id
from trainyard.serving.kubernetes.autoscaling import find_autoscalers, hold, let_go, scales
from trainyard.serving.kubernetes.manifests import (
    COMPONENT,
    SERVER,
    SERVER_PORT,
    TEMPLATE,
    ServerManifests,
    server_manifests,
)
from trainyard.serving.kubernetes.pod_status import not_begun, server_status
from trainyard.serving.protocol import ServerStatus
from trainyard.settings import Settings
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesServing

log = logging.getLogger(__name__)


class KubernetesHost:
    """The `Host` of environments on platform kubernetes."""

    def __init__(
        self,
        settings: Settings,
        environments: Mapping[str, Environment],
        *,
        connect: Callable[[Settings, str], Cluster] = Cluster.connect,
    ) -> None:
        """Serve in those of `environments` that are on platform kubernetes.

        Args:
            settings: of this installation.
            environments: by name.
            connect: returns the cluster of a context; called once for each context.
        """
        self._settings = settings
        self._environments = environments
        self._connect = connect
        self._clusters: dict[str, Cluster] = {}

    def deploy(self, environment: str, release: Release, replicas: int) -> None:
        """Wish for `replicas` servers of `release`; also scales an existing deployment.

        Where an autoscaler decides on their number, and is not held, it stays as it is.

        Raises:
            BadInput: the number or a name is not valid, no image is named, or there are objects of
                that name that are not ours.
            TrainyardError: as `Cluster.apply`.
        """
        if replicas < 0:
            raise BadInput(f"{replicas} servers of {release.release_id} make no sense.")
        check_name(release.model, "Model")
        check_release_id(release.release_id)
        cluster, place = self._cluster(environment), self._place(environment)
        name = server_object_name(environment, release.release_id)
        live = cluster.get(DEPLOYMENT, name, place.namespace)
        if live is not None:
            _demand_ours(DEPLOYMENT, live, environment, release.release_id)
            found = find_autoscalers(cluster, place.namespace, environment, release.model)
            if replicas and scales(found, name):
                replicas = int(live["spec"].get("replicas", replicas)) or replicas
        wanted = server_manifests(
            release,
            environment,
            place,
            replicas,
            self._settings,
            capacity=self._environments[environment].capacity,
            priority_class=self._priority_class(cluster, place, environment, release, live),
        )
        for kind in (SERVICE, DISRUPTION_BUDGET):
            there = cluster.get(kind, name, place.namespace)
            if there is not None:
                _demand_ours(kind, there, environment, release.release_id)
        self._apply(cluster, wanted, live, replicas)

    def _apply(
        self, cluster: Cluster, wanted: ServerManifests, live: Object | None, replicas: int
    ) -> None:
        deployment = wanted.deployment
        name, namespace = deployment["metadata"]["name"], deployment["metadata"]["namespace"]
        idle = live is None or not live["spec"].get("replicas")
        if live is None or idle or _template_of(live) == _template_of(deployment):
            live = cluster.apply(DEPLOYMENT, deployment)
        else:
            log.info("%s keeps its template: another one would restart its servers.", name)
            if live["spec"].get("replicas") != replicas:
                _scale(cluster, name, namespace, replicas)
        owner = {
            "apiVersion": DEPLOYMENT.api_version,
            "kind": DEPLOYMENT.name,
            "name": name,
            "uid": live["metadata"]["uid"],
        }
        for kind, body in (
            (SERVICE, wanted.service),
            (DISRUPTION_BUDGET, wanted.disruption_budget),
        ):
            metadata = {**body["metadata"], "ownerReferences": [owner]}
            cluster.apply(kind, {**body, "metadata": metadata})

    def scale(self, environment: str, release_id: str, replicas: int) -> None:
        """Wish for `replicas` servers of an adopted release.

        Raises:
            NotFound: no Deployment was adopted as that release.
            TrainyardError: as `Cluster.merge_patch`.
        """
        cluster, place = self._cluster(environment), self._place(environment)
        live = _adopted(cluster, place.namespace, environment, release_id)
        if live is None:
            raise NotFound(
                f"No Deployment in namespace {place.namespace} was adopted as {release_id}.",
                hint="`trainyard adopt` does that; somebody may have deleted it since.",
            )
        name, model = live["metadata"]["name"], release_id.rpartition("-")[0]
        found = find_autoscalers(cluster, place.namespace, environment, model)
        if live["spec"].get("replicas") != replicas and not scales(found, name):
            _scale(cluster, name, place.namespace, replicas)

    def remove(self, environment: str, release_id: str) -> None:
        """Wish for no servers of the release: drain, then stop.

        An adopted Deployment is somebody else's: it is scaled to nothing and stays.

        Raises:
            BadInput: the objects of that name are not ours.
            TrainyardError: as `Cluster.delete`.
        """
        cluster, place = self._cluster(environment), self._place(environment)
        check_release_id(release_id)
        name = server_object_name(environment, release_id)
        live = cluster.get(DEPLOYMENT, name, place.namespace)
        if live is not None:
            _demand_ours(DEPLOYMENT, live, environment, release_id)
            cluster.delete(DEPLOYMENT, name, place.namespace)
            return
        adopted = _adopted(cluster, place.namespace, environment, release_id)
        if adopted is not None and adopted["spec"].get("replicas"):
            _scale(cluster, adopted["metadata"]["name"], place.namespace, 0)

    def hold_autoscaling(self, environment: str, model: str) -> None:
        """Let nothing but us change the number of the model's servers.

        Raises:
            Conflict: somebody changed an autoscaler meanwhile; it is tried again at the next tick.
            TrainyardError: as `Cluster.list`.
        """
        cluster, place = self._cluster(environment), self._place(environment)
        hold(cluster, find_autoscalers(cluster, place.namespace, environment, model))

    def resume_autoscaling(self, environment: str, model: str, release_id: str) -> None:
        """Let autoscalers work again, on the Deployment of `release_id`.

        Raises:
            Conflict: somebody changed an autoscaler meanwhile.
            TrainyardError: as `Cluster.list`.
        """
        cluster, place = self._cluster(environment), self._place(environment)
        found = find_autoscalers(cluster, place.namespace, environment, model)
        if not found:
            return
        adopted = _adopted(cluster, place.namespace, environment, release_id)
        name = server_object_name(environment, release_id)
        let_go(cluster, found, adopted["metadata"]["name"] if adopted else name)

    def servers(self, environment: str, model: str) -> Sequence[ServerStatus]:
        """Return every server of the model in the environment, of whatever release.

        Raises:
            TrainyardError: as `Cluster.list`.
        """
        cluster, place = self._cluster(environment), self._place(environment)
        channel = {MODEL: model, ENVIRONMENT: environment}
        deployments, _ = cluster.list(DEPLOYMENT, place.namespace, labels=channel)
        ours = owned(COMPONENT, model=model, environment=environment)
        pods, _ = cluster.list(POD, place.namespace, labels=ours)
        found = [
            server_status(pod, pod["metadata"]["labels"][RELEASE])
            for pod in pods
            if RELEASE in pod["metadata"]["labels"]
        ]
        for each in deployments:
            if _is_adopted(each):
                found += _adopted_servers(cluster, each)
        servers = [server for server in found if server is not None]
        for each in deployments:
            release_id = each["metadata"]["labels"].get(RELEASE, "")
            begun = sum(s.release_id == release_id and s.state != "stopping" for s in servers)
            servers += not_begun(each, release_id, begun)
        return sorted(servers, key=lambda server: server.name)

    def _priority_class(
        self,
        cluster: Cluster,
        place: KubernetesServing,
        environment: str,
        release: Release,
        live: Object | None,
    ) -> str | None:
        """Return the PriorityClass of a release's pods: for good the one that they began with."""
        if place.candidate_priority_class is None:
            return place.stable_priority_class
        if live is not None:
            begun: str | None = live["spec"]["template"]["spec"].get("priorityClassName")
            return begun
        channel = {MODEL: release.model, ENVIRONMENT: environment}
        others, _ = cluster.list(DEPLOYMENT, place.namespace, labels=channel)
        if any(each["spec"].get("replicas") for each in others):
            return place.candidate_priority_class
        return place.stable_priority_class

    def _place(self, environment: str) -> KubernetesServing:
        found = self._environments.get(environment)
        if found is None or found.kubernetes is None:
            raise BadInput(
                f"Environment {environment} does not say where in a cluster its servers run.",
                hint="Add `kubernetes: {namespace: …}` to it in the environments file.",
            )
        return found.kubernetes

    def _cluster(self, environment: str) -> Cluster:
        context = self._place(environment).context
        if context not in self._clusters:
            self._clusters[context] = self._connect(self._settings, context)
        return self._clusters[context]


def _scale(cluster: Cluster, name: str, namespace: str, replicas: int) -> None:
    body = {"spec": {"replicas": replicas}}
    cluster.merge_patch(DEPLOYMENT, name, body, namespace=namespace, subresource="scale")


def _template_of(deployment: Object) -> str | None:
    """Return the digest of a Deployment's template as it was applied."""
    annotations = deployment["metadata"].get("annotations") or {}
    found: str | None = annotations.get(TEMPLATE)
    return found


def _demand_ours(kind: Kind, there: Object, environment: str, release_id: str) -> None:
    """Refuse an object that was not made by us for this release and environment."""
    metadata = there["metadata"]
    labels = metadata.get("labels") or {}
    ours = {MANAGED_BY: "trainyard", ENVIRONMENT: environment, RELEASE: release_id}
    wrong = [key for key, value in ours.items() if labels.get(key) != value]
    if wrong:
        raise BadInput(
            f"{kind.name} {metadata['name']} in namespace {metadata['namespace']} is not "
            f"Trainyard's for {release_id} in {environment}: it lacks the label "
            f"{wrong[0]}={ours[wrong[0]]}.",
            hint="Nothing was changed. Rename or delete it, or give the environment a namespace "
            "of its own.",
        )
    if metadata.get("deletionTimestamp"):
        raise Transient(f"{kind.name} {metadata['name']} is still being deleted.")


def _is_adopted(deployment: Object) -> bool:
    labels = deployment["metadata"].get("labels") or {}
    return labels.get(ADOPTED) == "true"


def _adopted(cluster: Cluster, namespace: str, environment: str, release_id: str) -> Object | None:
    """Return the Deployment that was adopted as a release."""
    labels = {ADOPTED: "true", ENVIRONMENT: environment, RELEASE: release_id}
    found, _ = cluster.list(DEPLOYMENT, namespace, labels=labels)
    return found[0] if found else None


def _adopted_servers(cluster: Cluster, deployment: Object) -> list[ServerStatus | None]:
    """Return the servers of an adopted Deployment, whose pods do not carry our labels."""
    metadata = deployment["metadata"]
    annotations = metadata.get("annotations") or {}
    labels = deployment["spec"]["selector"]["matchLabels"]
    pods, _ = cluster.list(POD, metadata["namespace"], labels=labels)
    return [
        server_status(
            pod,
            metadata["labels"][RELEASE],
            container=annotations.get(CONTAINER, SERVER),
            port=int(annotations.get(PORT, SERVER_PORT)),
        )
        for pod in pods
    ]
