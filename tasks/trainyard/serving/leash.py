"""Run a command that must not outlive its parent.

    python -m trainyard.serving.leash COMMAND …

The parent keeps the write end of our standard input open. When it closes, for whatever reason
(`kill -9` included), the command and everything it started are stopped. SIGTERM and SIGINT are
passed on; the exit code is the command's (128 + n for a signal n).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

_GRACE_S = 10.0
"""Seconds between the polite and the forced end once the parent is gone."""


def main(command: Sequence[str]) -> int:
    """Run `command` on the leash; the caller made us the leader of our own session."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)

    parent_gone = threading.Event()

    def watch_parent() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        parent_gone.set()
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
        _end_session()

    threading.Thread(target=watch_parent, name="parent", daemon=True).start()
    code = child.wait()
    if parent_gone.is_set():
        _end_session()
    return code if code >= 0 else 128 - code


def _end_session() -> None:
    """Kill everything that the command left behind, and this process with it."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
