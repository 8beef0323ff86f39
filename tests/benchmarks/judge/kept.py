"""Figures of cells that were measured before: the table takes hours, and may be made in pieces."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.benchmarks.judge import fast, peers, traffic
from tests.benchmarks.judge.figures import PeerTally, Tally
from tests.benchmarks.judge.traffic import Cell

from trainyard.canonical import canonical_json
from trainyard.rollout import judge


def judge_digest() -> str:
    """Return a digest of what the judge's figures are made by."""
    return _digest([*Path(judge.__file__).parent.glob("*.py"), *map(_file, (fast, traffic))])


def peers_digest() -> str:
    """Return a digest of what the peers' figures are made by."""
    return _digest(map(_file, (peers, traffic)))


@dataclass(frozen=True)
class Kept:
    """A folder with a file a cell; None keeps nothing."""

    folder: Path | None
    of: str
    """What figures depend on beside their cell and the number of runs: whose they are, traffic,
    specification, plan, seed, code."""

    def tally(self, cell: Cell, runs: int) -> Tally | None:
        """Return the judge's figures of a cell if they were measured with the same of all."""
        seen = self._read(cell, runs)
        return None if seen is None else Tally(cell=cell, **seen)

    def keep_tally(self, tally: Tally) -> None:
        """Keep the judge's figures of a cell, whole or not at all."""
        seen = {k: v for k, v in asdict(tally).items() if k not in ("cell", "peers")}
        self._write(tally.cell, tally.runs, seen)

    def peers(self, cell: Cell, runs: int) -> dict[str, PeerTally] | None:
        """Return the peers' figures of a cell if they were measured with the same of all."""
        seen = self._read(cell, runs)
        return None if seen is None else {name: PeerTally(**one) for name, one in seen.items()}

    def keep_peers(self, cell: Cell, runs: int, tallies: dict[str, PeerTally]) -> None:
        """Keep the peers' figures of a cell, whole or not at all."""
        self._write(cell, runs, {name: asdict(one) for name, one in tallies.items()})

    def _read(self, cell: Cell, runs: int) -> dict[str, Any] | None:
        path = self._path(cell, runs)
        if path is None or not path.exists():
            return None
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return figures

    def _write(self, cell: Cell, runs: int, figures: dict[str, Any]) -> None:
        path = self._path(cell, runs)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        said = {"cell": cell.name, "of": self.of, "figures": figures}
        fresh.write_text(json.dumps(said, default=float), encoding="utf-8")
        os.replace(fresh, path)

    def _path(self, cell: Cell, runs: int) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(
            canonical_json([self.of, runs, cell.name, cell.truth, asdict(cell.world)])
        ).hexdigest()[:16]
        return self.folder / f"{name}.json"


def _file(module: ModuleType) -> Path:
    return Path(module.__file__ or "")


def _digest(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]
