"""Garbage collection: removes what nobody needs, beside everything else that goes on.

In the order of events:

1. *Look.* Everything is listed, the documents that name others are read, and `decide` says what
   nobody needs: neither a channel, nor a recent release, nor a plan that was active lately, nor a
   step that is running, and no part of it is younger than the grace period.
2. *Pause, look again.* Only what was doomed at both looks, unchanged in between, goes on.
3. *Lock.* In groups, each of them gets its lock. That of a checkpoint, bundle or measurement is the
   lock of the step that makes it. Held by somebody: the object stays.
4. *Look a third time*, at the whole store, with the locks held. What is needed now stays; so does
   what a release names that is not locked itself, such as one that was stored since.
5. *Delete*, releases first, then what they named; of a checkpoint or bundle the manifest first (if
   it still is the same), then the files. Before each deletion the lock must still be held.
6. *Unlock.*
7. What the store keeps for itself and nobody goes on with (parts of cut uploads, above all) is
   removed under the lock of what it belongs to: no step makes that meanwhile.

Why nothing published ever dangles:

- A **release** stored before the third look is found there, and what it names stays. One stored
  later was stored while the locks were held (3 is before 4), and its publication looks, after it
  stored it, for each thing that it names: it finds the lock, or finds the thing gone, and withdraws
  the release. Publication never says "published" about a release that it has to withdraw.
- A **channel** that names a release before the third look keeps it. One that names it later finds
  the lock before it deploys servers, and waits; what was removed by then cannot be loaded.
- A **step** that finds its output stored already ("exists") says so under the lock of that output:
  either before the lock was taken, and then its status document is a sign of life of its plan, seen
  at the third look, or after it was freed, and then it makes the output again.
- A **download or compilation** that goes on with files of an earlier attempt holds the lock.
- A **process killed** at any line leaves locks, which expire or are seen to be dead. Whatever names
  something was removed before it, and a manifest before its files: what is left is complete, or is
  reachable from nowhere. The next run finds the rest: a prefix without a manifest, old and unnamed.

All of it, like every step, relies on processes not being stopped for longer than a lock lasts
exactly between the look at the lock and the next request to the store.

A step of an old plan that only reads (a measurement begun again after weeks, in this very second)
may find its checkpoint gone. It fails with NotFound; a new run makes what is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from trainyard.care.decide import (
    Decision,
    Policy,
    decide,
    decide_internals,
    deletion_order,
)
from trainyard.care.facts import Facts
from trainyard.care.inventory import Reader
from trainyard.errors import BadInput, Conflict, NotFound
from trainyard.settings import Settings
from trainyard.store.collection import COLLECTING, collection_lock
from trainyard.store.documents import read_versioned
from trainyard.store.layout import lock_key
from trainyard.store.locks import HeldElsewhere, HeldLock, StepLock, acquire_lock
from trainyard.store.objects import StoredObject, place_of
from trainyard.store.protocol import Internal, Store

BATCH = 32
"""Objects that are locked at the same time."""

THREADS = 8
"""Keys that are deleted at the same time."""

OWN_LOCK = "store-gc"
"""Name of the lock that keeps two collections apart."""


def policy_of(settings: Settings) -> Policy:
    """Return how long this installation keeps things."""
    return Policy(
        grace_s=settings.gc_grace_s,
        keep_releases_s=settings.gc_keep_releases_s,
        keep_plans_s=settings.gc_keep_plans_s,
        keep_rollouts_s=settings.gc_keep_rollouts_s,
        keep_previous=settings.gc_keep_previous,
    )


@dataclass(frozen=True)
class Collected:
    """What a collection did."""

    decisions: tuple[Decision, ...]
    """Of the second look; of the only one, if nothing was to be deleted."""
    deleted: tuple[StoredObject, ...] = ()
    spared: tuple[Decision, ...] = ()
    """Doomed at the first look, and kept in the end."""

    @property
    def freed_bytes(self) -> int:
        """Bytes of what was deleted."""
        return sum(each.size for each in self.deleted)


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Collection:
    """One run of garbage collection."""

    store: Store
    policy: Policy
    pause_s: float
    """Seconds between the first two looks."""
    lock_s: float
    """Seconds after which the locks expire if this process dies."""
    say: Callable[[str], None] = lambda line: None
    """Told what happens, a line each."""
    now: Callable[[], datetime] = _utc_now
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set it to end the pause early."""

    def look(self) -> tuple[Decision, ...]:
        """Return what would become of everything; change nothing. Raises as `Reader.facts`."""
        return self.judge(Reader(self.store).facts(self.now()))

    def judge(self, facts: Facts) -> tuple[Decision, ...]:
        """Return what would become of everything, as far as `facts` and the store tell."""
        now = self.now()
        inside = decide_internals(self._internals(), facts, now, self.policy)
        return decide(facts, now, self.policy) + inside

    def run(self) -> Collected:
        """Delete what nobody needs.

        Raises:
            HeldElsewhere: another collection is running.
            CorruptFile: a document that says what is needed cannot be read; nothing is deleted.
            Busy: this process was stopped for longer than its locks last.
            Transient: the store fails now; what is left is found by the next run.
        """
        with self._lock(OWN_LOCK):
            reader = Reader(self.store)
            done = self._collect_objects(reader)
            inside, removed = self._collect_internals(reader)
        return Collected(done.decisions + inside, done.deleted + removed, done.spared)

    def _collect_objects(self, reader: Reader) -> Collected:
        first = self._look(reader)
        before = {each.prefix: each for each in deletion_order(first)}
        if not before:
            return Collected(first)
        self.say(f"{len(before)} objects are needed by nobody; looking again.")
        self.stopped.wait(self.pause_s)
        second = self._look(reader)
        doomed = [
            each
            for each in deletion_order(second)
            if each.prefix in before and before[each.prefix].entries == each.entries
        ]
        spared = [each for each in second if each.keep and each.object.prefix in before]
        deleted: list[StoredObject] = []
        for start in range(0, len(doomed), BATCH):
            done, kept = self._collect(doomed[start : start + BATCH], reader)
            deleted += done
            spared += kept
        return Collected(second, tuple(deleted), tuple(spared))

    def _internals(self) -> list[Internal]:
        """Return what the store keeps for itself, if it lets us see that."""
        try:
            return list(self.store.internals())
        except BadInput as refused:
            self.say(f"What the store keeps for itself is left alone. {refused.message}")
            return []

    def _collect_internals(
        self, reader: Reader
    ) -> tuple[tuple[Decision, ...], tuple[StoredObject, ...]]:
        """Remove what was left of something that was cut; return all decisions and what went."""
        internals = {each.name: each for each in self._internals()}
        if not internals:
            return (), ()
        now = self.now()
        decisions = decide_internals(internals.values(), reader.facts(now), now, self.policy)
        removed = []
        for decision in decisions:
            name = decision.object.prefix
            if not decision.keep and self._remove_internal(internals[name]):
                self.say(f"Removed {name}. {decision.reason}")
                removed.append(decision.object)
        return decisions, tuple(removed)

    def _remove_internal(self, internal: Internal) -> bool:
        """Remove it; False if somebody works on what it belongs to, and it stays."""
        if not internal.key:
            self.store.remove_internal(internal)
            return True
        name = collection_lock(place_of(internal.key))
        try:
            lock = self._lock(name)
        except HeldElsewhere:
            return False
        with lock:
            self.store.remove_internal(internal)
        _remove_free_lock(self.store, name)
        return True

    def _look(self, reader: Reader, going: Container[str] | None = None) -> tuple[Decision, ...]:
        now = self.now()
        return decide(reader.facts(now), now, self.policy, going=going)

    def _lock(self, name: str) -> HeldLock:
        return acquire_lock(self.store, name, work=COLLECTING, duration_s=self.lock_s, wait_s=0.0)

    def _collect(
        self, doomed: Sequence[StoredObject], reader: Reader
    ) -> tuple[list[StoredObject], list[Decision]]:
        """Lock all, look at everything once more, delete what still is doomed, in this order."""
        deleted: list[StoredObject] = []
        spared: list[Decision] = []
        with self._locks() as locks:
            for each in doomed:
                if each.kind != "lock":
                    try:
                        locks[each.prefix] = self._lock(collection_lock(each.place))
                    except HeldElsewhere as held:
                        spared.append(Decision(each, True, held.message))
            busy = {each.object.prefix for each in spared}
            third = {each.object.prefix: each for each in self._look(reader, locks.keys())}
            for each in doomed:
                decision = third.get(each.prefix)
                if decision is None or each.prefix in busy:
                    continue
                if decision.keep:
                    spared.append(decision)
                elif self._delete(decision.object, locks.get(each.prefix)):
                    self.say(f"Deleted {each.prefix}. {decision.reason}")
                    deleted.append(decision.object)
            for each in deleted:
                if each.prefix in locks:
                    locks.pop(each.prefix).release()
                    _remove_free_lock(self.store, collection_lock(each.place))
        return deleted, spared

    @contextmanager
    def _locks(self) -> Iterator[dict[str, HeldLock]]:
        """Yield a place for locks; those that are still in it are freed afterwards."""
        held: dict[str, HeldLock] = {}
        try:
            yield held
        finally:
            for lock in held.values():
                lock.release()

    def _delete(self, doomed: StoredObject, lock: HeldLock | None) -> bool:
        """Delete an object; False if it was changed meanwhile and stays."""
        if lock is None:
            return _remove_free_lock(self.store, doomed.prefix.removeprefix("locks/")[:-5])
        manifest = doomed.manifest
        if manifest and not self._delete_manifest(manifest, lock):
            return False

        def delete(key: str) -> None:
            lock.ensure_held()
            self.store.delete(key)

        keys = [entry.key for entry in doomed.entries if entry.key != manifest]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="gc") as pool:
            list(pool.map(delete, keys))
        return True

    def _delete_manifest(self, key: str, lock: HeldLock) -> bool:
        """Delete a manifest unless somebody replaced it."""
        try:
            version = self.store.read(key).version
            lock.ensure_held()
            self.store.delete(key, version=version)
        except NotFound:
            return True
        except Conflict:
            return False
        return True


def _remove_free_lock(store: Store, name: str) -> bool:
    """Remove the document of a lock that nobody holds; False if somebody does, or took it now."""
    try:
        lock, version = read_versioned(store, lock_key(name), StepLock)
        if not lock.is_free(datetime.now(UTC)):
            return False
        store.delete(lock_key(name), version=version)
    except (NotFound, Conflict):
        return False
    return True
