"""Over every account, verb and kind: only what is listed here is allowed in the cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainyard.deploy.manifests import AIRFLOW_NAMESPACE, STEPS_NAMESPACE, load_overlay
from trainyard.deploy.rbac import READS, Right, rights, writes
from trainyard.deploy.tables import markdown

REPOSITORY = Path(__file__).parents[3]
ROOT = REPOSITORY / "k8s"
OVERLAYS = ["staging", "production", "cpu"]

WORKER = f"{AIRFLOW_NAMESPACE}/trainyard-airflow-worker"
TRIGGERER = f"{AIRFLOW_NAMESPACE}/trainyard-airflow-triggerer"
CHANGE = {"create", "patch", "delete"}


def expected_writes(namespace: str) -> set[tuple[str, str, str, str, str]]:
    """Account, namespace, kind, verb, name: all that may change anything."""
    found = set()
    for account in (WORKER, TRIGGERER):
        for kind, verbs in (
            ("deployments.apps", CHANGE),
            ("deployments.apps/scale", {"patch"}),
            ("services", CHANGE),
            # Of adopted Deployments, whose template is their owner's.
            ("pods", {"patch"}),
            ("poddisruptionbudgets.policy", CHANGE),
            # Those belong to whoever runs the cluster: held during a rollout, never made.
            ("horizontalpodautoscalers.autoscaling", {"patch"}),
            ("scaledobjects.keda.sh", {"patch"}),
            ("leases.coordination.k8s.io", {"create", "update", "patch"}),
        ):
            found |= {(account, namespace, kind, verb, "") for verb in verbs}
    for kind, verbs in (
        ("pods", CHANGE),
        ("secrets", CHANGE),
        ("resourceclaimtemplates.resource.k8s.io", {"create", "patch"}),
    ):
        found |= {(WORKER, STEPS_NAMESPACE, kind, verb, "") for verb in verbs}
    found.add((TRIGGERER, STEPS_NAMESPACE, "pods", "delete", ""))
    guard = f"{namespace}/trainyard-guard"
    found.add((guard, namespace, "httproutes.gateway.networking.k8s.io", "patch", ""))
    found.add((guard, namespace, "leases.coordination.k8s.io", "create", ""))
    found.add((guard, namespace, "leases.coordination.k8s.io", "update", "trainyard-guard"))
    return found


def rights_of(name: str) -> set[Right]:
    return rights(load_overlay(ROOT, name).objects)


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_may_change_more_than_this(name: str) -> None:
    namespace = load_overlay(ROOT, name).parameter("namespace")
    found = {
        (each.account, each.namespace, each.resource, each.verb, each.name)
        for each in writes(rights_of(name))
    }

    assert found == expected_writes(namespace)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_guard_alone_changes_routes(name: str) -> None:
    namespace = load_overlay(ROOT, name).parameter("namespace")
    changes = {
        (each.account, each.verb)
        for each in writes(rights_of(name))
        if each.resource.startswith("httproutes")
    }

    assert changes == {(f"{namespace}/trainyard-guard", "patch")}


@pytest.mark.parametrize("name", OVERLAYS)
def test_servers_and_steps_have_no_right_and_no_token(name: str) -> None:
    overlay = load_overlay(ROOT, name)
    holders = {each.account for each in rights_of(name)}
    without = {
        f"{each['metadata']['namespace']}/{each['metadata']['name']}"
        for each in overlay.objects
        if each["kind"] == "ServiceAccount"
        and each["metadata"]["name"] not in {"trainyard-guard", "trainyard-proxy"}
    }

    assert f"{overlay.parameter('namespace')}/trainyard-serving" in without
    assert f"{STEPS_NAMESPACE}/trainyard-compile" in without
    assert not holders & without
    for each in overlay.objects:
        if each["kind"] == "ServiceAccount":
            assert each["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_right_is_a_wildcard_or_gives_rights(name: str) -> None:
    for each in rights_of(name):
        assert "*" not in (each.verb, each.resource)
        # A worker makes the secrets of its pods, and lists none.
        assert each.resource != "secrets" or (each.account, each.namespace) == (
            WORKER,
            STEPS_NAMESPACE,
        )
        assert (each.resource, each.verb) != ("secrets", "list")
        assert not each.resource.startswith(("roles", "rolebindings", "clusterroles"))
        assert each.verb not in {"bind", "escalate", "impersonate", "deletecollection"}
        assert each.resource not in {"pods/exec", "pods/attach", "pods/portforward"}
    whole_cluster = {each for each in rights_of(name) if not each.namespace}
    assert {each.resource for each in whole_cluster} == {"nodes", "pods"}
    # Who plans counts the devices that pods hold, whoever they belong to.
    assert {(each.account, each.verb) for each in whole_cluster if each.resource == "pods"} == {
        (WORKER, "list")
    }
    assert {each.verb for each in whole_cluster} <= READS


def test_the_page_about_rights_is_up_to_date() -> None:
    page = (REPOSITORY / "docs" / "rights.md").read_text()

    assert page == markdown(load_overlay(ROOT, "production").objects), (
        "Run `trainyard render rights production > docs/rights.md`."
    )
