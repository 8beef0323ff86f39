"""The folder that NxD Inference compiles into: what of it is a bundle, and was it used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainyard.documents.artifacts import BundleManifest
from trainyard.errors import Refused
from trainyard.lanes.protocol import StartProof
from trainyard.lanes.start_proof import engine_init_s, judge_start, written_files
from trainyard.spec.model import Target

_NEEDED = ("model.pt", "neuron_config.json")
_WEIGHTS = "weights"


def capture(
    cache_dir: Path, _target: Target | None = None
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the files of a bundle (relative to `cache_dir`) and what was dropped and why.

    Sharded weights are dropped: a bundle is shared by checkpoints of the same architecture.

    Raises Refused if the compiled model or its configuration is missing.
    """
    files = [path.relative_to(cache_dir) for path in _files(cache_dir)]
    missing = [name for name in _NEEDED if Path(name) not in files]
    if missing:
        raise Refused(
            f"The compiler left no complete result in {cache_dir}: {', '.join(missing)} is "
            "missing.",
            hint="Look at the server's log for errors of the compiler, then compile again.",
        )
    weights = [path for path in files if path.parts[0] == _WEIGHTS]
    dropped = tuple(f"{path.as_posix()}: weights are no part of a bundle" for path in weights)
    return tuple(path for path in files if path not in weights), dropped


def snapshot(cache_dir: Path) -> frozenset[str]:
    """Return `<path>|<bytes>|<time of change>` for each file of the folder."""
    return written_files(cache_dir, _files(cache_dir))


def prove_start(
    *, log: str, before: frozenset[str], after: frozenset[str], bundle: BundleManifest | None
) -> StartProof:
    """Judge whether a start used its bundle: no file of the folder was written."""
    return judge_start(before, after, bundle, engine_init=engine_init_s(log), below="")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix != ".lock":
            yield path
