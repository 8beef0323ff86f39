"""JSON Schemas of the files that people write, for editors and other tools.

    python -m trainyard.spec.schema FOLDER

writes them. They say what single values may be; rules between values are in `rules`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from trainyard.spec.environments import Environments
from trainyard.spec.model import ModelSpec, SpecPart

FILES: dict[str, tuple[type[SpecPart], str]] = {
    "model.schema.json": (ModelSpec, "Trainyard model spec"),
    "environments.schema.json": (Environments, "Trainyard environments"),
}


def json_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schemas by file name."""
    return {
        name: {
            "$schema": GenerateJsonSchema.schema_dialect,
            **_without_titles(kind.model_json_schema(by_alias=True)),
            "title": title,
        }
        for name, (kind, title) in FILES.items()
    }


def write_schemas(folder: Path) -> list[Path]:
    """Write the JSON Schemas into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, schema in json_schemas().items():
        path = folder / name
        path.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def _without_titles(value: Any, *, names: bool = False) -> Any:
    """Drop the titles that only repeat keys; `names` says that the keys are themselves names."""
    if isinstance(value, dict):
        return {
            key: _without_titles(item, names=not names and key in ("properties", "$defs"))
            for key, item in value.items()
            if names or key != "title"
        }
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    return value


if __name__ == "__main__":
    for written in write_schemas(Path(sys.argv[1])):
        print(written)
