"""How long the DAG files take to parse, by the number of models in the catalogue.

    python tests/benchmarks/dag_parse.py [--models 10 50 200]

Each number gets a process of its own, as Airflow's DAG processor has: Airflow is imported first and
not counted, then the whole folder is parsed. Every model is refreshed, so each has a DAG. On a busy
machine the processor time says more than the time that passed. The aim is 2 s for 200 models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.refresh_world import write_spec

REPOSITORY = Path(__file__).parents[2]
AIM_S = 2.0

PROGRAM = """
import json, os, socket, sys, time

import airflow.sdk
from airflow.dag_processing.dagbag import DagBag
from airflow.providers.standard.triggers.temporal import DateTimeTrigger

connected = []
socket.socket.connect = lambda self, address: connected.append(str(address))
before = set(sys.modules)
passed, worked = time.perf_counter(), time.process_time()
bag = DagBag(sys.argv[1])
found = {"passed_s": time.perf_counter() - passed, "worked_s": time.process_time() - worked}
assert not bag.import_errors, bag.import_errors
heavy = ("great_expectations", "pandas", "kubernetes", "boto3", "torch", "scipy", "huggingface_hub")
print(json.dumps({
    **found,
    "dags": len(bag.dags),
    "files": {os.path.basename(each.file): each.duration.total_seconds()
              for each in bag.dagbag_stats},
    "heavy": [name for name in heavy if name in set(sys.modules) - before],
    "connected": connected,
}))
"""


def parse(models: int) -> dict[str, Any]:
    """Parse the DAG files with so many models in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Path(folder, "models")
        catalogue.mkdir()
        for number in range(models):
            write_spec(catalogue, f"model-{number:03d}")
        kept = {name: value for name, value in os.environ.items() if "TRAINYARD" not in name}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(REPOSITORY / "dags")],
            env=kept
            | {
                "AIRFLOW_HOME": str(Path(folder, "airflow")),
                "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
                "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder}/none.db",
                "TRAINYARD_HOME": str(Path(folder, "home")),
                "TRAINYARD_CATALOGUE": str(catalogue),
                "TRAINYARD_ENVIRONMENTS": str(REPOSITORY / "dags" / "environments.yaml"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, nargs="+", default=[10, 50, 200])
    for models in parser.parse_args().models:
        found = parse(models)
        print(
            f"{models:4} models, {found['dags']:4} DAGs: {found['passed_s']:5.2f} s passed, "
            f"{found['worked_s']:5.2f} s of processor, {found['worked_s'] / AIM_S:.2f} of the aim; "
            f"heavy modules: {found['heavy'] or 'none'}; connections: {len(found['connected'])}"
        )
        slowest = sorted(found["files"].items(), key=lambda each: -each[1])[:3]
        print("     " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in slowest))


if __name__ == "__main__":
    main()
