"""Where pods run: the cluster's side of environments and of heavy steps.

Everything that differs between an EKS cluster with Neuron nodes and a bare cluster of one node is
here, so that the same release runs on both.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from trainyard.spec.part import SpecPart

DNS_LABEL_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
DNS_NAME_PATTERN = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
ABSOLUTE_PATH_PATTERN = r"^/[^\x00:]*$"
RESERVATION_PATTERN = r"^cr-[0-9a-f]{8,32}$"
ENV_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"

DnsLabel = Annotated[str, StringConstraints(pattern=DNS_LABEL_PATTERN)]
"""Names of namespaces, service accounts and ports."""
DnsName = Annotated[str, StringConstraints(pattern=DNS_NAME_PATTERN)]
"""Names of most objects."""
AbsolutePath = Annotated[str, StringConstraints(pattern=ABSOLUTE_PATH_PATTERN)]
EnvName = Annotated[str, StringConstraints(pattern=ENV_NAME_PATTERN)]


class Toleration(SpecPart):
    """A taint of nodes that pods put up with."""

    key: str
    """Key of the taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Equal` compares the value too."""
    value: str = ""
    """Value of the taint, with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Empty: every effect."""


class HostMount(SpecPart):
    """A folder of the node that pods see."""

    host_path: AbsolutePath
    """On the node."""
    mount_path: AbsolutePath
    """In the container."""
    read_only: bool = True
    """May pods only read it?"""


class SecretEnv(SpecPart):
    """A secret of the namespace whose keys become environment variables."""

    name: DnsName
    """Of the secret."""
    optional: bool = False
    """May it be missing?"""


class NodeCacheVolume(SpecPart):
    """The folder of a node in which pods keep files of releases for each other."""

    host_path: AbsolutePath = "/mnt/k8s-disks/0/trainyard"
    """On the node: instance store (RAID0 at `/mnt/k8s-disks/0` on Bottlerocket and AL2023 nodes
    with `instanceStorePolicy: RAID0`), or a mounted volume."""
    gib: float = Field(default=0.0, ge=0)
    """GiB (2**30 bytes) that it may hold. 0: as much as its disk."""


class PodDefaults(SpecPart):
    """What all pods of one place share."""

    namespace: DnsLabel
    """Of the pods; made by `k8s/`, not by Trainyard."""
    context: str = ""
    """Context of the kubeconfig. Empty: the current one, or the cluster that we run in."""
    image: str = ""
    """Image of pods whose target names none of its own. Best with a digest."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """`Never` for images that were imported into the node."""
    image_pull_secrets: tuple[DnsName, ...] = ()
    """Secrets with the registry's login; ECR needs none on EKS."""
    service_account: DnsName
    """Carries the IAM role of the pods (IRSA or Pod Identity)."""
    python: str = "python3"
    """Interpreter in the image that has Trainyard installed."""
    serve_python: str = ""
    """Interpreter in the image that has vLLM installed. Empty: the same."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    """More environment variables, such as `TRAINYARD_S3_REGION`. No secrets: they are written into
    the pods' specs."""
    env_from_secrets: tuple[SecretEnv, ...] = ()
    """Secrets whose keys become environment variables, where there is no IAM role."""
    host_mounts: tuple[HostMount, ...] = ()
    """Folders of the node that pods see, such as a shared file system."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes, beside those of the target's instance type."""
    tolerations: tuple[Toleration, ...] = ()
    """Beside the taint `aws.amazon.com/neuron`, which pods that take a device tolerate anyway."""
    scheduler_name: DnsName | None = None
    """Scheduler of pods that take a part of a node's devices, such as `my-scheduler` of the Neuron
    Helm chart. Empty: the default one."""


class KubernetesServing(PodDefaults):
    """Where the servers of one environment run and how traffic reaches them."""

    service_account: DnsName = "trainyard-serving"
    """Of servers: may read the store, nothing else."""
    data_plane: Literal["gateway", "proxy"] = "gateway"
    """`gateway`: a Gateway API implementation splits the traffic. `proxy`: Trainyard's own proxy
    follows the HTTPRoute, on clusters without a gateway."""
    gateway: DnsName = "inference"
    """Name of the Gateway that routes attach to."""
    gateway_namespace: DnsLabel | None = None
    """Namespace of the Gateway. Empty: the servers' own."""
    gateway_class: DnsName = "eg"
    """Class of the Gateway: `eg` is Envoy Gateway's."""
    gateway_pods_namespace: DnsLabel = "envoy-gateway-system"
    """Namespace of the pods behind the Gateway, which count arrivals."""
    gateway_stats_port: int = Field(default=19001, ge=1, le=65535)
    """Port of those pods at which `/stats/prometheus` answers; 19001 is Envoy Gateway's."""
    hostnames: tuple[DnsName, ...] = ()
    """Host names of the route. Empty: all that the Gateway has."""
    node_cache: NodeCacheVolume | None = NodeCacheVolume()
    """Empty (null): each pod fetches its files anew into a volume of its own."""
    files_gib: int = Field(default=200, ge=1)
    """GiB of the node's disk that a server asks for its files, where there is no node cache."""
    trusted_keys: DnsName | None = "trainyard-trusted-keys"
    """ConfigMap with `trusted-keys.json`, as `trainyard keys` writes it: whose signatures count.
    Empty (null): `env` names a file of a mount."""
    run_as_user: int | None = Field(default=None, ge=1)
    """User id of servers and their files. Empty: the image's own, which is root in AWS's."""
    server_cpu: float | None = Field(default=None, gt=0)
    """Cores that a server asks for. Empty: one for each logical core of its devices."""
    server_memory_gib: float | None = Field(default=None, gt=0)
    """GiB of memory that a server asks for. Empty: most of its devices' share of the instance; on
    lane `cpu` its KV cache and 3 GiB."""
    stable_priority_class: DnsName | None = "trainyard-stable"
    """PriorityClass of servers; above that of every step. Empty (null): the cluster's default."""
    candidate_priority_class: DnsName | None = None
    """PriorityClass of servers that begin beside a stable release. They keep it when they are
    promoted, since another one would restart them. Empty (null): the stable one, so that nothing
    ever displaces a server that was promoted."""


class CapacityReservation(SpecPart):
    """Instances that are reserved in EC2 for heavy steps."""

    id: str = Field(pattern=RESERVATION_PATTERN)
    """Of the reservation or Capacity Block; Karpenter labels its nodes with it."""
    instance: str
    """Instance type that it is for, such as `trn2.48xlarge`."""
    ends_at: AwareDatetime | None = None
    """When a Capacity Block ends, with a time zone. Work that cannot end an hour before is refused.
    Empty: it does not end."""


DeviceKind = Literal["cpu", "inf2", "trn1", "trn2", "trn3"]
"""What a step computes on: a kind of Neuron chip, or none."""


class KubernetesSteps(PodDefaults):
    """Where heavy steps run as pods."""

    service_account: DnsName = "trainyard-steps"
    """Of steps that have none of their own below."""
    service_accounts: dict[
        Literal["download", "compile", "measure", "gate", "publish"], DnsName
    ] = Field(default_factory=dict)
    """Service account by step, so that each has only its own rights on the store."""
    work_gib: int = Field(default=100, ge=1)
    """GiB of the node's disk that pods which compile or measure ask for, at least."""
    schedule_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that a pod may wait for a node. Scarce devices: give more."""
    startup_timeout_s: float = Field(default=1200.0, gt=0)
    """Seconds from the node to the running container: images of Neuron have 10 GB and more."""
    measure_priority_class: DnsName | None = "trainyard-measure"
    """PriorityClass of measuring pods. Empty (null): the cluster's default."""
    compile_priority_class: DnsName | None = "trainyard-compile"
    """PriorityClass of compiling pods, the lowest."""
    slots: dict[DeviceKind, Annotated[int, Field(ge=1)]] = Field(default={"cpu": 1}, min_length=1)
    """The kinds of devices that there are, and for each how many pods may compile or measure at a
    time: the size of Airflow's pool `trainyard_pods_<kind>`."""
    neuron_driver: str = ""
    """Version of the Neuron driver on the nodes, such as `2.31.7.0`. With another one everything is
    measured anew. Empty: it is recorded only."""
    devices: Literal["plugin", "dra"] = "plugin"
    """How pods ask for devices: `plugin` counts `aws.amazon.com/neuron`; `dra` makes a claim, on
    nodes with the Neuron DRA driver instead of the device plugin."""
    device_class: DnsName = "neuron.aws.com"
    """DeviceClass of the claims, with `devices: dra`."""
    reservations: tuple[CapacityReservation, ...] = ()
    """Reserved instances. Pods for an instance type of the list go to its nodes only."""
