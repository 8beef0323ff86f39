"""The folder of a pod lives as long as its pod, and no longer than that by much."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainyard.node_cache.pod_folder import GRACE_S, LOCK, held, keep, remove, remove_left_over


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def old(folder: Path) -> Path:
    """Return a pod's folder without a sign of life for long."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text("w")
    lock = folder / LOCK
    lock.touch()
    os.utime(lock, (1, 1))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return tmp_path / "pods"


def test_what_a_dead_pod_left_is_removed(folders: Path) -> None:
    old(folders / "dead")
    assert remove_left_over(folders, now=time.time()) == ["dead"]
    assert list(folders.iterdir()) == []


def test_a_folder_that_is_held_stays_however_old_its_sign_of_life(folders: Path) -> None:
    folder = old(folders / "alive")
    with held(folder) as lock:
        os.utime(lock, (1, 1))
        assert remove_left_over(folders, now=time.time()) == []
    assert (folder / "model" / "weights").exists()


def test_a_sidecar_that_is_being_started_again_finds_its_folder(folders: Path) -> None:
    folder = old(folders / "restarting")
    os.utime(folder / LOCK, (1000, 1000))
    assert remove_left_over(folders, now=1000 + GRACE_S) == []
    assert remove_left_over(folders, now=1001 + GRACE_S) == ["restarting"]
    assert not folder.exists()


def test_a_removal_that_was_cut_is_finished(folders: Path) -> None:
    half = old(folders / "dead.gone")
    (half / LOCK).unlink()
    assert remove_left_over(folders, now=time.time()) == ["dead.gone"]
    assert not half.exists()


def test_a_folder_that_was_just_made_is_left_alone(folders: Path) -> None:
    (folders / "new").mkdir(parents=True)
    assert remove_left_over(folders, now=time.time()) == []
    assert remove_left_over(folders, now=time.time() + 2 * GRACE_S) == ["new"]


def test_links_and_files_are_nobody_s_folder(folders: Path, tmp_path: Path) -> None:
    folders.mkdir()
    elsewhere = old(tmp_path / "elsewhere")
    (folders / "link").symlink_to(elsewhere)
    (folders / "file").write_text("x")
    assert remove_left_over(folders, now=time.time()) == []
    assert (elsewhere / "model").exists()


def test_a_folder_is_removed_although_an_earlier_removal_left_a_part(folders: Path) -> None:
    folder = old(folders / "pod")
    old(folders / "pod.gone")
    remove(folder)
    assert list(folders.iterdir()) == []


def test_the_keeper_removes_its_folder_at_its_end_and_those_of_the_dead_at_its_start(
    folders: Path,
) -> None:
    old(folders / "dead")
    ended = threading.Event()
    keeper = threading.Thread(target=keep, args=(folders / "mine", ended))
    keeper.start()
    wait_for(lambda: (folders / "mine" / LOCK).exists())
    # A removal is two steps: out of sight, then away.
    wait_for(lambda: [each.name for each in folders.iterdir()] == ["mine"])
    assert remove_left_over(folders, now=time.time() + 2 * GRACE_S) == []
    ended.set()
    keeper.join(30)
    assert list(folders.iterdir()) == []


def test_sigterm_ends_it_cleanly_and_sigkill_leaves_the_folder_to_the_next(folders: Path) -> None:
    def run(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "trainyard.node_cache.pod_folder", str(folders / name)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for((folders / name / LOCK).exists)
        return process

    one, two = run("one"), run("two")
    one.kill()
    one.wait(30)
    assert (folders / "one").exists()
    two.send_signal(signal.SIGTERM)
    assert two.wait(30) == 0
    assert not (folders / "two").exists()
    assert remove_left_over(folders, now=time.time() + 2 * GRACE_S) == ["one"]
