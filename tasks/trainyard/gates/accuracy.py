"""What the accuracy gate expects: every task's score above its bound, and near stable's."""

from __future__ import annotations

from collections.abc import Iterator

from trainyard.documents.measurement import Measurement, TaskScore
from trainyard.gates.expectations import Expectation
from trainyard.gates.words import NO_BASELINE, ROUNDING_DIGITS, number
from trainyard.spec.model import AccuracyGate, AccuracyTask


def accuracy_expectations(
    gate: AccuracyGate, measurement: Measurement, baseline: Measurement | None
) -> tuple[Expectation, ...]:
    """Return what `gate` expects of `measurement`; `baseline` is the stable release's.

    A score that is no share of 1, such as a percentage, counts as missing.
    """
    return tuple(
        expectation
        for task in gate.tasks
        for expectation in _task_expectations(task, measurement, baseline)
    )


def _task_expectations(
    task: AccuracyTask, measurement: Measurement, baseline: Measurement | None
) -> Iterator[Expectation]:
    what = f"{task.name} {task.metric}"
    figure = f"{task.name}/{task.metric}"
    score = _find(measurement, task)
    observed, note = _usable(score)
    yield Expectation(figure, what, observed, f">= {number(task.min)}", minimum=task.min, note=note)
    if task.max_drop is None:
        return
    drop = number(task.max_drop)
    if baseline is None:
        yield Expectation(figure, what, observed, f">= stable - {drop}", skipped=NO_BASELINE)
        return
    stable = _find(baseline, task)
    if reason := _not_comparable(score, stable):
        yield Expectation(figure, what, observed, f">= stable - {drop}", skipped=reason)
    elif stable is not None:
        yield Expectation(
            figure,
            what,
            observed,
            f">= stable ({number(stable.score)}) - {drop}",
            minimum=round(max(0.0, stable.score - task.max_drop), ROUNDING_DIGITS),
            note=note,
        )


def _find(measurement: Measurement, task: AccuracyTask) -> TaskScore | None:
    """Return the score of `task`; None if there is none, or more than one to choose from."""
    found = [
        score
        for score in measurement.accuracy
        if score.name == task.name and score.metric == task.metric
    ]
    return found[0] if len(found) == 1 else None


def _usable(score: TaskScore | None) -> tuple[float | None, str]:
    """Return the score, and how sure it is or why it cannot be used."""
    if score is None:
        return None, "The measurement has no single score for this task and metric."
    if score.samples < 1:
        return None, "The task was scored on no samples."
    if not 0 <= score.score <= 1:
        return None, f"The score is {number(score.score)}, which is not a share of 1."
    error = "" if score.stderr is None else f", standard error {number(score.stderr)}"
    return score.score, f"{score.samples} samples{error}."


def _not_comparable(score: TaskScore | None, stable: TaskScore | None) -> str:
    """Return why the stable release's score says nothing about this one, or nothing if it does."""
    if stable is None:
        return "The stable release was not scored on this task and metric."
    if _usable(stable)[0] is None:
        return "The stable release has no usable score for this task."
    if score is not None and score.version != stable.version:
        return (
            f"The stable release was scored on version {stable.version or 'unknown'} of the task, "
            f"this one on version {score.version or 'unknown'}."
        )
    return ""
