"""Drivers of rollouts that are killed: a process that forks one attempt after the other.

As `tests.killed_download`: an attempt kills itself with SIGKILL at the n-th event, which is the
beginning or the end of a call that changes a file. Channel, route and wanted servers are files.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.kills import Events

from trainyard.rollout.rollouts import Kind
from trainyard.settings import Settings
from trainyard.wiring import open_rollout


def attempt(
    settings: dict[str, Any],
    kind: Kind,
    model: str,
    environment: str,
    release_id: str,
    run_id: str,
    die_at: int,
    report: str,
) -> None:
    """Begin a rollout, or go on with it, and drive it to its end, or die; report the outcome."""
    rollouts = open_rollout(Settings(**settings))
    Events(die_at).watch(in_folder=True)
    tick = rollouts.begin(
        kind=kind, model=model, environment=environment, release_id=release_id, run_id=run_id
    )
    while not (result := tick()).done:
        time.sleep(result.next_in_s)
    Path(report).write_text(json.dumps({"outcome": result.outcome, "summary": result.summary}))


def main() -> None:
    """Take jobs from standard input, one a line; answer each with the exit code of its attempt."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                attempt(**job)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
