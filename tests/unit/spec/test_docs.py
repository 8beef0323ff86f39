"""The page about specs knows every key."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from trainyard.spec.loader import load_spec
from trainyard.spec.schema import Kind, json_schema

REPOSITORY = Path(__file__).parents[3]
PAGE = REPOSITORY / "docs" / "model-spec.md"


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


def test_the_first_spec_of_ones_own_is_whole(tmp_path: Path) -> None:
    page = PAGE.with_name("first-release.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shutil.copytree(REPOSITORY / "dags" / "models" / "adder", tmp_path / "mini")
    (tmp_path / "mini.yaml").write_text(text)

    spec = load_spec(tmp_path / "mini.yaml")

    assert spec.model == "mini"
    assert [target.lane for target in spec.targets] == ["cpu"]
