"""`trainyard channel init`: makes a channel's HTTPRoute, once.

The route is in no repository and in nothing that kustomize applies: its weights are the guard's,
and whoever else applies it moves traffic. So before it is made, and whenever this is run again, we
look whether somebody else means to.

Running it again changes no weight. It adds a rule of ours that is missing, and attaches the route
where the environment says now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainyard.errors import BadInput, Conflict, Refused, Transient
from trainyard.kubernetes.client import Cluster, MissingKind, Object
from trainyard.kubernetes.kinds import GATEWAY, HTTP_ROUTE, NAMESPACE
from trainyard.kubernetes.labels import FIELD_MANAGER, GUARD_MANAGER, route_name
from trainyard.serving.kubernetes.route import (
    RULES,
    attachment,
    default_path,
    is_channel_route,
    new_route,
    new_rule,
)
from trainyard.spec.kubernetes import KubernetesServing

GITOPS_MANAGERS = ("argocd", "argo-cd", "flux", "kustomize-controller", "helm", "fleet", "gitops")
"""How the field managers begin of those who apply what is in a repository."""
GITOPS_MARKS: Mapping[str, str] = {
    "argocd.argoproj.io/tracking-id": "Argo CD",
    "argocd.argoproj.io/instance": "Argo CD",
    "kustomize.toolkit.fluxcd.io/name": "Flux",
    "helm.toolkit.fluxcd.io/name": "Flux",
    "meta.helm.sh/release-name": "Helm",
    "kubectl.kubernetes.io/last-applied-configuration": "kubectl apply",
    "config.kubernetes.io/owning-inventory": "kpt",
}
"""Annotations and labels of objects that come from a repository."""


@dataclass(frozen=True)
class InitDone:
    """What came of it."""

    route: Object
    did: str
    """In one sentence."""
    warnings: tuple[str, ...] = ()


def init_channel(
    cluster: Cluster,
    model: str,
    environment: str,
    place: KubernetesServing,
    *,
    path: str = "",
    timeouts: bool = True,
    exception_added: bool = False,
) -> InitDone:
    """Make the route of a channel, or mend the one that there is. Idempotent.

    Args:
        cluster: of the environment.
        model: name of the model.
        environment: name of the environment.
        place: where in the cluster.
        path: prefix of clients' paths; empty: `/<environment>/<model>/v1`.
        timeouts: see `new_route`.
        exception_added: a GitOps tool that made the route has been told to leave the weights alone.

    Raises:
        BadInput: CRDs, namespace or Gateway are missing, or the path cannot be served.
        Refused: there is a route of that name that is not ours, or whose weights somebody else
            manages.
        Transient: the route changed while it was looked at.
    """
    if path and not (path.startswith("/") and path.endswith("/v1")):
        raise BadInput(
            f"Path {path!r} does not lead to `/v1`.", hint="Such as `/v1` or `/chat/v1`."
        )
    if path and place.data_plane == "proxy" and path != default_path(model, environment):
        raise BadInput(
            f"Our own proxy serves this channel at {default_path(model, environment)} only.",
            hint="Leave the path out.",
        )
    name = route_name(model, environment)
    present = _present(cluster, name, place)
    warnings = tuple(_preflight(cluster, place))
    wanted = new_route(model, environment, place, path=path, timeouts=timeouts)
    if present is None:
        try:
            made = cluster.create(HTTP_ROUTE, wanted)
        except Conflict as error:
            raise Transient(f"HTTPRoute {name} was made by somebody else just now.") from error
        return InitDone(
            made, f"HTTPRoute {name} is made; the guard gives it its weights.", warnings
        )
    require_ours(present, model, environment, exception_added=exception_added)
    operations = list(_repairs(present, wanted, place, path or _path_of(present), timeouts))
    if not operations:
        return InitDone(present, f"HTTPRoute {name} is there already.", warnings)
    version = present["metadata"]["resourceVersion"]
    test = {"op": "test", "path": "/metadata/resourceVersion", "value": version}
    mended = cluster.json_patch(
        HTTP_ROUTE, name, [test, *operations], namespace=place.namespace, manager=FIELD_MANAGER
    )
    return InitDone(mended, f"HTTPRoute {name} is mended; no weight has changed.", warnings)


def _present(cluster: Cluster, name: str, place: KubernetesServing) -> Object | None:
    try:
        return cluster.get(HTTP_ROUTE, name, place.namespace)
    except MissingKind as error:
        raise BadInput(
            "The cluster has no Gateway API: it does not know HTTPRoutes.",
            hint="Install its CRDs (standard channel) and an implementation such as Envoy Gateway. "
            "With `data_plane: proxy` the CRDs alone are enough.",
        ) from error


def _preflight(cluster: Cluster, place: KubernetesServing) -> Iterator[str]:
    """Refuse a cluster in which the route could do nothing; yield what is only a pity."""
    if cluster.get(NAMESPACE, place.namespace) is None:
        raise BadInput(
            f"Namespace {place.namespace} is missing.", hint="`kubectl apply -k k8s/…` makes it."
        )
    if place.data_plane == "proxy":
        return
    namespace = place.gateway_namespace or place.namespace
    try:
        gateway = cluster.get(GATEWAY, place.gateway, namespace)
    except MissingKind as error:
        raise BadInput(
            "The cluster does not know Gateways.", hint="Install the Gateway API's CRDs."
        ) from error
    if gateway is None:
        raise BadInput(
            f"There is no Gateway {place.gateway} in namespace {namespace}.",
            hint="`kubectl apply -k k8s/…` makes it, or name another one in the environment "
            "(`kubernetes.gateway`, `kubernetes.gateway_namespace`).",
        )
    conditions = (gateway.get("status") or {}).get("conditions") or []
    if not any(c.get("type") == "Programmed" and c.get("status") == "True" for c in conditions):
        yield f"Gateway {place.gateway} is not programmed: nobody answers for it yet."
    kind = (gateway.get("spec") or {}).get("gatewayClassName", "")
    if kind != place.gateway_class:
        yield (
            f"Gateway {place.gateway} is of class {kind}, not {place.gateway_class}: arrivals are "
            "counted only where Envoy Gateway divides the traffic."
        )


def require_ours(
    route: Object, model: str, environment: str, *, exception_added: bool = False
) -> None:
    """Refuse a route that is not this channel's, or whose weights a tool manages.

    Raises:
        Refused: with the exception to add to that tool.
    """
    name = route["metadata"]["name"]
    tool = weights_managed_by(route)
    if tool and not exception_added:
        raise Refused(
            f"{tool} manages the weights of HTTPRoute {name}: its next sync would move traffic.",
            hint=f"{exception_for(tool, route)}\nThen run this again with --exception-added.",
        )
    if not is_channel_route(route) or name != route_name(model, environment):
        raise Refused(
            f"HTTPRoute {name} is there, but it is not a route of Trainyard's.",
            hint="Remove or rename it; a channel's route has this name and no other.",
        )


def weights_managed_by(route: Object) -> str:
    """Return who else manages the weights of a route; empty if nobody does."""
    metadata = route["metadata"]
    for entry in metadata.get("managedFields") or []:
        manager = str(entry.get("manager", ""))
        if manager in (FIELD_MANAGER, GUARD_MANAGER):
            continue
        if manager.lower().startswith(GITOPS_MANAGERS) and _owns_rules(entry):
            return manager
    marks = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
    found = [tool for mark, tool in GITOPS_MARKS.items() if mark in marks]
    return found[0] if found else ""


def _owns_rules(entry: Mapping[str, Any]) -> bool:
    fields = entry.get("fieldsV1")
    # Without details, whoever manages the object manages all of it.
    return fields is None or "f:rules" in fields.get("f:spec", {})


def exception_for(tool: str, route: Object) -> str:
    """Return what to tell a tool so that it leaves the weights alone."""
    name = str(route["metadata"]["name"])
    namespace = str(route["metadata"]["namespace"])
    tool = tool.lower()
    if "argo" in tool:
        return (
            "Take the route out of the repository (best), or add to the Application:\n"
            "spec:\n"
            "  ignoreDifferences:\n"
            "  - group: gateway.networking.k8s.io\n"
            "    kind: HTTPRoute\n"
            f"    name: {name}\n"
            f"    namespace: {namespace}\n"
            "    jqPathExpressions:\n"
            "    - .spec.rules[]?.backendRefs\n"
            '    - .metadata.annotations["trainyard.dev/guard"]\n'
            "  syncPolicy:\n"
            "    syncOptions:\n"
            "    - RespectIgnoreDifferences=true"
        )
    if "flux" in tool or "kustomize-controller" in tool or "helm" in tool:
        return (
            "Take the route out of the repository (best), or annotate it there, so that Flux makes "
            "it and then leaves it alone:\n"
            "metadata:\n"
            "  annotations:\n"
            "    kustomize.toolkit.fluxcd.io/ssa: IfNotPresent\n"
            "In a HelmRelease:\n"
            "spec:\n"
            "  driftDetection:\n"
            "    mode: enabled\n"
            "    ignore:\n"
            "    - target: {kind: HTTPRoute, name: " + name + "}\n"
            '      paths: ["/spec/rules"]'
        )
    return "Take the route out of what is applied: only the guard may change its weights."


def _path_of(route: Object) -> str:
    for rule in (route.get("spec") or {}).get("rules") or []:
        if rule.get("name") in RULES:
            return str(rule["matches"][0]["path"]["value"])
    return ""


def _repairs(
    route: Object, wanted: Object, place: KubernetesServing, path: str, timeouts: bool
) -> Iterator[dict[str, Any]]:
    spec = route.get("spec") or {}
    attached = attachment(place)
    known = [
        {key: ref[key] for key in ("name", "namespace") if key in ref}
        for ref in spec.get("parentRefs") or []
    ]
    if known != attached["parentRefs"]:
        yield {"op": "add", "path": "/spec/parentRefs", "value": attached["parentRefs"]}
    if (spec.get("hostnames") or []) != attached.get("hostnames", []):
        yield {"op": "add", "path": "/spec/hostnames", "value": attached.get("hostnames", [])}
    names = {rule.get("name") for rule in spec.get("rules") or []}
    path = path or wanted["spec"]["rules"][0]["matches"][0]["path"]["value"]
    for name in RULES:
        if name not in names:
            yield {
                "op": "add",
                "path": "/spec/rules/-",
                "value": new_rule(name, path, timeouts=timeouts),
            }
