"""Specs with holes, so that rules can look at what is right in a file that has mistakes.

`partial(ModelSpec, data, bad)` is a `ModelSpec` without the attributes whose values are wrong or
missing. Before a rule reads attributes it asks `known(part, "a", "b")`, which is always true for a
spec that has been validated.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar, Union, cast, get_args, get_origin

from trainyard.spec.model import SpecPart
from trainyard.spec.yaml_source import Location

Part = TypeVar("Part", bound=SpecPart)


def known(part: SpecPart, *names: str) -> bool:
    """Tell whether `part` has a valid value for each of these attributes."""
    return all(name in vars(part) for name in names)


def whole(part: SpecPart) -> bool:
    """Tell whether `part` and every part in it have all their attributes."""
    if not known(part, *type(part).model_fields):
        return False
    return all(whole(inner) for value in vars(part).values() for inner in _parts(value))


def partial(
    part_type: type[Part], data: Any, bad: AbstractSet[Location], at: Location = ()
) -> Part:
    """Return a `part_type` with the attributes of `data` that are fine.

    Args:
        part_type: a part of a spec.
        data: what the file says there; anything that is no mapping counts as an empty one.
        bad: the locations at which validation found something wrong.
        at: the location of `data`.
    """
    given: Mapping[str, Any] = data if isinstance(data, dict) else {}
    values: dict[str, Any] = {}
    holes: list[str] = []
    for name, field in part_type.model_fields.items():
        key = field.alias or name
        place = (*at, key)
        if key not in given:
            if field.is_required() or not isinstance(data, dict):
                holes.append(name)
            continue
        found, value = _value(field.annotation, given[key], bad, place)
        if found:
            values[name] = value
        else:
            holes.append(name)
    part = cast(Part, part_type.model_construct(**values))
    for name in holes:
        vars(part).pop(name, None)
    return part


def _value(
    annotation: Any, value: Any, bad: AbstractSet[Location], at: Location
) -> tuple[bool, Any]:
    """Return whether there is something to use of `value`, and what."""
    if at in bad:
        return False, None
    kinds = part_kinds(annotation)
    if kinds:
        part_type = kinds.get(str(value.get("kind"))) if isinstance(value, dict) else None
        return (False, None) if part_type is None else (True, partial(part_type, value, bad, at))
    part_type, container = _part_type(annotation)
    if part_type is None:
        inside_is_bad = any(place[: len(at)] == at for place in bad)
        return not inside_is_bad, tuple(value) if isinstance(value, list) else value
    if container is tuple and isinstance(value, list):
        return True, tuple(
            partial(part_type, item, bad, (*at, index)) for index, item in enumerate(value)
        )
    if container is dict and isinstance(value, dict):
        return True, {key: partial(part_type, item, bad, (*at, key)) for key, item in value.items()}
    if container is None and value is not None:
        return True, partial(part_type, value, bad, at)
    return True, value


def part_kinds(annotation: Any) -> dict[str, type[SpecPart]]:
    """Return the parts of a union by their `kind`; nothing if `annotation` is no such union."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return {}
    return {
        str(kind): part
        for part in get_args(annotation)
        if isinstance(part, type) and issubclass(part, SpecPart) and "kind" in part.model_fields
        for kind in get_args(part.model_fields["kind"].annotation)
    }


def _part_type(annotation: Any) -> tuple[type[SpecPart] | None, type | None]:
    """Return the kind of part in an annotation, and `tuple` or `dict` if it holds several."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            part_type, container = _part_type(argument)
            if part_type is not None:
                return part_type, container
        return None, None
    if origin in (tuple, dict):
        part_type, _ = _part_type(arguments[-2] if origin is tuple else arguments[-1])
        return part_type, origin
    if isinstance(annotation, type) and issubclass(annotation, SpecPart):
        return annotation, None
    return None, None


def _parts(value: Any) -> list[SpecPart]:
    if isinstance(value, SpecPart):
        return [value]
    if isinstance(value, tuple):
        return [item for item in value if isinstance(item, SpecPart)]
    if isinstance(value, dict):
        return [item for item in value.values() if isinstance(item, SpecPart)]
    return []
