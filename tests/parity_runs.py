"""Compares one server's answers with the references of several models, in one process.

    python -m tests.parity_runs < JOB

runs in the serving environment. What was served and what a reference says are compared both ways
alike: the answers of a faithful server are to the reference of tampered weights what the answers of
a tampered server are to the faithful reference. So many kinds of damage take one start of vLLM.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainyard.documents.base import Frozen
from trainyard.documents.parity import ParityFigures, ReferenceSettings, ServedAnswer
from trainyard.gates.accuracy import parity_expectations
from trainyard.measure.parity import compare
from trainyard.measure.reference import Rescorer, make_reference
from trainyard.spec.model import ParityCheck

REPOSITORY = Path(__file__).parents[1]
PYTHON = REPOSITORY / ".venv-serve" / "bin" / "python"


class Run(Frozen):
    """Answers to be compared with one reference."""

    name: str
    model: str
    """Folder of the model that the reference is made of."""
    served_dtype: str = "bfloat16"
    """Number format that the target says."""
    sets: int
    """So many sets of prompts are compared, each by itself, from the first."""


class Runs(Frozen):
    """All that one process compares."""

    check: ParityCheck
    set_size: int
    """Prompts of a set."""
    prompts: tuple[str, ...]
    served: tuple[ServedAnswer, ...]
    runs: tuple[Run, ...]


def sums(count: int, seed: int) -> list[str]:
    """Return prompts for the demonstration model."""
    chosen = random.Random(seed)
    return [f"{chosen.randrange(100):02d}+{chosen.randrange(100):02d}=" for _ in range(count)]


def figures_of(runs: Runs) -> dict[str, list[ParityFigures]]:
    """Compare in the serving environment and return the figures of each set, by run."""
    done = subprocess.run(
        [PYTHON, "-m", "tests.parity_runs"],
        cwd=REPOSITORY,
        input=runs.model_dump_json(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=3000,
    )
    found: dict[str, list[ParityFigures]] = {}
    for line in done.stdout.splitlines():
        answer = json.loads(line)
        found[answer["name"]] = [ParityFigures.model_validate(each) for each in answer["figures"]]
    return found


def broken(check: ParityCheck, figures: ParityFigures) -> list[str]:
    """Return which of the check's expectations these figures do not keep."""
    found = []
    for each in parity_expectations(check, figures):
        low = -float("inf") if each.minimum is None else each.minimum
        high = float("inf") if each.maximum is None else each.maximum
        if not low <= each.usable <= high:
            found.append(each.figure.removeprefix("parity/"))
    return found


def _compare(runs: Runs, run: Run) -> list[ParityFigures]:
    check, model = runs.check, Path(run.model)
    count = run.sets * runs.set_size
    settings = ReferenceSettings(
        dtype=check.dtype,
        served_dtype=run.served_dtype,
        prompts_digest="",
        max_tokens=check.max_tokens,
    )
    reference = make_reference(model, runs.prompts[:count], settings, checkpoint_digest=run.name)
    found = []
    with Rescorer(model, check.dtype) as rescorer:
        for start in range(0, count, runs.set_size):
            part = slice(start, start + runs.set_size)
            answers = reference.answers[part]
            comparison = compare(
                reference.model_copy(update={"answers": answers}),
                runs.served[part],
                key=run.name,
                near_tie=check.near_tie,
                top_logprobs=check.top_logprobs,
                rescore=rescorer.positions,
            )
            found.append(comparison.figures)
    return found


def main(arguments: Sequence[str]) -> None:
    """Read the job, compare, print one JSON object for each run."""
    runs = Runs.model_validate_json(sys.stdin.read())
    for run in runs.runs:
        figures = [each.model_dump(mode="json") for each in _compare(runs, run)]
        print(json.dumps({"name": run.name, "figures": figures}), flush=True)


if __name__ == "__main__":
    main(sys.argv)
