"""The compile cache of lane `neuron-native`: what of it becomes a bundle, and was it used.

The native vLLM Neuron plugin keeps one folder for each graph below `$VLLM_CACHE_ROOT`::

    neuron/compile_cache/<32 hex digits>/
        .compilation_complete      completed:<time>, neff_size:<bytes>; written last
        graph_<32 hex digits>.neff
        .artifact_metadata_v0.json graph.hlo command.txt log-neuron-cc.txt …
    neuron/compile_cache/.<32 hex digits>.compilation_metadata[.lock]   who compiles it, or did
    neuron/compile_cache/nki/<32 hex digits>.json                       compiled NKI kernels

The mark is the contract: the plugin takes an entry with it for a hit and never looks further. So
an entry counts here only if the mark and the NEFF agree. Everything else below the cache root goes
along as it is: from SDK 2.33 on the plugin keeps its traces there too, and does not say where.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from trainyard.documents.artifacts import BundleManifest
from trainyard.errors import Refused
from trainyard.lanes import neff
from trainyard.lanes.cache_files import (
    changed,
    compiler_code,
    empty,
    engine_init_s,
    files_below,
    is_leftover,
    is_lock,
    links_below,
    look,
    missing,
    text_of,
)
from trainyard.lanes.expected import Expected, expected_of, header_defect, neff_defect
from trainyard.lanes.protocol import StartProof
from trainyard.spec.model import Target

COMPILE_CACHE = "neuron/compile_cache"
NKI = "nki"
MARK = ".compilation_complete"
COMMAND = "command.txt"
LOG = "log-neuron-cc.txt"
ACCESSED = ".cache_accessed"
"""Rewritten at every hit; says nothing about the entry."""

_KEY = re.compile(r"[0-9a-f]{32}")
_NEFF_SIZE = re.compile(r"^neff_size:(\d+)$", re.MULTILINE)
_COMPLETED = re.compile(r"^completed:\d", re.MULTILINE)
_TARGET_FLAG = re.compile(r"--target[= ]'?([\w-]+)")

_HIT = re.compile(r"[Cc]ache hit for key:? ([0-9a-f]{32})")
_MISSES = (
    re.compile(r"VLLM_NEURON_DISABLE_WARMUP_COMPILE: .*?cache miss for key ([0-9a-f]{32})"),
    re.compile(r"Local cache miss for key: ([0-9a-f]{32})"),
)
"""What the plugin writes when it finds no entry: with the switch an error, else it compiles."""
_ON_NEURON = re.compile(
    r"Platform plugin neuron is activated|Automatically detected platform neuron"
)
"""vLLM's own line about the platform that it runs on."""


def capture(cache_dir: Path, target: Target | None) -> tuple[Sequence[Path], Sequence[str]]:
    """Return the files of a bundle, and what was dropped and why.

    Args:
        cache_dir: what the server had as `$VLLM_CACHE_ROOT`; its files are only read.
        target: what they were compiled for; None: no NEFF is compared with a target.

    Returns:
        Paths relative to `cache_dir`, sorted; sentences that begin with the dropped entry.

    Raises:
        Refused: no entry is complete and made for the target.
    """
    return capture_expected(cache_dir, expected_of(target))


def capture_expected(cache_dir: Path, expected: Expected) -> tuple[Sequence[Path], Sequence[str]]:
    """As `capture`, for what is expected of the code."""
    kept: list[Path] = []
    dropped = [
        f"{path.relative_to(cache_dir).as_posix()}: a symbolic link"
        for path in links_below(cache_dir)
    ]
    complete = 0
    for entry in _entries(cache_dir):
        reason = _defect(entry, expected)
        if reason:
            dropped.append(f"{entry.relative_to(cache_dir).as_posix()}: {reason}")
            continue
        complete += 1
        kept += [path for path in files_below(entry) if _belongs(path.name)]
    if not complete:
        raise Refused(
            f"There is no complete entry of the Neuron compiler in {cache_dir / COMPILE_CACHE}."
            f"{_first_of(dropped)}",
            hint="Look at the server's log for errors of neuronx-cc, then compile again.",
        )
    others, defects = _others(cache_dir, expected)
    dropped += defects
    return sorted(path.relative_to(cache_dir) for path in kept + others), sorted(dropped)


