"""Accuracy through lm-evaluation-harness, against the server's own HTTP interface."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainyard.documents.measurement import TaskScore
from trainyard.errors import BadInput, Refused
from trainyard.spec.model import AccuracyTask

CONCURRENCY = 8
"""Requests in flight; more does not help a server that runs fewer."""


def evaluate(
    task: AccuracyTask,
    *,
    folder: Path,
    base_url: str,
    served_model_name: str,
    model_dir: Path,
    max_model_len: int,
) -> TaskScore:
    """Run one task on a server and return its score.

    Args:
        task: what to run; `path` is relative to `folder`.
        folder: the task files of the plan.
        base_url: of the server.
        served_model_name: the name requests ask for.
        model_dir: where the tokenizer is.
        max_model_len: tokens that prompt and answer may have together.

    Raises:
        BadInput: the harness does not know the task, or the task does not give the metric.
        Refused: the harness failed.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = (folder / task.path).parent if task.path else None
    # Paths of data files in a task are relative to its folder; `datasets` asks the working folder.
    with contextlib.chdir(own or folder):
        try:
            manager = TaskManager(
                include_path=str(own) if own else None, include_defaults=own is None
            )
            if task.name not in manager.all_tasks:
                raise BadInput(
                    f"lm-evaluation-harness knows no task {task.name!r}.",
                    hint="Name one of its tasks, or give the `path` of a task file.",
                )
            generates = _output_types(manager, task.name) == {"generate_until"}
            results = simple_evaluate(
                model="local-completions",
                model_args={
                    "base_url": f"{base_url}/v1/completions",
                    "model": served_model_name,
                    "tokenizer": str(model_dir),
                    "tokenizer_backend": "huggingface",
                    # As clients do it: text, to which the server adds what the model wants before
                    # it. Log-likelihoods need to know where the prompt ends, hence tokens.
                    "tokenized_requests": not generates,
                    "num_concurrent": CONCURRENCY,
                    "max_length": max_model_len,
                },
                tasks=[task.name],
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                task_manager=manager,
                log_samples=False,
                batch_size=1,
            )
        except BadInput:
            raise
        except Exception as error:
            raise Refused(
                f"Accuracy task {task.name} failed: {type(error).__name__}: {error}",
                hint="The log of the measurement has the details.",
            ) from error
    return score_of(results or {}, task)


def score_of(results: Mapping[str, Any], task: AccuracyTask) -> TaskScore:
    """Return the score of `task` from the harness's results.

    Raises:
        BadInput: the results have no such metric; the message names those they have.
    """
    figures = results.get("results", {}).get(task.name, {})
    key = _metric_key(figures, task.metric)
    if key is None:
        known = sorted(
            name
            for name, value in figures.items()
            if isinstance(value, int | float) and "_stderr" not in name
        )
        raise BadInput(
            f"Accuracy task {task.name} gives no metric {task.metric!r}.",
            hint=f"It gives: {', '.join(known) or 'nothing'}.",
        )
    name, _, filtered = key.partition(",")
    stderr = figures.get(f"{name}_stderr,{filtered}")
    samples = results.get("n-samples", {}).get(task.name, {})
    return TaskScore(
        name=task.name,
        metric=task.metric,
        score=float(figures[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        samples=int(samples.get("effective", 0)),
        version=str(results.get("versions", {}).get(task.name, "")),
    )


def _metric_key(figures: Mapping[str, Any], metric: str) -> str | None:
    """Return the key of a metric: the harness appends a filter's name, mostly `none`."""
    candidates = [metric, f"{metric},none"]
    candidates += sorted(key for key in figures if key.startswith(f"{metric},"))
    for key in candidates:
        if isinstance(figures.get(key), int | float):
            return key
    return None


def _output_types(manager: Any, name: str) -> set[str]:
    """Return what kind of answers the task wants, or the tasks of that group."""
    return {str(task.OUTPUT_TYPE) for task in manager.load([name])["tasks"].values()}
