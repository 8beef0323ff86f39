"""The persistent cache of libneuronxla, which NxD Inference compiles through.

One folder for each graph, below one for each compiler::

    neuronxcc-<version>+<hash>/MODULE_<hash of the graph>+<hash of the flags>/
        model.hlo_module.pb  compile_flags.json
        model.neff  model.done      after success
        model.log                   after a failure; later runs then refuse to compile the graph
        *.lock                      while a process compiles it, or after one was killed
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainyard.lanes.cache_files import compiler_code, files_below, is_leftover, is_lock
from trainyard.lanes.expected import Expected, neff_defect

COMPILER_PREFIX = "neuronxcc-"
_MODULE_PREFIX = "MODULE_"
_EXECUTABLE = "model.neff"
_DONE = "model.done"
_FAILED = "model.log"


def module_folders(cache_dir: Path) -> list[Path]:
    """Return the folders of graphs below `cache_dir`, sorted."""
    return sorted(
        path
        for path in cache_dir.rglob(f"{COMPILER_PREFIX}*/{_MODULE_PREFIX}*")
        if path.is_dir() and not path.is_symlink()
    )


def capture_modules(cache_dir: Path, expected: Expected) -> tuple[Sequence[Path], Sequence[str]]:
    """Return the files of all graphs that were compiled, and what was dropped and why.

    Paths are relative to `cache_dir`. Both may be empty: a server can do without this cache.
    """
    kept: list[Path] = []
    dropped: list[str] = []
    for folder in module_folders(cache_dir):
        reason = _defect(folder, expected)
        if reason:
            dropped.append(f"{folder.relative_to(cache_dir).as_posix()}: {reason}")
            continue
        kept += [
            path.relative_to(cache_dir)
            for path in files_below(folder)
            if not is_lock(path.name) and not is_leftover(path.name)
        ]
    return kept, dropped


def _defect(folder: Path, expected: Expected) -> str:
    """Return why a graph is not part of a bundle; empty if it is."""
    names = {path.name for path in files_below(folder)}
    if _FAILED in names:
        code = compiler_code(folder / _FAILED)
        said = f" ({code})" if code else ""
        return f"the compiler failed{said}, and later runs would refuse to compile it"
    if _DONE not in names:
        if any(is_lock(name) for name in names):
            return "locked: a process compiles it, or was killed while it did"
        if _EXECUTABLE in names:
            return f"half-written: its mark {_DONE} is missing"
        return "empty: it was never compiled"
    if _EXECUTABLE not in names:
        return f"it is marked as complete, but holds no {_EXECUTABLE}"
    return neff_defect(folder / _EXECUTABLE, expected)
