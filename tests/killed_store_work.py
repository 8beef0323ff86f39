"""Publications and garbage collections that are killed, on both back ends.

    python -m tests.killed_store_work JOB

JOB is the JSON of a `Job`. The process imports once, then forks: a kill hits the work and not the
start of Python. Each round has a store of its own, filled from the same template.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from tests.fake_s3 import ENVIRONMENT, FAST
from tests.kills import Events
from tests.unit.care.world import POLICY, quick_gates
from tests.unit.yard import Yard, measurement, plan

from trainyard.care.gc import Collection
from trainyard.care.verify import Verifier
from trainyard.releases import list_verdicts, load_release, pins_not_held, release_ids
from trainyard.settings import Settings
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish
from trainyard.store.s3 import S3Store
from trainyard.store.s3_client import make_client

REPOSITORY = Path(__file__).parents[1]

SHORT = pytest.mark.timeout(1200)
SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]
KILLS = [
    pytest.param("folder", 8, marks=SHORT),
    # A round over HTTP takes ten times as long.
    pytest.param("s3", 2, marks=SHORT),
    pytest.param("folder", 200, marks=SOAK),
    pytest.param("s3", 200, marks=SOAK),
]
"""Where stores are, and how often the work is killed there."""


@dataclass(frozen=True)
class Job:
    """What is killed how often, and where."""

    work: Literal["publish", "collect"]
    folder: str
    """For homes and reports."""
    rounds: int
    seed: int
    template: str = ""
    """A home whose store is to be collected; a publication makes its own."""
    s3: dict[str, str] = field(default_factory=dict)
    """`bucket`, and `url` of the fake itself: nobody writes at the same time, so that its proxy is
    not needed. Empty: the stores are in folders."""


def run(job: Job) -> list[dict[str, Any]]:
    """Do a job in a process of its own and return what its rounds came to."""
    path = os.pathsep.join([str(REPOSITORY), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_store_work", json.dumps(asdict(job))],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    report: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return report


class Rounds:
    """Stores filled from a template, and attempts that are killed in them."""

    def __init__(self, job: Job, template: Path) -> None:
        self.job = job
        self.template = template
        self.folder = Path(job.folder)
        self.dice = random.Random(job.seed)
        self.files: dict[str, bytes] = {}
        if job.s3:
            root = Settings(home=template).store_root
            self.files = {
                path.relative_to(root).as_posix(): path.read_bytes()
                for path in root.rglob("*")
                if path.is_file() and ".trainyard" not in path.parts
            }
            # Those of children were never used: no connection is shared with this process.
            self.client, self.of_children = (
                make_client(Settings(store="s3://yard", s3_endpoint_url=job.s3["url"], **FAST))
                for _ in range(2)
            )

    def new(self, name: str) -> Yard:
        """Return a yard whose store has what the template has."""
        if not self.job.s3:
            shutil.copytree(self.template, self.folder / name)
            return Yard(self.folder / name)
        bucket = self.job.s3["bucket"]
        for key, data in self.files.items():
            self.client.put_object(Bucket=bucket, Key=f"{name}/{key}", Body=data)
        place = {"store": f"s3://{bucket}/{name}", "s3_endpoint_url": self.job.s3["url"], **FAST}
        yard = Yard(self.template, place)
        yard.use_client(self.client)
        # Conditions hold for one writer at a time, which is all there is; the probe's own writers
        # come at once, and only the fake's proxy lets them pass one by one.
        cast(S3Store, yard.store)._probed = True
        return yard

    def copy(self, yard: Yard) -> Yard:
        """Return the yard as it is, in a folder, where looking at everything is quick."""
        if not self.job.s3:
            return yard
        home = self.folder / "copy"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(self.template, home, ignore=shutil.ignore_patterns("store"))
        root = Settings(home=home).store_root
        for entry in yard.store.list(""):
            path = root / entry.key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(yard.store.read(entry.key).data)
        return Yard(home)

    def attempt(self, yard: Yard, work: Callable[[Yard], object], die_at: int = 0) -> int:
        """Do `work` in a child that dies at an event (0: does not); return its exit code."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if self.job.s3:
                    yard.use_client(self.of_children)
                events = Events(die_at)
                events.watch(in_folder=not self.job.s3)
                work(yard)
                (self.folder / "events").write_text(str(events.last))
                code = 0
            except Exception:
                # An exit without a kill fails the test, which should say why.
                traceback.print_exc()
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def moment(self) -> int:
        """Return a random event of those that the last attempt that ended had."""
        return self.dice.randint(1, int((self.folder / "events").read_text()))


