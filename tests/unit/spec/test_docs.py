"""The page about specs knows every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainyard.spec.schema import Kind, json_schema

PAGE = Path(__file__).parents[3] / "docs" / "model-spec.md"


@pytest.mark.parametrize("kind", ["model", "environments"])
def test_every_key_and_choice_is_explained(kind: Kind) -> None:
    schema = json_schema(kind)
    page = PAGE.read_text(encoding="utf-8")
    words = {
        word
        for part in (schema, *schema["$defs"].values())
        for name, value in part.get("properties", {}).items()
        for word in (name, *filter(None, value.get("enum", ())))
    }

    in_code = {
        word for code in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"[\w-]+", code)
    }

    assert sorted(words - in_code) == []
