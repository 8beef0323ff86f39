"""The source that a spec names."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.sources.local import LocalSource
from trainyard.sources.protocol import Source
from trainyard.spec.model import HuggingFaceSource, S3Source
from trainyard.spec.model import LocalSource as LocalSpec
from trainyard.spec.model import Source as SourceSpec


def open_source(
    source: SourceSpec,
    *,
    base: Path,
    settings: Settings,
    sleep: Callable[[float], object] = time.sleep,
) -> Source:
    """Return the source of a model.

    Args:
        source: the part of the spec that names it.
        base: the folder that relative paths start from: that of the spec file.
        settings: for `${TRAINYARD_HOME}`, endpoints and credentials.
        sleep: waits so many seconds before a request is made again; may raise to end it all.

    Raises:
        BadInput: the path holds a variable that has no meaning here.
    """
    # The libraries of a remote source take longer to load than a local one takes to read.
    if isinstance(source, HuggingFaceSource):
        from trainyard.sources.hub import HubSource

        return HubSource(source, settings, sleep)
    if isinstance(source, S3Source):
        from trainyard.sources.s3 import S3PrefixSource

        return S3PrefixSource(source, settings, sleep)
    return _open_local(source, base, settings)


def _open_local(source: LocalSpec, base: Path, settings: Settings) -> LocalSource:
    path = source.path.replace("${TRAINYARD_HOME}", str(settings.home))
    if unknown := re.search(r"\$\{[^}]*\}?", path):
        raise BadInput(
            f"source.path {source.path!r} holds the unknown variable {unknown.group()}.",
            hint="Only ${TRAINYARD_HOME} is known there.",
        )
    return LocalSource(base / Path(path).expanduser(), allow_files=source.allow_files)
