"""The router of platform `kubernetes`, as the rollout asks it. It writes nothing."""

from __future__ import annotations

import logging

from trainyard.errors import TrainyardError
from trainyard.kubernetes.client import Cluster
from trainyard.kubernetes.kinds import HTTP_ROUTE
from trainyard.kubernetes.labels import route_name
from trainyard.serving.kubernetes.arrivals import DataPlane, open_data_plane
from trainyard.serving.kubernetes.route import acceptance, record_of, split_weights
from trainyard.serving.protocol import ReleaseTraffic, RouteStatus
from trainyard.spec.kubernetes import KubernetesServing

log = logging.getLogger(__name__)


class KubernetesRouter:
    """The `Router` of one environment in a cluster."""

    def __init__(
        self, cluster: Cluster, place: KubernetesServing, data_plane: DataPlane | None = None
    ) -> None:
        """Read the routes of an environment, and the counts of its data plane."""
        self._cluster = cluster
        self._place = place
        self._data_plane = data_plane or open_data_plane(cluster, place)

    def status(self, environment: str, model: str) -> RouteStatus | None:
        """Return what the route does now; None if that cannot be told.

        Weights are in effect once the gateway has taken the route as it is, or once all of our
        proxies have them. Until then nobody knows which weights are.
        """
        try:
            return self._status(environment, model)
        except (TrainyardError, ValueError) as error:
            log.warning("The route of %s/%s cannot be read: %s", environment, model, error)
            return None

    def _status(self, environment: str, model: str) -> RouteStatus | None:
        name = route_name(model, environment)
        route = self._cluster.get(HTTP_ROUTE, name, self._place.namespace)
        if route is None:
            log.warning(
                "There is no HTTPRoute %s; `trainyard channel init %s %s` makes it",
                name,
                model,
                environment,
            )
            return None
        if self._place.data_plane == "gateway":
            accepted, why = acceptance(route, self._place)
            if not accepted:
                log.warning("HTTPRoute %s is not in effect: %s", name, why)
                return None
        sight = self._data_plane.look(environment, model, route)
        if sight is None:
            return None
        record = record_of(route)
        return RouteStatus(
            epoch=sight.epoch,
            weights=dict(sight.weights if sight.weights is not None else split_weights(route)),
            traffic={**dict.fromkeys(record.releases, ReleaseTraffic(0, 0, 0)), **sight.traffic},
            guard=record.memory.guard,
            guard_reason=record.reason,
            channel_generation=record.wish.generation if record.wish else 0,
        )
