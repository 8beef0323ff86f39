"""Garbage collection frees what nobody needs, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.care.world import (
    AT_ONCE,
    POLICY,
    in_100_days,
    keys,
    make_plan,
    quick_gates,
    release,
    serve,
    store_bundle,
    store_checkpoint,
    store_files,
)
from tests.unit.yard import Yard

from trainyard.care.gc import OWN_LOCK, Collected, Collection
from trainyard.care.verify import Verifier
from trainyard.documents.status import StepStatus
from trainyard.errors import Busy, CorruptFile, NotFound, TrainyardError
from trainyard.releases import list_releases, load_release, record_attestation
from trainyard.steps.publish import publish
from trainyard.store.collection import COLLECTING, being_collected, collection_lock
from trainyard.store.folder import FolderStore
from trainyard.store.layout import checkpoint_manifest_key, lock_key, release_key, status_key
from trainyard.store.locks import HeldElsewhere, acquire_lock
from trainyard.store.objects import place_of
from trainyard.store.protocol import Store


def collection(store: Store, **changes: Any) -> Collection:
    """Return a collection in 100 days, which does not wait."""
    made = Collection(store, POLICY, pause_s=0.0, lock_s=60.0, now=in_100_days)
    return replace(made, **changes)


def run(store: Store, **changes: Any) -> Collected:
    return collection(store, **changes).run()


def ids(yard: Yard) -> list[str]:
    return sorted(each.revision for each in list_releases(yard.store, "adder"))


def test_what_serves_and_its_predecessor_stay_whole_and_the_rest_goes(yard: Yard) -> None:
    done = run(yard.store)

    assert ids(yard) == ["v1", "v2"]
    assert not keys(yard.store, "checkpoints/adder/v3")
    verified = Verifier(yard.store, yard.settings, POLICY).run()
    assert verified.problems == ()
    assert {each.kind for each in done.deleted} == {
        *("release", "plan", "verdicts", "reports", "measurement", "samples", "references"),
        *("checkpoint", "bundle", "evals"),
    }
    # Not one of them but for v3: plans of v1 and v2 say which prompts a server is warmed up with.
    assert len([each for each in done.deleted if each.kind == "release"]) == 1
    assert done.freed_bytes > 0


def test_what_was_found_out_about_a_deleted_release_is_kept(yard: Yard) -> None:
    (gone,) = [each for each in list_releases(yard.store, "adder") if each.revision == "v3"]
    record_attestation(yard.store, "adder", gone.release_id, "rejection", {"reason": "slow"})

    run(yard.store)

    kept = keys(yard.store, f"attestations/adder/{gone.release_id}")
    assert len(kept) == 3
    assert any("rejection-" in key for key in kept)


def test_a_second_run_finds_nothing_to_do(yard: Yard) -> None:
    run(yard.store)
    before = keys(yard.store)

    # Locks of what is gone are gone as well, but for the collection's own.
    assert {entry.key for entry in yard.store.list("locks")} == {lock_key(OWN_LOCK)}
    assert {each.prefix for each in run(yard.store).deleted} <= {lock_key(OWN_LOCK)}
    assert keys(yard.store) == before


def test_a_look_changes_nothing_and_says_why(yard: Yard) -> None:
    before = {entry.key: yard.store.read(entry.key).data for entry in yard.store.list("")}

    decisions = {each.object.prefix: each for each in collection(yard.store).look()}

    assert before == {entry.key: yard.store.read(entry.key).data for entry in yard.store.list("")}
    assert "No channel, recent release" in decisions["checkpoints/adder/v3"].reason
    stable = next(each for each in list_releases(yard.store, "adder") if each.revision == "v2")
    key = release_key("adder", stable.release_id)
    assert decisions[key].reason == "It is stable in channel staging of adder."
    assert f"release {stable.release_id} names it" in decisions["checkpoints/adder/v2"].reason


def test_nothing_young_goes(yard: Yard) -> None:
    made = Collection(yard.store, POLICY, pause_s=0.0, lock_s=60.0)

    assert made.run().deleted == ()
    assert ids(yard) == ["v1", "v2", "v3"]


def test_a_prefix_with_one_young_part_stays_whole(yard: Yard) -> None:
    def age(key: str) -> None:
        path = yard.store.local_path(key)
        old = path.stat().st_mtime - 50 * 86400
        os.utime(path, (old, old))

    store_checkpoint(yard.store, "lone")
    for key in keys(yard.store):
        if not key.endswith("lone/config.json"):
            age(key)

    Collection(yard.store, POLICY, pause_s=0.0, lock_s=60.0).run()

    assert len(keys(yard.store, "checkpoints/adder/lone")) == 3
    assert not keys(yard.store, "checkpoints/adder/v3")


def test_unknown_keys_and_those_of_unknown_shape_are_left_alone(yard: Yard) -> None:
    strange = {"models/x.bin", "checkpoints/README.txt", "releases/adder/notes.txt", "locks/x.txt"}
    for key in strange:
        yard.store.create(key, b"x")

    run(yard.store)

    assert strange <= {entry.key for entry in yard.store.list("")}


def test_cut_downloads_old_locks_and_status_documents_go(yard: Yard) -> None:
    store_files(yard.store, "checkpoints/adder/cut", {"config.json": b"{"})
    store_files(yard.store, "bundles/cut", {"graph.bin": b"x"})
    acquire_lock(yard.store, "some/step", work="x", duration_s=60, wait_s=0).release()
    now = in_100_days()
    status = StepStatus(
        plan_id="adder-draft", step="plan", state="failed", started_at=now, updated_at=now
    )
    yard.store.put(status_key("adder-draft", "plan"), status.to_bytes())

    deleted = {each.prefix for each in run(yard.store).deleted}

    assert {
        *("checkpoints/adder/cut", "bundles/cut", lock_key("some/step"), "status/adder-draft"),
    } <= deleted


def test_an_active_plan_protects_what_its_steps_read_or_make(yard: Yard) -> None:
    """An old plan of which a step writes its status now."""
    now = in_100_days()
    status = StepStatus(
        plan_id="adder-v3", step="measure", state="running", started_at=now, updated_at=now
    )
    key = status_key("adder-v3", "measure")
    yard.store.put(key, status.to_bytes())
    os.utime(yard.store.local_path(key), (now.timestamp(), now.timestamp()))

    run(yard.store)

    assert ids(yard) == ["v1", "v2", "v3"]
    assert Verifier(yard.store, yard.settings, POLICY).run().is_whole


def test_what_somebody_works_on_stays(yard: Yard) -> None:
    store_files(yard.store, "checkpoints/adder/now", {"config.json": b"{"})
    name = checkpoint_manifest_key("adder", "now")
    # The lock lasts as long as the shifted clock of this test is ahead, and longer.
    with acquire_lock(yard.store, name, work="download", duration_s=1e8, wait_s=0):
        run(yard.store)
        assert keys(yard.store, "checkpoints/adder/now")

    run(yard.store)
    assert not keys(yard.store, "checkpoints/adder/now")


@pytest.mark.parametrize("prefix", ["channels/adder/staging.json", "plans/adder-v1.json"])
def test_nothing_goes_while_a_document_that_marks_cannot_be_read(prefix: str, yard: Yard) -> None:
    yard.store.put(prefix, b"{}")
    before = keys(yard.store)

    with pytest.raises(CorruptFile, match=prefix):
        run(yard.store)

    assert keys(yard.store) == before


def test_one_collection_at_a_time(yard: Yard) -> None:
    with (
        acquire_lock(yard.store, OWN_LOCK, work=COLLECTING, duration_s=1e8, wait_s=0),
        pytest.raises(HeldElsewhere),
    ):
        run(yard.store)
    assert ids(yard) == ["v1", "v2", "v3"]


class Watched(FolderStore):
    """A store that calls back before each deletion and after each lock that is taken."""

    before_delete: Callable[[str], None] = staticmethod(lambda key: None)
    after_create: Callable[[str], None] = staticmethod(lambda key: None)

    def delete(self, key: str, *, version: str | None = None) -> None:
        self.before_delete(key)
        super().delete(key, version=version)

    def create(self, key: str, data: bytes) -> str:
        version = super().create(key, data)
        self.after_create(key)
        return version


@pytest.fixture
def watched(yard: Yard) -> Watched:
    return Watched(yard.store.root)


def test_who_names_comes_before_what_is_named_and_a_manifest_before_its_files(
    yard: Yard, watched: Watched
) -> None:
    gone: list[str] = []
    watched.before_delete = gone.append

    run(watched)

    folders = [key.split("/")[0] for key in gone if not key.startswith("locks/")]
    assert folders.index("releases") == 0
    for artifact in ("checkpoints", "bundles"):
        first = next(key for key in gone if key.startswith(f"{artifact}/"))
        assert first.endswith("/manifest.json")
    assert folders.index("verdicts") < folders.index("checkpoints")


def test_each_is_locked_when_it_goes(yard: Yard, watched: Watched) -> None:
    unlocked: list[str] = []

    def look(key: str) -> None:
        if not key.startswith("locks/") and not being_collected(yard.store, key):
            unlocked.append(key)

    watched.before_delete = look
    assert run(watched).deleted
    assert unlocked == []


def test_a_release_promoted_between_the_looks_is_kept(yard: Yard, watched: Watched) -> None:
    """The lock is taken; then somebody promotes the release, before the last look."""
    (old,) = [each for each in list_releases(yard.store, "adder") if each.revision == "v3"]
    taken = lock_key(release_key("adder", old.release_id))

    def promote(key: str) -> None:
        if key == taken:
            serve(yard, old.release_id, environment="production")

    watched.after_create = promote
    spared = run(watched).spared

    assert ids(yard) == ["v1", "v2", "v3"]
    assert Verifier(yard.store, yard.settings, POLICY).run().is_whole
    assert "It is stable in channel production of adder." in {each.reason for each in spared}


def test_a_release_stored_between_the_looks_keeps_what_it_names_however_short_they_are_kept(
    yard: Yard, watched: Watched
) -> None:
    """Locks are taken, and a release is there that was not at the looks before."""
    (old,) = [each for each in list_releases(yard.store, "adder") if each.revision == "v3"]
    key = release_key("adder", old.release_id)
    data = yard.store.read(key).data
    yard.store.delete(key)
    first = lock_key("plans/adder-v3.json")

    def publish_again(locked: str) -> None:
        if locked == first:
            yard.store.create(key, data)

    watched.after_create = publish_again
    run(watched, policy=AT_ONCE)

    assert "v3" in ids(yard)
    assert Verifier(yard.store, yard.settings, POLICY).run().is_whole


def test_publication_withdraws_what_it_stored_when_its_parts_are_being_collected(
    yard: Yard,
) -> None:
    """The last look is over and the manifests are still there: the lock is all that tells."""
    (old,) = [each for each in list_releases(yard.store, "adder") if each.revision == "v3"]
    yard.store.delete(release_key("adder", old.release_id))
    lock = collection_lock(place_of(checkpoint_manifest_key("adder", "v3")))
    made = make_plan("v3")
    with (
        quick_gates(),
        acquire_lock(yard.store, lock, work=COLLECTING, duration_s=60, wait_s=0),
        pytest.raises(TrainyardError, match="so the release was withdrawn"),
    ):
        publish(made, "cpu", yard.context)
    with pytest.raises(NotFound):
        load_release(yard.store, "adder", old.release_id, yard.settings)

    with quick_gates():
        assert publish(made, "cpu", yard.context).detail["release_id"] == old.release_id


def test_a_step_that_holds_the_lock_keeps_it(yard: Yard, watched: Watched) -> None:
    """A download takes the lock between the second look and the locking."""
    name = checkpoint_manifest_key("adder", "v3")
    held = []

    def take(key: str) -> None:
        if "releases" in key and not held:
            held.append(acquire_lock(yard.store, name, work="download", duration_s=60, wait_s=0))

    watched.after_create = take
    try:
        spared = run(watched).spared
    finally:
        held[0].release()

    assert keys(yard.store, "checkpoints/adder/v3")
    assert any("download" in each.reason for each in spared)


def test_a_collector_that_lost_its_lock_deletes_nothing_more(yard: Yard, watched: Watched) -> None:
    name = checkpoint_manifest_key("adder", "v3")

    def steal(key: str) -> None:
        if key.startswith("releases/"):
            yard.store.delete(lock_key(name))
            acquire_lock(yard.store, name, work="download", duration_s=60, wait_s=0)
            # Longer than the collector's lock lasts: it has to look again.
            time.sleep(1.0)

    watched.before_delete = steal
    with pytest.raises(Busy):
        run(watched, lock_s=0.5)

    assert len(keys(yard.store, "checkpoints/adder/v3")) == 3


def test_everything_may_go_when_nobody_needs_anything(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    release(yard, "v1")
    store_bundle(yard.store, "spare")

    run(yard.store, policy=AT_ONCE)

    assert {key.split("/")[0] for key in keys(yard.store)} == {"attestations"}