def keep_whole(cache_dir: Path, target: Target) -> int:
    """Remove all but whole entries made for `target`, and return how many are left.

    Entries are named by all that they depend on, so a later attempt takes them as they are. Locks
    of a process that was killed go too; NKI kernels and traces stay only beside an entry.
    """
    try:
        kept, _ = capture(cache_dir, target)
    except Refused:
        empty(cache_dir)
        return 0
    wanted = {cache_dir / path for path in kept}
    for path in [*links_below(cache_dir), *files_below(cache_dir)]:
        if path not in wanted:
            path.unlink()
    for entry in _entries(cache_dir):
        if not (entry / MARK).is_file():
            shutil.rmtree(entry)
    return sum(path.name == MARK for path in kept)


def misfits(cache_dir: Path, target: Target) -> tuple[str, ...]:
    """Return which entries do not run on the cores that `target` takes, each as a sentence.

    Only the headers of NEFFs are read.
    """
    expected = expected_of(target)
    entries = [entry for entry in _entries(cache_dir) if (entry / MARK).is_file()]
    if not entries:
        return (f"There is no complete entry of the Neuron compiler in {COMPILE_CACHE}.",)
    found = []
    for entry in entries:
        for path in sorted(entry.glob(f"*{neff.SUFFIX}")):
            reason = header_defect(path, expected)
            if reason:
                found.append(f"{path.relative_to(cache_dir).as_posix()}: {reason}.")
    return tuple(found)


def snapshot(cache_dir: Path) -> frozenset[str]:
    """Return `<path>|<bytes>|<time of change>` for every NEFF and completion mark.

    A compile always writes both. What a hit writes (locks, time of access) is left out.
    """
    return frozenset(
        look(cache_dir, path)
        for path in files_below(cache_dir)
        if _is_output(path.name) and not is_leftover(path.parent.name)
    )


def missed(log: str) -> str:
    """Return the sentence about the first graph that a cache-only start did not find, if any."""
    found = _MISSES[0].search(log)
    if found is None:
        return ""
    return f"The start found no compiled code for graph {found[1]}, and may not compile."


def prove_start(
    *,
    log: str,
    before: frozenset[str],
    after: frozenset[str],
    bundle: BundleManifest | None,
) -> StartProof:
    """Judge whether a start used its bundle.

    It did if all entries of the bundle were there before, none was written or added, and the log
    tells of no miss. The keys that the log says were hit must be the bundle's.
    """
    written = changed(before, after)
    seconds = engine_init_s(log)

    def verdict(used: bool, reason: str) -> StartProof:
        return StartProof(used, reason, seconds, written)

    if bundle is None:
        return verdict(False, "There was no bundle to start from.")
    outputs = [file.path for file in bundle.files if _is_output(file.path.rsplit("/", 1)[-1])]
    absent = missing(bundle, before, outputs)
    if absent:
        return verdict(False, absent)
    missed = [key for pattern in _MISSES for key in pattern.findall(log)]
    if missed:
        return verdict(
            False, f"The server found no compiled code for graph {missed[0]} (its log says so)."
        )
    if written:
        return verdict(
            False, f"The server compiled: {len(written)} new files, such as {written[0]}."
        )
    keys = {key for path in outputs for key in _KEY.findall(path)}
    hit = set(_HIT.findall(log))
    if hit - keys:
        return verdict(
            False,
            f"The server used graph {min(hit - keys)}, which is not in the bundle.",
        )
    if not hit and seconds is None:
        return verdict(False, "The log says neither that graphs were found nor that it started.")
    if not hit and not _ON_NEURON.search(log):
        # Without a device the plugin steps aside with a warning, and vLLM serves on the CPU.
        return verdict(
            False,
            "The server may not run on a Neuron device: its log names neither a graph that was "
            "found nor the platform neuron.",
        )
    found = f"; {len(hit)} of the bundle's {len(keys)} graphs were found by key" if hit else ""
    ready = f", and the engine was ready in {seconds:.1f} s" if seconds is not None else ""
    return verdict(True, f"No new NEFF in the compile cache{found}{ready}.")


