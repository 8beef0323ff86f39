"""Autoscalers keep their hands off while a rollout compares two releases.

Autoscalers of a channel carry its labels (`trainyard.dev/model`, `trainyard.dev/environment`). They
belong to whoever runs the cluster; here they are held at the start of a rollout, and at its end let
go and pointed at the Deployment of the release that is stable then.

==============  ==========================================  ========================================
kind            held                                        source
==============  ==========================================  ========================================
ScaledObject    annotation `autoscaling.keda.sh/paused`:    KEDA, concepts/scaling-deployments,
                the number of replicas stays as it is       "Pausing autoscaling"
HorizontalPod-  `selectPolicy: Disabled` both ways, and     Kubernetes, tasks/run-application/
Autoscaler      `minReplicas: 1`, since below it the        horizontal-pod-autoscale, "Disable scale
                autoscaler acts whatever its policies say   down"
==============  ==========================================  ========================================

What was there before is kept in an annotation, so that whoever comes after a crash can put it back.
An autoscaler that KEDA made for a ScaledObject is KEDA's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainyard.kubernetes.client import Cluster, MissingKind, Object
from trainyard.kubernetes.kinds import AUTOSCALER, SCALED_OBJECT, Kind
from trainyard.kubernetes.labels import ENVIRONMENT, MODEL, PREFIX

HELD = f"{PREFIX}/autoscaling-before-rollout"
"""Annotation: what a rollout has changed, as JSON, to be put back."""
PAUSED = "autoscaling.keda.sh/paused"

_DISABLED = {"selectPolicy": "Disabled"}

Found = tuple[Kind, Object]


def find_autoscalers(cluster: Cluster, namespace: str, environment: str, model: str) -> list[Found]:
    """Return the autoscalers of a channel.

    Raises:
        TrainyardError: as `Cluster.list`, but for a cluster without KEDA.
    """
    found: list[Found] = []
    for kind in (AUTOSCALER, SCALED_OBJECT):
        try:
            listed, _ = cluster.list(
                kind, namespace, labels={MODEL: model, ENVIRONMENT: environment}
            )
        except MissingKind:
            continue
        found += [(kind, each) for each in listed if not _is_kedas(each)]
    return found


def hold(cluster: Cluster, found: Sequence[Found]) -> None:
    """Keep autoscalers from changing anything. Raises as `Cluster.merge_patch`."""
    for kind, each in found:
        if not is_held(each):
            metadata = each["metadata"]
            cluster.merge_patch(
                kind, metadata["name"], _holding(kind, each), namespace=metadata["namespace"]
            )


def let_go(cluster: Cluster, found: Sequence[Found], deployment: str) -> None:
    """Let autoscalers work again, on `deployment`.

    Raises:
        Conflict: somebody changed one meanwhile.
        TrainyardError: as `Cluster.json_patch`.
    """
    for kind, each in found:
        operations = _letting_go(kind, each, deployment)
        if operations:
            metadata = each["metadata"]
            cluster.json_patch(kind, metadata["name"], operations, namespace=metadata["namespace"])


def scales(found: Sequence[Found], deployment: str) -> bool:
    """Tell whether an autoscaler decides on the number of `deployment`'s replicas now."""
    return any(_target(each) == deployment and not is_held(each) for _, each in found)


def is_held(autoscaler: Object) -> bool:
    """Tell whether a rollout holds it."""
    return HELD in _annotations(autoscaler)


def _holding(kind: Kind, each: Object) -> Object:
    metadata: Object = {"resourceVersion": each["metadata"]["resourceVersion"]}
    if kind == SCALED_OBJECT:
        before: Mapping[str, Any] = {"paused": _annotations(each).get(PAUSED)}
        annotations = {HELD: _json(before), PAUSED: "true"}
        return {"metadata": {**metadata, "annotations": annotations}}
    spec = each["spec"]
    before = {"minReplicas": spec.get("minReplicas"), "behavior": spec.get("behavior")}
    return {
        "metadata": {**metadata, "annotations": {HELD: _json(before)}},
        "spec": {"minReplicas": 1, "behavior": {"scaleUp": _DISABLED, "scaleDown": _DISABLED}},
    }


def _letting_go(kind: Kind, each: Object, deployment: str) -> list[Object]:
    operations: list[Object] = []
    if is_held(each):
        held = _annotations(each)[HELD]
        operations.append({"op": "test", "path": _pointer("annotations", HELD), "value": held})
        operations.append({"op": "remove", "path": _pointer("annotations", HELD)})
        before = json.loads(held)
        if kind == SCALED_OBJECT:
            path, present = _pointer("annotations", PAUSED), _annotations(each)
            operations += _put_back(path, before["paused"], PAUSED in present)
        else:
            for name in ("minReplicas", "behavior"):
                operations += _put_back(f"/spec/{name}", before[name], name in each["spec"])
    if _target(each) not in (None, deployment):
        operations.append(
            {"op": "replace", "path": "/spec/scaleTargetRef/name", "value": deployment}
        )
    return operations


def _put_back(path: str, value: Any, present: bool) -> list[Object]:
    """Return what gives a field its value again; None: it had none.

    Somebody may have removed meanwhile what a hold had set, and what is missing cannot be removed:
    the patch would fail at every try, and the autoscaler be held for good.
    """
    if value is None:
        return [{"op": "remove", "path": path}] if present else []
    return [{"op": "add", "path": path, "value": value}]


def _target(each: Object) -> str | None:
    """Return the Deployment that an autoscaler scales; None if it scales something else."""
    target = (each.get("spec") or {}).get("scaleTargetRef") or {}
    # KEDA's default is a Deployment.
    return target.get("name") if target.get("kind", "Deployment") == "Deployment" else None


def _annotations(each: Object) -> dict[str, str]:
    return each["metadata"].get("annotations") or {}


def _is_kedas(each: Object) -> bool:
    owners = each["metadata"].get("ownerReferences") or ()
    return any(owner.get("kind") == "ScaledObject" for owner in owners)


def _pointer(*parts: str) -> str:
    """Return the JSON pointer of a part of an object's metadata."""
    escaped = (part.replace("~", "~0").replace("/", "~1") for part in ("metadata", *parts))
    return "/" + "/".join(escaped)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
