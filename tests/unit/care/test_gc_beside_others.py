"""Garbage collection beside publications and promotions, with no grace at all, and killed."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.fake_s3 import FAST, FakeS3
from tests.killed_store_work import KILLS, Job, run
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


def publish_and_promote(yard: Yard, name: str, counts: Counter[str], rounds: int) -> None:
    """Release and promote again and again; whatever was said to be published must be whole."""
    for turn in range(rounds):
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


@pytest.fixture(params=["folder", "s3"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Yard:
    """A yard without anything, on each back end."""
    if request.param == "folder":
        return Yard(tmp_path)
    s3: FakeS3 = request.getfixturevalue("s3")
    url = f"s3://{s3.new_bucket()}/yard"
    return Yard(tmp_path, {"store": url, "s3_endpoint_url": s3.proxy.url, **FAST})


def test_nothing_published_or_promoted_ever_dangles(empty: Yard) -> None:
    yard = empty
    # A bucket is slower: what takes one folder a moment takes the fake of S3 seconds.
    rounds = 3 if yard.place else 15
    counts: Counter[str] = Counter()
    over = threading.Event()
    names = [f"p{number}" for number in range(PUBLISHERS)]
    # The patch is for the whole process: it is made once, around all threads.
    with quick_gates(), ThreadPoolExecutor(PUBLISHERS + 1) as pool:
        collector = pool.submit(collect_until, yard, over, counts)
        publishers = [
            pool.submit(publish_and_promote, yard, name, counts, rounds) for name in names
        ]
        try:
            for publisher in publishers:
                publisher.result()
        finally:
            over.set()
        collector.result()
    assert counts["collected"] > 0
    assert counts["published"] + counts["refused"] == rounds * PUBLISHERS
    Collection(yard.store, AT_ONCE, pause_s=0.0, lock_s=60.0).run()
    assert Verifier(yard.store, yard.settings, AT_ONCE).run().problems == ()


@pytest.mark.parametrize(("place", "rounds"), KILLS)
def test_a_collection_killed_anywhere_leaves_nothing_dangling_and_the_next_one_finishes(
    place: str, rounds: int, template: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fake = request.getfixturevalue("s3_place") if place == "s3" else {}
    reports = run(Job("collect", str(tmp_path), rounds, 1, str(template), fake))

    assert len(reports) == rounds
    assert [each for each in reports if each["wrong"] or not each["finished"]] == []
    # Some ended before or after the deletions (or at a moment that only others came to).
    assert any(each["code"] == -9 for each in reports)
    assert any(each["half"] for each in reports)
