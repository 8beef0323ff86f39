"""Drivers of rollouts that are killed.

An attempt kills itself with SIGKILL at the n-th event (`tests.kills`), which is the
beginning or the end of a call that changes a file. Channel, route and wanted servers are files.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.kills import Events, take_jobs

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
) -> int:
    """Begin a rollout, or go on with it, and drive it to its end, or die; report the outcome."""
    rollouts = open_rollout(Settings(**settings))
    Events(die_at).watch(in_folder=True)
    tick = rollouts.begin(
        kind=kind, model=model, environment=environment, release_id=release_id, run_id=run_id
    )
    while not (result := tick()).done:
        time.sleep(result.next_in_s)
    Path(report).write_text(json.dumps({"outcome": result.outcome, "summary": result.summary}))
    return 0


if __name__ == "__main__":
    take_jobs(attempt)
