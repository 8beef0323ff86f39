"""Where the tests of a real cluster run: what they are told, and what they find out themselves.

Only `TRAINYARD_TEST_KUBECONFIG` is needed. `docs/kubernetes-tests.md` lists the other variables.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

from trainyard.errors import BadInput, NotFound
from trainyard.kubernetes.client import Cluster, Object
from trainyard.kubernetes.kinds import GATEWAY, HTTP_ROUTE, NAMESPACE, NODE, POD, Kind
from trainyard.settings import Settings
from trainyard.spec.kubernetes import HostMount

REPOSITORY = Path(__file__).parents[2]
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PREFIX = "TRAINYARD_TEST_"
PROBE_S = 180.0
"""Seconds for a probe's pod: an image of 10 GB may have to be unpacked."""
PATIENCE_S = 420.0
"""Seconds to wait for what a cluster does by itself: nobody asserts that it is quick."""

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/alternatives")
PROBE = """
import shutil, sys
import trainyard
if not shutil.which("g++"):
    sys.exit("vLLM on a CPU needs g++, which is not there")
"""

SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
CUSTOM_KIND = Kind(
    "apiextensions.k8s.io/v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)

PullPolicy = Literal["Always", "IfNotPresent", "Never"]
T = TypeVar("T")


class Missing(Exception):
    """Something that the tests need and cannot find: says which variable brings it."""


@dataclass(frozen=True)
class Place:
    """One namespace of a cluster, made for one run of the tests, and how pods run in it."""

    cluster: Cluster
    kubeconfig: Path
    context: str
    namespace: str
    shared: Path
    """A folder of this machine that pods see at the same path, to write too."""
    mounts: tuple[HostMount, ...]
    image: str
    pull_policy: PullPolicy
    python: str
    serve_python: str
    service_account: str
    data_plane: Literal["gateway", "proxy"]
    gateway: str
    gateway_namespace: str
    gateway_class: str
    gateway_url: str = ""
    """Where this machine reaches the Gateway; empty: at its first address."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment of every pod."""

    @property
    def pod_settings(self) -> dict[str, Any]:
        """What environments and steps have in common, as their part of the environments file."""
        return {
            "namespace": self.namespace,
            "context": self.context,
            "image": self.image,
            "image_pull_policy": self.pull_policy,
            "service_account": self.service_account,
            "python": self.python,
            "serve_python": self.serve_python,
            "env": dict(self.env),
            "host_mounts": [mount.model_dump() for mount in self.mounts],
        }

    def pod(self, name: str, command: list[str], **spec: Any) -> Object:
        """Return a pod that runs one command with the image and the mounts of the tests."""
        volumes, mounts = volumes_of(self.mounts)
        container = {
            "name": "main",
            "image": self.image,
            "imagePullPolicy": self.pull_policy,
            "command": command,
            "env": [{"name": key, "value": value} for key, value in self.env.items()],
            "volumeMounts": mounts,
        }
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                # A Service trainyard-proxy would set TRAINYARD_PROXY_PORT, which is a setting.
                "enableServiceLinks": False,
                "containers": [container],
                "volumes": volumes,
                **spec,
            },
        }

    def run(self, name: str, command: list[str], **spec: Any) -> str:
        """Run a pod to its end; return its log.

        Raises:
            AssertionError: it failed.
        """
        self.cluster.create(POD, self.pod(name, command, **spec))
        try:
            ended = wait_for(
                lambda: self._ended(name), f"pod {name} to end", explain=lambda: self.explain(name)
            )
            log = self.cluster.logs(name, self.namespace)
            assert ended == "Succeeded", f"{self.explain(name)}\n{log}"
            return log
        finally:
            self.cluster.delete(POD, name, self.namespace)

    @property
    def volumes(self) -> tuple[list[Object], list[Object]]:
        """Volume mounts of containers, and volumes of pods, for the tests' mounts."""
        volumes, inside = volumes_of(self.mounts)
        return inside, volumes

    @property
    def url_of_traffic(self) -> str:
        """Where clients on this machine send requests: to the Gateway, or to our proxy's pod."""
        if self.data_plane == "proxy":
            (pod,) = self.pods({"app.kubernetes.io/component": "proxy"})
            return f"http://{pod['status']['podIP']}:8080"
        if self.gateway_url:
            return self.gateway_url
        found = self.cluster.get(GATEWAY, self.gateway, self.gateway_namespace) or {}
        addresses = (found.get("status") or {}).get("addresses")
        assert addresses, f"Gateway {self.gateway} has no address: set {PREFIX}GATEWAY_URL"
        return f"http://{addresses[0]['value']}"

    def kill(self, pod: str) -> None:
        """End a pod's processes at once, without a chance to say goodbye, where we can."""
        victims = [process for process in psutil.process_iter() if _host_of(process) == pod]
        for process in victims:
            process.kill()
        if not victims:
            # On another machine: the kubelet gives it a second or two.
            now = {"gracePeriodSeconds": 0, "apiVersion": "v1", "kind": "DeleteOptions"}
            path = POD.path(self.namespace, pod)
            self.cluster._request("DELETE", path, body=now, what=f"Pod {pod}")

    def pods(self, labels: Mapping[str, str]) -> list[Object]:
        """Return the pods with these labels that are not on their way out."""
        found, _ = self.cluster.list(POD, self.namespace, labels=labels)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def explain(self, pod: str) -> str:
        """Return what the cluster says of a pod."""
        found = self.cluster.get(POD, pod, self.namespace)
        return f"pod {pod}: {found['status']}" if found else f"there is no pod {pod}"

    def _ended(self, name: str) -> str:
        found = self.cluster.get(POD, name, self.namespace) or {}
        phase = str((found.get("status") or {}).get("phase", ""))
        return phase if phase in {"Succeeded", "Failed"} else ""


