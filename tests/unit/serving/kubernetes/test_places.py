"""Which environments a process in a cluster is for."""

from __future__ import annotations

from typing import Any

import pytest

from trainyard.errors import BadInput, NotFound
from trainyard.serving.kubernetes.places import ServingPlaces
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesServing


def cluster(namespace: str = "serving", **changes: Any) -> Environment:
    place = KubernetesServing(namespace=namespace, **changes)
    return Environment(platform="kubernetes", target="cpu", kubernetes=place)


LOCAL = Environment(target="cpu")


def test_all_that_are_in_a_cluster_are_meant() -> None:
    environments = {"here": LOCAL, "staging": cluster(), "production": cluster()}
    places = ServingPlaces.of(environments)
    assert (set(places.by_name), places.namespace) == ({"staging", "production"}, "serving")


@pytest.mark.parametrize("other", [cluster("elsewhere"), cluster(context="other")])
def test_one_process_is_for_one_namespace(other: Environment) -> None:
    environments = {"staging": cluster(), "production": other}
    with pytest.raises(BadInput, match="different namespaces or clusters"):
        ServingPlaces.of(environments)
    assert set(ServingPlaces.of(environments, ["production"]).by_name) == {"production"}


def test_an_environment_that_is_unknown_or_not_in_a_cluster_is_named() -> None:
    with pytest.raises(NotFound, match="'moon'"):
        ServingPlaces.of({"staging": cluster()}, ["moon"])
    with pytest.raises(BadInput, match="here has no servers in a cluster"):
        ServingPlaces.of({"staging": cluster(), "here": LOCAL}, ["staging", "here"])
    with pytest.raises(BadInput, match="None of the environments"):
        ServingPlaces.of({"here": LOCAL})
