"""The JSON Schemas in the catalogue are those of the code, and agree with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from trainyard.spec.schema import Kind, json_schema, write_schemas

DAGS = Path(__file__).parents[3] / "dags"
SCHEMAS = DAGS / "models" / "schema"
EXAMPLES: dict[Kind, Path] = {
    "model": DAGS / "models" / "adder.yaml",
    "environments": DAGS / "environments.yaml",
}


def example(kind: Kind) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(EXAMPLES[kind].read_text(encoding="utf-8"))
    return data


def test_the_stored_schemas_are_current(tmp_path: Path) -> None:
    written = write_schemas(tmp_path)

    assert {path.name for path in written} == {path.name for path in SCHEMAS.iterdir()}
    for path in written:
        stored = (SCHEMAS / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8") == stored, (
            "run `python -m trainyard.spec.schema dags/models/schema`"
        )


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_examples_follow_their_schema(kind: Kind) -> None:
    schema = json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)

    jsonschema.Draft202012Validator(schema).validate(example(kind))


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_examples_name_their_schema(kind: Kind) -> None:
    first = EXAMPLES[kind].read_text(encoding="utf-8").splitlines()[0]
    prefix = "# yaml-language-server: $schema="

    assert first.startswith(prefix)
    named = json.loads((EXAMPLES[kind].parent / first.removeprefix(prefix)).read_text())
    assert named == json_schema(kind)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_unknown_keys_are_refused_at_every_level(kind: Kind) -> None:
    validator = jsonschema.Draft202012Validator(json_schema(kind))

    def spoilt(value: Any) -> list[Any]:
        """Return copies of `value`, each with one more key in one mapping."""
        copies: list[Any] = []
        if isinstance(value, dict):
            copies.append({**value, "unheard_of": 1})
            for key, inner in value.items():
                copies += [{**value, key: changed} for changed in spoilt(inner)]
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                for changed in spoilt(inner):
                    copied = copy.copy(value)
                    copied[index] = changed
                    copies.append(copied)
        return copies

    copies = spoilt(example(kind))
    assert len(copies) > 3
    for data in copies:
        assert not validator.is_valid(data)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_key_is_described(kind: Kind) -> None:
    schema = json_schema(kind)

    for part in (schema, *schema["$defs"].values()):
        assert part["description"]
        for name, value in part.get("properties", {}).items():
            assert value.get("description"), (part.get("title"), name)
            assert "title" not in value
