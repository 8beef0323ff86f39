"""How long a gate takes as Airflow runs it: a process of its own, with Great Expectations.

    python tests/benchmarks/gate.py

prints the seconds of both gates, of a process that only imports what they need, and how much of the
limit (20 s on a free machine) that is.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.unit.gates.test_accuracy import samples
from tests.unit.yard import Yard, measurement, plan

from trainyard.canonical import short
from trainyard.store.documents import create_document, substance
from trainyard.store.layout import samples_key

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 20.0
SAMPLES = 10_000


def seconds(*words: str, home: Path) -> tuple[float, float]:
    """Return the seconds that a command takes, and those of them on a processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TRAINYARD_HOME": str(home)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, used


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        yard = Yard(Path(folder))
        keys = {}
        for name in ("candidate", "stable"):
            made = samples(SAMPLES - 100, 100).model_copy(update={"measurement_id": name})
            keys[name] = samples_key(name, short(hashlib.sha256(substance(made)).hexdigest()))
            create_document(yard.store, keys[name], made)
            yard.keep(measurement(name, samples=keys[name]))
        yard.keep_plan(plan(environments=("production",), baselines={"production": "stable"}))
        found = {"imports": seconds("-c", "import great_expectations, pandas", home=yard.home)}
        for gate in ("accuracy", "latency"):
            words = ("-m", "trainyard", "gate", "--plan=adder-plan", "--target=cpu")
            found[gate] = seconds(*words, f"--gate={gate}", home=yard.home)
    print(
        json.dumps(
            {
                "seconds": {name: round(wall, 1) for name, (wall, _) in found.items()},
                "processor_seconds": {name: round(used, 1) for name, (_, used) in found.items()},
                "of_the_limit": {
                    name: round(wall / LIMIT_S, 2) for name, (wall, _) in found.items()
                },
                "samples": SAMPLES,
                # On a machine that does other work, the processor seconds are what counts.
                "load_per_processor": round(os.getloadavg()[0] / (os.cpu_count() or 1), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
