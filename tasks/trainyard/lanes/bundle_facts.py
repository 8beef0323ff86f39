"""What the files of a bundle tell about themselves, whatever the lane: NEFF headers, versions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainyard.documents.artifacts import NeffRecord
from trainyard.lanes import neff
from trainyard.lanes.cache_files import text_of
from trainyard.lanes.native_cache import LOG
from trainyard.lanes.nxdi_folder import CONFIG
from trainyard.lanes.xla_cache import COMPILER_PREFIX

COMPILER = "neuronx-cc"

_SAYS_VERSION = re.compile(r"[Nn]euron[xX](?:[ -](?:cc|[Cc]ompiler))? version:? (\d[\w.+]*)")
_CONFIG_VERSIONS = {"neuronxcc_version": COMPILER, "compiler_version": COMPILER}
"""Fields of a `neuron_config.json` that name a version, where the exporter writes them."""


def neff_records(cache_dir: Path, files: Iterable[Path]) -> tuple[NeffRecord, ...]:
    """Return what the headers of the NEFFs among `files` say, sorted by path.

    Raises:
        CorruptFile: one of them is no NEFF.
    """
    return tuple(
        _record(path, neff.read_header(cache_dir / path, name=path.as_posix()))
        for path in sorted(files)
        if path.suffix == neff.SUFFIX
    )


def recorded_versions(cache_dir: Path, files: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Return the versions that the files name, by package; empty if they name none."""
    found: dict[str, set[str]] = {}
    for path in files:
        for package, version in _versions_in(cache_dir, path):
            found.setdefault(package, set()).add(version)
    return {package: tuple(sorted(versions)) for package, versions in sorted(found.items())}


def contradictions(
    recorded: Mapping[str, Sequence[str]], toolchain: Mapping[str, str]
) -> tuple[str, ...]:
    """Return where the versions that files name are not those of a toolchain, as sentences.

    A version is the same if it is as far as both are given: `2.27.5334.0+abc` is `2.27.5334`.
    """
    planned = {name.replace("_", "-"): version for name, version in toolchain.items()}
    return tuple(
        f"It was compiled with {package} {version}, the target's toolchain has {planned[package]}."
        for package, versions in sorted(recorded.items())
        if package in planned
        for version in versions
        if not _same(version, planned[package])
    )


def _record(path: Path, header: neff.NeffHeader) -> NeffRecord:
    return NeffRecord(
        path=path.as_posix(),
        name=header.name,
        uuid=header.uuid,
        version=header.version,
        lnc_size=header.lnc_size,
        feature_bits=f"{header.feature_bits:#x}",
        build_version=header.build_version,
    )


def _versions_in(cache_dir: Path, path: Path) -> Iterator[tuple[str, str]]:
    for part in path.parts[:-1]:
        if part.startswith(COMPILER_PREFIX):
            yield COMPILER, part.removeprefix(COMPILER_PREFIX)
    if path.name == LOG:
        for version in _SAYS_VERSION.findall(text_of(cache_dir / path)):
            yield COMPILER, version
    if path.name == CONFIG:
        fields = _fields(text_of(cache_dir / path))
        for field, package in _CONFIG_VERSIONS.items():
            if isinstance(fields.get(field), str):
                yield package, fields[field]


def _fields(text: str) -> dict[str, Any]:
    """Return the fields of a `neuron_config.json`, those of its inner object first."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    inner = content.get("neuron_config")
    return {**content, **inner} if isinstance(inner, dict) else content


def _same(one: str, other: str) -> bool:
    parts = [version.split("+", 1)[0].split(".") for version in (one, other)]
    length = min(map(len, parts))
    return parts[0][:length] == parts[1][:length]
