"""The pod of one heavy step, as a manifest: what runs, on which node, with what of it.

Pure: the same work in the same place gives the same manifest. Nothing secret is in it: credentials
come from the service account's IAM role, or from Secrets by name.

Sources, where a line is not plain Kubernetes: AWS Neuron SDK 2.32 documentation (deploy/includes/
k8s-neuron-device-plugin.rst, deploy/infrastructure/scheduler.rst, deploy/eks/dra.rst), Karpenter's
documentation (concepts/disruption, tasks/odcrs), the EC2 user guide (Capacity Blocks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from trainyard.canonical import digest, short
from trainyard.errors import BadInput
from trainyard.kubernetes import labels
from trainyard.kubernetes.step_size import Devices, StepSize, devices_of, size_of
from trainyard.spec.kubernetes import CapacityReservation, HostMount, KubernetesSteps, Toleration
from trainyard.spec.model import Target

Object = dict[str, Any]

CONTAINER = "base"
"""Airflow's KubernetesPodOperator watches the container of this name."""
HOME = "/trainyard"
"""Where a step keeps its scratch files, in the container."""
NEURON = "aws.amazon.com/neuron"
"""Resource and taint of whole Neuron devices. Cores (`…/neuroncore`) will not do: the plugin then
sets NEURON_RT_VISIBLE_CORES, which vLLM refuses with more than one."""
HOSTNAME = "kubernetes.io/hostname"
GRACE_S = 45
"""Seconds between SIGTERM and SIGKILL: a step cleans up in 30."""
BLOCK_MARGIN = timedelta(hours=1)
"""EC2 begins to terminate the instances of a Capacity Block half an hour before its end."""
SERVING_STEPS = frozenset({"tasks", "compile", "measure", "logits"})
"""They use what the target's image serves and measures with."""
POD_STEPS = frozenset({"download", *SERVING_STEPS})
"""Steps that become pods. What they make is known by its key before they run."""
ACCOUNT_OF = {"tasks": "measure", "logits": "measure"}
"""Steps that use another one's service account."""
SOURCE_STEPS = frozenset({"download"})


@dataclass(frozen=True)
class StepWork:
    """What a pod is to do."""

    step: str
    plan_id: str
    model: str
    target: Target | None = None
    """None: the step serves all targets."""
    arguments: tuple[str, ...] = ()
    checkpoint_bytes: int = 0
    """Size of the model's files; 0: unknown."""
    reference_gib: float = 0.0
    """Memory that the parity reference takes beside the server, or the goldens of step `logits`; 0:
    none are made."""
    limit_s: float = 6 * 3600.0
    """Seconds that the task may take in all."""
    out_of_memory: int = 0
    """How often the step ran out of memory before."""
    avoided_nodes: tuple[str, ...] = ()
    """Host names of nodes whose devices failed it."""

    @property
    def devices(self) -> Devices | None:
        """The devices that the work takes."""
        return devices_of(self.step, self.target)


def image_of(work: StepWork, place: KubernetesSteps) -> str:
    """Return the image that a step runs in. Raises BadInput if none is named."""
    own = work.target.neuron.image if work.target is not None and work.target.neuron else ""
    image = own if work.step in SERVING_STEPS and own else place.image
    if not image:
        what = f"target {work.target.name}" if work.target is not None else "the step"
        raise BadInput(
            f"No image is named for step {work.step} of {what}.",
            hint="Set steps.image in the environments file, or neuron.image in the target.",
        )
    return image


def step_pod(
    work: StepWork,
    place: KubernetesSteps,
    *,
    env: Mapping[str, str],
    secret: str = "",
    now: datetime,
) -> Object:
    """Return the manifest of the pod.

    Args:
        work: what it is to do.
        place: where the steps run.
        env: variables of Trainyard for every step, none of them secret.
        secret: name of a Secret whose keys become variables as well; empty: none.
        now: the time, with a time zone; what a Capacity Block has left depends on it.

    Raises:
        BadInput: no image is named, the store is a folder that no pod sees, or the work cannot end
            in time before its Capacity Block does.
    """
    image = image_of(work, place)
    check_store(env, place)
    size = size_of(
        work.step,
        work.target,
        checkpoint_bytes=work.checkpoint_bytes,
        reference_gib=work.reference_gib,
        work_gib=place.work_gib,
        out_of_memory=work.out_of_memory,
    )
    reservation = reservation_of(work, place)
    deadline_s = deadline_of(work, size, reservation, now=now)
    devices = work.devices
    spec: Object = {
        "restartPolicy": "Never",  # Airflow tries again, and knows when not to.
        "activeDeadlineSeconds": int(deadline_s),
        "terminationGracePeriodSeconds": GRACE_S,
        "serviceAccountName": place.service_accounts.get(
            ACCOUNT_OF.get(work.step, work.step),  # type: ignore[call-overload]
            place.service_account,
        ),
        # IAM roles come through a volume of their own; no step talks to the cluster's API.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "nodeSelector": dict(_node_selector(place, devices, reservation)),
        "tolerations": list(_tolerations(place, devices)),
        "containers": [_container(work, place, size, image=image, env=env, secret=secret)],
        "volumes": list(_volumes(place, size)),
    }
    if work.avoided_nodes:
        expression = {"key": HOSTNAME, "operator": "NotIn", "values": list(work.avoided_nodes)}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
        spec["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}
        }
    if place.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in place.image_pull_secrets]
    priority = {
        "compile": place.compile_priority_class, "measure": place.measure_priority_class,
        "logits": place.compile_priority_class,
    }.get(work.step)  # fmt: skip
    if priority is not None:
        spec["priorityClassName"] = priority
    if devices is not None and not devices.whole_node and place.scheduler_name is not None:
        # The extension finds devices that are connected; whole nodes need none.
        spec["schedulerName"] = place.scheduler_name
    if devices is not None and place.devices == "dra":
        claim = claim_name(devices)
        spec["resourceClaims"] = [{"name": "neurons", "resourceClaimTemplateName": claim}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(work),
            "namespace": place.namespace,
            "labels": _labels(work),
            "annotations": {
                # Neither autoscaler may move a pod that would begin again from nothing.
                "karpenter.sh/do-not-disrupt": "true",
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            },
        },
        "spec": spec,
    }


