"""Resolves a kustomization the way `kubectl kustomize` does, without kubectl.

`trainyard render` must print exactly what `kubectl apply -k` would apply, also where there is no
kubectl. `k8s/` uses a small part of kustomize, and this is that part:

::

    resources            files with objects, and folders with a kustomization
    components           folders whose kustomization changes what is there already
    configMapGenerator   `envs` and `literals`, with `disableNameSuffixHash`
    patches              JSON Patch (add, replace, remove) on objects found by `target`
    namespace            of all objects that have one
    labels               `pairs`, in metadata only
    replacements         fields copied from one object into others
    sortOptions          `order: fifo`, at the top

Anything else is refused, so that nothing is rendered otherwise than kustomize would. A test
compares both wherever kubectl is there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainyard.errors import BadInput

Object = dict[str, Any]

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""As safe as the other, and faster where there is a libyaml."""
_FILE = "kustomization.yaml"
_LOCAL_CONFIG = "config.kubernetes.io/local-config"
_KNOWN = {
    "apiVersion", "kind", "resources", "components", "configMapGenerator", "patches", "namespace",
    "labels", "replacements", "sortOptions",
}  # fmt: skip
_CLUSTER_SCOPED = {
    "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace",
    "PersistentVolume", "PriorityClass", "StorageClass", "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}  # fmt: skip
_SELECTORS = {"group", "version", "kind", "name", "namespace"}


def build(folder: Path) -> list[Object]:
    """Return the objects of a kustomization, in their order.

    Raises:
        BadInput: it uses something that is not in the list above, or cannot be resolved; the
            message names the file.
    """
    objects = _kustomization(folder.resolve(), [], component=False)
    return [each for each in objects if not _is_local(each)]


def _is_local(resource: Object) -> bool:
    annotations = resource["metadata"].get("annotations") or {}
    return bool(annotations.get(_LOCAL_CONFIG) == "true")


def _kustomization(folder: Path, before: list[Object], *, component: bool) -> list[Object]:
    """Return `before` and the folder's own objects; a component also changes those before it."""
    where = folder / _FILE
    content = _load(where)
    unknown = sorted(set(content) - _KNOWN)
    if unknown:
        raise BadInput(f"{where}: {unknown[0]!r} is not known here.", hint=_hint())
    expected = "Component" if component else "Kustomization"
    if content.get("kind", "Kustomization") != expected:
        raise BadInput(f"{where}: its kind is {content.get('kind')!r}, not {expected!r}.")
    objects = list(before)
    for name in content.get("resources") or ():
        objects += _resource(folder / name)
    for name in content.get("components") or ():
        objects = _kustomization((folder / name).resolve(), objects, component=True)
    for generator in content.get("configMapGenerator") or ():
        objects.append(_config_map(generator, folder))
    _refuse_twins(objects, where)
    for patch in content.get("patches") or ():
        _patch(patch, objects, where)
    if content.get("namespace"):
        _set_namespace(content["namespace"], objects)
    for labels in content.get("labels") or ():
        _label(labels, objects, where)
    for replacement in content.get("replacements") or ():
        _replace(replacement, objects, where)
    return objects


def _hint() -> str:
    return "Use what trainyard/deploy/kustomize.py lists, or render with `kubectl kustomize`."


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise BadInput(f"There is no {path}.") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds no mapping.")
    return content


def _resource(path: Path) -> list[Object]:
    """Return the objects of one entry of `resources`."""
    if path.is_dir():
        return _kustomization(path.resolve(), [], component=False)
    return read_objects(path)


def read_objects(path: Path) -> list[Object]:
    """Return the objects of a file of manifests. Raises BadInput."""
    try:
        text = path.read_text(encoding="utf-8")
        found = [each for each in yaml.load_all(text, Loader=_Loader) if each]
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is no YAML: {error}") from error
    for each in found:
        if not (isinstance(each, dict) and each.get("kind") and each.get("metadata")):
            raise BadInput(f"{path}: an object has no kind or no metadata.")
    return found


def identity(resource: Object) -> tuple[str, str, str, str]:
    """Return what tells an object from all others: group, kind, namespace, name."""
    metadata = resource["metadata"]
    group = resource["apiVersion"].rpartition("/")[0]
    return group, resource["kind"], metadata.get("namespace", ""), metadata["name"]


def _refuse_twins(objects: Sequence[Object], where: Path) -> None:
    seen = set()
    for each in objects:
        key = identity(each)
        if key in seen:
            raise BadInput(f"{where}: {key[1]} {key[3]} is there twice.")
        seen.add(key)


# --- ConfigMaps -------------------------------------------------------------------------------


def _config_map(generator: Mapping[str, Any], folder: Path) -> Object:
    options = generator.get("options") or {}
    if not options.get("disableNameSuffixHash"):
        raise BadInput(f"{folder / _FILE}: a ConfigMap needs `disableNameSuffixHash`.")
    data: dict[str, str] = {}
    for name in generator.get("envs") or ():
        data |= read_env(folder / name)
    for literal in generator.get("literals") or ():
        key, _, value = literal.partition("=")
        data[key] = value
    metadata: dict[str, Any] = {"name": generator["name"]}
    if generator.get("namespace"):
        metadata["namespace"] = generator["namespace"]
    for what in ("annotations", "labels"):
        if options.get(what):
            metadata[what] = dict(options[what])
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def read_env(path: Path) -> dict[str, str]:
    """Return the values of a file with lines `name=value`; `#` begins a comment line.

    Raises:
        BadInput: it cannot be read, or a line is none of these.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    values = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or name != name.strip() or not name:
            raise BadInput(f"{path}, line {number}: write `name=value`, without spaces around `=`.")
        values[name] = value
    return values


# --- Changes ----------------------------------------------------------------------------------


def _selected(
    selector: Mapping[str, str], objects: Sequence[Object], where: Path, *, patterns: bool = False
) -> list[Object]:
    """Return the objects that a selector means, whose values may be whole regular expressions."""
    unknown = sorted(set(selector) - _SELECTORS)
    if unknown:
        raise BadInput(f"{where}: objects cannot be selected by {unknown[0]!r}.", hint=_hint())
    return [each for each in objects if _is_selected(selector, each, patterns)]


def _is_selected(selector: Mapping[str, str], resource: Object, patterns: bool) -> bool:
    group, kind, namespace, name = identity(resource)
    own = {
        "group": group,
        "version": resource["apiVersion"].rpartition("/")[2],
        "kind": kind,
        "namespace": namespace,
        "name": name,
    }
    if patterns:
        return all(re.fullmatch(wanted, own[key]) for key, wanted in selector.items())
    return all(wanted == own[key] for key, wanted in selector.items())


def _patch(patch: Mapping[str, Any], objects: Sequence[Object], where: Path) -> None:
    operations = yaml.safe_load(patch["patch"]) if "patch" in patch else None
    if not isinstance(operations, list) or "target" not in patch:
        raise BadInput(f"{where}: a patch must be a JSON Patch with a `target`.", hint=_hint())
    targets = _selected(patch["target"], objects, where, patterns=True)
    if not targets:
        raise BadInput(f"{where}: no object is a {dict(patch['target'])}.")
    for target in targets:
        for operation in operations:
            try:
                _operate(operation, target)
            except (KeyError, IndexError, ValueError) as error:
                raise BadInput(
                    f"{where}: {operation['op']} {operation['path']} does not fit "
                    f"{target['kind']} {target['metadata']['name']}."
                ) from error


def _operate(operation: Mapping[str, Any], target: Object) -> None:
    """Do one operation of a JSON Patch. Raises KeyError, IndexError, ValueError."""
    *parents, last = [
        part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
    ]
    place: Any = target
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    kind = operation["op"]
    value = copy.deepcopy(operation.get("value"))
    if isinstance(place, list):
        _operate_on_list(kind, place, last, value)
    elif kind == "add" or (kind == "replace" and last in place):
        place[last] = value
    elif kind == "remove":
        del place[last]
    else:
        raise ValueError(kind)


def _operate_on_list(kind: str, place: list[Any], last: str, value: Any) -> None:
    index = len(place) if last == "-" else int(last)
    if kind == "add" and index <= len(place):
        place.insert(index, value)
    elif kind == "replace":
        place[index] = value
    elif kind == "remove":
        del place[index]
    else:
        raise ValueError(kind)


def _set_namespace(namespace: str, objects: Sequence[Object]) -> None:
    accounts = {each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"}
    for each in objects:
        if each["kind"] == "Namespace":
            each["metadata"]["name"] = namespace
        elif each["kind"] not in _CLUSTER_SCOPED:
            each["metadata"]["namespace"] = namespace
        for subject in each.get("subjects") or ():
            own = subject["kind"] == "ServiceAccount" and subject["name"] in accounts
            if own and "namespace" not in subject:
                subject["namespace"] = namespace


def _label(labels: Mapping[str, Any], objects: Sequence[Object], where: Path) -> None:
    if set(labels) != {"pairs"}:
        raise BadInput(f"{where}: labels are given as `pairs` only.", hint=_hint())
    for each in objects:
        each["metadata"].setdefault("labels", {}).update(labels["pairs"])


def _replace(replacement: Mapping[str, Any], objects: Sequence[Object], where: Path) -> None:
    source = dict(replacement["source"])
    path = source.pop("fieldPath")
    found = _selected(source, objects, where)
    if len(found) != 1:
        raise BadInput(f"{where}: {len(found)} objects are the source {source}; one must be.")
    (value, *_) = [get() for get, _ in _fields(found[0], _parts(path))] or [None]
    if value is None:
        raise BadInput(
            f"{where}: {source['kind']} {source['name']} has no {path}.",
            hint="Give it a value in the overlay's cluster.env.",
        )
    for target in replacement["targets"]:
        for each in _selected(target["select"], objects, where):
            for field in target["fieldPaths"]:
                _replace_field(each, field, value, target.get("options") or {}, where)


def _replace_field(
    target: Object, path: str, value: Any, options: Mapping[str, Any], where: Path
) -> None:
    places = list(_fields(target, _parts(path)))
    if not places:
        raise BadInput(f"{where}: {target['kind']} {target['metadata']['name']} has no {path}.")
    for get, put in places:
        put(_inserted(str(get()), str(value), options) if options else copy.deepcopy(value))


def _inserted(old: str, value: str, options: Mapping[str, Any]) -> str:
    """Return `old` with the part number `index`, cut at `delimiter`, replaced."""
    parts = old.split(options["delimiter"])
    parts[int(options.get("index", 0))] = value
    return str(options["delimiter"].join(parts))


def _parts(path: str) -> list[str]:
    """Split a field path at its dots; brackets keep theirs, and hold a name with dots or `a=b`."""
    parts = re.findall(r"\[[^\]]*\]|[^.\[\]]+", path)
    return [part[1:-1] if "." in part and "=" not in part else part for part in parts]


def _fields(
    place: Any, parts: Sequence[str]
) -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Yield a reader and a writer for each field that a path means."""
    head, *rest = parts
    for key in _keys(place, head):
        if rest:
            yield from _fields(place[key], rest)
        else:
            yield (
                lambda place=place, key=key: place[key],  # type: ignore[misc]
                lambda value, place=place, key=key: place.__setitem__(key, value),  # type: ignore[misc]
            )


def _keys(place: Any, part: str) -> list[Any]:
    """Return the keys or positions in `place` that one part of a path means."""
    if isinstance(place, list):
        if part == "*":
            return list(range(len(place)))
        if part.startswith("["):
            name, _, wanted = part[1:-1].partition("=")
            return [number for number, each in enumerate(place) if str(each.get(name)) == wanted]
        return [int(part)] if part.isdigit() and int(part) < len(place) else []
    return [part] if isinstance(place, dict) and part in place else []
