"""Manifests of checkpoints and bundles; each is written last, after the files it lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from trainyard.canonical import digest
from trainyard.documents.base import Document, FileEntry, Frozen


def files_digest(files: Iterable[FileEntry]) -> str:
    """Return the digest of a set of files: of `[[path, size, sha256], …]`, sorted by path."""
    return digest(sorted([entry.path, entry.size, entry.sha256] for entry in files))


class CheckpointManifest(Document):
    """`checkpoints/<model>/<revision>/manifest.json`: one exact revision of a model's files."""

    model: str
    revision: str
    source: str
    """Where it came from, for people: a URI without credentials."""
    files: tuple[FileEntry, ...]
    """Sorted by path."""
    digest: str
    """sha256 of the canonical JSON of `[[path, size, sha256], …]`, sorted by path."""
    architecture_digest: str
    """What the compiled code depends on: see `trainyard.sources.architecture`."""
    source_fingerprint: str = ""
    """The source's listing when the files were read; equal to a plan's: the same content."""
    parameters: int
    """Elements of all tensors."""
    allowed_files: tuple[str, ...] = ()
    """Code or pickles among the files, which the spec allowed by name."""


class NeffRecord(Frozen):
    """What the header of one NEFF of a bundle says."""

    path: str
    """In the bundle."""
    name: str
    uuid: str
    """32 hex digits."""
    version: str
    """NEFF version, such as `2.0`."""
    lnc_size: int
    """Physical cores in one logical core; 0: not recorded."""
    feature_bits: str
    """Features that a runtime must have, in hex as the runtime prints them."""
    build_version: str
    """The compiler's own tag."""


class BundleManifest(Document):
    """`bundles/<compile key>/manifest.json`: what a compiler made for a target."""

    compile_key: str
    lane: str
    key_inputs: dict[str, Any]
    """The JSON whose digest is the compile key."""
    files: tuple[FileEntry, ...]
    digest: str
    """As for checkpoints."""
    toolchain: dict[str, str]
    compile_s: float | None
    """Seconds from the server's start until it was ready, with empty caches or with what an attempt
    that was cut had finished. None: imported."""
    engine_init_s: float | None = None
    """Seconds that the engine itself reported."""
    peak_memory_bytes: int | None = None
    """Most resident memory that all processes of the compiling server had together, as seen every
    second or so. None: imported, or nobody looked."""
    dropped: tuple[str, ...] = Field(default=())
    """Cache entries that were left out (failed, locked, half-written), each with the reason."""
    neffs: tuple[NeffRecord, ...] = ()
    """One for each NEFF file, sorted by path. NEFFs inside a `model.pt` are not listed."""
    recorded_versions: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Versions that the compiled code itself names, by package."""
    compiled_on: dict[str, Any] = Field(default_factory=dict)
    """The machine that compiled: processor, cores, memory, kernel. Empty: imported."""
    imported_from: str = ""
    """Where it was brought in from, by whom on which machine. Empty: compiled here."""