def check_store(env: Mapping[str, str], place: KubernetesSteps) -> None:
    """Raise BadInput if the store is a folder that pods do not see."""
    store = {**env, **place.env}.get("TRAINYARD_STORE", "")
    if "://" in store or any(_within(store, mount) for mount in place.host_mounts):
        return
    raise BadInput(
        f"The store {store or '(none)'} is a folder that no pod sees.",
        hint="Use a store in S3 (TRAINYARD_STORE=s3://…), or mount the folder under the same path "
        "with steps.host_mounts, not read-only.",
    )


def _within(path: str, mount: HostMount) -> bool:
    return not mount.read_only and PurePosixPath(path).is_relative_to(mount.mount_path)


def reservation_of(work: StepWork, place: KubernetesSteps) -> CapacityReservation | None:
    """Return the reservation whose nodes the work goes to: that which lasts longest."""
    devices = work.devices
    if devices is None:
        return None
    fitting = [each for each in place.reservations if each.instance == devices.instance.name]
    never = datetime.max.replace(tzinfo=UTC)
    return max(fitting, key=lambda each: each.ends_at or never, default=None)


def deadline_of(
    work: StepWork, size: StepSize, reservation: CapacityReservation | None, *, now: datetime
) -> float:
    """Return the seconds that the pod may be active.

    Raises:
        BadInput: the Capacity Block ends too early.
    """
    if reservation is None or reservation.ends_at is None:
        return work.limit_s
    left_s = (reservation.ends_at - BLOCK_MARGIN - now).total_seconds()
    if left_s < size.needed_s:
        ends = reservation.ends_at.isoformat(timespec="minutes")
        raise BadInput(
            f"Step {work.step} may need {size.needed_s / 3600:.1f} h, and Capacity Block "
            f"{reservation.id} of {reservation.instance} ends at {ends}: an hour before that, only "
            f"{max(0.0, left_s) / 3600:.1f} h are left.",
            hint="Extend the block, add a later one to steps.reservations, or take the ended one "
            "out.",
        )
    return min(work.limit_s, left_s)


def pod_name(work: StepWork) -> str:
    """Return the beginning of the pod's name, to which Airflow adds a random end."""
    parts = [work.step, work.plan_id, *([work.target.name] if work.target is not None else [])]
    return re.sub(r"[^a-z0-9-]+", "-", "-".join(parts).lower())[:50].strip("-")


def secret_name(dag_run: str, task: str) -> str:
    """Return the name of the Secret of one task: the same for each of its tries."""
    return f"trainyard-step-{short(digest([dag_run, task]))}"


def secret_object(name: str, place: KubernetesSteps, values: Mapping[str, str]) -> Object:
    """Return a Secret with variables for one pod."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "namespace": place.namespace,
            "labels": labels.owned("step"),
        },
        "type": "Opaque",
        "stringData": dict(values),
    }


def claim_name(devices: Devices) -> str:
    """Return the name of the template of the pod's claim."""
    kind = devices.instance.name.replace(".", "-")
    return f"trainyard-{kind}-{devices.chips}-lnc{devices.lnc}"


def claim_template(devices: Devices, place: KubernetesSteps) -> Object:
    """Return the ResourceClaimTemplate for so many devices (deploy/eks/dra.rst).

    Parts of a Trainium node are groups of devices that are connected; the driver knows groups of
    4, 8 and 16.
    """
    request: Object = {
        "deviceClassName": place.device_class,
        "selectors": [
            {
                "cel": {
                    "expression": f"device.attributes['neuron.aws.com'].instanceType == "
                    f"'{devices.instance.name}'"
                }
            }
        ],
        **(
            {"allocationMode": "All"}
            if devices.whole_node
            else {"allocationMode": "ExactCount", "count": devices.chips}
        ),
    }
    found: Object = {"requests": [{"name": "neurons", "exactly": request}]}
    if not devices.whole_node and devices.chips in (4, 8, 16):
        group = f"resource.aws.com/devicegroup{devices.chips}_id"
        found["constraints"] = [{"requests": ["neurons"], "matchAttribute": group}]
    if devices.instance.default_lnc != devices.lnc:
        parameters = {
            "apiVersion": "neuron.aws.com/v1",
            "kind": "NeuronConfig",
            "logicalNeuronCore": devices.lnc,
        }
        opaque = {"driver": "neuron.aws.com", "parameters": parameters}
        found["config"] = [{"requests": ["neurons"], "opaque": opaque}]
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {
            "name": claim_name(devices),
            "namespace": place.namespace,
            "labels": labels.owned("step"),
        },
        "spec": {"spec": {"devices": found}},
    }


