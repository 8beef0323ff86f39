"""The little of each spec that Airflow needs while it parses DAG files: who is refreshed, and when.

A spec is read in full when its run begins. Here a mistake in one spec must not cost the other
models their DAGs, and two hundred specs must be read in a moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from trainyard.errors import BadInput
from trainyard.names import check_name
from trainyard.spec.cron import cron_problem
from trainyard.spec.loader import Catalogue
from trainyard.spec.model import ModelSpec, Refresh
from trainyard.spec.sentences import say
from trainyard.spec.yaml_source import YamlFile, read_yaml


@dataclass(frozen=True)
class RefreshOutline:
    """A model that is refreshed."""

    model: str
    owner: str = ""
    refresh: Refresh | None = None
    """None: there is a problem."""
    problem: str = ""
    """What is wrong with its spec, as far as it matters here."""


def refresh_outlines(folder: Path) -> list[RefreshOutline]:
    """Return the models of a catalogue whose specs have a `refresh`, sorted by name."""
    return [found for path in Catalogue(folder).paths() for found in _outline(path)]


def _outline(path: Path) -> Iterator[RefreshOutline]:
    """Yield the model of a file, if it is refreshed."""
    try:
        model = check_name(path.stem, "Model")
    except BadInput:  # no DAG can have that name; `trainyard check` tells
        return
    try:
        source = read_yaml(path, quick=True)
    except BadInput as error:
        yield RefreshOutline(model, problem=str(error))
        return
    if source.flaws:
        # Whether a broken file has the key, only its text can tell.
        if any(
            line.startswith("refresh:") for line in path.read_text("utf-8", "replace").split("\n")
        ):
            flaw = source.flaws[0]
            yield RefreshOutline(
                model, problem=f"{path.name}:{flaw.position.line}: {flaw.message} {flaw.remedy}"
            )
        return
    if source.data is not None and source.data.get("refresh") is not None:
        yield _described(model, source)


def _described(model: str, source: YamlFile) -> RefreshOutline:
    data = source.data or {}
    owner = data.get("owner")
    owner = owner if isinstance(owner, str) else ""
    try:
        refresh = Refresh.model_validate_json(json.dumps(data["refresh"]), strict=True)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        within = {**detail, "loc": ("refresh", *detail["loc"])}
        location, message, remedy = say(within, ModelSpec)  # type: ignore[arg-type]
        line = source.position(location).line
        return RefreshOutline(
            model, owner, problem=f"{source.path.name}:{line}: {message} {remedy}"
        )
    problem = cron_problem(refresh.cron)
    if problem is not None:
        line = source.position(("refresh", "cron")).line
        return RefreshOutline(model, owner, problem=f"{source.path.name}:{line}: {problem}")
    return RefreshOutline(model, owner, refresh)
