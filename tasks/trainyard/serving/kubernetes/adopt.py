"""`trainyard adopt`: a Deployment that runs already becomes the stable release of a channel.

Nothing of it restarts: its own labels and annotations say from now on what it is, its template and
its pods stay as they are. A Service of our own selects the same pods, for the route. The release is
unverified: nobody knows what it is made of, so there is no manifest, no measurement to compare
with, and nothing to deploy it from again. It is good for being compared with under real traffic,
and for going back to: it is scaled, never deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trainyard.canonical import digest, short
from trainyard.documents.channel import Channel
from trainyard.errors import BadInput, NotFound
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import DEPLOYMENT, SERVICE
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
from trainyard.names import check_name
from trainyard.rollout.channel_store import change_channel, read_channel
from trainyard.rollout.events import Adopted
from trainyard.rollout.state_machine import step
from trainyard.serving.kubernetes.manifests import COMPONENT, PORT_NAME, SERVER_PORT
from trainyard.spec.environments import Environments
from trainyard.spec.kubernetes import KubernetesServing
from trainyard.store.protocol import Store

_SERVED_NAME = "--served-model-name"


@dataclass(frozen=True)
class Adoption:
    """What is going to be said about a Deployment."""

    release_id: str
    deployment: str
    container: str
    port: int
    ready: int
    """Servers that are ready."""
    served_names: tuple[str, ...]
    """Model names that its command serves; empty if it does not say."""


def place_of(environments: Environments, environment: str) -> KubernetesServing:
    """Return where in a cluster an environment serves.

    Raises:
        NotFound: there is no such environment.
        BadInput: it is not on platform kubernetes.
    """
    found = environments.environments.get(environment)
    if found is None:
        raise NotFound(
            f"There is no environment {environment}.",
            hint=f"There are: {', '.join(environments.environments)}.",
        )
    if found.kubernetes is None:
        raise BadInput(
            f"Environment {environment} is on platform {found.platform}.",
            hint="Only Deployments can be adopted, by environments on platform kubernetes.",
        )
    return found.kubernetes


def examine(
    deployment: Object, model: str, environment: str, *, container: str = "", port: int = 0
) -> Adoption:
    """Return how a Deployment would be adopted.

    Args:
        deployment: as the API has it.
        model: the channel's model.
        environment: the channel's environment.
        container: the one that serves; empty: the only one there is.
        port: where it listens; 0: its only port, else 8000.

    Raises:
        BadInput: it is Trainyard's own, belongs to another channel, has no server, selects its pods
            in a way that labels alone cannot say, or container or port are not clear.
    """
    metadata, spec = deployment["metadata"], deployment["spec"]
    name, labels = metadata["name"], metadata.get("labels") or {}
    if labels.get(MANAGED_BY) == "trainyard":
        raise BadInput(
            f"Deployment {name} is Trainyard's own already.",
            hint="Adopt one that was deployed by other means.",
        )
    channel = (labels.get(MODEL, model), labels.get(ENVIRONMENT, environment))
    if channel != (model, environment):
        raise BadInput(
            f"Deployment {name} was adopted for {channel[0]} in {channel[1]}.",
            hint="One Deployment serves in one channel.",
        )
    if spec["selector"].get("matchExpressions") or not spec["selector"].get("matchLabels"):
        raise BadInput(
            f"Deployment {name} selects its pods by expressions, which no Service can.",
            hint="Deploy it with a selector of labels alone.",
        )
    ready = int((deployment.get("status") or {}).get("readyReplicas") or 0)
    if ready < 1:
        raise BadInput(
            f"Deployment {name} has no ready pod.",
            hint="Only what serves now can become the stable release.",
        )
    serving = _container(name, spec["template"]["spec"]["containers"], container)
    return Adoption(
        release_id=f"{model}-{short(digest([environment, metadata['uid']]))}",
        deployment=name,
        container=serving["name"],
        port=port or _port(name, serving),
        ready=ready,
        served_names=_served_names([*serving.get("command", ()), *serving.get("args", ())]),
    )


def adopt(
    cluster: Cluster,
    store: Store,
    *,
    namespace: str,
    model: str,
    environment: str,
    deployment: str,
    container: str = "",
    port: int = 0,
    served_name: str = "",
    who: str = "",
    now: datetime,
) -> tuple[Adoption, Channel]:
    """Make a running Deployment the stable release of a channel; doing it again changes nothing.

    Args:
        cluster: where it runs.
        store: of the channel.
        namespace: of the environment.
        model: name of the model.
        environment: name of the environment.
        deployment: name of the Deployment.
        container: the one that serves; empty: the only one there is.
        port: where it listens; 0: as its Deployment says.
        served_name: the model's name for clients; both sides of a canary must answer to it.
        who: wants it.
        now: the time.

    Raises:
        NotFound: there is no such Deployment.
        BadInput: as `examine`; the channel has a stable release, or a rollout; or the Deployment
            serves under other names.
        TrainyardError: as `Cluster.merge_patch`.
    """
    check_name(model, "Model")
    check_name(environment, "Environment")
    found = cluster.get(DEPLOYMENT, deployment, namespace)
    if found is None:
        raise NotFound(
            f"There is no Deployment {deployment} in namespace {namespace}.",
            hint="The namespace is that of the environment's `kubernetes.namespace`.",
        )
    adoption = examine(found, model, environment, container=container, port=port)
    if served_name and adoption.served_names and served_name not in adoption.served_names:
        raise BadInput(
            f"Deployment {deployment} serves {', '.join(adoption.served_names)}, and clients of "
            f"{model} ask for {served_name}.",
            hint=f"Set served_model_name in the spec of {model} to the name that clients use.",
        )
    _demand_room(read_channel(store, model, environment), adoption)
    cluster.apply(SERVICE, _service(found, adoption, namespace, model, environment))
    event = Adopted(adoption.release_id, deployment, who)

    def change(channel: Channel) -> Channel:
        _demand_room(channel, adoption)
        return step(channel, event, now)[0]

    channel = change_channel(store, model, environment, change)
    # Last: servers that are marked and that no channel wants are taken away by rollouts.
    marks = _marks(adoption, model, environment)
    cluster.merge_patch(DEPLOYMENT, deployment, marks, namespace=namespace)
    return adoption, channel


def _demand_room(channel: Channel, adoption: Adoption) -> None:
    stable = channel.stable
    if channel.in_progress or (stable is not None and stable.release_id != adoption.release_id):
        has = f"the stable release {stable.release_id}" if stable is not None else "a rollout"
        raise BadInput(
            f"{channel.environment} of {channel.model} has {has} already.",
            hint="Only an empty channel can adopt; promote releases into this one.",
        )


def _marks(adoption: Adoption, model: str, environment: str) -> Object:
    labels = {MODEL: model, ENVIRONMENT: environment, RELEASE: adoption.release_id, ADOPTED: "true"}
    annotations = {CONTAINER: adoption.container, PORT: str(adoption.port)}
    return {"metadata": {"labels": labels, "annotations": annotations}}


def _service(
    deployment: Object, adoption: Adoption, namespace: str, model: str, environment: str
) -> Object:
    """Return the Service through which the route reaches the pods of an adopted Deployment."""
    owner = {
        "apiVersion": DEPLOYMENT.api_version,
        "kind": DEPLOYMENT.name,
        "name": adoption.deployment,
        "uid": deployment["metadata"]["uid"],
    }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": server_object_name(environment, adoption.release_id),
            "namespace": namespace,
            "labels": {
                **owned(COMPONENT, model=model, environment=environment),
                RELEASE: adoption.release_id,
            },
            "ownerReferences": [owner],
        },
        "spec": {
            "type": "ClusterIP",
            "selector": dict(deployment["spec"]["selector"]["matchLabels"]),
            "ports": [
                {
                    "name": PORT_NAME,
                    "port": SERVER_PORT,
                    "targetPort": adoption.port,
                    "protocol": "TCP",
                    "appProtocol": "http",
                }
            ],
        },
    }


def _container(deployment: str, containers: Sequence[Any], wanted: str) -> Object:
    names = [each["name"] for each in containers]
    chosen = wanted or (names[0] if len(names) == 1 else "")
    if chosen not in names:
        what = f"no container {wanted}" if wanted else f"{len(names)} containers"
        raise BadInput(
            f"Deployment {deployment} has {what}.",
            hint=f"Name the one that serves (--container): {', '.join(names)}.",
        )
    found: Object = containers[names.index(chosen)]
    return found


def _port(deployment: str, container: Object) -> int:
    ports = [int(each["containerPort"]) for each in container.get("ports") or ()]
    if len(ports) > 1:
        raise BadInput(
            f"Container {container['name']} of Deployment {deployment} has {len(ports)} ports.",
            hint=f"Name the one that serves (--port): {', '.join(map(str, ports))}.",
        )
    return ports[0] if ports else SERVER_PORT


def _served_names(words: Sequence[str]) -> tuple[str, ...]:
    """Return the names after `--served-model-name`, of which vLLM takes several."""
    for index, word in enumerate(words):
        if word.startswith(f"{_SERVED_NAME}="):
            return tuple(word.partition("=")[2].split())
        if word == _SERVED_NAME:
            names = []
            for name in words[index + 1 :]:
                if name.startswith("-"):
                    break
                names.append(name)
            return tuple(names)
    return ()
