"""Does lm-evaluation-harness know the tasks of a spec, and can the lanes answer them?

Asked when a release is planned and the serving environment is on the same machine. Otherwise, and
once more in any case, the measuring process finds out.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainyard.errors import BadInput, Transient
from trainyard.serving.process import base_environment
from trainyard.spec.model import AccuracyTask
from trainyard.spec.tasks import GENERATE_INSTEAD, GENERATES, needs_logprobs

_TIMEOUT_S = 900.0
"""Data sets may have to be fetched."""


def harness_problems(
    tasks: Sequence[AccuracyTask], python: Path, silent: Sequence[str]
) -> Iterator[str]:
    """Yield what is wrong with the harness's own tasks, each as sentences.

    Args:
        tasks: those of the spec; the ones with a file of their own are left out.
        python: the serving interpreter.
        silent: names of targets whose servers return no log-probs of prompts.

    Raises:
        BadInput: the serving environment cannot be asked.
        Transient: it did not answer in time.
    """
    names = [task.name for task in tasks if task.path is None]
    for answer in _ask(names, python) if names else ():
        name, kinds = str(answer["name"]), set(answer["output_types"])
        if answer["problem"]:
            yield (
                f"Accuracy task {name}: {answer['problem']} Correct its name, give the `path` of a "
                "task file, or make its data set reachable from here (HF_HOME, HF_ENDPOINT)."
            )
        elif silent and kinds != {GENERATES}:
            yield f"{needs_logprobs(name, kinds)} (target {', '.join(silent)}) {GENERATE_INSTEAD}"


def _ask(names: Sequence[str], python: Path) -> list[dict[str, Any]]:
    """Return what the harness says about its tasks."""
    own = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    try:
        done = subprocess.run(
            [str(python.absolute()), "-P", "-m", "trainyard.measure.tasks", *names],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**base_environment(), **own},
            check=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise Transient(
            f"lm-evaluation-harness did not load its tasks within {_TIMEOUT_S:.0f} s."
        ) from error
    except OSError as error:
        raise BadInput(
            f"The serving environment's Python ({python}) cannot be run: {error.strerror}.",
            hint="Run `make setup`, or set TRAINYARD_SERVE_PYTHON to a Python that has vLLM.",
        ) from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(
            f"The serving environment ({python}) cannot be asked about accuracy tasks: {said}",
            hint="Run `make setup`, or install the extra `serve` there.",
        ) from error
    return [json.loads(line) for line in done.stdout.splitlines()]