def _first_of(dropped: Sequence[str]) -> str:
    if not dropped:
        return ""
    what = "One was dropped" if len(dropped) == 1 else f"{len(dropped)} were dropped, the first"
    return f" {what}: {min(dropped)}."


def _entries(cache_dir: Path) -> list[Path]:
    """Return what lies in the compile cache as an entry, finished or not."""
    root = cache_dir / COMPILE_CACHE
    if not root.is_dir() or root.is_symlink() or root.parent.is_symlink():
        return []
    return sorted(
        path
        for path in root.iterdir()
        if path.is_dir()
        and not path.is_symlink()
        and (_KEY.fullmatch(path.name) or is_leftover(path.name))
    )


def _defect(entry: Path, expected: Expected) -> str:
    """Return why an entry is not part of a bundle; empty if it is."""
    if not _KEY.fullmatch(entry.name):
        return "left by a copy or a trace that was cut"
    mark = entry / MARK
    if not mark.is_file() or mark.is_symlink():
        return _unfinished(entry)
    said = text_of(mark)
    size = _NEFF_SIZE.search(said)
    if size is None or not _COMPLETED.search(said):
        return f"its mark {MARK} is cut short"
    neffs = [path for path in files_below(entry) if path.suffix == neff.SUFFIX]
    if len(neffs) != 1:
        return f"it is marked as complete, but holds {len(neffs) or 'no'} NEFFs"
    (executable,) = neffs
    found = executable.stat().st_size
    if found != int(size[1]):
        return f"its NEFF has {found} bytes, its mark says {size[1]}"
    return _wrong_key(entry) or _wrong_code(entry, executable, expected)


def _unfinished(entry: Path) -> str:
    """Say what became of an entry without its mark."""
    if not any(entry.iterdir()):
        return "empty"
    code = compiler_code(entry / LOG)
    if code:
        return f"the compiler failed ({code})"
    if (entry.parent / f".{entry.name}.compilation_metadata.lock").exists():
        return "locked: a process compiles it, or was killed while it did"
    return f"half-written: its mark {MARK} is missing"


def _wrong_key(entry: Path) -> str:
    """Say so if the entry's own description is broken or belongs to another key."""
    for path in entry.glob(".artifact_metadata_v*.json"):
        try:
            key = json.loads(path.read_bytes()).get("cache_key", entry.name)
        except (ValueError, RecursionError, AttributeError):
            return f"{path.name} is not a JSON object"
        if key != entry.name:
            return f"{path.name} says that it is entry {key}; it was moved or renamed"
    return ""


def _wrong_code(entry: Path, executable: Path, expected: Expected) -> str:
    """Say so if the NEFF is damaged or made for something else than expected."""
    defect = neff_defect(executable, expected)
    if defect:
        return defect
    compiled_for = _TARGET_FLAG.search(text_of(entry / COMMAND))
    if compiled_for and expected.platform_target not in ("", compiled_for[1]):
        return f"compiled for {compiled_for[1]}, the target is {expected.platform_target}"
    return ""


def _others(cache_dir: Path, expected: Expected) -> tuple[list[Path], list[str]]:
    """Return the files that are no part of an entry, and those of them that are broken."""
    kept: list[Path] = []
    dropped: list[str] = []
    entries = set(_entries(cache_dir))
    for path in files_below(cache_dir):
        if entries.intersection(path.parents) or is_lock(path.name) or path.name == ACCESSED:
            continue
        reason = _other_defect(path, cache_dir, expected)
        if reason:
            dropped.append(f"{path.relative_to(cache_dir).as_posix()}: {reason}")
        else:
            kept.append(path)
    return kept, dropped


def _other_defect(path: Path, cache_dir: Path, expected: Expected) -> str:
    if any(is_leftover(part) for part in path.relative_to(cache_dir).parts):
        return "left by a write that was cut"
    if path.parent == cache_dir / COMPILE_CACHE / NKI and not _is_json(path):
        return "not a whole JSON document"
    return neff_defect(path, expected) if path.suffix == neff.SUFFIX else ""


def _belongs(name: str) -> bool:
    return not is_lock(name) and not is_leftover(name) and name != ACCESSED


def _is_output(name: str) -> bool:
    return name == MARK or name.endswith(neff.SUFFIX)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True
