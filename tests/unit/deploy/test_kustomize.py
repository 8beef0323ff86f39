"""Our rendering of a kustomization is kustomize's, and what we do not know is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainyard.deploy.kustomize import build, read_env
from trainyard.errors import BadInput

ROOT = Path(__file__).parents[3] / "k8s"
OVERLAYS = sorted(each.name for each in (ROOT / "overlays").iterdir())

DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web", "annotations": {"a/b": "one:two:three"}},
    "spec": {
        "template": {
            "spec": {
                "containers": [{"name": "one", "image": "old"}, {"name": "two", "image": "old"}]
            }
        }
    },
}
BINDING: dict[str, Any] = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "RoleBinding",
    "metadata": {"name": "web"},
    "subjects": [
        {"kind": "ServiceAccount", "name": "own"},
        {"kind": "ServiceAccount", "name": "other", "namespace": "elsewhere"},
    ],
}
ACCOUNT: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "ServiceAccount",
    "metadata": {"name": "own"},
}
PARAMETERS: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {
        "name": "parameters",
        "annotations": {"config.kubernetes.io/local-config": "true"},
    },
    "data": {"image": "new", "middle": "2"},
}


def folder(where: Path, objects: list[dict[str, Any]], **content: Any) -> Path:
    """Write a kustomization with these objects."""
    where.mkdir(parents=True, exist_ok=True)
    (where / "objects.yaml").write_text(yaml.safe_dump_all(objects))
    written = {"resources": ["objects.yaml"] if objects else [], **content}
    (where / "kustomization.yaml").write_text(yaml.safe_dump(written))
    return where


def kubectl(where: Path) -> list[Any]:
    """Render with kubectl; skip where there is none."""
    if shutil.which("kubectl") is None:
        pytest.skip("There is no kubectl here to compare with.")
    done = subprocess.run(
        ["kubectl", "kustomize", str(where)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_what_kubectl_makes_of_them(name: str) -> None:
    assert build(ROOT / "overlays" / name) == kubectl(ROOT / "overlays" / name)


def test_every_feature_is_that_of_kubectl(tmp_path: Path) -> None:
    folder(
        tmp_path / "component",
        [],
        kind="Component",
        apiVersion="kustomize.config.k8s.io/v1alpha1",
        patches=[
            {
                "target": {"kind": "Deploy.*"},
                "patch": yaml.safe_dump(
                    [
                        {"op": "add", "path": "/metadata/annotations/c~1d", "value": "x"},
                        {"op": "remove", "path": "/metadata/annotations/e"},
                        {
                            "op": "add",
                            "path": "/spec/template/spec/containers/-",
                            "value": {"name": "three", "image": "old"},
                        },
                        {
                            "op": "replace",
                            "path": "/spec/template/spec/containers/1/name",
                            "value": "second",
                        },
                    ]
                ),
            }
        ],
    )
    deployment = {
        **DEPLOYMENT,
        "metadata": {"name": "web", "annotations": {"a.b/c": "one:two:three", "e": "f"}},
    }
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "before"}}
    inner = folder(
        tmp_path / "inner", [namespace, ACCOUNT, BINDING, deployment], namespace="inside"
    )
    source = {"kind": "ConfigMap", "name": "parameters"}
    outer = folder(
        tmp_path / "outer",
        [PARAMETERS],
        sortOptions={"order": "fifo"},
        components=["../component"],
        labels=[{"pairs": {"part": "all"}}],
        configMapGenerator=[
            {
                "name": "made",
                "literals": ["one=1", "two=a=b"],
                "options": {"disableNameSuffixHash": True},
            }
        ],
        replacements=[
            {
                "source": {**source, "fieldPath": "data.image"},
                "targets": [
                    {
                        "select": {"kind": "Deployment", "name": "web"},
                        "fieldPaths": [
                            "spec.template.spec.containers.[name=second].image",
                            "spec.template.spec.containers.0.image",
                        ],
                    }
                ],
            },
            {
                "source": {**source, "fieldPath": "data.middle"},
                "targets": [
                    {
                        "select": {"kind": "Deployment"},
                        "fieldPaths": ["metadata.annotations.[a.b/c]"],
                        "options": {"delimiter": ":", "index": 1},
                    }
                ],
            },
        ],
    )
    content = yaml.safe_load((outer / "kustomization.yaml").read_text())
    content["resources"].insert(0, f"../{inner.name}")
    (outer / "kustomization.yaml").write_text(yaml.safe_dump(content))

    rendered = build(outer)

    web = next(each for each in rendered if each["kind"] == "Deployment")
    images = {each["name"]: each["image"] for each in web["spec"]["template"]["spec"]["containers"]}
    assert images == {"one": "new", "second": "new", "three": "old"}
    assert web["metadata"]["annotations"] == {"a.b/c": "one:2:three", "c/d": "x"}
    assert "parameters" not in [each["metadata"]["name"] for each in rendered]
    assert rendered == kubectl(outer)


def test_own_accounts_of_a_binding_get_the_namespace_and_others_keep_theirs(tmp_path: Path) -> None:
    binding = build(folder(tmp_path / "a", [ACCOUNT, BINDING], namespace="inside"))[1]

    assert [each["namespace"] for each in binding["subjects"]] == ["inside", "elsewhere"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a field of kustomize that is not known": ({"namePrefix": "x-"}, "namePrefix"),
    "a patch without a target": ({"patches": [{"patch": "[]"}]}, "target"),
    "a strategic merge": (
        {"patches": [{"target": {"kind": "Deployment"}, "patch": "spec: {}"}]},
        "JSON Patch",
    ),
    "a patch of nothing": ({"patches": [{"target": {"kind": "Pod"}, "patch": "[]"}]}, "no object"),
    "a selector by labels": (
        {"patches": [{"target": {"labelSelector": "a=b"}, "patch": "[]"}]},
        "labelSelector",
    ),
    "a patch that does not fit": (
        {
            "patches": [
                {
                    "target": {"kind": "Deployment"},
                    "patch": '[{"op": "replace", "path": "/spec/nothing", "value": 1}]',
                }
            ]
        },
        "does not fit",
    ),
    "labels in selectors": (
        {"labels": [{"pairs": {"a": "b"}, "includeSelectors": True}]},
        "pairs",
    ),
    "a ConfigMap whose name changes": (
        {"configMapGenerator": [{"name": "x", "literals": ["a=b"]}]},
        "disableNameSuffixHash",
    ),
    "a source without the field": (
        {
            "replacements": [
                {
                    "source": {"kind": "Deployment", "name": "web", "fieldPath": "spec.nothing"},
                    "targets": [],
                }
            ]
        },
        "spec.nothing",
    ),
    "a target without the field": (
        {
            "replacements": [
                {
                    "source": {"kind": "Deployment", "name": "web", "fieldPath": "kind"},
                    "targets": [{"select": {"kind": "Deployment"}, "fieldPaths": ["spec.nothing"]}],
                }
            ]
        },
        "spec.nothing",
    ),
    "two sources": (
        {"replacements": [{"source": {"fieldPath": "kind"}, "targets": []}]},
        "2 objects",
    ),
    "a component that is none": ({"components": ["."]}, "Component"),
    "a file that is not there": ({"resources": ["missing.yaml"]}, "missing.yaml"),
    "one object twice": ({"resources": ["objects.yaml", "objects.yaml"]}, "twice"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused(tmp_path: Path, what: str) -> None:
    content, said = REFUSED[what]

    with pytest.raises(BadInput, match=said):
        build(folder(tmp_path, [DEPLOYMENT, ACCOUNT], **content))


def test_lines_of_an_env_file_are_values_or_comments(tmp_path: Path) -> None:
    path = tmp_path / "cluster.env"
    path.write_text("# a comment\n\na=1\nb=x=y\nempty=\n")

    assert read_env(path) == {"a": "1", "b": "x=y", "empty": ""}


@pytest.mark.parametrize("line", ["no value", "spaces = around", "=nothing"])
def test_other_lines_of_an_env_file_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cluster.env"
    path.write_text(f"a=1\n{line}\n")

    with pytest.raises(BadInput, match="line 2"):
        read_env(path)
