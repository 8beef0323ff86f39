"""What the Neuron lanes compare to tell whether a start used its bundle."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from trainyard.documents.artifacts import BundleManifest
from trainyard.lanes.protocol import StartProof

_ENGINE_INIT = re.compile(r"init engine \([^)]*\) took ([\d.]+) s")


def engine_init_s(log: str) -> float | None:
    """Return the seconds that vLLM says its engine took to start."""
    match = _ENGINE_INIT.search(log)
    return float(match[1]) if match else None


def written_files(folder: Path, files: Iterable[Path]) -> frozenset[str]:
    """Return `<path>|<bytes>|<time of change>` for each of the files."""
    return frozenset(
        f"{path.relative_to(folder).as_posix()}|{stat.st_size}|{stat.st_mtime_ns}"
        for path in files
        for stat in (path.stat(),)
    )


def judge_start(
    before: frozenset[str],
    after: frozenset[str],
    bundle: BundleManifest | None,
    *,
    engine_init: float | None,
    below: str,
) -> StartProof:
    """Return whether a start used its bundle: all of it was there, and nothing was written.

    Args:
        before: the snapshot before the start.
        after: the snapshot after it.
        bundle: what was restored.
        engine_init: seconds that the engine took, from the log.
        below: beginning of the paths that the snapshots cover.
    """
    written = tuple(sorted({entry.split("|")[0] for entry in after - before}))

    def verdict(used: bool, reason: str) -> StartProof:
        return StartProof(used, reason, engine_init, written)

    if bundle is None:
        return verdict(False, "There was no bundle to start from.")
    present = {entry.split("|")[0] for entry in before}
    wanted = {file.path for file in bundle.files if file.path.startswith(below)}
    missing = sorted(wanted - present)
    if missing:
        return verdict(
            False, f"{len(missing)} files of the bundle were not there, such as {missing[0]}."
        )
    if written:
        return verdict(
            False, f"The server compiled: {len(written)} new files, such as {written[0]}."
        )
    if engine_init is None:
        return verdict(False, "The log does not say that the engine was initialised.")
    return verdict(
        True, f"No new file of the compiler, and the engine was ready in {engine_init:.1f} s."
    )