@contextmanager
def away(store: Path) -> Iterator[None]:
    """Take a store's folder away; a file in its place makes every use of it fail."""
    kept = store.with_name(f"{store.name}-away")
    store.rename(kept)
    store.write_text("not a folder")
    try:
        yield
    finally:
        store.unlink()
        kept.rename(store)


def _host_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("HOSTNAME", "")
    except psutil.Error:
        return ""


def wait_for(
    probe: Callable[[], T],
    what: str,
    *,
    timeout_s: float = PATIENCE_S,
    interval_s: float = 0.5,
    explain: Callable[[], object] = str,
) -> T:
    """Return the first true answer of `probe`; fail with `explain`'s words if none comes."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"Waited {timeout_s:g} s for {what}. {explain()}")
        time.sleep(interval_s)


def volumes_of(mounts: tuple[HostMount, ...]) -> tuple[list[Object], list[Object]]:
    """Return volumes and volume mounts of a pod."""
    volumes = [
        {"name": f"host-{index}", "hostPath": {"path": mount.host_path}}
        for index, mount in enumerate(mounts)
    ]
    inside = [
        {"name": f"host-{index}", "mountPath": mount.mount_path, "readOnly": mount.read_only}
        for index, mount in enumerate(mounts)
    ]
    return volumes, inside


def told(name: str, default: str = "") -> str:
    """Return what the environment says, under the tests' own prefix."""
    return os.environ.get(PREFIX + name, default).strip()


