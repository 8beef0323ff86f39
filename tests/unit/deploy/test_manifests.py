"""Every overlay is valid, holds what the code names, and moves no traffic."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from tests.fake_cluster import FakeCluster
from tests.unit.deploy.custom_kinds import RULES

from trainyard.deploy.autoscaler import autoscaler
from trainyard.deploy.kustomize import Object, identity
from trainyard.deploy.manifests import (
    AIRFLOW_NAMESPACE,
    STEPS_NAMESPACE,
    account_of,
    filled,
    helm_values,
    load_overlay,
    load_overlays,
    overlay_names,
    to_yaml,
    together,
)
from trainyard.deploy.rights import ROLES
from trainyard.errors import BadInput, NotFound
from trainyard.kubernetes.kinds import HTTP_ROUTE, NAMESPACE, Kind
from trainyard.kubernetes.labels import (
    COMPONENT,
    ENVIRONMENT,
    LANE,
    MANAGED_BY,
    MODEL,
    RELEASE,
    owned,
)
from trainyard.spec.environments import Environments
from trainyard.spec.kubernetes import KubernetesServing, KubernetesSteps

ROOT = Path(__file__).parents[3] / "k8s"
VERSIONS = ("1.35", "1.36", "1.37")
OVERLAYS = overlay_names(ROOT)
RELEASE_ID = "llama-0123456789ab"


@cache
def objects_of(name: str) -> tuple[Object, ...]:
    return load_overlay(ROOT, name).objects


@cache
def everything() -> list[Object]:
    """All objects of all overlays and templates, those that differ in a name of a place once."""
    found = {
        str(each).replace("staging", "production"): each
        for name in OVERLAYS
        for each in objects_of(name)
    }
    return [*found.values(), *(scaler(kind) for kind in ("keda", "hpa"))]


def scaler(kind: Any) -> Object:
    return autoscaler(
        ROOT,
        kind,
        model="llama",
        environment="production",
        namespace="trainyard-production",
        release_id=RELEASE_ID,
        min_replicas=1,
        max_replicas=4,
        prometheus="http://prometheus:9090",
    )


def of_kind(name: str, kind: str) -> list[Object]:
    return [each for each in objects_of(name) if each["kind"] == kind]


def pod_specs(name: str) -> list[tuple[str, Object]]:
    """The pod specs of an overlay, by namespace."""
    found = []
    for each in objects_of(name):
        spec = each.get("spec") or {}
        if each["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if "template" in spec and "containers" in spec["template"].get("spec", {}):
            found.append((each["metadata"]["namespace"], spec["template"]["spec"]))
    return found


# --- Schemas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_core_kinds_have_the_schema_of(version: str) -> None:
    checked = 0
    for each in everything():
        if (each["apiVersion"], each["kind"]) not in RULES:
            kubernetes_validate.validate(each, version, strict=True)
            checked += 1
    assert checked > 50


def test_custom_kinds_keep_the_rules_of_their_crds() -> None:
    seen = set()
    for each in everything():
        rule = RULES.get((each["apiVersion"], each["kind"]))
        if rule is not None:
            jsonschema.validate(each["spec"], rule)
            seen.add((each["apiVersion"], each["kind"]))
    assert seen == set(RULES)


def test_an_ami_called_latest_would_be_refused() -> None:
    node_class = copy.deepcopy(of_kind("production", "EC2NodeClass")[0])
    node_class["spec"]["amiSelectorTerms"][0]["alias"] = "al2023@latest"

    with pytest.raises(jsonschema.ValidationError, match="latest"):
        jsonschema.validate(node_class["spec"], RULES["karpenter.k8s.aws/v1", "EC2NodeClass"])


# --- Traffic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_route_is_ever_applied(name: str) -> None:
    assert not [each for each in objects_of(name) if each["kind"].endswith("Route")]


def kind_of(resource: Object) -> Kind:
    name = resource["kind"].lower()
    plural = {"gateway": "gateways", "gatewayclass": "gatewayclasses"}.get(
        name, re.sub(r"(s|y)$", lambda end: {"s": "ses", "y": "ies"}[end[0]], name)
    )
    plural = plural if plural.endswith("s") else f"{plural}s"
    namespaced = bool(resource["metadata"].get("namespace"))
    return Kind(resource["apiVersion"], resource["kind"], plural, namespaced=namespaced)


@pytest.mark.parametrize("name", OVERLAYS)
def test_applying_during_a_canary_changes_no_weight_and_applying_twice_nothing(name: str) -> None:
    overlay = load_overlay(ROOT, name)
    namespace = overlay.parameter("namespace")
    route = {
        "apiVersion": HTTP_ROUTE.api_version,
        "kind": HTTP_ROUTE.name,
        "metadata": {"name": "llama.production", "namespace": namespace},
        "spec": {
            "rules": [
                {
                    "backendRefs": [
                        {"name": "a", "port": 8000, "weight": 90},
                        {"name": "b", "port": 8000, "weight": 10},
                    ]
                }
            ]
        },
    }
    with FakeCluster.running() as fake:
        # Those of others, such as Envoy Gateway's own, are there before.
        used = {each["metadata"].get("namespace") for each in overlay.objects} - {None}
        for each in used:
            fake.put(NAMESPACE, {"metadata": {"name": each}})
        applied = [(kind_of(o), o) for o in overlay.objects if o["kind"] != "Namespace"]
        kinds = sorted({kind for kind, _ in applied}, key=str)
        fake.kinds |= {(kind.api_version, kind.plural): kind for kind in kinds}
        fake.put(HTTP_ROUTE, route)
        before = fake.get(HTTP_ROUTE, "llama.production", namespace)
        cluster = fake.client()

        states = []
        for _ in range(2):
            for kind, each in applied:
                cluster.apply(kind, each)
            states.append([fake.objects(kind) for kind in kinds])

        assert states[0] == states[1]
        assert fake.get(HTTP_ROUTE, "llama.production", namespace) == before


# --- What the code names ----------------------------------------------------------------------


def accounts(name: str) -> set[tuple[str, str]]:
    return {
        (each["metadata"]["namespace"], each["metadata"]["name"])
        for each in of_kind(name, "ServiceAccount")
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_account_that_code_or_manifests_name_is_there(name: str) -> None:
    namespace = load_overlay(ROOT, name).parameter("namespace")
    serving, steps = KubernetesServing(namespace=namespace), KubernetesSteps(namespace="x")
    known = accounts(name)

    assert (namespace, serving.service_account) in known
    assert (STEPS_NAMESPACE, steps.service_account) in known
    for where, spec in pod_specs(name):
        assert (where, spec["serviceAccountName"]) in known


@pytest.mark.parametrize("name", ["staging", "production"])
def test_every_role_of_the_store_belongs_to_an_account(name: str) -> None:
    overlay = load_overlay(ROOT, name)
    places = account_of([overlay]).clusters[0][1]
    # Those of Airflow are made by its chart.
    chart = yaml.safe_load(helm_values(ROOT, "airflow", overlay))
    made_by_chart = {
        (AIRFLOW_NAMESPACE, part["serviceAccount"]["name"]): part["serviceAccount"]["annotations"]
        for part in chart.values()
        if isinstance(part, dict) and "serviceAccount" in part
    }
    annotations = made_by_chart | {
        identity(each)[2:]: each["metadata"].get("annotations", {})
        for each in of_kind(name, "ServiceAccount")
    }

    for role in ROLES:
        found = annotations[places[role.where], role.account]
        assert found["eks.amazonaws.com/role-arn"] == account_of([overlay]).role_arn(role)


@pytest.mark.parametrize("name", OVERLAYS)
def test_priorities_put_users_before_measuring_before_compiling(name: str) -> None:
    value = {each["metadata"]["name"]: each["value"] for each in of_kind(name, "PriorityClass")}
    serving, steps = KubernetesServing(namespace="x"), KubernetesSteps(namespace="x")
    order = [
        serving.stable_priority_class,
        "trainyard-candidate",
        steps.measure_priority_class,
        steps.compile_priority_class,
    ]

    assert [value[str(each)] for each in order] == sorted(value.values(), reverse=True)
    assert len(set(value.values())) == 4
    # User classes end there; above are the cluster's own.
    assert max(value.values()) < 1_000_000_000
    assert serving.candidate_priority_class in (None, *value)


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_find_pods_that_exist(name: str) -> None:
    # What hosts put on servers, and what the manifests' own pods have.
    server = {**owned("server", model="m", environment="e"), RELEASE: "r", LANE: "cpu"}
    pods = [server]
    for each in objects_of(name):
        template = (each.get("spec") or {}).get("template") or {}
        labels = (template.get("metadata") or {}).get("labels")
        pods += [labels] if labels else []
    wanted = []
    for each in objects_of(name):
        spec = each.get("spec") or {}
        if each["kind"] == "Service":
            wanted.append(spec["selector"])
        if each["kind"] == "NetworkPolicy":
            wanted.append(spec["podSelector"].get("matchLabels", {}))
            peers = [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [])]
            peers += [peer for rule in spec.get("egress", []) for peer in rule.get("to", [])]
            wanted += [p["podSelector"]["matchLabels"] for p in peers if "podSelector" in p]
        if each["kind"] in {"PodMonitor", "PodDisruptionBudget", "Deployment", "DaemonSet"}:
            wanted.append(spec["selector"]["matchLabels"])

    assert len(wanted) > 5
    for selector in wanted:
        assert any(selector.items() <= labels.items() for labels in pods), selector


def test_series_of_servers_carry_the_labels_that_hosts_put_on_pods() -> None:
    (vllm,) = (m for m in of_kind("production", "PodMonitor") if m["metadata"]["name"] == "vllm")
    (endpoint,) = vllm["spec"]["podMetricsEndpoints"]
    labels = {each["targetLabel"]: each["sourceLabels"][0] for each in endpoint["relabelings"]}

    for name, label in (
        ("release", RELEASE),
        ("model", MODEL),
        ("environment", ENVIRONMENT),
        ("lane", LANE),
    ):
        assert labels[name] == "__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", label)
    assert set(vllm["spec"]["selector"]["matchLabels"]) == {MANAGED_BY, COMPONENT}


def test_the_autoscalers_ask_for_a_channel_and_can_be_found_by_rollouts() -> None:
    for kind in ("keda", "hpa"):
        found = scaler(kind)
        assert found["metadata"]["labels"][MODEL] == "llama"
        assert found["metadata"]["labels"][ENVIRONMENT] == "production"
        assert found["spec"]["scaleTargetRef"]["name"] == f"{RELEASE_ID}-production"
        # A query for one release would find nothing after the next promotion.
        assert "release" not in str(found["spec"].get("triggers", ""))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_replicas": 0}, "no range"),
        ({"min_replicas": 5}, "no range"),
        ({"prometheus": "somewhere"}, "no address"),
        ({"model": "../x"}, "Model"),
        ({"release_id": "no release"}, "elease"),
    ],
)
def test_an_autoscaler_with_wrong_values_is_refused(changes: dict[str, Any], said: str) -> None:
    values: dict[str, Any] = {
        "model": "llama",
        "environment": "production",
        "namespace": "n",
        "release_id": RELEASE_ID,
        "min_replicas": 1,
        "max_replicas": 4,
        "prometheus": "http://prometheus:9090",
    }
    with pytest.raises(BadInput, match=said):
        autoscaler(ROOT, "keda", **(values | changes))


# --- Safety -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_our_own_pods_are_restricted(name: str) -> None:
    for where, spec in pod_specs(name):
        if where == "trainyard-neuron-monitor":
            continue  # AWS's exporter reads the driver.
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_namespace_denies_what_nothing_allows(name: str) -> None:
    for namespace in (STEPS_NAMESPACE, load_overlay(ROOT, name).parameter("namespace")):
        denied = [
            each["spec"]
            for each in of_kind(name, "NetworkPolicy")
            if each["metadata"] | {"labels": None}
            == {"name": "default-deny", "namespace": namespace, "labels": None}
        ]
        assert denied == [{"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]


@pytest.mark.parametrize("name", ["staging", "production"])
def test_the_instance_s_credentials_are_out_of_reach(name: str) -> None:
    for each in of_kind(name, "NetworkPolicy"):
        for rule in each["spec"].get("egress", ()):
            for peer in rule["to"]:
                block = peer.get("ipBlock")
                assert block is None or block["except"] == ["169.254.169.254/32"]
    for each in of_kind(name, "EC2NodeClass"):
        assert each["spec"]["metadataOptions"]["httpTokens"] == "required"
        assert each["spec"]["metadataOptions"]["httpPutResponseHopLimit"] == 1


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_are_pinned_and_namespaces_have_a_security_level(name: str) -> None:
    for _, spec in pod_specs(name):
        for container in spec["containers"]:
            image = container["image"]
            assert "@sha256:" in image or re.search(r":[\w.-]+$", image), image
            assert not image.endswith(":latest")
    for each in of_kind(name, "Namespace"):
        assert "pod-security.kubernetes.io/enforce" in each["metadata"]["labels"]


def test_spot_is_only_for_what_may_be_interrupted() -> None:
    for pool in of_kind("production", "NodePool"):
        spec = pool["spec"]["template"]["spec"]
        capacity = next(
            each["values"]
            for each in spec["requirements"]
            if each["key"] == "karpenter.sh/capacity-type"
        )
        taints = {taint["key"] for taint in spec.get("taints", ())}
        has_devices = "aws.amazon.com/neuron" in pool["spec"]["limits"]
        assert has_devices == ("aws.amazon.com/neuron" in taints)
        if "spot" in capacity and has_devices:
            # Servers do not tolerate this taint, so they never land there.
            assert "trainyard.dev/spot" in taints


def test_nodes_with_devices_are_never_moved_by_themselves() -> None:
    for pool in of_kind("production", "NodePool"):
        if "aws.amazon.com/neuron" not in pool["spec"]["limits"]:
            continue
        assert pool["spec"]["template"]["spec"]["expireAfter"] == "Never"
        budgets = pool["spec"]["disruption"]["budgets"]
        assert {"nodes": "0", "reasons": ["Drifted", "Underutilized"]} in budgets


def test_every_node_pool_has_a_class_and_a_limit() -> None:
    classes = {each["metadata"]["name"] for each in of_kind("production", "EC2NodeClass")}
    pools = of_kind("production", "NodePool")

    used = {pool["spec"]["template"]["spec"]["nodeClassRef"]["name"] for pool in pools}
    assert used == classes
    assert all(pool["spec"]["limits"] for pool in pools)
    raid = {
        each["metadata"]["name"]
        for each in of_kind("production", "EC2NodeClass")
        if each["spec"].get("instanceStorePolicy") == "RAID0"
    }
    # inf2 and the compile nodes' families without a `d` have no instance store.
    assert raid == {"trainyard-trn"}


def test_the_node_cache_of_servers_is_a_folder_that_they_may_mount() -> None:
    (policy,) = of_kind("production", "ValidatingAdmissionPolicy")
    cache = KubernetesServing(namespace="x").node_cache
    assert cache is not None

    (folders,) = (v for v in policy["spec"]["variables"] if v["name"] == "folders")
    assert f"'{cache.host_path}'" in folders["expression"]
    selector = policy["spec"]["matchConstraints"]["namespaceSelector"]["matchLabels"]
    open_to_host_paths = [
        each["metadata"]["labels"]
        for each in of_kind("production", "Namespace")
        if each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
        and each["metadata"]["name"] != "trainyard-neuron-monitor"
    ]
    assert open_to_host_paths
    assert all(selector.items() <= labels.items() for labels in open_to_host_paths)


def with_component(root: Path, name: str, component: str) -> tuple[Object, ...]:
    """An overlay with one more component."""
    overlay = root / "overlays" / "mine"
    overlay.mkdir(parents=True)
    for part in ("base", "components"):
        (root / part).symlink_to(ROOT / part)
    content = yaml.safe_load((ROOT / "overlays" / name / "kustomization.yaml").read_text())
    content["components"].append(f"../../components/{component}")
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content))
    for part in ("parameters", "serving"):
        (overlay / part).mkdir()
        for each in (ROOT / "overlays" / name / part).iterdir():
            (overlay / part / each.name).write_text(each.read_text())
    return load_overlay(root, "mine").objects


@pytest.mark.parametrize("component", ["efs", "fsx"])
def test_a_shared_file_system_can_be_added(tmp_path: Path, component: str) -> None:
    found = with_component(tmp_path, "production", component)

    data = [each["spec"]["userData"] for each in found if each["kind"] == "EC2NodeClass"]
    assert len(data) == 3
    assert all("mount /mnt/trainyard" in each and each.endswith("--//--\n") for each in data)
    (steps,) = (each for each in found if identity(each)[1:] == ("Namespace", "", STEPS_NAMESPACE))
    assert steps["metadata"]["labels"]["trainyard.dev/host-paths"] == "limited"


def test_the_guard_can_read_a_store_that_is_a_folder(tmp_path: Path) -> None:
    found = with_component(tmp_path, "cpu", "shared-folder")

    (guard,) = (each for each in found if identity(each)[1::2] == ("Deployment", "trainyard-guard"))
    kubernetes_validate.validate(guard, VERSIONS[0], strict=True)
    spec = guard["spec"]["template"]["spec"]
    assert {"name": "shared", "mountPath": "/mnt/trainyard"} in spec["containers"][0][
        "volumeMounts"
    ]
    assert spec["volumes"][-1]["hostPath"]["path"] == "/mnt/trainyard"


def test_every_component_is_in_an_overlay_or_tried_above() -> None:
    used = {
        entry.rpartition("/")[2]
        for name in OVERLAYS
        for entry in yaml.safe_load((ROOT / "overlays" / name / "kustomization.yaml").read_text())[
            "components"
        ]
    }

    assert {each.name for each in (ROOT / "components").iterdir()} == {
        *used, "efs", "fsx", "shared-folder",
    }  # fmt: skip


# --- Choosing what to render ------------------------------------------------------------------


def environments(**changes: Any) -> Environments:
    serving = {"namespace": "trainyard-production"} | changes
    return Environments.model_validate(
        {
            "schema": "trainyard/v1",
            "environments": {
                "production": {
                    "platform": "kubernetes",
                    "target": "trn2",
                    "kubernetes": serving,
                },
                "here": {"platform": "local", "target": "cpu"},
            },
            "steps": {
                "namespace": STEPS_NAMESPACE,
                "service_accounts": {
                    step: f"trainyard-{step}"
                    for step in ("download", "compile", "measure", "gate", "publish")
                },
            },
        }
    )


def test_an_environment_is_rendered_by_the_overlay_of_its_name() -> None:
    (overlay,) = load_overlays(ROOT, ["production"], environments())

    assert overlay.name == "production"
    assert overlay.uses_examples


def test_an_environment_is_rendered_by_the_overlay_that_makes_its_namespace() -> None:
    known = environments()
    renamed = known.model_copy(update={"environments": {"live": known.environments["production"]}})

    assert [each.name for each in load_overlays(ROOT, ["live"], renamed)] == ["production"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"namespace": "elsewhere"}, "Namespace elsewhere"),
        ({"service_account": "nobody"}, "ServiceAccount nobody"),
        ({"gateway": "another"}, "Gateway another"),
        ({"stable_priority_class": "urgent"}, "PriorityClass urgent"),
    ],
)
def test_an_environment_that_names_what_its_overlay_has_not_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        load_overlays(ROOT, ["production"], environments(**changes))


def test_steps_whose_accounts_are_missing_are_refused() -> None:
    known = environments()
    assert known.steps is not None
    steps = known.steps.model_copy(update={"service_accounts": {"compile": "nobody"}})

    with pytest.raises(BadInput, match="ServiceAccount nobody"):
        load_overlays(ROOT, ["production"], known.model_copy(update={"steps": steps}))


@pytest.mark.parametrize("name", ["here", "nothing", "../production"])
def test_what_is_neither_overlay_nor_environment_in_a_cluster_is_refused(name: str) -> None:
    with pytest.raises(NotFound, match="neither"):
        load_overlays(ROOT, [name], environments())


def test_a_folder_without_overlays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="overlays"):
        load_overlays(tmp_path, ["production"], None)


def test_overlays_of_one_cluster_are_applied_together() -> None:
    both = load_overlays(ROOT, ["staging", "production"], None)
    found = together(both)

    assert len({identity(each) for each in found}) == len(found)
    assert {identity(each) for each in found} == {
        identity(each) for overlay in both for each in overlay.objects
    }


def test_overlays_that_do_not_agree_are_not_applied_together() -> None:
    both = load_overlays(ROOT, ["production", "cpu"], None)

    with pytest.raises(BadInput, match="do not agree"):
        together(both)


def test_the_same_objects_give_the_same_text() -> None:
    text = to_yaml(objects_of("production"))

    assert text == to_yaml(load_overlay(ROOT, "production").objects)
    assert list(yaml.safe_load_all(text)) == list(objects_of("production"))


# --- Helm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chart", ["airflow", "neuron"])
@pytest.mark.parametrize("name", ["staging", "production"])
def test_the_values_of_charts_are_filled_in(chart: str, name: str) -> None:
    text = helm_values(ROOT, chart, load_overlay(ROOT, name))

    assert "${" not in text
    assert isinstance(yaml.safe_load(text), dict)


def test_a_chart_without_values_is_refused() -> None:
    with pytest.raises(NotFound, match="airflow, neuron"):
        helm_values(ROOT, "redis", load_overlay(ROOT, "production"))


def test_a_value_that_an_overlay_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: ${missing}\n")

    with pytest.raises(BadInput, match="missing"):
        filled(path, {})
