from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.documents.status import StepStatus
from trainyard.errors import BadInput, CorruptFile, StorageFull
from trainyard.settings import Settings
from trainyard.steps.status import (
    TAIL_LINE_CHARS,
    TAIL_LINES,
    StatusWriter,
    clean_lines,
    read_status,
)
from trainyard.store.folder import FolderStore

LONG_S = 3600.0


class WatchedStore(FolderStore):
    """Tells when a status document was written, and may refuse to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: list[StepStatus] = []
        self.another = threading.Condition()
        self.full = False

    def put(self, key: str, data: bytes) -> str:
        with self.another:
            if not self.full:
                self.written.append(StepStatus.model_validate_json(data))
            self.another.notify_all()
        if self.full:
            raise StorageFull("full")
        return super().put(key, data)

    def wait_for(self, count: int) -> None:
        with self.another:
            assert self.another.wait_for(lambda: len(self.written) >= count, timeout=600)


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    return WatchedStore(tmp_path)


def writer(
    store: FolderStore, *, interval_s: float = 0.0, heartbeat_s: float = LONG_S
) -> StatusWriter:
    return StatusWriter(
        store,
        Settings(home=Path("unused"), requested_by="me"),
        plan_id="p1",
        step="compile",
        target="cpu",
        interval_s=interval_s,
        heartbeat_s=heartbeat_s,
    )


def test_the_life_of_a_step(store: WatchedStore) -> None:
    assert read_status(store, "p1", "compile", "cpu") is None
    status = writer(store)
    assert not status.begun
    status.begin()
    assert status.begun
    running = read_status(store, "p1", "compile", "cpu")
    assert running is not None
    assert (running.state, running.attempt, running.exit_code) == ("running", 1, None)
    assert running.provenance.requested_by == "me"
    status.change(progress=0.5)
    status.log(["one", "two"])
    status.finish(state="done", exit_code=0, output_key="k")
    done = read_status(store, "p1", "compile", "cpu")
    assert done is not None
    assert (done.state, done.exit_code, done.progress) == ("done", 0, 0.5)
    assert done.log_tail == ("one", "two")
    assert done.started_at == running.started_at
    assert done.updated_at > running.updated_at


def test_attempts_are_counted(store: WatchedStore) -> None:
    for attempt in (1, 2, 3):
        status = writer(store)
        status.begin()
        status.begin()
        status.finish(state="failed", exit_code=30)
        assert store.written[-1].attempt == attempt


def test_a_broken_document_does_not_stop_a_step(store: WatchedStore) -> None:
    store.create("status/p1/compile/cpu.json", b"{")
    with pytest.raises(CorruptFile):
        read_status(store, "p1", "compile", "cpu")
    status = writer(store)
    status.begin()
    status.finish(state="done")
    assert store.written[-1].attempt == 1


def test_changes_are_written_without_being_asked(store: WatchedStore) -> None:
    status = writer(store)
    status.begin()
    status.change(reason="halfway")
    store.wait_for(2)
    assert store.written[1].reason == "halfway"
    status.stop()


def test_a_burst_of_changes_is_written_once(store: WatchedStore) -> None:
    status = writer(store, interval_s=LONG_S)
    status.begin()
    for n in range(1000):
        status.change(progress=n / 1000)
    status.finish(state="done")
    assert len(store.written) == 2


def test_a_silent_step_has_a_heartbeat(store: WatchedStore) -> None:
    status = writer(store, heartbeat_s=0.01)
    status.begin()
    store.wait_for(3)
    status.stop()
    first, *_, last = store.written
    assert last.updated_at > first.updated_at
    assert last.model_copy(update={"updated_at": first.updated_at}) == first


def test_after_stop_nothing_is_written(store: WatchedStore) -> None:
    status = writer(store, heartbeat_s=0.001)
    status.begin()
    status.stop()
    count = len(store.written)
    status.change(reason="late")
    assert len(store.written) == count


def test_a_full_disk_does_not_stop_the_heartbeat(store: WatchedStore) -> None:
    status = writer(store, heartbeat_s=0.01)
    status.begin()
    with store.another:
        store.full = True
        assert store.another.wait(60)
        store.full = False
    status.change(reason="room again")
    store.wait_for(2)
    status.stop()


def test_a_full_disk_shows_at_begin_and_end(store: WatchedStore) -> None:
    store.full = True
    status = writer(store)
    with pytest.raises(StorageFull):
        status.begin()
    with pytest.raises(StorageFull):
        status.finish(state="done")


def test_the_tail_is_bounded(store: WatchedStore) -> None:
    status = writer(store)
    status.log(f"line {n}" for n in range(1000))
    status.log(["x" * 100_000])
    status.finish(state="done")
    tail = store.written[-1].log_tail
    assert len(tail) == TAIL_LINES
    assert tail[-2] == "line 999"
    assert len(tail[-1]) == TAIL_LINE_CHARS


def test_names_are_checked(store: WatchedStore) -> None:
    with pytest.raises(BadInput):
        StatusWriter(store, Settings(home=Path("unused")), plan_id="../x", step="a", target="")


@given(st.text(), st.text())
def test_lines_are_clean_and_can_be_stored(text: str, more: str) -> None:
    for line in clean_lines(f"{text}\x1b[31m{more}\x1b[0m"):
        assert line.isprintable()
        line.encode()


def test_escapes_go_and_text_stays() -> None:
    assert clean_lines("\x1b[1;31mred\x1b[0m a\tb\r\n  ü  \n") == ["red a b", "  ü"]
    assert clean_lines("") == []