def mounts_told(text: str) -> tuple[HostMount, ...]:
    """Return mounts written as `/path`, `/host:/container` or with `:rw`, comma between them."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        host, *rest = part.split(":")
        writable = bool(rest) and rest[-1] == "rw"
        inside = [name for name in rest if name not in {"rw", "ro"}]
        found.append(
            HostMount(
                host_path=host,
                mount_path=inside[0] if inside else host,
                read_only=not writable,
            )
        )
    return tuple(found)


@contextmanager
def place(shared: Path) -> Iterator[Place]:
    """Make a namespace with all that the tests need, and remove it at the end.

    Raises:
        Missing: something is not there and cannot be found.
    """
    kubeconfig = told("KUBECONFIG")
    if not kubeconfig or not Path(kubeconfig).is_file():
        raise Missing(f"{PREFIX}KUBECONFIG must name the kubeconfig of a cluster for tests.")
    context = told("CONTEXT")
    cluster = Cluster.connect(Settings(kubeconfig=Path(kubeconfig)), context)
    namespace = f"trainyard-test-{uuid.uuid4().hex[:8]}"
    cluster.create(
        NAMESPACE,
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": namespace,
                # Pods mount folders of the node, whatever the cluster's default is.
                "labels": {"pod-security.kubernetes.io/enforce": "privileged"},
            },
        },
    )
    with removed_at_the_end(cluster, namespace), route_kind(cluster):
        account = told("SERVICE_ACCOUNT") or made_account(cluster, namespace)
        wait_for(
            lambda: cluster.get(SERVICE_ACCOUNT, account, namespace),
            f"service account {account}",
        )
        yield found_place(cluster, Path(kubeconfig), context, namespace, shared, account)


@contextmanager
def removed_at_the_end(cluster: Cluster, namespace: str) -> Iterator[None]:
    """Remove the namespace with all in it, and wait until it is gone."""
    try:
        yield
    finally:
        cluster.delete(NAMESPACE, namespace)
        wait_for(lambda: cluster.get(NAMESPACE, namespace) is None, f"namespace {namespace} to go")


def made_account(cluster: Cluster, namespace: str) -> str:
    """Make a service account without any rights; return its name."""
    name = "trainyard-tests"
    body = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": namespace},
    }
    cluster.create(SERVICE_ACCOUNT, body)
    return name


@contextmanager
def route_kind(cluster: Cluster) -> Iterator[None]:
    """Teach a cluster without the Gateway API what an HTTPRoute is, for as long as the tests run.

    The kind made here keeps whatever is written into it: no controller reads it but ours.
    """
    try:
        cluster.list(HTTP_ROUTE, "default")
        yield
        return
    except (BadInput, NotFound):
        pass
    group, version = HTTP_ROUTE.api_version.split("/")
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": anything, "status": anything}}
    body = {
        "apiVersion": CUSTOM_KIND.api_version,
        "kind": CUSTOM_KIND.name,
        "metadata": {
            "name": f"{HTTP_ROUTE.plural}.{group}",
            # The API server refuses kinds of *.k8s.io without a word on who approved them.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests of Trainyard"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {
                "kind": HTTP_ROUTE.name,
                "listKind": "HTTPRouteList",
                "plural": HTTP_ROUTE.plural,
                "singular": "httproute",
            },
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                }
            ],
        },
    }
    cluster.create(CUSTOM_KIND, body)
    try:
        wait_for(lambda: knows(cluster, HTTP_ROUTE), "the kind HTTPRoute")
        yield
    finally:
        cluster.delete(CUSTOM_KIND, body["metadata"]["name"])


def knows(cluster: Cluster, kind: Kind) -> bool:
    """Does the cluster serve a kind of object?"""
    try:
        cluster.list(kind, "default")
    except (BadInput, NotFound):
        return False
    return True


def found_place(
    cluster: Cluster, kubeconfig: Path, context: str, namespace: str, shared: Path, account: str
) -> Place:
    """Return the place, with what was not told found out."""
    here = is_node_of(cluster)
    mounts = mounts_told(told("HOST_MOUNTS"))
    if not mounts and here:
        mounts = own_mounts()
    if not here and not mounts and not told("IMAGE"):
        raise Missing(
            f"This machine is not a node of the cluster, so pods cannot use its files: "
            f"{PREFIX}IMAGE must name an image that has Trainyard installed, and "
            f"{PREFIX}HOST_MOUNTS a folder that pods and this machine share."
        )
    python = told("PYTHON") or (sys.executable if here else "python3")
    serve = REPOSITORY / ".venv-serve" / "bin" / "python"
    made = Place(
        cluster=cluster,
        kubeconfig=kubeconfig,
        context=context,
        namespace=namespace,
        shared=shared,
        mounts=(*mounts, HostMount(host_path=str(shared), mount_path=str(shared), read_only=False)),
        image=told("IMAGE"),
        pull_policy=told("PULL_POLICY") or "IfNotPresent",  # type: ignore[arg-type]
        python=python,
        serve_python=told("SERVE_PYTHON") or (str(serve) if here and serve.exists() else python),
        service_account=account,
        data_plane="gateway" if told("GATEWAY") else "proxy",
        gateway=told("GATEWAY", "inference"),
        gateway_namespace=told("GATEWAY_NAMESPACE") or namespace,
        gateway_class=told("GATEWAY_CLASS", "eg"),
        gateway_url=told("GATEWAY_URL"),
    )
    return with_image(made, here=here)


def as_user(here: Place, user: str) -> Cluster:
    """Return the cluster as somebody else, whom the tests' own user may speak for."""
    other = Cluster.connect(Settings(kubeconfig=here.kubeconfig), here.context)
    other._api.set_default_header("Impersonate-User", user)
    return other


def is_node_of(cluster: Cluster) -> bool:
    """Is this machine the cluster's only node, so that pods may mount its folders?"""
    nodes, _ = cluster.list(NODE)
    boots = [node["status"]["nodeInfo"]["bootID"] for node in nodes]
    return boots == [BOOT_ID.read_text().strip()]


