"""What the caches of the Neuron lanes have in common: files, locks, leftovers, start proofs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainyard.documents.artifacts import BundleManifest
from trainyard.failures import recognise

ENGINE_INIT = re.compile(r"init engine \([^)]*\) took ([\d.]+) s")
"""vLLM's line about the start of its engine, in seconds."""

COMPILER_LOGS = ("log-neuron-cc.txt", "model.log")
"""Names of the compiler's logs in the native plugin's cache and in libneuronxla's."""

_LOG_TAIL_BYTES = 64 << 10
_MAX_TEXT_BYTES = 1 << 20
_LEFTOVER = re.compile(r"\.(tmp|trash|capture|part)(\.|$)")


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the regular files below `folder`, sorted; links are not followed and not yielded."""
    for parent, subfolders, names in os.walk(folder):
        subfolders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path


def links_below(folder: Path) -> Iterator[Path]:
    """Yield the symbolic links below `folder`."""
    for parent, subfolders, names in os.walk(folder):
        for name in sorted([*subfolders, *names]):
            path = Path(parent, name)
            if path.is_symlink():
                yield path


def empty(folder: Path) -> None:
    """Make `folder` an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def is_lock(name: str) -> bool:
    """Tell whether a file is a lock, or says who holds one."""
    return name.endswith((".lock", ".compilation_metadata"))


def is_leftover(name: str) -> bool:
    """Tell whether a name is that of a write or a copy that has not ended."""
    return _LEFTOVER.search(name) is not None


def text_of(path: Path) -> str:
    """Return the content of a small text file; empty if there is none."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_TEXT_BYTES).decode(errors="replace")
    except OSError:
        return ""


def compiler_code(log: Path) -> str:
    """Return the last error code of the compiler in its log, such as `NCC_EVRF009`; or nothing."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            text = stream.read(_LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return recognise.compiler_code(text)


def look(cache_dir: Path, path: Path) -> str:
    """Return `<path>|<bytes>|<time of change>`: writing the file again changes it."""
    stat = path.stat()
    return f"{path.relative_to(cache_dir).as_posix()}|{stat.st_size}|{stat.st_mtime_ns}"


def names_of(snapshot: frozenset[str]) -> frozenset[str]:
    """Return the paths in a snapshot of `look`s."""
    return frozenset(entry.rsplit("|", 2)[0] for entry in snapshot)


def changed(before: frozenset[str], after: frozenset[str]) -> tuple[str, ...]:
    """Return the files that were added or written between two snapshots, sorted."""
    return tuple(sorted(names_of(after - before)))


def missing(bundle: BundleManifest, before: frozenset[str], wanted: Sequence[str]) -> str:
    """Return the sentence that names bundle files that a start did not find; or nothing.

    Args:
        bundle: what should have been restored.
        before: the snapshot from before the start.
        wanted: those of its files that a snapshot would show.
    """
    absent = sorted(set(wanted) - names_of(before))
    if not bundle.files or not wanted:
        return "The bundle holds no compiled code of this lane."
    if not absent:
        return ""
    noun = "file" if len(absent) == 1 else "files"
    return (
        f"{len(absent)} {noun} of the bundle were not in the cache before the start, such as "
        f"{absent[0]}."
    )


def engine_init_s(log: str) -> float | None:
    """Return the seconds that the engine says its start took; None if it does not say."""
    match = ENGINE_INIT.search(log)
    return float(match[1]) if match else None
