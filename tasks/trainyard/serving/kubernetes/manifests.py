"""The objects of a release's servers, as pure functions: a Deployment, a Service, a PDB.

What a pod consists of::

    init      own-folder     only with `run_as_user`: gives the node's folder to that user
    sidecar   pod-folder     holds the pod's folder on the node, removes it with the pod
    init      restore        `trainyard materialize`: the files of the release, checked
    server    server         the lane's command, with everything that would compile out of reach

Nothing here says stable or candidate: that is the channel's and the route's business. A promotion
changes no field of a template, so it restarts no pod.

`docs/serving-kubernetes.md` has the source of every line that is not plain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trainyard.canonical import digest, short
from trainyard.documents.release import Release
from trainyard.errors import BadInput
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.labels import (
    ENVIRONMENT,
    LANE,
    PREFIX,
    RELEASE,
    TARGET,
    owned,
    server_object_name,
)
from trainyard.lanes.neuron_common import chips_needed, world_size
from trainyard.lanes.neuron_support import INSTANCES, Instance
from trainyard.lanes.registry import get_lane
from trainyard.settings import Settings
from trainyard.spec.kubernetes import KubernetesServing
from trainyard.spec.model import Capacity, Target

SERVER_PORT = 8000
"""Of servers and of their Services; vLLM's own default."""
PORT_NAME = "http"
"""What Services and PodMonitors call it."""
COMPONENT = "server"
SERVER = "server"
RESTORE = "restore"
POD_FOLDER = "pod-folder"
OWN_FOLDER = "own-folder"

TEMPLATE = f"{PREFIX}/template"
"""Annotation: digest of the Deployment's template as we applied it."""

SETTLE_S = 20
"""Seconds in which every data plane has learned that a pod left its Service."""
STOP_S = 30
"""Seconds between SIGTERM and SIGKILL, at the end of the grace period."""
KEEP_ALIVE_S = 3900
"""Seconds before a server closes an idle connection; vLLM's default is 5. Data planes keep theirs
for longer (Envoy an hour), and must go first: a request that meets a connection which is just being
closed fails, and the less traffic a release has, the more of its requests do."""

_NODE = "/node"
"""Where the node's folder lies in containers that may see all of it."""
_FILES = "/release"
"""Where the release lies in a server, and nothing else of the node."""
_KEYS = "/etc/trainyard/keys"
_NEURON = "aws.amazon.com/neuron"
_GIB_OF_SHM = 64
"""The most that a server's shared memory may take."""

_PASSED_ON = (
    "s3_endpoint_url",
    "s3_region",
    "s3_addressing_style",
    "s3_expected_bucket_owner",
    "s3_timeout_s",
    "s3_attempts",
)
"""Settings that say how the store is read, beside where it is."""


@dataclass(frozen=True)
class ServerManifests:
    """Everything that serves one release in one environment."""

    deployment: Object
    service: Object
    disruption_budget: Object

    @property
    def objects(self) -> tuple[Object, ...]:
        """All of them, in the order in which they are applied."""
        return (self.deployment, self.service, self.disruption_budget)


