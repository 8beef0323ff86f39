"""A channel's HTTPRoute: what `channel init` makes, and what the guard changes of it. Pure.

The route has three rules of ours, found by their names::

    pinned-stable      header x-trainyard-track: stable      the stable release, whatever its weight
    pinned-candidate   header x-trainyard-track: candidate   the candidate
    split              everything else                       both, by weight

The guard owns the `backendRefs` of these rules and one annotation, nothing else. All of it changes
in one JSON Patch whose tests name the rules, the backends and the annotation that it was planned
on, so a patch never lands on a route that has become another one. Other rules, filters, labels and
hosts are whoever's they are.

The annotation `trainyard.dev/guard` is the guard's memory: with it, any guard can go on without the
store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from trainyard.documents.base import Frozen
from trainyard.errors import BadInput
from trainyard.kubernetes.client import Object
from trainyard.kubernetes.kinds import HTTP_ROUTE
from trainyard.kubernetes.labels import (
    COMPONENT,
    ENVIRONMENT,
    MANAGED_BY,
    MODEL,
    PREFIX,
    owned,
    route_name,
    server_object_name,
)
from trainyard.serving.guard import RouteDecision, Wish
from trainyard.serving.guard_events import GuardMemory
from trainyard.serving.kubernetes.manifests import SERVER_PORT
from trainyard.serving.relay import TRACK_HEADER
from trainyard.spec.kubernetes import KubernetesServing

ROUTE = "route"
"""Component label of channels' routes."""
RECORD = f"{PREFIX}/guard"
"""Annotation with a `RouteRecord`."""
SPLIT = "split"
PINNED_STABLE = "pinned-stable"
PINNED_CANDIDATE = "pinned-candidate"
RULES = (PINNED_STABLE, PINNED_CANDIDATE, SPLIT)

Operation = dict[str, Any]
"""One operation of a JSON Patch."""


class RouteRecord(Frozen):
    """What the guard wrote on the route, in the same patch as the weights."""

    wish: Wish | None = None
    """The channel's last known wish; None until there is a channel."""
    weights: Mapping[str, int] = {}
    """Percent by release id, as in the route."""
    reason: str = ""
    """Why the guard does not follow the channel."""
    memory: GuardMemory = GuardMemory()

    @property
    def releases(self) -> tuple[str, ...]:
        """The releases that the route is about, stable first."""
        if self.wish is None:
            return ()
        found = (self.wish.stable, self.wish.candidate)
        return tuple(dict.fromkeys(name for name in found if name))


@dataclass(frozen=True)
class Wanted:
    """What the guard wants of a route."""

    split: Mapping[str, int]
    """Weights by Service, stable first."""
    pinned: Mapping[str, str | None]
    """Service by pinned rule."""
    record: RouteRecord


class BrokenRoute(BadInput):
    """A rule of ours is missing on a route."""


def wanted_route(
    wish: Wish, decision: RouteDecision, memory: GuardMemory, with_pods: set[str]
) -> Wanted:
    """Return what follows from a decision.

    Args:
        wish: of the channel.
        decision: of the guard.
        memory: of the guard after it.
        with_pods: releases that have pods, ready or not. Without pods there may be no Service yet,
            and a route to a Service that does not exist is refused as a whole; while pods drain,
            their backend stays, with weight 0.
    """
    split: dict[str, int] = {}
    for release_id in (wish.stable, wish.candidate):
        if release_id is None:
            continue
        weight = decision.weights.get(release_id, 0)
        if weight > 0 or release_id == wish.stable or release_id in with_pods:
            split[server_object_name(wish.environment, release_id)] = weight
    pinned = {}
    for rule, release_id in ((PINNED_STABLE, wish.stable), (PINNED_CANDIDATE, wish.candidate)):
        known = release_id is not None and (release_id == wish.stable or release_id in with_pods)
        pinned[rule] = (
            server_object_name(wish.environment, release_id) if known and release_id else None
        )
    record = RouteRecord(
        wish=wish, weights=dict(decision.weights), reason=decision.reason, memory=memory
    )
    return Wanted(split, pinned, record)


def plan_patch(route: Object, wanted: Wanted) -> list[Operation]:
    """Return the JSON Patch that makes a route as wanted; empty if it is so already.

    Raises:
        BrokenRoute: a rule of ours is missing.
    """
    changes: list[Operation] = []
    tests: list[Operation] = []
    for name in RULES:
        index, rule = find_rule(route, name)
        backends = (
            [(service, weight) for service, weight in wanted.split.items()]
            if name == SPLIT
            else [(service, 1) for service in [wanted.pinned.get(name)] if service]
        )
        operations = list(_backend_changes(f"/spec/rules/{index}", rule, backends))
        if name == SPLIT:
            operations += _session_changes(f"/spec/rules/{index}", rule, backends)
        if operations:
            tests.append({"op": "test", "path": f"/spec/rules/{index}/name", "value": name})
            changes += operations
    changes += _record_changes(route, wanted.record)
    if not changes:
        return []
    return [*tests, *_record_test(route), *changes]


