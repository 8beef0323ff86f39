"""Every mistake the validator can find has a plain sentence."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from trainyard.spec.environments import Environments
from trainyard.spec.model import ModelSpec, SpecPart
from trainyard.spec.sentences import say


def every_part() -> list[type[SpecPart]]:
    found: list[type[SpecPart]] = []
    waiting: list[type[SpecPart]] = [SpecPart]
    while waiting:
        part = waiting.pop()
        waiting += part.__subclasses__()
        if part is not SpecPart:
            found.append(part)
    assert {ModelSpec, Environments} <= set(found)
    return found


@pytest.mark.parametrize("part", every_part())
def test_no_value_is_answered_with_jargon(part: type[SpecPart]) -> None:
    said = set()
    for name, field in part.model_fields.items():
        for value in (None, "", "A b!", -1, 1e12, 1.5, [], {}, True, [1], {"a b": 1}, [[]]):
            try:
                text = json.dumps({field.alias or name: value})
                part.model_validate_json(text, strict=True)
            except ValidationError as error:
                for detail in error.errors(include_url=False):
                    location, message, remedy = say(detail, part)
                    said.add(message)
                    assert location[0] in {f.alias or n for n, f in part.model_fields.items()}
                    assert message.endswith(".")
                    assert remedy.endswith((".", "?"))
                    assert "The rule is" not in remedy
                    assert "It must match" not in remedy
    assert said
