"""Garbage collection beside publications and promotions, with no grace at all, and killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.unit.care.world import AT_ONCE, quick_gates, release, serve
from tests.unit.yard import Yard

from trainyard.care.facts import release_facts
from trainyard.care.gc import Collection
from trainyard.care.verify import Verifier
from trainyard.documents.plan import Plan
from trainyard.errors import TrainyardError
from trainyard.releases import list_attestations, load_release
from trainyard.store.collection import being_collected
from trainyard.store.documents import read_document
from trainyard.store.layout import channel_key, release_key

ROUNDS = 15
PUBLISHERS = 2


def parts_of(yard: Yard, release_id: str) -> frozenset[str]:
    """Return the prefixes of everything that a release names."""
    found = load_release(yard.store, "adder", release_id, yard.settings)
    attested = list_attestations(yard.store, "adder", release_id)
    plans = {
        key: read_document(yard.store, key, Plan)
        for key in found.provenance.inputs
        if key.startswith("plans/")
    }
    # Reports are made for people; nobody needs them in order to serve.
    names = release_facts(found, attested, plans).names
    return frozenset(name for name in names if not name.startswith("reports/"))


def lost(yard: Yard, names: frozenset[str]) -> list[str]:
    return [
        name
        for name in sorted(names)
        if not yard.store.exists(name) and not any(True for _ in yard.store.list(name))
    ]


def publish_and_promote(yard: Yard, name: str, counts: Counter[str]) -> None:
    """Release and promote again and again; whatever was said to be published must be whole."""
    for turn in range(ROUNDS):
        try:
            # The same two revisions in turn, so that what exists is found and used again.
            release_id = release(yard, f"{name}-{turn % 2}")
            names = parts_of(yard, release_id)
        except TrainyardError:
            counts["refused"] += 1
            continue
        counts["published"] += 1
        key = release_key("adder", release_id)
        # First what it names, then the release: the collector takes them the other way round.
        missing = lost(yard, names)
        assert not missing or not yard.store.exists(key), missing
        serve(yard, release_id, environment=name)
        if being_collected(yard.store, key) or not yard.store.exists(key):
            counts["came too late"] += 1
            yard.store.delete(channel_key("adder", name))
            continue
        counts["promoted"] += 1
        for _ in range(3):
            assert lost(yard, names | {key}) == []


def collect_until(yard: Yard, over: threading.Event, counts: Counter[str]) -> None:
    while not over.is_set():
        try:
            done = Collection(yard.store, AT_ONCE, pause_s=0.0, lock_s=60.0).run()
        except TrainyardError:
            counts["collector failed"] += 1
            continue
        counts["collected"] += len(done.deleted)


def test_nothing_published_or_promoted_ever_dangles(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    counts: Counter[str] = Counter()
    over = threading.Event()
    names = [f"p{number}" for number in range(PUBLISHERS)]
    # The patch is for the whole process: it is made once, around all threads.
    with quick_gates(), ThreadPoolExecutor(PUBLISHERS + 1) as pool:
        collector = pool.submit(collect_until, yard, over, counts)
        publishers = [pool.submit(publish_and_promote, yard, name, counts) for name in names]
        try:
            for publisher in publishers:
                publisher.result()
        finally:
            over.set()
        collector.result()
    assert counts["collected"] > 0
    assert counts["published"] + counts["refused"] == ROUNDS * PUBLISHERS
    Collection(yard.store, AT_ONCE, pause_s=0.0, lock_s=60.0).run()
    assert Verifier(yard.store, yard.settings, AT_ONCE).run().problems == ()


KILL = """
import json, os, random, shutil, signal, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from trainyard.care.decide import Policy
from trainyard.care.gc import Collection
from trainyard.care.verify import Verifier
from trainyard.settings import Settings
from trainyard.store.folder import FolderStore

template, root, rounds, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
DAY = 86400.0
POLICY = Policy(DAY, 10 * DAY, 5 * DAY, 20 * DAY, 1)
CALLS = ["open", "write", "fsync", "link", "replace", "unlink", "rmdir"]

def collect(store):
    later = lambda: datetime.now(UTC) + timedelta(days=100)
    Collection(store, POLICY, pause_s=0.0, lock_s=60.0, now=later).run()

def keys(store):
    return sorted(e.key for e in store.list("") if e.key != "locks/store-gc.json")

def world(name):
    shutil.copytree(template, root / name)
    settings = Settings(home=root / name)
    return settings, FolderStore(settings.store_root)

def problems(settings, store):
    found = Verifier(store, settings, POLICY).run().problems
    return [[each.key, each.message] for each in found if each.is_wrong]

def killed_at(number, store):
    pid = os.fork()
    if pid == 0:
        done = 0
        def dying(call):
            def wrapped(*args, **kwargs):
                nonlocal done
                done += 1
                if done == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapped
        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            collect(store)
        finally:
            (root / "calls").write_text(str(done))
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

settings, store = world("whole")
before = keys(store)
assert killed_at(-1, store) == 0
calls, expected = int((root / "calls").read_text()), keys(store)
dice = random.Random(seed)
report = []
for turn in range(rounds):
    settings, store = world(f"kill-{turn}")
    number = dice.randrange(1, calls + 1)
    code = killed_at(number, store)
    half = keys(store)
    wrong = problems(settings, store)
    collect(store)
    report.append({
        "at": number,
        "code": code,
        "half": len(before) > len(half) > len(expected),
        "wrong": wrong,
        "finished": keys(store) == expected and problems(settings, store) == [],
    })
    shutil.rmtree(root / f"kill-{turn}")
print(json.dumps(report))
"""


def kill_collectors(template: Path, root: Path, rounds: int) -> Iterator[dict[str, object]]:
    """Kill a collection at `rounds` random system calls, and run another one after each."""
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(template), str(root), str(rounds), "7"],
        check=True,
        stdout=subprocess.PIPE,
    )
    yield from json.loads(done.stdout)


@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param(20, id="20"),
        pytest.param(200, id="200", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_a_collection_killed_anywhere_leaves_nothing_dangling_and_the_next_one_finishes(
    rounds: int, template: Path, tmp_path: Path
) -> None:
    reports = list(kill_collectors(template, tmp_path, rounds))

    assert len(reports) == rounds
    assert [each for each in reports if each["wrong"] or not each["finished"]] == []
    # Some ended before or after the deletions (or in a moment that only one thread came to).
    assert any(each["code"] == -9 for each in reports)
    assert any(each["half"] for each in reports)
