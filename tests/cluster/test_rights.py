"""The manifests of `k8s/` in a real API server: it takes them, and refuses what they forbid."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
from tests.cluster.place import REPOSITORY, Place, as_user, wait_for

from trainyard.deploy.manifests import load_overlay
from trainyard.deploy.rbac import Right, rights, writes
from trainyard.errors import BadInput, TrainyardError
from trainyard.kubernetes.client import Cluster, MissingKind, Object
from trainyard.kubernetes.kinds import NAMESPACE, Kind

pytestmark = pytest.mark.cluster

OVERLAYS = ("production", "staging", "cpu")
KEPT = {"Namespace", "ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
"""Kinds that are really made; of all others the API server only says whether it would take them."""
ADD_ONS = {
    "cilium.io",
    "eks.amazonaws.com",
    "gateway.envoyproxy.io",
    "gateway.networking.k8s.io",
    "karpenter.k8s.aws",
    "karpenter.sh",
    "keda.sh",
    "monitoring.coreos.com",
}
"""Groups that a cluster has only with something installed."""
VERBS = {"create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}
CORE = (
    "configmaps", "events", "persistentvolumeclaims", "pods", "pods/exec", "secrets",
    "serviceaccounts", "serviceaccounts/token", "services",
)  # fmt: skip
GROUPS = {
    "apps/v1": ("daemonsets", "deployments", "deployments/scale", "statefulsets"),
    "autoscaling/v2": ("horizontalpodautoscalers",),
    "batch/v1": ("cronjobs", "jobs"),
    "coordination.k8s.io/v1": ("leases",),
    "gateway.networking.k8s.io/v1": ("gateways", "httproutes"),
    "networking.k8s.io/v1": ("networkpolicies",),
    "policy/v1": ("poddisruptionbudgets",),
    "rbac.authorization.k8s.io/v1": ("rolebindings", "roles"),
}
"""What somebody may try to write."""


@dataclass(frozen=True)
class Applied:
    """One overlay in namespaces of its own."""

    name: str
    objects: list[Object]
    namespaces: Mapping[str, str]
    """Ours by the manifests' own."""

    @property
    def accounts(self) -> set[str]:
        """All service accounts that the overlay makes or gives rights to, as `namespace/name`."""
        made = {
            f"{each['metadata']['namespace']}/{each['metadata']['name']}"
            for each in self.objects
            if each["kind"] == "ServiceAccount"
        }
        return made | {right.account for right in rights(self.objects)}


def moved(body: Object, namespaces: Mapping[str, str], run: str) -> Object:
    """Return an object as it is in namespaces of other names."""
    body = copy.deepcopy(body)
    metadata = body["metadata"]
    if body["kind"] == "Namespace":
        metadata["name"] = namespaces[metadata["name"]]
    elif "namespace" in metadata:
        metadata["namespace"] = namespaces[metadata["namespace"]]
    elif body["kind"] in KEPT:
        metadata["name"] = f"{run}-{metadata['name']}"
        if "roleRef" in body:
            body["roleRef"]["name"] = f"{run}-{body['roleRef']['name']}"
    for subject in body.get("subjects", []):
        subject["namespace"] = namespaces[subject["namespace"]]
    return body


@pytest.fixture(scope="module", params=OVERLAYS)
def applied(request: pytest.FixtureRequest, here: Place) -> Iterator[Applied]:
    """An overlay whose rights are in force."""
    objects = load_overlay(REPOSITORY / "k8s", request.param).objects
    run = f"{here.namespace}-{request.param[:4]}"
    names = {each["metadata"].get("namespace", "") for each in objects} - {""}
    names |= {each["metadata"]["name"] for each in objects if each["kind"] == "Namespace"}
    namespaces = {name: f"{run}-{name.removeprefix('trainyard-')}" for name in sorted(names)}
    made = Applied(request.param, [moved(each, namespaces, run) for each in objects], namespaces)
    try:
        for name in namespaces.values():
            # Some are of others, such as the gateway's: here there may be none.
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            here.cluster.create(NAMESPACE, body)
        for each in made.objects:
            if each["kind"] in KEPT:
                here.cluster.apply(kind_of(here.cluster, each), each)
        yield made
    finally:
        for each in made.objects:
            if each["kind"] in KEPT and "namespace" not in each["metadata"]:
                here.cluster.delete(kind_of(here.cluster, each), each["metadata"]["name"])
        for name in namespaces.values():
            here.cluster.delete(NAMESPACE, name)
        for name in namespaces.values():
            wait_for(lambda name=name: here.cluster.get(NAMESPACE, name) is None, f"{name} to go")