def find_rule(route: Object, name: str) -> tuple[int, Object]:
    """Return a rule of a route and its index. Raises BrokenRoute."""
    rules = (route.get("spec") or {}).get("rules") or []
    for index, rule in enumerate(rules):
        if rule.get("name") == name:
            return index, rule
    metadata = route["metadata"]
    raise BrokenRoute(
        f"HTTPRoute {metadata['name']} has no rule {name!r} any more.",
        hint="`trainyard channel init MODEL ENVIRONMENT` adds it again and changes no weight.",
    )


def _backend_changes(
    path: str, rule: Object, wanted: Sequence[tuple[str, int]]
) -> Iterator[Operation]:
    present: list[Object] = rule.get("backendRefs") or []
    names = [backend["name"] for backend in present]
    path = f"{path}/backendRefs"
    if names == [name for name, _ in wanted]:
        changed = [
            (index, name, weight)
            for index, (name, weight) in enumerate(wanted)
            if present[index].get("weight", 1) != weight
        ]
        if changed:
            for index, name in enumerate(names):
                yield {"op": "test", "path": f"{path}/{index}/name", "value": name}
        for index, _, weight in changed:
            yield {"op": "add", "path": f"{path}/{index}/weight", "value": weight}
        return
    known = {backend["name"]: backend for backend in present}
    if "backendRefs" in rule:
        yield {"op": "test", "path": path, "value": rule["backendRefs"]}
    value = [
        # What others have set on a backend of ours, such as a filter, stays.
        {**known.get(name, {"name": name, "port": SERVER_PORT}), "weight": weight}
        for name, weight in wanted
    ]
    yield {"op": "add", "path": path, "value": value}


def _session_changes(
    path: str, rule: Object, wanted: Sequence[tuple[str, int]]
) -> Iterator[Operation]:
    """End the sessions that would keep clients on a backend that loses its traffic.

    Gateway API demands that sticky sessions go on at weight 0 (GEP-1619), so a new name of the
    cookie is what takes them back; persistence that has no name of ours to change goes.
    """
    sticky = rule.get("sessionPersistence")
    had = {b["name"] for b in rule.get("backendRefs") or [] if b.get("weight", 1) > 0}
    has = {name for name, weight in wanted if weight > 0}
    if sticky is None or not had - has:
        return
    path = f"{path}/sessionPersistence"
    yield {"op": "test", "path": path, "value": sticky}
    if (sticky.get("cookie") or {}).get("name"):
        name = _next_name(sticky["cookie"]["name"])
        yield {"op": "replace", "path": f"{path}/cookie/name", "value": name}
    elif sticky.get("sessionName") and sticky.get("type", "Cookie") == "Cookie":
        name = _next_name(sticky["sessionName"])
        yield {"op": "replace", "path": f"{path}/sessionName", "value": name}
    else:
        yield {"op": "remove", "path": path}


def _next_name(name: str) -> str:
    base, _, number = name.rpartition("-")
    return f"{base}-{int(number) + 1}" if base and number.isdigit() else f"{name}-1"


def _record_changes(route: Object, record: RouteRecord) -> Iterator[Operation]:
    if record_of(route) == record:
        return
    text = record.model_dump_json(by_alias=True)
    if not route["metadata"].get("annotations"):
        yield {"op": "add", "path": "/metadata/annotations", "value": {RECORD: text}}
    else:
        yield {"op": "add", "path": _RECORD_PATH, "value": text}


def _record_test(route: Object) -> Iterator[Operation]:
    annotations = route["metadata"].get("annotations") or {}
    if RECORD in annotations:
        yield {"op": "test", "path": _RECORD_PATH, "value": annotations[RECORD]}
    else:
        version = route["metadata"]["resourceVersion"]
        yield {"op": "test", "path": "/metadata/resourceVersion", "value": version}


_RECORD_PATH = f"/metadata/annotations/{RECORD.replace('/', '~1')}"


def record_of(route: Object) -> RouteRecord:
    """Return what the guard wrote on a route; an empty record if that cannot be read."""
    text = (route["metadata"].get("annotations") or {}).get(RECORD)
    if not text:
        return RouteRecord()
    try:
        return RouteRecord.model_validate_json(text)
    except ValidationError:
        return RouteRecord()


