"""The client against an emulated API server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster, Fault

from trainyard.errors import BadInput, Conflict, NotFound, OutOfCapacity, Transient
from trainyard.kubernetes.client import PAGE, Cluster, MissingKind
from trainyard.kubernetes.kinds import DEPLOYMENT, HTTP_ROUTE, LEASE, POD
from trainyard.settings import Settings


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeCluster]:
    with FakeCluster.running() as fake:
        yield fake


@pytest.fixture
def fake(shared: FakeCluster) -> Iterator[FakeCluster]:
    yield shared
    shared.faults.clear()
    shared.denied.clear()
    shared.token, shared.down = "", False
    for kind in (DEPLOYMENT, HTTP_ROUTE, LEASE, POD):
        for found in shared.objects(kind):
            shared.remove(kind, found["metadata"]["name"])


@pytest.fixture
def cluster(fake: FakeCluster) -> Cluster:
    return fake.client()


def deployment(name: str = "server", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": NS, "labels": {"app": name}},
        "spec": {"replicas": 1, **spec},
    }


def route(*weights: int) -> dict[str, Any]:
    backends = [
        {"name": name, "port": 8000, "weight": weight}
        for name, weight in zip("ab", weights, strict=True)
    ]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "route", "namespace": NS},
        "spec": {"rules": [{"name": "split", "backendRefs": backends}]},
    }


# --- applying -------------------------------------------------------------------------------------


def test_applying_makes_an_object_and_applying_it_again_changes_nothing(cluster: Cluster) -> None:
    first = cluster.apply(DEPLOYMENT, deployment())
    again = cluster.apply(DEPLOYMENT, deployment())
    assert first["metadata"]["generation"] == 1
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


def test_what_is_applied_no_more_goes_and_what_others_set_stays(
    fake: FakeCluster, cluster: Cluster
) -> None:
    cluster.apply(DEPLOYMENT, deployment(paused=True))

    def scale(body: dict[str, Any]) -> None:
        body["spec"]["minReadySeconds"] = 5
        body["metadata"].setdefault("annotations", {})["mine"] = "kept"

    fake.edit(DEPLOYMENT, "server", scale)
    found = cluster.apply(DEPLOYMENT, deployment())
    assert found["spec"] == {"replicas": 1, "minReadySeconds": 5}
    assert found["metadata"]["annotations"] == {"mine": "kept"}


def test_a_field_that_somebody_else_took_is_taken_back(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.apply(DEPLOYMENT, deployment())
    fake.edit(DEPLOYMENT, "server", lambda body: body["spec"].update(replicas=7))
    assert cluster.apply(DEPLOYMENT, deployment())["spec"]["replicas"] == 1


def test_a_dry_run_stores_nothing(fake: FakeCluster, cluster: Cluster) -> None:
    assert cluster.apply(DEPLOYMENT, deployment(), dry_run=True)["spec"]["replicas"] == 1
    assert fake.get(DEPLOYMENT, "server") is None


def test_containers_are_merged_by_name(fake: FakeCluster, cluster: Cluster) -> None:
    ours = {"template": {"spec": {"containers": [{"name": "server", "image": "a"}]}}}
    cluster.apply(DEPLOYMENT, deployment(**ours))

    def inject(body: dict[str, Any]) -> None:
        body["spec"]["template"]["spec"]["containers"].append({"name": "mesh", "image": "b"})

    fake.edit(DEPLOYMENT, "server", inject)
    found = cluster.apply(DEPLOYMENT, deployment(**ours))
    names = [each["name"] for each in found["spec"]["template"]["spec"]["containers"]]
    assert names == ["server", "mesh"]


# --- reading --------------------------------------------------------------------------------------


def test_what_is_not_there_is_none(cluster: Cluster) -> None:
    assert cluster.get(DEPLOYMENT, "nobody", NS) is None


def test_a_list_has_kinds_labels_and_all_pages(fake: FakeCluster, cluster: Cluster) -> None:
    count = PAGE + 3
    for number in range(count):
        labels = {"app": "many", "odd": str(number % 2)}
        fake.put(POD, {"metadata": {"name": f"pod-{number}", "labels": labels}})
    found, version = cluster.list(POD, NS, labels={"app": "many"})
    assert (len(found), found[0]["kind"], int(version) > 0) == (count, "Pod", True)
    odd, _ = cluster.list(POD, NS, labels={"app": "many", "odd": "1"})
    assert len(odd) == count // 2
    assert cluster.list(POD, "default")[0] == []


def test_a_watch_goes_on_from_a_version_and_ends_by_itself(
    fake: FakeCluster, cluster: Cluster
) -> None:
    pod = {"metadata": {"name": "pod", "labels": {"app": "x"}}}
    fake.put(POD, pod)
    _, version = cluster.list(POD, NS)
    fake.edit(POD, "pod", lambda body: body.update(status={"phase": "Running"}))
    fake.put(POD, {"metadata": {"name": "other", "labels": {"app": "y"}}})
    fake.remove(POD, "pod")
    events = list(
        cluster.watch(POD, NS, resource_version=version, labels={"app": "x"}, timeout_s=1)
    )
    assert [(type_, body["metadata"]["name"]) for type_, body in events] == [
        ("MODIFIED", "pod"),
        ("DELETED", "pod"),
    ]


def test_a_watch_that_is_cut_is_transient_and_an_old_version_a_conflict(
    fake: FakeCluster, cluster: Cluster
) -> None:
    _, version = cluster.list(POD, NS)
    fake.put(POD, {"metadata": {"name": "pod"}})
    watch = cluster.watch(POD, NS, resource_version=version)
    assert next(watch)[0] == "ADDED"
    fake.cut_watches()
    with pytest.raises(Transient, match="broke"):
        next(watch)
    fake.forget_history()
    with pytest.raises(Conflict, match="too old"):
        next(cluster.watch(POD, NS, resource_version=version))


def test_the_end_of_a_log(fake: FakeCluster, cluster: Cluster) -> None:
    fake.put(POD, {"metadata": {"name": "pod"}})
    fake.logs[NS, "pod", "server"] = "one\ntwo\nthree\n"
    assert cluster.logs("pod", NS, container="server", tail_lines=2) == "two\nthree\n"
    assert cluster.logs("pod", NS, container="not-started") == ""
    assert cluster.logs("nobody", NS) == ""


# --- changing -------------------------------------------------------------------------------------


def test_a_patch_whose_test_does_not_hold_is_a_conflict_and_changes_nothing(
    fake: FakeCluster, cluster: Cluster
) -> None:
    fake.put(HTTP_ROUTE, route(90, 10))
    at = "/spec/rules/0/backendRefs"
    test = {"op": "test", "path": f"{at}/1/name", "value": "c"}
    change = {"op": "replace", "path": f"{at}/1/weight", "value": 50}
    with pytest.raises(Conflict):
        cluster.json_patch(HTTP_ROUTE, "route", [test, change], namespace=NS)
    gone = {"op": "replace", "path": f"{at}/2/weight", "value": 50}
    with pytest.raises(Conflict):
        cluster.json_patch(HTTP_ROUTE, "route", [gone], namespace=NS)
    found = cluster.json_patch(HTTP_ROUTE, "route", [change], namespace=NS)
    weights = [backend["weight"] for backend in found["spec"]["rules"][0]["backendRefs"]]
    assert (weights, found["metadata"]["generation"]) == ([90, 50], 2)


def test_a_patch_that_makes_an_invalid_object_is_bad_input(
    fake: FakeCluster, cluster: Cluster
) -> None:
    fake.put(HTTP_ROUTE, route(90, 10))
    change = {"op": "replace", "path": "/spec/rules/0/backendRefs/0/weight", "value": -1}
    with pytest.raises(BadInput, match="out of range"):
        cluster.json_patch(HTTP_ROUTE, "route", [change], namespace=NS)


def test_a_merge_patch_removes_what_is_none(fake: FakeCluster, cluster: Cluster) -> None:
    fake.put(DEPLOYMENT, deployment(paused=True))
    body = {"spec": {"paused": None, "replicas": 2}}
    found = cluster.merge_patch(DEPLOYMENT, "server", body, namespace=NS)
    assert found["spec"] == {"replicas": 2}


def test_the_scale_of_a_deployment(fake: FakeCluster, cluster: Cluster) -> None:
    fake.put(DEPLOYMENT, deployment())
    cluster.merge_patch(
        DEPLOYMENT, "server", {"spec": {"replicas": 0}}, namespace=NS, subresource="scale"
    )
    stored = fake.get(DEPLOYMENT, "server")
    assert stored is not None
    assert stored["spec"]["replicas"] == 0


def test_a_replacement_needs_the_present_version(fake: FakeCluster, cluster: Cluster) -> None:
    lease = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": "lease", "namespace": NS},
        "spec": {"holderIdentity": "a"},
    }
    made = cluster.create(LEASE, lease)
    with pytest.raises(Conflict, match="already exists"):
        cluster.create(LEASE, lease)
    mine = {**made, "spec": {"holderIdentity": "b"}}
    cluster.replace(LEASE, mine)
    with pytest.raises(Conflict, match="modified"):
        cluster.replace(LEASE, {**made, "spec": {"holderIdentity": "c"}})


def test_deleting_takes_what_is_owned_and_tells_whether_there_was_anything(
    fake: FakeCluster, cluster: Cluster
) -> None:
    owner = fake.put(DEPLOYMENT, deployment())
    reference = {"uid": owner["metadata"]["uid"], "name": "server"}
    fake.put(POD, {"metadata": {"name": "pod", "ownerReferences": [reference]}})
    assert cluster.delete(DEPLOYMENT, "server", NS)
    assert fake.get(POD, "pod") is None
    assert not cluster.delete(DEPLOYMENT, "server", NS)


# --- errors ---------------------------------------------------------------------------------------


def test_a_kind_without_its_crd_is_told_from_a_missing_object(
    fake: FakeCluster, cluster: Cluster
) -> None:
    kinds = dict(fake.kinds)
    fake.uninstall(HTTP_ROUTE)
    try:
        with pytest.raises(MissingKind, match="does not know this kind"):
            cluster.get(HTTP_ROUTE, "route", NS)
    finally:
        fake.kinds = kinds


def test_a_namespace_that_is_missing_is_named(cluster: Cluster) -> None:
    body = deployment()
    body["metadata"]["namespace"] = "nowhere"
    with pytest.raises(NotFound, match='namespaces "nowhere"'):
        cluster.apply(DEPLOYMENT, body)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(status=401, reason="Unauthorized"), Transient),
        (Fault(status=403, reason="Forbidden"), BadInput),
        (Fault.quota("deployments"), OutOfCapacity),
        (Fault(status=409, reason="Conflict"), Conflict),
        (Fault(status=422, reason="Invalid", details={"causes": [{}]}), BadInput),
        (Fault(status=429, reason="TooManyRequests"), Transient),
        (Fault(status=500), Transient),
        (Fault(status=500, message="failed to create typed patch object (x)"), BadInput),
        (Fault(status=503), Transient),
        (Fault(cut="before"), Transient),
        (Fault(cut="after"), Transient),
    ],
)
def test_answers_become_errors(
    fake: FakeCluster, cluster: Cluster, fault: Fault, error: type[Exception]
) -> None:
    fault.times = 1
    fake.faults.append(fault)
    with pytest.raises(error) as raised:
        cluster.create(DEPLOYMENT, deployment())
    assert type(raised.value) is error
    assert (fake.get(DEPLOYMENT, "server") is not None) == (fault.cut == "after")
    assert cluster.list(DEPLOYMENT, NS)


def test_a_right_that_is_missing_is_named(fake: FakeCluster, cluster: Cluster) -> None:
    fake.denied.add(("patch", "httproutes"))
    fake.put(HTTP_ROUTE, route(90, 10))
    with pytest.raises(BadInput, match="cannot patch resource") as raised:
        cluster.json_patch(HTTP_ROUTE, "route", [], namespace=NS)
    assert "service account" in raised.value.hint


def test_no_answer_is_transient(fake: FakeCluster) -> None:
    fake.faults.append(Fault(delay_s=60, times=1))
    with pytest.raises(Transient, match="does not answer"):
        fake.client(timeout_s=0.2).list(POD, NS)
    fake.down = True
    with pytest.raises(Transient, match="does not answer"):
        fake.client().list(POD, NS)


def test_one_client_serves_several_threads(fake: FakeCluster, cluster: Cluster) -> None:
    problems: list[Exception] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                cluster.apply(DEPLOYMENT, deployment(f"server-{number}"))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(cluster.list(DEPLOYMENT, NS)[0]) == 4


# --- connecting -----------------------------------------------------------------------------------


def test_a_kubeconfig_brings_address_and_token(fake: FakeCluster, tmp_path: Path) -> None:
    fake.token = "secret"
    path = tmp_path / "kubeconfig"
    path.write_text(fake.kubeconfig("secret"))
    cluster = Cluster.connect(Settings(home=tmp_path, kubeconfig=path))
    assert cluster.version() == "v1.36.1"
    with pytest.raises(Transient):
        fake.client(token="wrong").version()


def test_a_context_that_is_missing_is_said(fake: FakeCluster, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(fake.kubeconfig())
    with pytest.raises(BadInput, match="other"):
        Cluster.connect(Settings(home=tmp_path, kubeconfig=path), "other")
    with pytest.raises(BadInput, match="cannot be found"):
        Cluster.connect(Settings(home=tmp_path, kubeconfig=tmp_path / "missing"))
