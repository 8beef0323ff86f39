"""Settings of a target that one release changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from trainyard.errors import BadInput
from trainyard.spec.model import Target
from trainyard.spec.rules import target_findings
from trainyard.spec.sentences import choose, say

FIXED = frozenset({"name", "lane"})
"""What a target is; a change of these would be another target."""


def apply_overrides(target: Target, overrides: Mapping[str, Any]) -> Target:
    """Return `target` with some settings changed.

    Args:
        target: as in the spec.
        overrides: values by setting, with JSON's types. Of a setting that has settings of its own,
            such as `neuron`, only those named change.

    Raises:
        BadInput: a key does not exist or may not change, or a value is not possible; the message
            names all of them.
    """
    possible = [name for name in Target.model_fields if name not in FIXED]
    problems: list[str] = []
    for key in overrides:
        if key in FIXED:
            problems.append(
                f"{key}: the {key} of a target cannot be overridden. Ask for another target."
            )
        elif key not in possible:
            problems.append(f"{key}: a target has no such setting. {choose(key, possible)}")
    changes = {key: value for key, value in overrides.items() if key in possible}
    changed = target
    try:
        merged = json.dumps(_merged(target.model_dump(mode="json"), changes), allow_nan=False)
        changed = Target.model_validate_json(merged, strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            location, message, remedy = say(detail, Target)
            problems.append(f"{'.'.join(map(str, location))}: {message} {remedy}")
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"The overrides are not plain JSON values: {error}.",
            hint="Use text, numbers, true, false and null.",
        ) from error
    else:
        problems += [
            f"{finding.location[0]}: {finding.message} {finding.remedy}"
            for finding in target_findings(changed)
        ]
    if problems:
        raise BadInput(f"The overrides do not fit target {target.name}: {' '.join(problems)}")
    return changed


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes` in place, also inside the mappings that both have."""
    merged = dict(values)
    for key, change in changes.items():
        current = merged.get(key)
        if isinstance(change, Mapping) and isinstance(current, Mapping):
            merged[key] = _merged(current, change)
        else:
            merged[key] = change
    return merged
