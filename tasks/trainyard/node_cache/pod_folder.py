"""The folder of one pod on its node: held while the pod lives, removed with it.

    python -m trainyard.node_cache.pod_folder /node/pods/UID

Restored files are hard links into the node cache, so they lie in a folder of the node and not in a
volume that Kubernetes takes away with the pod. This runs beside the pod's containers from before
the restore until after the server has ended, and does three things: it locks the pod's folder; it
removes the folders of pods whose lock nobody holds any more (a node that lost power, a sidecar that
was killed), since their links keep files in the cache that nobody needs; and it removes its own
folder when it is told to end.

A lock ends with its process, however that ends. A sidecar that was killed alone comes back within
minutes, so a folder counts as left over only after `GRACE_S` without a sign of life.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = "pod.lock"
"""In the folder; its time of change is the last sign of life."""
GRACE_S = 900.0
"""Longer than Kubernetes waits before it starts a container again (at most 5 minutes)."""
SIGN_OF_LIFE_S = 60.0
_GONE = ".gone"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Hold `folder`, which is made; yield its lock file."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with lock.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        os.utime(lock)
        yield lock


def remove_left_over(folders: Path, *, now: float) -> list[str]:
    """Remove the folders of pods that are gone; return their names.

    Args:
        folders: holds the folders of all pods of this node.
        now: seconds since 1970.
    """
    removed = []
    for folder in sorted(folders.iterdir()):
        if folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError):
            if _is_left_over(folder, now):
                remove(folder)
                removed.append(folder.name)
    return removed


def remove(folder: Path) -> None:
    """Remove a pod's folder, from everybody's sight first."""
    gone = folder.with_name(f"{folder.name.removesuffix(_GONE)}{_GONE}")
    if gone != folder:
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
    shutil.rmtree(gone)


def _is_left_over(folder: Path, now: float) -> bool:
    if folder.name.endswith(_GONE):
        return True
    lock = folder / LOCK
    if not lock.exists():
        # Its pod has just made it, or somebody else took it away halfway.
        return now - folder.stat().st_mtime > GRACE_S
    with lock.open("rb") as stream:
        if now - lock.stat().st_mtime <= GRACE_S:
            return False
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def keep(folder: Path, ended: threading.Event) -> None:
    """Hold `folder` until `ended`, then remove it; before, remove what others left over."""
    with held(folder) as lock:
        for name in remove_left_over(folder.parent, now=time.time()):
            log.info("The folder of pod %s, which is gone, was removed.", name)
        log.info("%s is held.", folder)
        while not ended.wait(SIGN_OF_LIFE_S):
            os.utime(lock)
        remove(folder)
    log.info("%s was removed.", folder)


def main() -> None:
    """Keep the folder that the only argument names, until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    keep(Path(sys.argv[1]), ended)


if __name__ == "__main__":
    main()