def killed_publications(job: Job) -> list[dict[str, Any]]:
    """Kill publications and publish again; what is visible meanwhile must be whole."""
    template = Yard(Path(job.folder) / "template")
    template.keep_artifacts()
    template.keep_plan(plan())
    template.keep(measurement())
    for name in ("accuracy", "latency"):
        gate(plan(), "cpu", name, template.context)
    # The first one makes the key that all of them sign with.
    publish(plan(), "cpu", template.context)
    for made in ("releases", "attestations"):
        shutil.rmtree(template.store.root / made)
    rounds = Rounds(job, template.home)

    def work(yard: Yard) -> None:
        publish(plan(), "cpu", yard.context)

    assert rounds.attempt(rounds.new("whole"), work) == 0
    report = []
    for number in range(job.rounds):
        yard = rounds.new(f"kill-{number}")
        moment = rounds.moment()
        code = rounds.attempt(yard, work, moment)
        broken, visible = _broken(yard), len(release_ids(yard.store, "adder"))
        work(yard)
        report.append(
            {
                "at": moment,
                "code": code,
                "visible": visible,
                "wrong": broken,
                "finished": len(release_ids(yard.store, "adder")) == 1 and not _broken(yard),
            }
        )
    return report


def _broken(yard: Yard) -> list[str]:
    """Return what cannot be trusted of the releases that can be seen."""
    found = []
    for release_id in release_ids(yard.store, "adder"):
        release = load_release(yard.store, "adder", release_id, yard.settings)
        found += pins_not_held(yard.store, release.pins)
        if len(list_verdicts(yard.store, "adder", release_id, yard.settings)) != 2:
            found.append(f"verdicts of {release_id}")
    return found


def killed_collections(job: Job) -> list[dict[str, Any]]:
    """Kill collections and collect again; what is left in between must be whole."""
    rounds = Rounds(job, Path(job.template))
    yard = rounds.new("whole")
    before = _keys(yard)
    assert rounds.attempt(yard, _collect) == 0
    expected = _keys(yard)
    assert _problems(rounds.copy(yard)) == []
    report = []
    for number in range(job.rounds):
        yard = rounds.new(f"kill-{number}")
        moment = rounds.moment()
        code = rounds.attempt(yard, _collect, moment)
        seen = rounds.copy(yard)
        half, wrong = _keys(seen), _problems(seen)
        _collect(yard)
        report.append(
            {
                "at": moment,
                "code": code,
                "half": len(before) > len(half) > len(expected),
                "wrong": wrong,
                # The same keys as without a kill; what they hold is written once, and was checked.
                "finished": _keys(yard) == expected,
            }
        )
    return report


def _collect(yard: Yard) -> None:
    def later() -> datetime:
        return datetime.now(UTC) + timedelta(days=100)

    Collection(yard.store, POLICY, pause_s=0.0, lock_s=60.0, now=later).run()


def _keys(yard: Yard) -> list[str]:
    return sorted(e.key for e in yard.store.list("") if e.key != "locks/store-gc.json")


def _problems(yard: Yard) -> list[list[str]]:
    found = Verifier(yard.store, yard.settings, POLICY).run().problems
    return [[each.key, each.message] for each in found if each.is_wrong]


def main() -> None:
    """Do the job and print its report as the last line."""
    job = Job(**json.loads(sys.argv[1]))
    with quick_gates():
        done = killed_publications(job) if job.work == "publish" else killed_collections(job)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
