"""What is looked at right before a server starts from its bundle, wherever it starts.

Every place that starts servers calls this with the restored folder: the steps, the keepers of this
machine, the restore step of a pod.
"""

from __future__ import annotations

from pathlib import Path

from trainyard.errors import Refused
from trainyard.lanes.neuron_device import driver_version
from trainyard.lanes.neuron_support import driver_problem
from trainyard.lanes.protocol import Lane
from trainyard.spec.model import Target


def refuse_misfit(lane: Lane, target: Target, cache_dir: Path) -> None:
    """Raise Refused if a server of `target` could not start here from `cache_dir` alone.

    The message names every reason: code for other shapes or cores than the target's, and a driver
    that is too old for the target's SDK.
    """
    problems = [*lane.misfits(target, cache_dir)]
    driver = driver_version()
    if target.neuron is not None and driver:
        problem = driver_problem(target.neuron.sdk, driver)
        problems += [problem] if problem else []
    if problems:
        listed = f" {problems[0]}" if len(problems) == 1 else "\n  " + "\n  ".join(problems)
        raise Refused(
            f"A server of target {target.name} cannot start from its bundle here:{listed}",
            hint="A start that compiles instead would take an hour and serve something unproven.",
        )