def place_warnings(work: StepWork, place: KubernetesSteps) -> Iterator[str]:
    """Yield what people should know of the work in this place, each as sentences."""
    devices = work.devices
    if devices is None or devices.whole_node or devices.chips == 1:
        return
    if place.devices == "plugin" and place.scheduler_name is None:
        yield (
            f"Its pods take {devices.chips} of the {devices.instance.chips} devices of a node, "
            "which must be connected: set steps.scheduler_name to a scheduler with the Neuron "
            "extension, unless the cluster's default one has it."
        )


def _labels(work: StepWork) -> dict[str, str]:
    found = labels.owned("step", model=work.model)
    found |= {labels.STEP: work.step, labels.PLAN: work.plan_id}
    if work.target is not None:
        found |= {labels.TARGET: work.target.name, labels.LANE: work.target.lane}
    return found


def _node_selector(
    place: KubernetesSteps, devices: Devices | None, reservation: CapacityReservation | None
) -> Iterator[tuple[str, str]]:
    yield from place.node_selector.items()
    if devices is not None:
        yield "node.kubernetes.io/instance-type", devices.instance.name
    if reservation is not None:
        yield "karpenter.k8s.aws/capacity-reservation-id", reservation.id


def _tolerations(place: KubernetesSteps, devices: Devices | None) -> Iterator[Object]:
    own = [Toleration(key=NEURON)] if devices is not None else []
    for each in dict.fromkeys((*own, *place.tolerations)):
        found: Object = {"key": each.key, "operator": each.operator}
        if each.operator == "Equal":
            found["value"] = each.value
        if each.effect:
            found["effect"] = each.effect
        yield found


def _container(
    work: StepWork,
    place: KubernetesSteps,
    size: StepSize,
    *,
    image: str,
    env: Mapping[str, str],
    secret: str,
) -> Object:
    values = {
        "PYTHONUNBUFFERED": "1",
        **env,
        "TRAINYARD_HOME": HOME,
        # Nothing inside a container knows its image.
        "TRAINYARD_IMAGE": image,
    }
    if place.serve_python:
        values["TRAINYARD_SERVE_PYTHON"] = place.serve_python
    values |= place.env
    sources = [
        {"secretRef": {"name": each.name, "optional": each.optional}}
        for each in place.env_from_secrets
    ]
    if secret:
        sources.append({"secretRef": {"name": secret}})
    command = [place.python, "-m", "trainyard", work.step, "--plan", work.plan_id]
    if work.target is not None:
        command += ["--target", work.target.name]
    container: Object = {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": place.image_pull_policy,
        "command": [*command, *work.arguments],
        "env": [{"name": name, "value": value} for name, value in sorted(values.items())],
        "resources": _resources(work, place, size),
        "securityContext": {"allowPrivilegeEscalation": False},
        # The end of the log is the reason, for those who look at the pod alone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": list(_mounts(place, size)),
    }
    if sources:
        container["envFrom"] = sources
    return container


def _resources(work: StepWork, place: KubernetesSteps, size: StepSize) -> Object:
    requests: dict[str, str] = {
        "cpu": str(size.cpus),
        "memory": f"{size.memory_gib}Gi",
        "ephemeral-storage": f"{size.disk_gib}Gi",
    }
    devices = work.devices
    if devices is None:
        return {"requests": requests}
    if place.devices == "dra":
        return {"requests": requests, "claims": [{"name": "neurons"}]}
    count = {NEURON: str(devices.chips)}
    # Extended resources cannot be overcommitted: request and limit are the same.
    return {"requests": {**requests, **count}, "limits": count}


def _volumes(place: KubernetesSteps, size: StepSize) -> Iterator[Object]:
    yield {"name": "work", "emptyDir": {"sizeLimit": f"{size.disk_gib}Gi"}}
    if size.shm_gib:
        # Workers of one server exchange tensors there; 64 MiB are a container's default.
        yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{size.shm_gib}Gi"}}
    for number, mount in enumerate(place.host_mounts):
        yield {"name": f"host-{number}", "hostPath": {"path": mount.host_path}}


def _mounts(place: KubernetesSteps, size: StepSize) -> Iterator[Object]:
    yield {"name": "work", "mountPath": HOME}
    if size.shm_gib:
        yield {"name": "shm", "mountPath": "/dev/shm"}
    for number, mount in enumerate(place.host_mounts):
        yield {
            "name": f"host-{number}",
            "mountPath": mount.mount_path,
            "readOnly": mount.read_only,
        }
