"""The autoscaler of one channel, filled in from a template of `k8s/templates`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from trainyard.deploy.kustomize import Object
from trainyard.deploy.manifests import filled
from trainyard.errors import BadInput
from trainyard.kubernetes.labels import route_name, server_object_name
from trainyard.names import check_name, check_release_id

AutoscalerKind = Literal["keda", "hpa"]

_TEMPLATES = {"keda": "scaledobject.yaml", "hpa": "hpa.yaml"}


def autoscaler(
    root: Path,
    kind: AutoscalerKind,
    *,
    model: str,
    environment: str,
    namespace: str,
    release_id: str,
    min_replicas: int,
    max_replicas: int,
    prometheus: str = "",
) -> Object:
    """Return what scales the stable release of a channel.

    It asks for the channel's figures and not for the release's, so that it goes on after a
    promotion, when the rollout points it at another Deployment.

    Args:
        root: the folder `k8s`.
        kind: KEDA's ScaledObject, or a HorizontalPodAutoscaler.
        model: of the channel.
        environment: of the channel.
        namespace: of its servers.
        release_id: the stable release.
        min_replicas: at least 1.
        max_replicas: at least as many.
        prometheus: its address, for KEDA.

    Raises:
        BadInput: the numbers do not fit, or KEDA lacks an address.
    """
    if not 1 <= min_replicas <= max_replicas:
        raise BadInput(
            f"{min_replicas} to {max_replicas} replicas are no range.",
            hint="Give at least 1, and at most the devices that there are.",
        )
    if kind == "keda" and not prometheus.startswith(("http://", "https://")):
        raise BadInput(
            f"{prometheus!r} is no address of a Prometheus.",
            hint="Give --prometheus, such as http://prometheus-operated.monitoring:9090.",
        )
    values: dict[str, Any] = {
        "name": route_name(check_name(model, "Model"), check_name(environment, "Environment")),
        "namespace": namespace,
        "model": model,
        "environment": environment,
        "deployment": server_object_name(environment, check_release_id(release_id)),
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "prometheus": prometheus,
    }
    loaded: Object = yaml.safe_load(filled(root / "templates" / _TEMPLATES[kind], values))
    return loaded