def kind_of(cluster: Cluster, body: Object) -> Kind:
    """Return the kind of an object as the cluster's discovery has it.

    Raises:
        MissingKind: it does not know the group.
    """
    version = body["apiVersion"]
    root = "/api/v1" if version == "v1" else f"/apis/{version}"
    known = cluster._request("GET", root, what=version)["resources"]
    for each in known:
        if each["kind"] == body["kind"] and "/" not in each["name"]:
            return Kind(version, each["kind"], each["name"], each["namespaced"])
    raise MissingKind(f"{version} has no {body['kind']}")


def test_the_api_server_takes_everything(
    applied: Applied, here: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = set()
    for each in applied.objects:
        try:
            kind = kind_of(here.cluster, each)
        except MissingKind:
            missing.add(f"{each['apiVersion']} {each['kind']}")
            continue
        here.cluster.apply(kind, each, dry_run=True)
    with capsys.disabled():
        print(f"\n{applied.name}: not installed here, so not tried: {sorted(missing) or 'nothing'}")
    assert {name.split("/")[0] for name in missing} <= ADD_ONS


def test_applying_again_changes_nothing(applied: Applied, here: Place) -> None:
    kept = [each for each in applied.objects if each["kind"] in KEPT - {"Namespace"}]
    for each in kept:
        kind = kind_of(here.cluster, each)
        metadata = each["metadata"]
        before = here.cluster.get(kind, metadata["name"], metadata.get("namespace", ""))
        assert before is not None
        after = here.cluster.apply(kind, each)
        assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


# Thousands of requests, and the roles of all overlays are the same ones.
@pytest.mark.parametrize("applied", ["production"], indirect=True)
def test_every_forbidden_write_is_refused_and_every_other_is_not(
    applied: Applied, here: Place
) -> None:
    allowed = {
        (right.account, right.namespace, right.resource, right.verb, right.name)
        for right in writes(rights(applied.objects))
    }
    tried = 0
    wrong = []
    for account in sorted(applied.accounts):
        namespace, name = account.split("/")
        client = as_user(here, f"system:serviceaccount:{namespace}:{name}")
        for right in attempts(account, applied):
            tried += 1
            may = may_write(allowed, right)
            if (not refused(client, right)) != may:
                wrong.append(f"{right}: {'refused' if may else 'not refused'}")
    assert not wrong
    assert tried > 1000


def attempts(account: str, applied: Applied) -> Iterator[Right]:
    """Yield everything that an account may try: each verb on each kind in each namespace."""
    example = Right(account, "", "", "", "")
    for namespace in (*applied.namespaces.values(), "kube-system"):
        for version, kinds in {"v1": CORE, **GROUPS}.items():
            for kind in kinds:
                plural, _, subresource = kind.partition("/")
                group = "" if version == "v1" else f".{version.split('/')[0]}"
                resource = f"{plural}{group}" + (f"/{subresource}" if subresource else "")
                for verb in VERBS:
                    if subresource and verb in {"create", "delete"}:
                        continue
                    name = "trainyard-guard" if plural == "leases" else ""
                    for each in {"", name}:
                        yield replace(
                            example, namespace=namespace, resource=resource, verb=verb, name=each
                        )


def may_write(allowed: set[tuple[str, str, str, str, str]], right: Right) -> bool:
    """Is a write allowed by a right to all objects of its kind, or to the one of its name?"""
    key = (right.account, right.namespace, right.resource, right.verb)
    if right.verb == "create":
        return (*key, "") in allowed
    return (*key, "") in allowed or (bool(right.name) and (*key, right.name) in allowed)


def refused(client: Cluster, right: Right) -> bool:
    """Try a write, without effect, of an object that does not exist; tell whether it is refused."""
    resource, _, subresource = right.resource.partition("/")
    plural, _, group = resource.partition(".")
    version = next((each for each in GROUPS if each.split("/")[0] == group), "v1")
    kind = Kind(version, plural, plural)
    name = right.name or "nobody-has-this-name"
    path = kind.path(right.namespace, "" if right.verb == "create" else name, subresource)
    content = "application/merge-patch+json" if right.verb == "patch" else "application/json"
    body = {"metadata": {"name": name}} if right.verb != "delete" else None
    try:
        client._request(
            VERBS[right.verb], path, query={"dryRun": "All"}, body=body, content=content, what=path
        )
    except BadInput as error:
        return f"cannot {right.verb} resource" in str(error)
    except TrainyardError:
        return False
    return False
