"""Who may do what in the cluster, as the roles in a set of manifests say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

READS = frozenset({"get", "list", "watch"})


@dataclass(frozen=True, order=True)
class Right:
    """One thing that a service account may do."""

    account: str
    """`namespace/name` of the service account."""
    namespace: str
    """Where; empty: in the whole cluster."""
    resource: str
    """Plural name with its group, such as `deployments.apps`, with a subresource behind a slash."""
    verb: str
    name: str = ""
    """Only of the object of that name; empty: of all."""


def rights(objects: Sequence[Object]) -> set[Right]:
    """Return all rights that bindings in `objects` give to service accounts."""
    roles = {
        (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]): each
        for each in objects
        if each["kind"] in {"Role", "ClusterRole"}
    }
    return {right for each in objects for right in _of_binding(each, roles)}


def _of_binding(binding: Object, roles: Mapping[tuple[str, str, str], Object]) -> Iterator[Right]:
    if binding["kind"] not in {"RoleBinding", "ClusterRoleBinding"}:
        return
    namespace = binding["metadata"].get("namespace", "")
    wanted = binding["roleRef"]
    at = namespace if wanted["kind"] == "Role" else ""
    role = roles[wanted["kind"], at, wanted["name"]]
    for subject in binding["subjects"]:
        account = f"{subject.get('namespace', namespace)}/{subject['name']}"
        for rule in role["rules"]:
            for resource, verb, name in _of_rule(rule):
                yield Right(account, namespace, resource, verb, name)


def _of_rule(rule: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for group in rule["apiGroups"]:
        for resource in rule["resources"]:
            plural, slash, subresource = resource.partition("/")
            full = f"{plural}.{group}" if group else plural
            for verb in rule["verbs"]:
                for name in rule.get("resourceNames") or ("",):
                    yield f"{full}{slash}{subresource}", verb, name


def writes(found: Iterable[Right]) -> set[Right]:
    """Return those rights that change something."""
    return {right for right in found if right.verb not in READS}
