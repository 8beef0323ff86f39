"""What the accuracy gate expects: scores above their bounds, not worse than stable's, and parity.

A drop from the stable release is looked at twice. The drop that was *seen* must not be more than
`max_drop`. And the samples should *prove* that it is not: that is non-inferiority, and a score that
is only as good by luck does not show it (`trainyard.gates.comparison`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainyard.documents.measurement import Measurement, TaskScore
from trainyard.documents.parity import Divergence, ParityFigures, Samples
from trainyard.errors import BadInput
from trainyard.gates.comparison import Difference, paired_difference, unpaired_difference
from trainyard.gates.expectations import Expectation
from trainyard.gates.words import NO_BASELINE, ROUNDING_DIGITS, number
from trainyard.spec.model import PARITY_LOGPROBS, AccuracyGate, AccuracyTask, Bound, ParityCheck

_FEW_IN_COMMON = 0.9
"""Share of the samples that should be shared with the stable release."""


@dataclass(frozen=True)
class Baseline:
    """What a candidate is compared with."""

    measurement: Measurement | None = None
    """The stable release's; None: there is none."""
    samples: Samples | None = None
    """Those of its measurement, where they are kept."""
    why_none: str = NO_BASELINE
    """Why there is no measurement."""


def accuracy_expectations(
    gate: AccuracyGate,
    measurement: Measurement,
    baseline: Baseline,
    samples: Samples | None = None,
) -> tuple[Expectation, ...]:
    """Return what `gate` expects of `measurement`.

    A score that is no share of 1, such as a percentage, counts as missing.

    Args:
        gate: the spec's.
        measurement: of the candidate.
        baseline: the stable release's.
        samples: those of the candidate's measurement, where they are kept.

    Raises:
        BadInput: a bound of the spec has neither `min` nor `max`.
    """
    tasks = (
        expectation
        for task in gate.tasks
        for expectation in _task_expectations(task, measurement, baseline, samples)
    )
    parity = () if gate.parity is None else parity_expectations(gate.parity, measurement.parity)
    return (*tasks, *parity)


def parity_expectations(check: ParityCheck, figures: ParityFigures | None) -> Iterator[Expectation]:
    """Yield what the parity check expects: its bounds, and that prompts mean the same tokens.

    Raises:
        BadInput: a bound has neither `min` nor `max`.
    """
    observed, note = _usable_share(figures)
    yield Expectation(
        "parity/prompt_agreement",
        "parity: prompts cut into the reference's tokens",
        observed,
        ">= 1",
        minimum=1.0,
        note=note if observed is None else _tokenizer_note(observed),
    )
    for metric, bound in check.bounds.items():
        yield _parity_expectation(metric, bound, figures)


def _parity_expectation(metric: str, bound: Bound, figures: ParityFigures | None) -> Expectation:
    if bound.min is None and bound.max is None:
        raise BadInput(
            f"The bound of parity {metric} has neither min nor max.",
            hint="Give the spec's bound a limit, or remove it.",
        )
    words = [f">= {number(bound.min)}"] if bound.min is not None else []
    words += [f"<= {number(bound.max)}"] if bound.max is not None else []
    observed, note = _parity_figure(metric, figures)
    silent = figures is not None and not figures.top_logprobs and metric in PARITY_LOGPROBS
    return Expectation(
        f"parity/{metric}",
        f"parity: {metric}",
        observed,
        " and ".join(words),
        minimum=bound.min,
        maximum=bound.max,
        severity=bound.severity,
        note=note,
        skipped="The lane returns no log-probs for this target." if silent else "",
    )


def _usable_share(figures: ParityFigures | None) -> tuple[float | None, str]:
    if figures is None:
        return None, "The measurement has no parity figures."
    if figures.prompts < 1:
        return None, "No prompt was asked."
    return figures.prompt_agreement, ""


def _tokenizer_note(share: float) -> str:
    if share == 1:
        return ""
    return "The server cuts prompts into other tokens than the checkpoint's tokenizer does."


