"""Publications that are killed at random moments leave nothing that cannot be trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

# Imports once, then forks: the kill hits the publication and not the start of Python.
PUBLISH_AND_DIE = """
import json, os, random, shutil, signal, sys, threading, time
from pathlib import Path
from tqdm.std import tqdm
from tests.unit.yard import Yard, measurement, plan
from trainyard.releases import list_verdicts, load_release, pins_not_held, release_ids
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish

# Great Expectations draws bars, and their lock is shared by forked processes: a child that is
# killed while it draws would keep it for good.
tqdm.set_lock(threading.RLock())

root, rounds = Path(sys.argv[1]), int(sys.argv[2])
dice = random.Random(int(sys.argv[3]))
template = Yard(root / "template")
template.keep_artifacts()
template.keep_plan(plan())
template.keep(measurement())
for name in ("accuracy", "latency"):
    gate(plan(), "cpu", name, template.context)

def copy(name):
    shutil.copytree(root / "template", root / name)
    return Yard(root / name)

def broken(yard):
    found = []
    for release_id in release_ids(yard.store, "adder"):
        release = load_release(yard.store, "adder", release_id, yard.settings)
        found += pins_not_held(yard.store, release.pins)
        if len(list_verdicts(yard.store, "adder", release_id, yard.settings)) != 2:
            found.append("verdicts of " + release_id)
    return found

publish(plan(), "cpu", copy("warm").context)
started = time.monotonic()
publish(plan(), "cpu", copy("whole").context)
whole_s = time.monotonic() - started
report = {"broken": [], "killed": 0, "visible": 0, "completed": 0}
for number in range(rounds):
    yard = copy(str(number))
    pid = os.fork()
    if pid == 0:
        publish(plan(), "cpu", yard.context)
        os._exit(0)
    if number % 2:
        # Most of the time goes into deriving verdicts: these rounds hit the writing.
        while not (yard.store.root / "attestations").exists():
            time.sleep(0.001)
        time.sleep(dice.uniform(0, whole_s / 10))
    else:
        time.sleep(dice.uniform(0, whole_s))
    os.kill(pid, signal.SIGKILL)
    report["killed"] += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    report["broken"] += broken(yard)
    report["visible"] += len(release_ids(yard.store, "adder"))
    publish(plan(), "cpu", yard.context)
    report["broken"] += broken(yard)
    report["completed"] += len(release_ids(yard.store, "adder"))
print(json.dumps(report))
"""


def publish_and_die(folder: Path, rounds: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH_AND_DIE, str(folder), str(rounds), "1"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(report)
    return report


@pytest.mark.parametrize(
    "rounds", [20, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_whoever_kills_it_no_release_names_what_is_not_there(rounds: int, tmp_path: Path) -> None:
    report = publish_and_die(tmp_path, rounds)

    assert report["broken"] == []
    assert report["completed"] == rounds
    assert report["killed"] > 0
