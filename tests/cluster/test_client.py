"""The client against a real API server: what the emulated one of the unit tests must be like."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.place import Place, as_user, wait_for

from trainyard.errors import BadInput, Conflict, NotFound, OutOfCapacity, Transient
from trainyard.kubernetes.client import Cluster, MissingKind
from trainyard.kubernetes.kinds import DEPLOYMENT, HTTP_ROUTE, LEASE, NAMESPACE, POD, Kind
from trainyard.settings import Settings

pytestmark = pytest.mark.cluster

CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
QUOTA = Kind("v1", "ResourceQuota", "resourcequotas")
NOBODY_KNOWS = Kind("nobody.example/v1", "Unknown", "unknowns")
REFS = "/spec/rules/0/backendRefs"


def config(here: Place, name: str, **data: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": here.namespace, "labels": {"app": name}},
        "data": data,
    }


def deployment(here: Place, name: str, **spec: Any) -> dict[str, Any]:
    labels = {"app": name}
    pod = {"containers": [{"name": "server", "image": "none", "imagePullPolicy": "Never"}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": here.namespace, "labels": labels},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
            **spec,
        },
    }


@pytest.fixture
def route(here: Place, cluster: Cluster) -> Iterator[str]:
    """An HTTPRoute with the weights 90 and 10."""
    backends = [
        {"name": name, "port": 8000, "weight": weight} for name, weight in (("a", 90), ("b", 10))
    ]
    body = {
        "apiVersion": HTTP_ROUTE.api_version,
        "kind": HTTP_ROUTE.name,
        "metadata": {"name": "route", "namespace": here.namespace},
        "spec": {"rules": [{"backendRefs": backends}]},
    }
    cluster.create(HTTP_ROUTE, body)
    yield "route"
    cluster.delete(HTTP_ROUTE, "route", here.namespace)


def weights(found: dict[str, Any]) -> list[int]:
    return [backend["weight"] for backend in found["spec"]["rules"][0]["backendRefs"]]


# --- applying -------------------------------------------------------------------------------------


def test_applying_again_changes_nothing(here: Place, cluster: Cluster) -> None:
    first = cluster.apply(DEPLOYMENT, deployment(here, "again"))
    again = cluster.apply(DEPLOYMENT, deployment(here, "again"))
    # The controller writes the status between the two, which is a version but no generation.
    assert first["metadata"]["generation"] == again["metadata"]["generation"] == 1
    assert first["spec"] == again["spec"]


def test_what_is_applied_no_more_goes_and_what_others_set_stays(
    here: Place, cluster: Cluster
) -> None:
    cluster.apply(DEPLOYMENT, deployment(here, "fields", paused=True))
    change = {"spec": {"minReadySeconds": 5}, "metadata": {"annotations": {"mine": "kept"}}}
    cluster.merge_patch(DEPLOYMENT, "fields", change, namespace=here.namespace, manager="other")
    found = cluster.apply(DEPLOYMENT, deployment(here, "fields"))
    assert "paused" not in found["spec"]
    assert found["spec"]["minReadySeconds"] == 5
    assert found["metadata"]["annotations"]["mine"] == "kept"


def test_a_field_that_somebody_else_took_is_taken_back(here: Place, cluster: Cluster) -> None:
    cluster.apply(CONFIG_MAP, config(here, "taken", key="ours"))
    theirs = {"data": {"key": "theirs"}}
    cluster.merge_patch(CONFIG_MAP, "taken", theirs, namespace=here.namespace, manager="other")
    assert cluster.apply(CONFIG_MAP, config(here, "taken", key="ours"))["data"]["key"] == "ours"


def test_a_dry_run_stores_nothing(here: Place, cluster: Cluster) -> None:
    assert cluster.apply(CONFIG_MAP, config(here, "dry", key="x"), dry_run=True)["data"]
    assert cluster.get(CONFIG_MAP, "dry", here.namespace) is None


# --- reading --------------------------------------------------------------------------------------


def test_a_list_has_kinds_labels_and_all_pages(
    here: Place, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainyard.kubernetes.client.PAGE", 2)
    for number in range(5):
        body = config(here, f"many-{number}")
        body["metadata"]["labels"] = {"app": "many", "odd": str(number % 2)}
        cluster.create(CONFIG_MAP, body)
    found, version = cluster.list(CONFIG_MAP, here.namespace, labels={"app": "many"})
    assert (len(found), found[0]["kind"], found[0]["apiVersion"]) == (5, "ConfigMap", "v1")
    assert int(version) > 0
    odd, _ = cluster.list(CONFIG_MAP, here.namespace, labels={"app": "many", "odd": "1"})
    assert len(odd) == 2
    assert any(item["metadata"]["name"] == "many-0" for item in cluster.list(CONFIG_MAP)[0])


def test_a_watch_goes_on_from_a_version_and_ends_by_itself(here: Place, cluster: Cluster) -> None:
    _, version = cluster.list(CONFIG_MAP, here.namespace)
    cluster.create(CONFIG_MAP, config(here, "watched", key="1"))
    cluster.create(CONFIG_MAP, config(here, "other"))
    cluster.apply(CONFIG_MAP, config(here, "watched", key="2"))
    cluster.delete(CONFIG_MAP, "watched", here.namespace)
    events = cluster.watch(
        CONFIG_MAP,
        here.namespace,
        resource_version=version,
        labels={"app": "watched"},
        timeout_s=2,
    )
    assert [(kind, body["metadata"]["name"]) for kind, body in events] == [
        ("ADDED", "watched"),
        ("MODIFIED", "watched"),
        ("DELETED", "watched"),
    ]


def test_a_watch_tells_a_change_as_it_happens(here: Place, cluster: Cluster) -> None:
    _, version = cluster.list(CONFIG_MAP, here.namespace)
    told = threading.Event()

    def change() -> None:
        cluster.create(CONFIG_MAP, config(here, "soon"))
        told.wait(60)

    with_ = threading.Thread(target=change)
    with_.start()
    try:
        watch = cluster.watch(
            CONFIG_MAP, here.namespace, resource_version=version, labels={"app": "soon"}
        )
        assert next(watch)[0] == "ADDED"
    finally:
        told.set()
        with_.join()


def test_a_watch_from_the_first_version_tells_all_or_is_a_conflict(
    here: Place, cluster: Cluster
) -> None:
    cluster.create(CONFIG_MAP, config(here, "since"))
    try:
        events = list(cluster.watch(CONFIG_MAP, here.namespace, resource_version="1", timeout_s=2))
    except Conflict:
        return
    # A cluster that is minutes old still has everything that ever happened.
    assert "since" in [body["metadata"]["name"] for _, body in events]


def test_the_log_of_a_pod_and_of_none(here: Place, cluster: Cluster) -> None:
    said = here.run("says", [here.python, "-c", "print('one'); print('two'); print('three')"])
    assert said.splitlines() == ["one", "two", "three"]
    assert cluster.logs("nobody", here.namespace) == ""
    waiting = here.pod("waiting", ["true"])
    waiting["spec"]["nodeSelector"] = {"no-node": "has-this"}
    cluster.create(POD, waiting)
    assert cluster.logs("waiting", here.namespace) == ""
    cluster.delete(POD, "waiting", here.namespace)


# --- changing -------------------------------------------------------------------------------------


def test_a_patch_whose_test_does_not_hold_is_a_conflict_and_changes_nothing(
    here: Place, cluster: Cluster, route: str
) -> None:
    change = {"op": "replace", "path": f"{REFS}/1/weight", "value": 50}
    test = {"op": "test", "path": f"{REFS}/1/name", "value": "somebody"}
    with pytest.raises(Conflict):
        cluster.json_patch(HTTP_ROUTE, route, [test, change], namespace=here.namespace)
    gone = {"op": "replace", "path": f"{REFS}/2/weight", "value": 50}
    with pytest.raises(Conflict):
        cluster.json_patch(HTTP_ROUTE, route, [gone], namespace=here.namespace)
    missing = {"op": "test", "path": "/metadata/annotations/nobody", "value": "set"}
    with pytest.raises(Conflict):
        cluster.json_patch(HTTP_ROUTE, route, [missing, change], namespace=here.namespace)
    found = cluster.get(HTTP_ROUTE, route, here.namespace)
    assert found is not None
    assert weights(found) == [90, 10]


def test_a_patch_with_the_version_it_was_planned_from_holds_only_for_that_version(
    here: Place, cluster: Cluster, route: str
) -> None:
    found = cluster.get(HTTP_ROUTE, route, here.namespace)
    assert found is not None
    version = found["metadata"]["resourceVersion"]
    guarded = [
        {"op": "test", "path": "/metadata/resourceVersion", "value": version},
        {"op": "replace", "path": f"{REFS}/0/weight", "value": 75},
        {"op": "replace", "path": f"{REFS}/1/weight", "value": 25},
    ]
    changed = cluster.json_patch(HTTP_ROUTE, route, guarded, namespace=here.namespace)
    assert weights(changed) == [75, 25]
    assert changed["metadata"]["generation"] == 2
    with pytest.raises(Conflict):
        cluster.json_patch(HTTP_ROUTE, route, guarded, namespace=here.namespace)


def test_a_patch_of_what_is_not_there_is_not_found(here: Place, cluster: Cluster) -> None:
    change = {"op": "replace", "path": "/data/key", "value": "x"}
    with pytest.raises(NotFound):
        cluster.json_patch(CONFIG_MAP, "nobody", [change], namespace=here.namespace)


def test_a_patch_that_makes_an_invalid_object_is_bad_input(here: Place, cluster: Cluster) -> None:
    cluster.apply(DEPLOYMENT, deployment(here, "invalid"))
    change = {"op": "replace", "path": "/spec/replicas", "value": -1}
    with pytest.raises(BadInput, match="replicas"):
        cluster.json_patch(DEPLOYMENT, "invalid", [change], namespace=here.namespace)
    wrong_type = {"op": "replace", "path": "/spec/replicas", "value": "many"}
    with pytest.raises(BadInput):
        cluster.json_patch(DEPLOYMENT, "invalid", [wrong_type], namespace=here.namespace)


def test_scaling_by_merge_patch_leaves_the_rest(here: Place, cluster: Cluster) -> None:
    cluster.apply(DEPLOYMENT, deployment(here, "scaled"))
    change = {"spec": {"replicas": 0, "minReadySeconds": 1}}
    found = cluster.merge_patch(DEPLOYMENT, "scaled", change, namespace=here.namespace)
    assert (found["spec"]["replicas"], found["spec"]["minReadySeconds"]) == (0, 1)
    scale = cluster.merge_patch(
        DEPLOYMENT,
        "scaled",
        {"spec": {"replicas": 0}},
        namespace=here.namespace,
        subresource="scale",
    )
    assert scale["kind"] == "Scale"


def test_of_two_who_create_or_replace_one_object_one_is_told(here: Place, cluster: Cluster) -> None:
    first = cluster.create(CONFIG_MAP, config(here, "one", key="1"))
    with pytest.raises(Conflict):
        cluster.create(CONFIG_MAP, config(here, "one"))
    cluster.replace(CONFIG_MAP, {**first, "data": {"key": "2"}})
    with pytest.raises(Conflict):
        cluster.replace(CONFIG_MAP, {**first, "data": {"key": "3"}})
    found = cluster.get(CONFIG_MAP, "one", here.namespace)
    assert found is not None
    assert found["data"] == {"key": "2"}


def test_a_lease_keeps_its_times_to_the_microsecond(here: Place, cluster: Cluster) -> None:
    body = {
        "apiVersion": LEASE.api_version,
        "kind": LEASE.name,
        "metadata": {"name": "model.environment", "namespace": here.namespace},
        "spec": {
            "holderIdentity": "me",
            "leaseDurationSeconds": 15,
            "renewTime": "2026-11-27T12:00:00.000001Z",
        },
    }
    assert cluster.create(LEASE, body)["spec"] == body["spec"]
    whole = {**body["spec"], "renewTime": "2026-11-27T12:00:00Z"}
    with pytest.raises(BadInput):
        cluster.merge_patch(LEASE, "model.environment", {"spec": whole}, namespace=here.namespace)


def test_removing_tells_whether_there_was_one(here: Place, cluster: Cluster) -> None:
    cluster.create(CONFIG_MAP, config(here, "short"))
    assert cluster.delete(CONFIG_MAP, "short", here.namespace)
    assert not cluster.delete(CONFIG_MAP, "short", here.namespace)


def test_removing_a_deployment_removes_its_pods(here: Place, cluster: Cluster) -> None:
    cluster.apply(DEPLOYMENT, deployment(here, "owner", replicas=1))
    wait_for(lambda: here.pods({"app": "owner"}), "the pod")
    cluster.delete(DEPLOYMENT, "owner", here.namespace)
    wait_for(lambda: not here.pods({"app": "owner"}), "the pod to go")


# --- errors ---------------------------------------------------------------------------------------


def test_a_kind_that_is_not_installed_is_told_from_an_object_that_is_not_there(
    here: Place, cluster: Cluster
) -> None:
    with pytest.raises(MissingKind):
        cluster.get(NOBODY_KNOWS, "x", here.namespace)
    with pytest.raises(MissingKind):
        cluster.list(NOBODY_KNOWS, here.namespace)
    with pytest.raises(MissingKind):
        cluster.apply(
            NOBODY_KNOWS,
            {
                "apiVersion": NOBODY_KNOWS.api_version,
                "kind": NOBODY_KNOWS.name,
                "metadata": {"name": "x", "namespace": here.namespace},
            },
        )
    assert cluster.get(HTTP_ROUTE, "nobody", here.namespace) is None


def test_a_namespace_that_is_not_there(cluster: Cluster) -> None:
    assert cluster.get(CONFIG_MAP, "x", "trainyard-nobody") is None
    body = {"apiVersion": "v1", "kind": "ConfigMap"}
    with pytest.raises(NotFound, match="trainyard-nobody"):
        cluster.create(
            CONFIG_MAP, {**body, "metadata": {"name": "x", "namespace": "trainyard-nobody"}}
        )
    with pytest.raises(NotFound, match="trainyard-nobody"):
        cluster.apply(
            CONFIG_MAP, {**body, "metadata": {"name": "x", "namespace": "trainyard-nobody"}}
        )


def test_a_body_that_does_not_fit_its_kind_is_bad_input(here: Place, cluster: Cluster) -> None:
    with pytest.raises(BadInput, match="selector"):
        cluster.create(DEPLOYMENT, deployment(here, "bad", selector={}))
    with pytest.raises(BadInput):
        cluster.create(CONFIG_MAP, config(here, "Not_A_Name"))
    with pytest.raises(BadInput):
        cluster.apply(DEPLOYMENT, deployment(here, "bad", replicas="many"))


def test_a_right_that_is_missing_is_named(here: Place) -> None:
    other = as_user(here, f"system:serviceaccount:{here.namespace}:{here.service_account}")
    with pytest.raises(BadInput, match='cannot list resource "deployments"'):
        other.list(DEPLOYMENT, here.namespace)


def test_a_quota_that_is_used_up_is_a_matter_of_capacity(here: Place, cluster: Cluster) -> None:
    cluster.create(
        QUOTA,
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "none", "namespace": here.namespace},
            "spec": {"hard": {"count/secrets": "0"}},
        },
    )
    secret = Kind("v1", "Secret", "secrets")
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "x", "namespace": here.namespace},
    }

    def refused() -> bool:
        try:
            cluster.create(secret, body)
        except OutOfCapacity:
            return True
        except BadInput:
            # "status unknown for quota": the controller has not counted yet.
            return False
        cluster.delete(secret, "x", here.namespace)
        return False

    try:
        wait_for(refused, "the quota to count")
    finally:
        cluster.delete(QUOTA, "none", here.namespace)


def test_who_says_nothing_the_server_knows_may_try_again(here: Place) -> None:
    other = Cluster.connect(Settings(kubeconfig=here.kubeconfig), here.context)
    configuration = other._api.configuration
    configuration.cert_file = configuration.key_file = None
    configuration.api_key = {"authorization": "Bearer wrong"}
    from kubernetes import client

    with pytest.raises(Transient):
        Cluster(client.ApiClient(configuration)).list(POD, here.namespace)


def test_a_server_that_is_not_there_is_transient(here: Place) -> None:
    from kubernetes import client

    configuration = client.Configuration(host="https://127.0.0.1:9")
    configuration.retries = False
    with pytest.raises(Transient, match="does not answer"):
        Cluster(client.ApiClient(configuration), timeout_s=2).get(NAMESPACE, here.namespace)


def test_the_version(cluster: Cluster) -> None:
    assert cluster.version().startswith("v1.")


def test_nothing_that_we_send_is_more_than_json(here: Place, cluster: Cluster) -> None:
    text = json.dumps({"quote": '"', "line": "\n", "high": "ü\u2028"})
    cluster.apply(CONFIG_MAP, config(here, "json", text=text))
    found = cluster.get(CONFIG_MAP, "json", here.namespace)
    assert found is not None
    assert json.loads(found["data"]["text"]) == json.loads(text)