def server_manifests(
    release: Release,
    environment: str,
    place: KubernetesServing,
    replicas: int,
    settings: Settings,
    *,
    capacity: Capacity = "surge",
    priority_class: str | None = None,
) -> ServerManifests:
    """Return the objects that serve `release`.

    Args:
        release: a verified release.
        environment: its name.
        place: where in the cluster.
        replicas: how many servers.
        settings: of this installation: the store, limits of time.
        capacity: has the environment room for one server more than it needs?
        priority_class: of the pods; it can not be changed without new pods.

    Raises:
        BadInput: neither target nor place name an image, or the instance is not known.
    """
    target = release.target
    name = server_object_name(environment, release.release_id)
    labels = {
        **owned(COMPONENT, model=release.model, environment=environment),
        RELEASE: release.release_id,
        TARGET: target.name,
        LANE: release.lane,
    }
    metadata = {"name": name, "namespace": place.namespace, "labels": labels}
    template = _template(release, place, settings, labels, priority_class)
    deployment: Object = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**metadata, "annotations": {TEMPLATE: template_digest(template)}},
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": math.ceil(release.spec.rollout.deploy_timeout_s),
            "strategy": _strategy(capacity),
            "selector": {"matchLabels": selector_of(labels)},
            "template": template,
        },
    }
    service: Object = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "type": "ClusterIP",
            "selector": selector_of(labels),
            "ports": [
                {
                    "name": PORT_NAME,
                    "port": SERVER_PORT,
                    "targetPort": PORT_NAME,
                    "protocol": "TCP",
                    "appProtocol": "http",
                }
            ],
        },
    }
    budget: Object = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata,
        "spec": {
            # The only server of a release is not evicted: a cold start is an outage.
            "maxUnavailable": 1 if replicas > 1 else 0,
            "selector": {"matchLabels": selector_of(labels)},
            # A server that is broken anyway does not hold up a node's upgrade.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
    return ServerManifests(deployment, service, budget)


def selector_of(labels: Mapping[str, str]) -> dict[str, str]:
    """Return those labels by which Deployment, Service and PDB know their pods."""
    return {key: labels[key] for key in (ENVIRONMENT, RELEASE)}


def template_digest(template: Mapping[str, Any]) -> str:
    """Return what tells two templates apart; never something that YAML takes for a number."""
    return f"sha256:{short(digest(template))}"


def start_window_s(release: Release, settings: Settings) -> int:
    """Return the seconds that a server may take from its start to its first healthy answer."""
    lane_s = get_lane(release.lane).start_timeout_s(cache_only=True)
    return math.ceil(max(lane_s, settings.server_start_timeout_s))


def _strategy(capacity: Capacity) -> Object:
    """Return how pods are replaced if a template changes, which we do not do by ourselves."""
    surge = capacity == "surge"
    # Without room for one more, a surge would wait for a device for ever.
    how = {"maxSurge": 1, "maxUnavailable": 0} if surge else {"maxSurge": 0, "maxUnavailable": 1}
    return {"type": "RollingUpdate", "rollingUpdate": how}


def _template(
    release: Release,
    place: KubernetesServing,
    settings: Settings,
    labels: Mapping[str, str],
    priority_class: str | None,
) -> Object:
    target, instance = release.target, _instance(release.target)
    drain_s = math.ceil(settings.drain_timeout_s)
    spec: Object = {
        "serviceAccountName": place.service_account,
        # Nothing in the pod talks to the cluster. IAM roles come in a volume of their own.
        "automountServiceAccountToken": False,
        # A Service named `vllm` would set VLLM_PORT, which vLLM takes for its own setting.
        "enableServiceLinks": False,
        "securityContext": _pod_security(place),
        "terminationGracePeriodSeconds": SETTLE_S + drain_s + STOP_S,
        "topologySpreadConstraints": [
            _spread("topology.kubernetes.io/zone", labels),
            _spread("kubernetes.io/hostname", labels),
        ],
        "initContainers": _init_containers(release, place, settings),
        "containers": [_server(release, place, settings, instance, drain_s)],
        "volumes": _volumes(place, target, instance),
    }
    selector = {**place.node_selector}
    if instance is not None:
        selector["node.kubernetes.io/instance-type"] = instance.name
    optional: Object = {
        "nodeSelector": selector,
        "tolerations": _tolerations(place, instance),
        "imagePullSecrets": [{"name": name} for name in place.image_pull_secrets],
        "priorityClassName": priority_class,
        "schedulerName": place.scheduler_name if _takes_part(target, instance) else None,
    }
    spec |= {key: value for key, value in optional.items() if value}
    return {
        "metadata": {
            "labels": dict(labels),
            "annotations": {
                "karpenter.sh/do-not-disrupt": "true",
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "kubectl.kubernetes.io/default-container": SERVER,
                # The server answers the world and has no use for the store's credentials.
                "eks.amazonaws.com/skip-containers": ",".join((SERVER, POD_FOLDER)),
            },
        },
        "spec": spec,
    }


def _server(
    release: Release,
    place: KubernetesServing,
    settings: Settings,
    instance: Instance | None,
    drain_s: int,
) -> Object:
    target = release.target
    command = get_lane(release.lane).command(
        target,
        python=Path("/python"),
        model_dir=Path(_FILES, "model"),
        cache_dir=Path(_FILES, "cache"),
        served_model_name=release.served_model_name,
        port=SERVER_PORT,
        cache_only=True,
        # Other pods and the node's kubelet ask it.
        host="0.0.0.0",
    )
    env = {
        "PYTHONUNBUFFERED": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
        **_home(place),
        **place.env,
        **command.env,
    }
    if instance is not None:
        # Tells the releases of one node apart in neuron-monitor's `runtime_tag`.
        env["NEURON_PROCESS_TAG"] = release.release_id
    window_s = start_window_s(release, settings)
    drain = [
        place.python,
        "-m",
        "trainyard.serving.kubernetes.drain",
        f"--port={SERVER_PORT}",
        f"--settle-s={SETTLE_S}",
        f"--timeout-s={drain_s}",
    ]
    return {
        "name": SERVER,
        "image": image_of(target, place),
        "imagePullPolicy": place.image_pull_policy,
        "command": [place.serve_python or place.python, *map(_literal, command.argv[1:])],
        "env": [*_pod_uid(place), *_env(env)],
        "ports": [{"name": PORT_NAME, "containerPort": SERVER_PORT, "protocol": "TCP"}],
        "resources": _resources(target, place, instance),
        "startupProbe": {
            **_health(period_s=5, misses=math.ceil(window_s / 5)),
            "terminationGracePeriodSeconds": STOP_S,
        },
        "readinessProbe": _health(period_s=5, misses=3),
        "livenessProbe": {
            **_health(period_s=10, misses=6),
            # It answers nobody: there is nothing to drain.
            "terminationGracePeriodSeconds": STOP_S,
        },
        "lifecycle": {"preStop": {"exec": {"command": drain}}},
        # The end of the log of a server that died is in the pod's status.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _security(),
        "volumeMounts": [*_server_mounts(place), *_host_mounts(place)],
    }


def _init_containers(
    release: Release, place: KubernetesServing, settings: Settings
) -> list[Object]:
    folder = f"{_NODE}/pods/$(POD_UID)"
    image: Object = {
        "image": image_of(release.target, place),
        "imagePullPolicy": place.image_pull_policy,
    }
    node = {"name": "node", "mountPath": _NODE}
    containers: list[Object] = []
    if place.node_cache is not None and place.run_as_user is not None:
        containers.append(
            {
                "name": OWN_FOLDER,
                **image,
                # Kubernetes gives a hostPath to root and knows no fsGroup for it.
                "command": ["chown", f"{place.run_as_user}:{place.run_as_user}", _NODE],
                "securityContext": {
                    **_security(),
                    "runAsUser": 0,
                    "runAsNonRoot": False,
                    "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]},
                },
                "volumeMounts": [node],
            }
        )
    if place.node_cache is not None:
        containers.append(
            {
                "name": POD_FOLDER,
                **image,
                # A sidecar: it runs before the restore begins and until the server has ended.
                "restartPolicy": "Always",
                "command": [place.python, "-m", "trainyard.node_cache.pod_folder", folder],
                "env": [*_pod_uid(place), *_env(place.env)],
                "resources": {"requests": {"cpu": "5m", "memory": "32Mi"}},
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": _security(),
                # Its interpreter may lie on one of them.
                "volumeMounts": [node, *_host_mounts(place)],
            }
        )
    cached = place.node_cache is not None
    cpu = _cpu(release.target, place, _instance(release.target))
    containers.append(
        {
            "name": RESTORE,
            **image,
            "command": [
                place.python,
                "-m",
                "trainyard",
                "materialize",
                release.release_id,
                folder if cached else _FILES,
            ],
            "env": [*_pod_uid(place), *_env(_restore_env(place, settings))],
            "envFrom": [
                {"secretRef": {"name": secret.name, "optional": secret.optional}}
                for secret in place.env_from_secrets
            ],
            # No more than the server, which starts when it has ended: the larger counts.
            "resources": {"requests": {"cpu": f"{min(1, cpu):g}", "memory": "1Gi"}},
            # The reason of a failed restore is in the pod's status.
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "securityContext": _security(),
            "volumeMounts": [
                node if cached else {"name": "files", "mountPath": _FILES},
                {"name": "tmp", "mountPath": "/tmp"},
                *_key_mounts(place),
                *_host_mounts(place),
            ],
        }
    )
    return [{key: value for key, value in each.items() if value} for each in containers]


def _restore_env(place: KubernetesServing, settings: Settings) -> dict[str, str]:
    """Return what the restore is told; nothing of it is secret."""
    env = {
        "TRAINYARD_HOME": "/tmp/trainyard",
        "TRAINYARD_STORE": settings.store_name,
        **{
            f"TRAINYARD_{name.upper()}": str(getattr(settings, name))
            for name in _PASSED_ON
            if name in settings.model_fields_set
        },
    }
    if place.node_cache is not None:
        env["TRAINYARD_NODE_CACHE"] = f"{_NODE}/cache"
        if place.node_cache.gib:
            env["TRAINYARD_NODE_CACHE_GIB"] = f"{place.node_cache.gib:g}"
    if place.trusted_keys is not None:
        env["TRAINYARD_TRUSTED_KEYS"] = f"{_KEYS}/trusted-keys.json"
    env = {**_home(place), **env, **place.env}
    _check_store(env["TRAINYARD_STORE"], place)
    return env


def _check_store(store: str, place: KubernetesServing) -> None:
    """Raise BadInput if the store is a folder that no pod sees."""
    mounts = (mount.mount_path for mount in place.host_mounts)
    if "://" not in store and not any(PurePosixPath(store).is_relative_to(m) for m in mounts):
        raise BadInput(
            f"The store {store} is a folder that no server's pod sees.",
            hint="Use a store in S3 (TRAINYARD_STORE=s3://…), or mount the folder under the same "
            "path with kubernetes.host_mounts.",
        )


def image_of(target: Target, place: KubernetesServing) -> str:
    """Return the image that serves a target. Raises BadInput if nobody names one."""
    image = (target.neuron.image if target.neuron is not None else "") or place.image
    if not image:
        raise BadInput(
            f"There is no image for servers of target {target.name}.",
            hint="Name one in the target (`neuron.image`) or in the environment "
            "(`kubernetes.image`).",
        )
    return image


def _instance(target: Target) -> Instance | None:
    """Return the instance whose devices a target takes; None if it takes none."""
    if target.neuron is None:
        return None
    instance = INSTANCES.get(target.instance)
    if instance is None:
        raise BadInput(
            f"Instance {target.instance!r} of target {target.name} is not in Trainyard's table, so "
            "nobody knows how many devices a server takes.",
            hint=f"Known instances: {', '.join(INSTANCES)}.",
        )
    return instance


def _takes_part(target: Target, instance: Instance | None) -> bool:
    """Tell whether a server leaves devices of its node to others."""
    return instance is not None and chips_needed(target) < instance.chips


def _resources(target: Target, place: KubernetesServing, instance: Instance | None) -> Object:
    """Return what a server asks for. No limits but devices: a server that is slowed down, or that
    reads its weights through the page cache, is not to be taken for one that leaks."""
    requests = {"ephemeral-storage": f"{_disk_gib(place)}Gi"}
    requests["cpu"] = f"{_cpu(target, place, instance):g}"
    memory_gib = place.server_memory_gib or _memory_gib(target, instance)
    if memory_gib is not None:
        requests["memory"] = f"{math.ceil(memory_gib)}Gi"
    if instance is None:
        return {"requests": dict(sorted(requests.items()))}
    devices = str(chips_needed(target))
    return {
        # Chips, not cores: vLLM refuses NEURON_RT_VISIBLE_CORES, which comes with `neuroncore`.
        "limits": {_NEURON: devices},
        "requests": {_NEURON: devices, **dict(sorted(requests.items()))},
    }


def _cpu(target: Target, place: KubernetesServing, instance: Instance | None) -> float:
    """Return the cores that a server asks for."""
    return place.server_cpu or (1 if instance is None else world_size(target))


def _disk_gib(place: KubernetesServing) -> int:
    """Return the disk for logs and temporary files, and for the release where it lies there."""
    return 8 if place.node_cache is not None else 8 + place.files_gib


def _memory_gib(target: Target, instance: Instance | None) -> float | None:
    if instance is None:
        return target.kv_cache_gib + 3
    share = _share_gib(target, instance)
    # The rest is the kubelet's, the system's and the page cache's.
    return None if share is None else math.floor(share * 0.8)


def _share_gib(target: Target, instance: Instance) -> float | None:
    """Return the part of an instance's memory that belongs to a server's devices."""
    if instance.host_memory_gib is None:
        return None
    return instance.host_memory_gib * chips_needed(target) / instance.chips


def _volumes(place: KubernetesServing, target: Target, instance: Instance | None) -> list[Object]:
    share = _share_gib(target, instance) if instance is not None else 8.0
    shm_gib = min(_GIB_OF_SHM, max(1, int((share or 512.0) / 8)))
    volumes: list[Object] = [
        # Workers of one server talk through it; Kubernetes gives 64 MiB by default.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if place.node_cache is not None:
        path = {"path": place.node_cache.host_path, "type": "DirectoryOrCreate"}
        volumes.append({"name": "node", "hostPath": path})
    else:
        size = {"sizeLimit": f"{place.files_gib}Gi"}
        volumes.append({"name": "files", "emptyDir": size})
    if place.trusted_keys is not None:
        # Missing keys are the restore's to explain; a missing volume would say nothing.
        keys = {"name": place.trusted_keys, "optional": True}
        volumes.append({"name": "trusted-keys", "configMap": keys})
    for index, mount in enumerate(place.host_mounts):
        volumes.append({"name": f"host-{index}", "hostPath": {"path": mount.host_path}})
    return volumes


def _server_mounts(place: KubernetesServing) -> list[Object]:
    """Return a server's view: its own release, the weights read-only, nothing else of the node."""
    common: list[Object] = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if place.node_cache is None:
        return [
            {"name": "files", "mountPath": _FILES},
            {
                "name": "files",
                "mountPath": f"{_FILES}/model",
                "subPath": "model",
                "readOnly": True,
            },
            *common,
        ]
    own = "pods/$(POD_UID)"
    return [
        {"name": "node", "mountPath": _FILES, "subPathExpr": own},
        {
            "name": "node",
            "mountPath": f"{_FILES}/model",
            "subPathExpr": f"{own}/model",
            "readOnly": True,
        },
        *common,
    ]


def _key_mounts(place: KubernetesServing) -> list[Object]:
    if place.trusted_keys is None:
        return []
    return [{"name": "trusted-keys", "mountPath": _KEYS, "readOnly": True}]


def _host_mounts(place: KubernetesServing) -> list[Object]:
    return [
        {
            "name": f"host-{index}",
            "mountPath": mount.mount_path,
            **({"readOnly": True} if mount.read_only else {}),
        }
        for index, mount in enumerate(place.host_mounts)
    ]


def _pod_uid(place: KubernetesServing) -> list[Object]:
    if place.node_cache is None:
        return []
    return [{"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}]


def _env(variables: Mapping[str, str]) -> list[Object]:
    return [{"name": name, "value": _literal(value)} for name, value in sorted(variables.items())]


def _literal(text: str) -> str:
    """Return a text that Kubernetes leaves as it is: it would fill in `$(NAME)`."""
    return text.replace("$(", "$$(")


def _home(place: KubernetesServing) -> dict[str, str]:
    """Return a home for a user whom the image does not know."""
    return {} if place.run_as_user is None else {"HOME": "/tmp"}


def _health(*, period_s: int, misses: int) -> Object:
    return {
        "httpGet": {"path": "/health", "port": PORT_NAME},
        "periodSeconds": period_s,
        # A machine whose processors are all busy answers late.
        "timeoutSeconds": 10,
        "failureThreshold": misses,
    }


def _spread(key: str, labels: Mapping[str, str]) -> Object:
    return {
        "maxSkew": 1,
        "topologyKey": key,
        # A wish: devices are where they are.
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector_of(labels)},
    }


def _tolerations(place: KubernetesServing, instance: Instance | None) -> Sequence[Object]:
    own: list[Object] = []
    if instance is not None:
        own.append({"key": _NEURON, "operator": "Exists", "effect": "NoSchedule"})
    return [
        *own,
        *({key: value for key, value in vars(t).items() if value} for t in place.tolerations),
    ]


def _pod_security(place: KubernetesServing) -> Object:
    user: Object = {}
    if place.run_as_user is not None:
        user = {
            "runAsNonRoot": True,
            "runAsUser": place.run_as_user,
            "runAsGroup": place.run_as_user,
            "fsGroup": place.run_as_user,
        }
    return {**user, "seccompProfile": {"type": "RuntimeDefault"}}


def _security() -> Object:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
