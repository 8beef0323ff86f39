"""Which environments a process in a cluster is for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainyard.errors import BadInput, NotFound
from trainyard.kubernetes.client import Cluster
from trainyard.settings import Settings
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesServing
from trainyard.spec.loader import load_environments


@dataclass(frozen=True)
class ServingPlaces:
    """Environments that share one namespace of one cluster."""

    by_name: Mapping[str, KubernetesServing]
    namespace: str
    context: str

    @classmethod
    def load(cls, settings: Settings, names: Sequence[str] = ()) -> ServingPlaces:
        """Return environments of the environments file.

        Args:
            settings: name the file.
            names: of environments; empty: all in a cluster.

        Raises:
            BadInput: they are not all in one namespace, or not in a cluster.
            NotFound: there is no environment of that name.
        """
        return cls.of(load_environments(settings.environments).environments, names)

    @classmethod
    def of(
        cls, environments: Mapping[str, Environment], names: Sequence[str] = ()
    ) -> ServingPlaces:
        """Return some of these environments. Raises as `load`."""
        for name in names:
            if name not in environments:
                raise NotFound(
                    f"There is no environment {name!r}.",
                    hint=f"Known are: {', '.join(environments)}.",
                )
        found = {
            name: environment.kubernetes
            for name, environment in environments.items()
            if environment.kubernetes is not None and (not names or name in names)
        }
        if not found or set(names) - set(found):
            wrong = ", ".join(sorted(set(names) - set(found))) or "None of the environments"
            raise BadInput(
                f"{wrong} has no servers in a cluster.",
                hint="Give the environment `platform: kubernetes` and a `kubernetes` section.",
            )
        where = {(place.namespace, place.context) for place in found.values()}
        if len(where) > 1:
            raise BadInput(
                f"The environments {', '.join(found)} are in different namespaces or clusters.",
                hint="Each namespace has a guard of its own: name the environments of one.",
            )
        namespace, context = where.pop()
        return cls(found, namespace, context)

    def connect(self, settings: Settings) -> Cluster:
        """Return their cluster; for a process in a pod that is the one it runs in.

        Raises:
            BadInput: it cannot be found.
        """
        inside = bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and settings.kubeconfig is None
        return Cluster.connect(settings, "" if inside else self.context)
