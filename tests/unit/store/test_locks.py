from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from trainyard.errors import Busy, NotFound, StorageFull
from trainyard.store.documents import read_document, update_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import lock_key
from trainyard.store.locks import HeldElsewhere, HeldLock, Holder, StepLock, acquire_lock

STEP = "bundles/abc/manifest.json"
KEY = lock_key(STEP)
LONG_S = 3600.0
BRIEF_S = 1.5
"""Renewed every half second."""


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def take(store: FolderStore, *, duration_s: float = LONG_S, wait_s: float = 0.0) -> HeldLock:
    return acquire_lock(store, STEP, work="compile", duration_s=duration_s, wait_s=wait_s)


def change(store: FolderStore, **changes: object) -> StepLock:
    """Change the stored lock behind its holder's back."""
    return update_document(store, KEY, StepLock, lambda lock: lock.model_copy(update=changes))


def somebody(**changes: object) -> Holder:
    """A holder on another machine, of which nobody here knows whether it lives."""
    return Holder.me("somebody").model_copy(update={"machine": "another", **changes})


def past() -> datetime:
    return datetime.now(UTC) - timedelta(seconds=1)


class TestTaking:
    def test_one_has_it_and_others_are_told_who(self, store: FolderStore) -> None:
        with take(store) as lock:
            assert lock.epoch == 1
            lock.ensure_held()
            with pytest.raises(HeldElsewhere, match=rf"{STEP} is being done .*\(compile") as caught:
                take(store)
            assert caught.value.exit_code == 75
            assert caught.value.holder.work == "compile"

    def test_a_released_lock_is_free_and_epochs_grow(self, store: FolderStore) -> None:
        for epoch in (1, 2, 3):
            with take(store) as lock:
                assert lock.epoch == epoch
            assert read_document(store, KEY, StepLock).holder is None

    def test_different_steps_do_not_meet(self, store: FolderStore) -> None:
        with (
            take(store),
            acquire_lock(store, "another", work="w", duration_s=LONG_S, wait_s=0) as other,
        ):
            assert other.epoch == 1

    def test_an_expired_lock_is_taken_with_a_higher_epoch(self, store: FolderStore) -> None:
        take(store).release()
        change(store, holder=somebody(), expires_at=past())
        with take(store) as lock:
            assert lock.epoch == 2

    def test_a_lock_of_another_machine_is_respected_until_then(self, store: FolderStore) -> None:
        take(store).release()
        change(
            store,
            holder=somebody(pid=2**22 + 1),
            expires_at=datetime.now(UTC) + timedelta(seconds=60),
        )
        with pytest.raises(HeldElsewhere):
            take(store)

    def test_waiting_ends_when_the_holder_is_done(self, store: FolderStore) -> None:
        first = take(store)
        waits = []

        def released(waiting: HeldElsewhere) -> None:
            waits.append(waiting.holder.work)
            first.release()

        with acquire_lock(
            store, STEP, work="second", duration_s=LONG_S, wait_s=60, on_wait=released
        ) as lock:
            assert lock.epoch == 2
        assert waits == ["compile"]

    def test_waiting_can_be_ended(self, store: FolderStore) -> None:
        pause = threading.Event()
        with take(store), pytest.raises(HeldElsewhere):
            acquire_lock(
                store,
                STEP,
                work="second",
                duration_s=LONG_S,
                wait_s=3600,
                on_wait=lambda waiting: pause.set(),
                pause=pause,
            )

    def test_of_many_that_want_it_one_gets_it(self, store: FolderStore) -> None:
        barrier = threading.Barrier(6)
        taken: list[HeldLock] = []

        def want() -> None:
            barrier.wait()
            try:
                taken.append(take(store))
            except HeldElsewhere:
                return

        threads = [threading.Thread(target=want) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        taken[0].release()


HOLD = """
import sys
from pathlib import Path
from trainyard.store.folder import FolderStore
from trainyard.store.locks import acquire_lock

acquire_lock(FolderStore(Path(sys.argv[1])), sys.argv[2], work="w", duration_s=3600, wait_s=0)
print("held", flush=True)
sys.stdin.read()
"""


class TestDeadHolders:
    @pytest.fixture
    def holder(self, store: FolderStore) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(store.root), STEP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
            process.communicate()

    def test_a_living_holder_keeps_it(
        self, store: FolderStore, holder: subprocess.Popen[str]
    ) -> None:
        with pytest.raises(HeldElsewhere, match=f"process {holder.pid} on"):
            take(store)

    def test_a_stopped_holder_keeps_it(
        self, store: FolderStore, holder: subprocess.Popen[str]
    ) -> None:
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(HeldElsewhere):
            take(store)

    def test_a_killed_holder_loses_it_at_once(
        self, store: FolderStore, holder: subprocess.Popen[str]
    ) -> None:
        holder.kill()
        # Dead, but a zombie until somebody waits for it: that is dead enough.
        with acquire_lock(store, STEP, work="w", duration_s=LONG_S, wait_s=60) as lock:
            assert lock.epoch == 2

    def test_a_process_that_got_the_same_number_is_another(self, store: FolderStore) -> None:
        take(store).release()
        alive = Holder.me("earlier boot").model_copy(update={"process_started": "1"})
        change(store, holder=alive, expires_at=datetime.now(UTC) + timedelta(seconds=60))
        assert alive.is_gone()
        with take(store) as lock:
            assert lock.epoch == 2

    def test_where_the_system_cannot_tell_only_expiry_counts(self) -> None:
        assert not Holder.me("w").is_gone()
        assert not Holder.me("w").model_copy(update={"machine": ""}).is_gone()
        assert not somebody(process_started="1").is_gone()


class TestLosing:
    def test_the_holder_renews(self, store: FolderStore) -> None:
        renewed = threading.Event()
        really = store.replace

        def replace(key: str, data: bytes, *, version: str) -> str:
            renewed.set()
            return really(key, data, version=version)

        store.replace = replace  # type: ignore[method-assign]
        with take(store, duration_s=BRIEF_S) as lock:
            assert renewed.wait(60)
            lock.ensure_held()
            assert not lock.lost

    def test_a_holder_that_was_replaced_learns_it(self, store: FolderStore) -> None:
        lost = threading.Event()
        successor = somebody(work="another attempt")
        with acquire_lock(
            store, STEP, work="w", duration_s=BRIEF_S, wait_s=0, on_lost=lost.set
        ) as lock:
            change(store, holder=successor, epoch=2)
            assert lost.wait(60)
            assert lock.lost
            assert lock.successor == successor
            with pytest.raises(Busy, match="lost the lock"):
                lock.ensure_held()
        # Its release leaves the successor's lock alone.
        assert read_document(store, KEY, StepLock).holder == successor

    def test_a_lock_that_was_deleted_is_lost(self, store: FolderStore) -> None:
        lost = threading.Event()
        with acquire_lock(
            store, STEP, work="w", duration_s=BRIEF_S, wait_s=0, on_lost=lost.set
        ) as lock:
            store.delete(KEY)
            assert lost.wait(60)
            assert lock.successor is None
        assert not store.exists(KEY)

    def test_a_holder_that_slept_asks_before_it_commits(self, store: FolderStore) -> None:
        lock = take(store, duration_s=LONG_S)
        lock._lock = lock._lock.model_copy(update={"expires_at": past()})
        lock.ensure_held()
        assert read_document(store, KEY, StepLock).expires_at > datetime.now(UTC)
        change(store, holder=somebody(), epoch=2)
        lock._lock = lock._lock.model_copy(update={"expires_at": past()})
        with pytest.raises(Busy, match="lost the lock"):
            lock.ensure_held()
        lock.release()

    def test_a_store_that_fails_does_not_lose_it_but_its_expiry_does(
        self, store: FolderStore
    ) -> None:
        lock = take(store, duration_s=LONG_S)

        def replace(key: str, data: bytes, *, version: str) -> str:
            raise StorageFull("full")

        store.replace = replace  # type: ignore[method-assign]
        lock.ensure_held()
        lock._lock = lock._lock.model_copy(update={"expires_at": past()})
        with pytest.raises(Busy):
            lock.ensure_held()
        assert not lock.lost
        lock.release()
        assert read_document(store, KEY, StepLock).holder is not None

    def test_a_renewal_that_arrived_although_it_failed_is_ours(self, store: FolderStore) -> None:
        with take(store) as lock:
            change(store, expires_at=datetime.now(UTC) + timedelta(seconds=7200))
            lock._lock = lock._lock.model_copy(update={"expires_at": past()})
            lock.ensure_held()
            assert not lock.lost
        assert read_document(store, KEY, StepLock).holder is None

    def test_releasing_where_the_lock_is_gone_is_fine(self, store: FolderStore) -> None:
        lock = take(store)
        store.delete(KEY)
        lock.release()
        with pytest.raises(NotFound):
            store.read(KEY)
