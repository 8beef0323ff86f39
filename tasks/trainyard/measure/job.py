"""The process that measures: it puts questions and load on a server and reports the figures.

    python -m trainyard.measure.job

A process of its own, because lm-evaluation-harness and vLLM's benchmark print, set up logging and
change folders as they please, and because their imports take as long as the server's start, beside
which they can run. Standard input: the job as one line of JSON, once the server answers; when it
closes, this process ends. Standard output: events, one JSON object a line (`Ready`, `Progress`,
`Made`, `Outcome`, `Failure`). Standard error: all that the libraries say.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Literal, TextIO

from pydantic import Field, TypeAdapter

from trainyard.documents.base import Frozen
from trainyard.documents.behaviour import Behaviour
from trainyard.documents.measurement import LevelFigures, TaskScore
from trainyard.documents.parity import (
    AnswerFigures,
    ParityFigures,
    Reference,
    ReferenceSettings,
    TaskSamples,
)
from trainyard.errors import BadInput, TrainyardError
from trainyard.measure.behaviour.run import BehaviourJob, run_behaviour
from trainyard.measure.parity import Comparison, collect, compare
from trainyard.spec.model import AccuracyTask, LoadLevel


class ParityJob(Frozen):
    """The parity check of a job."""

    prompts: tuple[str, ...]
    settings: ReferenceSettings
    checkpoint_digest: str
    near_tie: float
    """Nats."""
    top_logprobs: int
    """Tokens whose log-probs the lane returns at each position; 0: none."""
    key: str
    """Of the reference."""
    reference: Reference | None = None
    """None: it is to be made."""
    imported: bool = False
    """The model is too large to be asked again here."""


class Job(Frozen):
    """What to measure."""

    base_url: str
    served_model_name: str
    model_dir: str
    max_model_len: int
    assets_dir: str
    """The task files of the plan."""
    tasks: tuple[AccuracyTask, ...]
    levels: tuple[LoadLevel, ...]
    prompt_logprobs: bool = True
    """Does the lane return log-probs of prompts? Without them only generating tasks can run."""
    parity: ParityJob | None = None
    behaviour: BehaviourJob | None = None
    """None: no check of the behaviour is to be made."""


class Ready(Frozen):
    """Everything is imported."""

    event: Literal["ready"] = "ready"


class Progress(Frozen):
    """What is measured now."""

    event: Literal["progress"] = "progress"
    fraction: float
    message: str


class Made(Frozen):
    """A reference was made, which is worth keeping whatever becomes of the measurement."""

    event: Literal["made"] = "made"
    reference: Reference


class Outcome(Frozen):
    """All figures; the last event of a measurement that worked."""

    event: Literal["outcome"] = "outcome"
    accuracy: tuple[TaskScore, ...]
    latency: tuple[LevelFigures, ...]
    samples: tuple[TaskSamples, ...] = ()
    """Of the accuracy tasks."""
    parity: ParityFigures | None = None
    answers: tuple[AnswerFigures, ...] = ()
    """Of the parity check."""
    behaviour: Behaviour | None = None


class Failure(Frozen):
    """Why there are no figures; the last event of a measurement that failed."""

    event: Literal["failure"] = "failure"
    bad_input: bool
    """The spec is wrong; else the model or the server is."""
    message: str
    hint: str


Event = Annotated[Ready | Progress | Made | Outcome | Failure, Field(discriminator="event")]
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


def main() -> int:
    """Serve one job; returns 0 if it was measured, else an exit code of `trainyard.errors`."""
    # Whatever prints from here on prints to standard error.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        _prepare()
        _send(events, Ready())
        line = sys.stdin.readline()
        if not line:
            return 0
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
        _send(events, measure(Job.model_validate_json(line), events))
    except TrainyardError as error:
        bad_input = isinstance(error, BadInput)
        _send(events, Failure(bad_input=bad_input, message=error.message, hint=error.hint))
        return error.exit_code
    return 0


def measure(job: Job, events: TextIO) -> Outcome:
    """Measure everything of `job`, reporting progress to `events`.

    Accuracy comes first: its requests also warm the server up. Latency comes last, so that a
    server that loses its breath in a behaviour check shows it.
    """
    from pathlib import Path

    from trainyard.measure.accuracy import evaluate
    from trainyard.measure.latency import run_level

    checks = (job.parity is not None) + (job.behaviour is not None)
    parts = len(job.tasks) + len(job.levels) + checks
    server = {"base_url": job.base_url, "served_model_name": job.served_model_name}
    model_dir = Path(job.model_dir)
    done = 0

    def tell(what: str, fraction: float = 0.0) -> None:
        _send(events, Progress(fraction=(done + fraction) / parts, message=what))

    scores: list[TaskScore] = []
    samples: list[TaskSamples] = []
    for task in job.tasks:
        tell(f"accuracy: {task.name}")
        score, of_task = evaluate(
            task,
            folder=Path(job.assets_dir),
            model_dir=model_dir,
            max_model_len=job.max_model_len,
            prompt_logprobs=job.prompt_logprobs,
            **server,
        )
        scores.append(score)
        samples += [of_task] if of_task is not None else []
        done += 1
    parity: Comparison | None = None
    if job.parity is not None:
        parity = _parity(job.parity, job, events, lambda share, what: tell(what, share))
        done += 1
    behaviour = None
    if job.behaviour is not None:
        tell("behaviour")
        behaviour = run_behaviour(
            job.behaviour,
            model_dir=model_dir,
            assets_dir=Path(job.assets_dir),
            max_model_len=job.max_model_len,
            **server,
        )
        done += 1
    levels: list[LevelFigures] = []
    for level in job.levels:
        tell(f"latency: level {level.name}")
        levels.append(run_level(level, model_dir=model_dir, **server))
        done += 1
    return Outcome(
        accuracy=tuple(scores),
        latency=tuple(levels),
        samples=tuple(samples),
        parity=None if parity is None else parity.figures,
        answers=() if parity is None else parity.answers,
        behaviour=behaviour,
    )


def _parity(
    parity: ParityJob, job: Job, events: TextIO, tell: Callable[[float, str], None]
) -> Comparison:
    """Compare the server's answers with the reference, which is made if there is none."""
    from pathlib import Path

    from trainyard.measure.reference import Rescorer, make_reference

    model_dir = Path(job.model_dir)
    reference = parity.reference
    if reference is None:
        reference = make_reference(
            model_dir,
            parity.prompts,
            parity.settings,
            checkpoint_digest=parity.checkpoint_digest,
            tell=tell,
        )
        _send(events, Made(reference=reference))
    tell(0.9, "parity: asking the server")
    served = collect(
        parity.prompts,
        base_url=job.base_url,
        served_model_name=job.served_model_name,
        max_tokens=parity.settings.max_tokens,
        top_logprobs=parity.top_logprobs,
    )
    with Rescorer(model_dir, parity.settings.dtype) as rescorer:
        return compare(
            reference,
            served,
            key=parity.key,
            near_tie=parity.near_tie,
            top_logprobs=parity.top_logprobs,
            rescore=None if parity.imported else rescorer.positions,
            reused=parity.reference is not None,
        )


def _prepare() -> None:
    """Import everything that takes long, and keep it quiet.

    Raises:
        BadInput: the serving environment is incomplete.
    """
    # As in `trainyard.lanes.cpu_server`: there are thousands of modules to import.
    gc.set_threshold(50_000, 20, 20)
    os.environ.setdefault("TQDM_DISABLE", "1")
    # No proxy of the environment may come between us and loopback.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    try:
        import datasets
        import lm_eval.evaluator
        import lm_eval.models.openai_completions
        import lm_eval.tasks  # noqa: F401
        import vllm.benchmarks.serve  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f"The serving environment ({sys.executable}) cannot measure: {error}.",
            hint="Run `make setup`, or install the extra `serve` there.",
        ) from error
    datasets.disable_progress_bars()


def _send(events: TextIO, event: Ready | Progress | Made | Outcome | Failure) -> None:
    events.write(event.model_dump_json() + "\n")
    events.flush()


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
