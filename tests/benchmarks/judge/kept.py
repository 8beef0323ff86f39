"""Figures of cells that were measured before: the table takes hours, and may be made in pieces."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.judge import fast, figures, peers, traffic
from tests.benchmarks.judge.figures import PeerTally, Tally
from tests.benchmarks.judge.traffic import Cell

from trainyard.canonical import canonical_json
from trainyard.rollout import judge


def code_digest() -> str:
    """Return a digest of what figures are made by: the judge, the traffic, the peers."""
    own = [Path(module.__file__ or "") for module in (fast, figures, peers, traffic)]
    files = [*sorted(Path(judge.__file__).parent.glob("*.py")), *own]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


@dataclass(frozen=True)
class Kept:
    """A folder with a file a cell; None keeps nothing."""

    folder: Path | None
    of: str
    """What figures depend on beside their cell: traffic, specification, plan, runs, seed, code."""

    def read(self, cell: Cell) -> Tally | None:
        """Return a cell's figures if they were measured with the same of everything."""
        path = self._path(cell)
        if path is None or not path.exists():
            return None
        said = json.loads(path.read_text(encoding="utf-8"))
        seen = said["figures"]
        by_peer = {name: PeerTally(**tally) for name, tally in seen.pop("peers").items()}
        return Tally(cell=cell, peers=by_peer, **seen)

    def write(self, tally: Tally) -> None:
        """Keep a cell's figures, whole or not at all."""
        path = self._path(tally.cell)
        if path is None:
            return
        seen = asdict(tally)
        del seen["cell"]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        said = {"cell": tally.cell.name, "of": self.of, "figures": seen}
        fresh.write_text(json.dumps(said, default=float), encoding="utf-8")
        os.replace(fresh, path)

    def _path(self, cell: Cell) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(canonical_json([self.of, cell.name, cell.truth])).hexdigest()[:16]
        return self.folder / f"{name}.json"