def _parity_figure(metric: str, figures: ParityFigures | None) -> tuple[float | None, str]:
    """Return a figure of the parity check, and what to know about it or why there is none."""
    if figures is None:
        return None, "The measurement has no parity figures."
    if figures.compared < 1:
        return None, "No position was compared."
    value = {
        "agreement": figures.agreement,
        "excused": figures.excused_share,
        "exact_answers": figures.exact_answers,
        "first_divergence": float(figures.first_divergence),
        "logprob_error": figures.logprob_error,
        "error_ratio": figures.error_ratio,
    }.get(metric)
    if metric == "error_ratio" and value is not None:
        return value, _ratio_note(figures)
    if metric == "logprob_error":
        return value, "Nats, root mean square." if value is not None else "No log-probs came back."
    if value is None:
        return None, "No log-probs came back, or the reference does not know the rounding."
    return value, _counts(figures)


def _ratio_note(figures: ParityFigures) -> str:
    error, rounding = figures.logprob_error, figures.rounding_error
    if error is None or rounding is None:
        return ""
    return (
        f"Error {number(error)} nats, of which the served number format's rounding explains "
        f"{number(rounding)}."
    )


def _counts(figures: ParityFigures) -> str:
    words = f"{figures.compared} positions, {figures.excused} excused as near ties"
    words += f", {figures.uncompared} not compared" if figures.uncompared else ""
    if figures.divergences:
        words += f"; the first divergence: {_place(figures.divergences[0])}"
    return f"{words}."


def _place(first: Divergence) -> str:
    served = "an end" if first.served is None else f"token {first.served}"
    expected = "an end" if first.expected is None else f"token {first.expected}"
    gap = "" if first.gap is None else f" ({number(first.gap)} nats ahead of the next)"
    return (
        f"prompt {first.prompt + 1}, position {first.position}, {served} instead of {expected}{gap}"
    )


def _task_expectations(
    task: AccuracyTask, measurement: Measurement, baseline: Baseline, samples: Samples | None
) -> Iterator[Expectation]:
    what = f"{task.name} {task.metric}"
    figure = f"{task.name}/{task.metric}"
    score = _find(measurement, task)
    observed, note = _usable(score)
    yield Expectation(figure, what, observed, f">= {number(task.min)}", minimum=task.min, note=note)
    if task.max_drop is None:
        return
    drop = number(task.max_drop)
    if baseline.measurement is None:
        yield Expectation(figure, what, observed, f">= stable - {drop}", skipped=baseline.why_none)
        return
    stable = _find(baseline.measurement, task)
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
        if score is not None and observed is not None:
            yield _proof(
                task, score, stable, _scores(samples, task), _scores(baseline.samples, task)
            )


def _proof(
    task: AccuracyTask,
    score: TaskScore,
    stable: TaskScore,
    own: dict[str, float],
    others: dict[str, float],
) -> Expectation:
    """Return the expectation that the samples prove the drop to be within its margin."""
    margin = task.max_drop or 0.0
    difference = paired_difference(own, others, margin)
    if difference is None:
        difference = unpaired_difference(
            score.score, score.samples, stable.score, stable.samples, margin
        )
    return Expectation(
        f"{task.name}/{task.metric}/proven",
        f"{task.name} {task.metric}: proven difference from stable",
        difference.lower,
        f">= -{number(margin)}",
        minimum=-margin,
        severity="critical" if task.on_undecided == "fail" else "warning",
        note=_proof_note(difference, margin, len(own), bool(own) and bool(others)),
        paired=True,
    )


def _proof_note(difference: Difference, margin: float, own: int, kept: bool) -> str:
    """Return how the difference was found, and what would prove the margin if it is not proven."""
    seen = f"{difference.estimate:+.4g} seen"
    if difference.method == "unpaired":
        why = "they have no samples in common" if kept else "the scores of single samples are lost"
        how = f"{seen} on {difference.samples} samples, not paired because {why} (Newcombe's bound)"
    else:
        bound = "Tango's bound" if difference.method == "Tango" else "paired bootstrap"
        how = (
            f"{seen} on {difference.samples} paired samples, {difference.discordant} of which "
            f"differ ({bound})"
        )
        if difference.samples < _FEW_IN_COMMON * own:
            how += f"; {own - difference.samples} samples have no partner"
    if difference.lower >= -margin:
        return f"{how}."
    if not difference.needed:
        return f"{how}. A margin of {number(margin)} cannot be proven by any number of samples."
    return (
        f"{how}. Not enough samples to prove it: that takes about {difference.needed} "
        "if the two are equally good."
    )


def _scores(samples: Samples | None, task: AccuracyTask) -> dict[str, float]:
    for each in samples.tasks if samples is not None else ():
        if (each.name, each.metric) == (task.name, task.metric):
            return each.scores
    return {}


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
