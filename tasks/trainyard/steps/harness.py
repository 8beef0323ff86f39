"""Does lm-evaluation-harness know the tasks of a spec, and can the lanes answer them?

Asked when a release is planned and the serving environment is on the same machine. Where steps are
pods it is in their image: then the step `tasks` asks there, before any device is taken. The
measuring process finds out once more in any case.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainyard.errors import BadInput, Transient
from trainyard.serving.process import base_environment
from trainyard.spec.tasks import GENERATE_INSTEAD, GENERATES, needs_logprobs

_TIMEOUT_S = 900.0
"""Data sets may have to be fetched."""


def harness_problems(names: Sequence[str], python: Path, silent: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the harness's own tasks, each as sentences.

    Args:
        names: of the tasks.
        python: the serving interpreter.
        silent: names of targets whose servers return no log-probs of prompts.

    Raises:
        BadInput: the serving environment cannot be asked.
        Transient: it did not answer in time.
    """
    yield from problems_of(ask_harness(names, python) if names else (), silent)


def problems_of(answers: Iterable[dict[str, Any]], silent: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with tasks of which the harness said this (see `ask_harness`)."""
    for answer in answers:
        name, kinds = str(answer["name"]), set(answer["output_types"])
        if answer["problem"]:
            yield (
                f"Accuracy task {name}: {answer['problem']} Correct its name, give the `path` of a "
                "task file, or make its data set reachable from here (HF_HOME, HF_ENDPOINT)."
            )
        elif silent and kinds != {GENERATES}:
            yield f"{needs_logprobs(name, kinds)} (target {', '.join(silent)}) {GENERATE_INSTEAD}"


def ask_harness(names: Sequence[str], python: Path) -> list[dict[str, Any]]:
    """Return what the harness of a serving environment says of tasks.

    For each its `name`, the kinds of answers it wants (`output_types`), and its `problem`, empty if
    there is none.

    Raises:
        BadInput: the serving environment cannot be asked.
        Transient: it did not answer in time.
    """
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
