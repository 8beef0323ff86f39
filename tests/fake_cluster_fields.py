"""Who owns which field of an object: the part of server-side apply that tests depend on. Pure.

Paths have the form of `managedFields`: `f:name` is a field, `k:{...}` an item of a list whose items
have keys. Other lists are one value (atomic), as those of an HTTPRoute are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Path = tuple[str, ...]

LIST_KEYS: Mapping[str, Sequence[str]] = {
    "conditions": ("type",),
    "containers": ("name",),
    "env": ("name",),
    "initContainers": ("name",),
    "ownerReferences": ("uid",),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
"""Keys of the items of lists that are merged."""
UNOWNED = {
    ("f:apiVersion",),
    ("f:kind",),
    *(
        ("f:metadata", f"f:{name}")
        for name in (
            "creationTimestamp",
            "deletionTimestamp",
            "generation",
            "managedFields",
            "name",
            "namespace",
            "resourceVersion",
            "uid",
        )
    ),
}


def leaves(value: Any, path: Path = ()) -> dict[Path, Any]:
    """Return the values that can have an owner, by path."""
    return {
        path: leaf
        for path, leaf in _leaves(value, path)
        if path[:1] not in UNOWNED and path[:2] not in UNOWNED
    }


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, f"f:{key}"))
    elif isinstance(value, list) and value and (keys := _keys(path, value)):
        for item in value:
            yield from _leaves(item, (*path, _item(item, keys)))
    else:
        yield path, value


def _keys(path: Path, items: Sequence[Any]) -> Sequence[str]:
    keys = LIST_KEYS.get(path[-1].removeprefix("f:"), ()) if path else ()
    return keys if all(isinstance(item, dict) and set(keys) <= set(item) for item in items) else ()


def _item(item: Mapping[str, Any], keys: Sequence[str]) -> str:
    return "k:" + json.dumps({key: item[key] for key in keys})


def merged(live: Any, wanted: Any, path: Path = ()) -> Any:
    """Return `live` with everything that `wanted` says."""
    if isinstance(live, dict) and isinstance(wanted, dict):
        result = dict(live)
        for key, value in wanted.items():
            result[key] = merged(live.get(key), value, (*path, f"f:{key}"))
        return result
    if isinstance(live, list) and isinstance(wanted, list):
        keys = _keys(path, [*live, *wanted])
        if keys:
            items = {_item(item, keys): item for item in live}
            for item in wanted:
                name = _item(item, keys)
                items[name] = merged(items.get(name), item, (*path, name))
            return list(items.values())
    return copy.deepcopy(wanted)


def without(value: Any, paths: set[Path], path: Path = ()) -> Any:
    """Return `value` without these leaves; what becomes empty goes too (None)."""
    if path in paths:
        return None
    if isinstance(value, dict) and value:
        kept = {
            key: left
            for key, item in value.items()
            if (left := without(item, paths, (*path, f"f:{key}"))) is not None
        }
        return kept or None
    if isinstance(value, list) and value and (keys := _keys(path, value)):
        kept_items = []
        for item in value:
            left = without(item, paths, (*path, _item(item, keys)))
            if left is not None:
                # Whatever else is left of it needs its keys.
                kept_items.append({**{key: item[key] for key in keys}, **left})
        return kept_items or None
    return value


def as_fields(paths: set[Path]) -> dict[str, Any]:
    """Return paths as `fieldsV1`."""
    tree: dict[str, Any] = {}
    for path in sorted(paths):
        at = tree
        for part in path:
            at = at.setdefault(part, {})
    return tree
