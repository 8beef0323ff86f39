"""The native plugin's caches below `VLLM_CACHE_ROOT`: what of them is a bundle, and was it used.

Each graph has an entry `neuron/compile_cache/<32 hex digits>/`, which counts only with the mark
`.compilation_complete` that the compiler's driver writes last. What else lies below the root (the
traces of the native route) goes along.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainyard.documents.artifacts import BundleManifest
from trainyard.errors import Refused
from trainyard.lanes.protocol import StartProof
from trainyard.lanes.start_proof import engine_init_s, judge_start, written_files
from trainyard.spec.model import Target

_ENTRIES = Path("neuron", "compile_cache")
_COMPLETE = ".compilation_complete"


def capture(
    cache_dir: Path, _target: Target | None = None
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the files of a bundle (relative to `cache_dir`) and what was dropped and why.

    Raises Refused if no entry is complete.
    """
    folder = cache_dir / _ENTRIES
    entries = sorted(path for path in folder.glob("*") if path.is_dir())
    whole = {path for path in entries if (path / _COMPLETE).is_file()}
    if not whole:
        raise Refused(
            f"The compiler left no complete entry in {folder}: {len(entries)} are incomplete.",
            hint="Look at the server's log for errors of the compiler, then compile again.",
        )
    kept = tuple(
        path.relative_to(cache_dir)
        for path in _files(cache_dir)
        if not any(path.is_relative_to(entry) for entry in entries if entry not in whole)
    )
    dropped = tuple(
        f"{(_ENTRIES / path.name).as_posix()}: without {_COMPLETE}"
        for path in entries
        if path not in whole
    )
    return kept, dropped


def snapshot(cache_dir: Path) -> frozenset[str]:
    """Return `<path>|<bytes>|<time of change>` for each file of a compiled graph."""
    return written_files(cache_dir, _files(cache_dir / _ENTRIES))


def prove_start(
    *, log: str, before: frozenset[str], after: frozenset[str], bundle: BundleManifest | None
) -> StartProof:
    """Judge whether a start used its bundle: no file of a compiled graph was written."""
    return judge_start(
        before,
        after,
        bundle,
        engine_init=engine_init_s(log),
        below=f"{_ENTRIES.as_posix()}/",
    )


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix != ".lock":
            yield path