def own_mounts() -> tuple[HostMount, ...]:
    """Return mounts of the checkout, the environments and their Python, at their own paths."""
    folders = {REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)}
    for name in (".venv", ".venv-serve"):
        python = REPOSITORY / name / "bin" / "python"
        if python.exists():
            folders |= {python.parents[1].resolve(), python.resolve().parents[1]}
    outer = [each for each in folders if not any(other in each.parents for other in folders)]
    # The system's own folders are the image's, unless no image has what is needed.
    outer = [each for each in outer if each not in {Path("/"), Path("/usr"), Path("/usr/local")}]
    own = tuple(HostMount(host_path=str(each), mount_path=str(each)) for each in sorted(outer))
    return (*own, *mounts_of_code(folders))


def mounts_of_code(environments: set[Path]) -> tuple[HostMount, ...]:
    """Return mounts of this checkout's code where environments of another checkout look for it.

    Servers start without PYTHONPATH, so what an environment links to is what runs in a pod.
    """
    links = {
        Path(line)
        for environment in environments
        for file in environment.glob("lib/python*/site-packages/*.pth")
        for line in file.read_text().splitlines()
        if line.startswith("/")
    }
    return tuple(
        HostMount(host_path=str(REPOSITORY / link.name), mount_path=str(link))
        for link in sorted(links)
        if link.name in {"tasks", "plugins"} and REPOSITORY not in link.parents
    )


def system_mounts() -> tuple[HostMount, ...]:
    """Return mounts of this machine's programs and libraries over those of an image."""
    return tuple(
        HostMount(host_path=folder, mount_path=folder) for folder in SYSTEM if Path(folder).exists()
    )


def with_image(made: Place, *, here: bool) -> Place:
    """Return the place with an image whose pods can run Trainyard and vLLM.

    On the node itself, an image that lacks something gets this machine's programs and libraries.

    Raises:
        Missing: neither the image that was told nor one of the node's own can.
    """
    tried = []
    for image, policy in candidates(made):
        plain = replace(made, image=image, pull_policy=policy)
        places = [plain, replace(plain, mounts=(*system_mounts(), *made.mounts))]
        for each in places if here else places[:1]:
            problem = probe(each)
            if not problem:
                return each
            tried.append(f"{image}: {problem}")
    raise Missing(
        f"No image can run `{made.python} -m trainyard` and vLLM. Set {PREFIX}IMAGE to one that "
        f"can (and {PREFIX}PULL_POLICY, {PREFIX}PYTHON, {PREFIX}HOST_MOUNTS). Tried: "
        + ("; ".join(tried) or "nothing, since the node has no image")
    )


def candidates(made: Place) -> list[tuple[str, PullPolicy]]:
    """Return images to try with their pull policies: the one told, else the node's, largest first.

    A node that has no registry has its images under names that nothing could pull.
    """
    if made.image:
        return [(made.image, made.pull_policy)]
    nodes, _ = made.cluster.list(NODE)
    images = [image for node in nodes for image in node["status"].get("images", [])]
    images.sort(key=lambda image: -image.get("sizeBytes", 0))
    named = [next((name for name in image["names"] if "@" not in name), "") for image in images]
    return [(name, "Never") for name in named if name][:5]


def probe(place_: Place) -> str:
    """Return why pods of a place cannot do what they must, empty if they can."""
    name = f"probe-{uuid.uuid4().hex[:6]}"
    try:
        place_.cluster.create(POD, place_.pod(name, [place_.python, "-c", PROBE]))
        ended = wait_for(lambda: settled(place_, name), "the probe", timeout_s=PROBE_S)
        if ended == "Succeeded":
            return ""
        log = place_.cluster.logs(name, place_.namespace).strip().splitlines()
        return log[-1] if log else ended
    except AssertionError:
        return place_.explain(name)
    finally:
        place_.cluster.delete(POD, name, place_.namespace)


def settled(place_: Place, name: str) -> str:
    """Return how a pod ended, or why it cannot start; empty as long as neither is known."""
    status = (place_.cluster.get(POD, name, place_.namespace) or {}).get("status") or {}
    if status.get("phase") in {"Succeeded", "Failed"}:
        return str(status["phase"])
    for container in status.get("containerStatuses", []):
        waiting = container["state"].get("waiting") or {}
        if waiting.get("reason") not in {None, "ContainerCreating", "PodInitializing"}:
            return f"{waiting['reason']}: {waiting.get('message', '')}"
    return ""
