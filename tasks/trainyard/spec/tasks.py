"""What a task file of lm-evaluation-harness asks for: kinds of answers, and data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainyard.errors import BadInput
from trainyard.spec.yaml_source import read_yaml

GENERATES = "generate_until"
"""The output type of tasks that let the model write; it is also the harness's default."""

GENERATE_INSTEAD = (
    "Use a task that lets the model write (`output_type: generate_until`), such as the generating "
    "variant that the harness has of many tasks."
)


def needs_logprobs(name: str, output_types: Iterable[str]) -> str:
    """Return the sentence that a lane without log-probs of prompts cannot run a task."""
    listed = ", ".join(sorted(set(output_types) - {GENERATES}))
    return (
        f"Accuracy task {name} compares given answers ({listed}), for which the server must return "
        "log-probs of the prompt, and this lane's does not."
    )


_MAX_INCLUDES = 20
_LOADERS = frozenset({"json", "csv", "text", "pandas", "parquet"})
"""Values of `dataset_path` that read files."""


def task_config(path: Path) -> dict[str, Any]:
    """Return the keys of a task file with those of the files that it includes.

    Files that cannot be read count as empty: the check of the task file says what is wrong there.
    """
    merged: dict[str, Any] = {}
    for _ in range(_MAX_INCLUDES):
        try:
            data = read_yaml(path).data or {}
        except BadInput:
            break
        merged = {**data, **merged}
        include = data.get("include")
        if not isinstance(include, str):
            break
        path = path.parent / include
    return merged


def output_type(config: Mapping[str, Any]) -> str:
    """Return the kind of answers that a task wants; empty for a group of other tasks."""
    if "task" not in config or not isinstance(config["task"], str):
        return ""
    return str(config.get("output_type", GENERATES))


def missing_data(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the data files of a task that are not in its folder.

    Args:
        config: of the task.
        folder: of the task file.
    """
    options = config.get("dataset_kwargs")
    if config.get("dataset_path") not in _LOADERS or not isinstance(options, dict):
        return []
    named = list(_names(options.get("data_files")))
    patterns = any(character in "*?[" for name in named for character in name)
    if patterns or any("://" in name for name in named):
        return []
    return sorted(name for name in named if not (folder / name).is_file())


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _names(each)
    elif isinstance(value, dict):
        yield from _names(list(value.values()))