def split_weights(route: Object) -> dict[str, int]:
    """Return the percentages in a route, by release id; shares of others are by Service name.

    Raises:
        BrokenRoute: the rule is missing.
    """
    record = record_of(route)
    environment = route["metadata"]["labels"][ENVIRONMENT]
    names = {server_object_name(environment, name): name for name in record.releases}
    _, rule = find_rule(route, SPLIT)
    weights = {b["name"]: b.get("weight", 1) for b in rule.get("backendRefs") or []}
    total = sum(weights.values())
    if total == 0:
        return {}
    shares = {names.get(name, name): round(100 * w / total) for name, w in weights.items()}
    return {**dict.fromkeys(record.releases, 0), **shares}


def is_channel_route(route: Object) -> bool:
    """Tell whether a route is one of a channel of ours."""
    labels = route["metadata"].get("labels") or {}
    return (
        labels.get(MANAGED_BY) == "trainyard"
        and labels.get(COMPONENT) == ROUTE
        and route["metadata"]["name"] == route_name(labels.get(MODEL, ""), labels[ENVIRONMENT])
    )


def channel_of(route: Object) -> tuple[str, str]:
    """Return environment and model of a channel's route."""
    labels = route["metadata"]["labels"]
    return labels[ENVIRONMENT], labels[MODEL]


def acceptance(route: Object, place: KubernetesServing) -> tuple[bool, str]:
    """Tell whether the gateway has taken a route as it is now, and if not, why."""
    generation = route["metadata"].get("generation", 0)
    namespace = place.gateway_namespace or place.namespace
    found = [
        parent
        for parent in (route.get("status") or {}).get("parents") or []
        if parent.get("parentRef", {}).get("name") == place.gateway
        and parent.get("parentRef", {}).get("namespace", place.namespace) == namespace
    ]
    if not found:
        return False, f"Gateway {place.gateway} has not looked at it yet."
    for parent in found:
        conditions = {each["type"]: each for each in parent.get("conditions") or []}
        for name in ("Accepted", "ResolvedRefs"):
            condition = conditions.get(name, {})
            if condition.get("observedGeneration", 0) < generation:
                return False, f"Gateway {place.gateway} has not seen its last change yet."
            if condition.get("status") != "True":
                said = condition.get("message") or condition.get("reason") or "no reason given"
                return False, f"Gateway {place.gateway} says {name} is false: {said}"
    return True, ""


# --- making it ------------------------------------------------------------------------------------


def default_path(model: str, environment: str) -> str:
    """Return the path prefix of a channel, the same as on one machine."""
    return f"/{environment}/{model}/v1"


def new_route(
    model: str, environment: str, place: KubernetesServing, *, path: str = "", timeouts: bool = True
) -> Object:
    """Return the route of a channel that serves nothing yet.

    Args:
        model: name of the model.
        environment: name of the environment.
        place: where in the cluster.
        path: prefix of clients' paths; servers get `/v1` in its place.
        timeouts: say that requests may take any time; not every gateway knows the field.
    """
    return {
        "apiVersion": HTTP_ROUTE.api_version,
        "kind": HTTP_ROUTE.name,
        "metadata": {
            "name": route_name(model, environment),
            "namespace": place.namespace,
            "labels": owned(ROUTE, model=model, environment=environment),
            "annotations": {
                RECORD: RouteRecord().model_dump_json(by_alias=True),
                # For those who compare the cluster with a repository: this object is in none.
                "argocd.argoproj.io/compare-options": "IgnoreExtraneous",
                "argocd.argoproj.io/sync-options": "Prune=false",
                "kustomize.toolkit.fluxcd.io/prune": "disabled",
            },
        },
        "spec": {
            **attachment(place),
            "rules": [
                new_rule(name, path or default_path(model, environment), timeouts=timeouts)
                for name in RULES
            ],
        },
    }


def attachment(place: KubernetesServing) -> Object:
    """Return the part of a route's spec that says where it attaches."""
    parent = {"name": place.gateway}
    if place.gateway_namespace is not None:
        parent["namespace"] = place.gateway_namespace
    hosts: Object = {"hostnames": list(place.hostnames)} if place.hostnames else {}
    return {"parentRefs": [parent], **hosts}


def new_rule(name: str, path: str, *, timeouts: bool = True) -> Object:
    """Return a rule of ours without backends."""
    match: Object = {"path": {"type": "PathPrefix", "value": path}}
    track = {PINNED_STABLE: "stable", PINNED_CANDIDATE: "candidate"}.get(name)
    if track is not None:
        match["headers"] = [{"type": "Exact", "name": TRACK_HEADER, "value": track}]
    rule: Object = {"name": name, "matches": [match], "backendRefs": []}
    if path != "/v1":
        rewrite = {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/v1"}
        rule["filters"] = [{"type": "URLRewrite", "urlRewrite": {"path": rewrite}}]
    if timeouts:
        # An answer streams for as long as it takes; gateways' defaults are seconds.
        rule["timeouts"] = {"request": "0s"}
    return rule
