"""Accuracy through lm-evaluation-harness, against the server's own HTTP interface."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainyard.documents.measurement import TaskScore
from trainyard.documents.parity import TaskSamples
from trainyard.errors import BadInput, Refused
from trainyard.spec.model import AccuracyTask
from trainyard.spec.tasks import GENERATE_INSTEAD, GENERATES, needs_logprobs

CONCURRENCY = 8
"""Requests in flight; more does not help a server that runs fewer."""

MAX_SAMPLES = 50_000
"""Samples of a task whose scores are kept; of a larger task only the score is."""

_DIGITS = 8
"""Hex digits of a digest that tell samples apart which have the same number."""


def evaluate(
    task: AccuracyTask,
    *,
    folder: Path,
    base_url: str,
    served_model_name: str,
    model_dir: Path,
    max_model_len: int,
    prompt_logprobs: bool = True,
) -> tuple[TaskScore, TaskSamples | None]:
    """Run one task on a server and return its score, and the scores of its samples.

    Args:
        task: what to run; `path` is relative to `folder`.
        folder: the task files of the plan.
        base_url: of the server.
        served_model_name: the name requests ask for.
        model_dir: where the tokenizer is.
        max_model_len: tokens that prompt and answer may have together.
        prompt_logprobs: does the server return log-probs of prompts?

    Raises:
        BadInput: the harness does not know the task, the server cannot answer such a task, or the
            task does not give the metric.
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
            outputs = _output_types(manager, task.name)
            generates = outputs == {GENERATES}
            if not (generates or prompt_logprobs):
                raise BadInput(needs_logprobs(task.name, outputs), hint=GENERATE_INSTEAD)
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
                log_samples=True,
                batch_size=1,
            )
        except BadInput:
            raise
        except Exception as error:
            raise Refused(
                f"Accuracy task {task.name} failed: {type(error).__name__}: {error}",
                hint="The log of the measurement has the details.",
            ) from error
    score = score_of(results or {}, task)
    return score, samples_of(results or {}, task)


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


def samples_of(results: Mapping[str, Any], task: AccuracyTask) -> TaskSamples | None:
    """Return the scores of the samples of `task`, or of the tasks of that group.

    None if there are none, too many, or the metric has no score for a single sample (such as
    perplexity or BLEU of a whole corpus).
    """
    figures = results.get("results", {}).get(task.name, {})
    name, _, chosen = (_metric_key(figures, task.metric) or task.metric).partition(",")
    scores: dict[str, float] = {}
    for inner, logged in results.get("samples", {}).items():
        for sample in logged:
            value = sample.get(name)
            if sample.get("filter", chosen) != chosen or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                continue
            digests = (str(sample.get(key, ""))[:_DIGITS] for key in ("prompt_hash", "target_hash"))
            prefix = f"{inner}/" if inner != task.name else ""
            scores[f"{prefix}{sample['doc_id']}-{'-'.join(digests)}"] = float(value)
    if not 0 < len(scores) <= MAX_SAMPLES:
        return None
    return TaskSamples(name=task.name, metric=task.metric, scores=scores)


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
