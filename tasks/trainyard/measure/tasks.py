"""Asks lm-evaluation-harness about tasks before anything is measured.

    python -m trainyard.measure.tasks NAME...

loads each of the harness's own tasks, with its data set, and prints one JSON object a line: `name`,
`output_types`, and `problem` (empty if there is none). Runs in the serving environment.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any


def main() -> int:
    """Look at the tasks that are named on the command line; return 0."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in sys.argv[1:]:
        answers.write(json.dumps({"name": name, **look(manager, name)}) + "\n")
        answers.flush()
    return 0


def look(manager: Any, name: str) -> dict[str, Any]:
    """Return the kinds of answers that a task wants, and what is wrong with it."""
    if name not in manager.all_tasks:
        return {"output_types": [], "problem": "lm-evaluation-harness knows no such task."}
    try:
        tasks = manager.load([name])["tasks"].values()
    except Exception as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        return {
            "output_types": [],
            "problem": f"It cannot be loaded with its data set: {type(error).__name__}: {said}",
        }
    return {"output_types": sorted({str(task.OUTPUT_TYPE) for task in tasks}), "problem": ""}


if __name__ == "__main__":
    raise SystemExit(main())
