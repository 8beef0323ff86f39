"""JSON Schemas of the files that people write, for editors and other tools.

    python -m trainyard.spec.schema FOLDER

writes them. They say what single values may be; rules between values are in `rules`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic.json_schema import GenerateJsonSchema

from trainyard.spec.environments import Environments
from trainyard.spec.model import ModelSpec, SpecPart

Kind = Literal["model", "environments"]

_ROOTS: dict[Kind, tuple[type[SpecPart], str]] = {
    "model": (ModelSpec, "Trainyard model spec"),
    "environments": (Environments, "Trainyard environments"),
}


def json_schema(kind: Kind) -> dict[str, Any]:
    """Return the JSON Schema of model specs or of the environments file."""
    root, title = _ROOTS[kind]
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": title,
        **_tidy(root.model_json_schema(by_alias=True)),
    }


def write_schemas(folder: Path) -> list[Path]:
    """Write the JSON Schemas into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in _ROOTS:
        path = folder / f"{kind}.schema.json"
        text = json.dumps(json_schema(kind), indent=2, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
        paths.append(path)
    return paths


def _tidy(value: Any, *, names: bool = False) -> Any:
    """Drop titles, which only repeat keys, and refuse keys that are no valid names.

    `names` says that the keys of `value` are names of properties or parts.
    """
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if not isinstance(value, dict):
        return value
    tidy = {
        key: _tidy(item, names=not names and key in ("properties", "patternProperties", "$defs"))
        for key, item in value.items()
        if names or key != "title"
    }
    if not names and "patternProperties" in tidy:
        tidy["additionalProperties"] = False
    return tidy


if __name__ == "__main__":
    for written in write_schemas(Path(sys.argv[1])):
        print(written)
