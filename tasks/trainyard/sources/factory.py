"""The source that a spec names."""

from __future__ import annotations

import re
from pathlib import Path

from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.sources.local import LocalSource
from trainyard.sources.protocol import Source
from trainyard.spec.model import Source as SourceSpec


def open_source(source: SourceSpec, *, base: Path, settings: Settings) -> Source:
    """Return the source of a model.

    Args:
        source: the part of the spec that names it.
        base: the folder that relative paths start from: that of the spec file.
        settings: for `${TRAINYARD_HOME}`.

    Raises:
        BadInput: the path holds a variable that has no meaning here.
    """
    path = source.path.replace("${TRAINYARD_HOME}", str(settings.home))
    if unknown := re.search(r"\$\{[^}]*\}?", path):
        raise BadInput(
            f"source.path {source.path!r} holds the unknown variable {unknown.group()}.",
            hint="Only ${TRAINYARD_HOME} is known there.",
        )
    return LocalSource(base / Path(path).expanduser())
