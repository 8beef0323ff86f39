"""From measurement and bounds to a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainyard.documents.measurement import Check, GateVerdict, Measurement
from trainyard.documents.parity import Samples
from trainyard.documents.plan import GateName
from trainyard.gates.accuracy import Baseline, accuracy_expectations
from trainyard.gates.behaviour import PREFIX, behaviour_expectations
from trainyard.gates.expectations import evaluate
from trainyard.gates.latency import latency_expectations
from trainyard.gates.words import NO_BASELINE, number
from trainyard.spec.model import Gates

_SHOWN = 3
"""Checks that a summary names at most."""


@dataclass(frozen=True)
class Derived:
    """A verdict as it follows from its measurement."""

    verdict: GateVerdict
    result: dict[str, Any]
    """Great Expectations' own result."""


def derive_verdict(
    gate: GateName,
    gates: Gates,
    *,
    plan_id: str,
    target: str,
    measurement: Measurement,
    baseline: Measurement | None,
    samples: Samples | None = None,
    baseline_samples: Samples | None = None,
    why_no_baseline: str = NO_BASELINE,
) -> Derived:
    """Return what `gate` makes of `measurement`.

    The same arguments always give a verdict of the same substance.

    Args:
        gate: its name.
        gates: the spec's bounds.
        plan_id: for the verdict.
        target: for the verdict.
        measurement: of the candidate.
        baseline: the stable release's; None: there is nothing to compare with.
        samples: what the measurement's scores are made of, where it is kept.
        baseline_samples: the same of the stable release.
        why_no_baseline: said where nothing is compared.

    Raises:
        BadInput: the gate's bounds make no sense.
    """
    if gate == "accuracy":
        stable = Baseline(baseline, baseline_samples, why_no_baseline)
        expectations = accuracy_expectations(gates.accuracy, measurement, stable, samples)
        # Good behaviour alone says nothing about the answers: without them the gate fails.
        if expectations:
            expectations += behaviour_expectations(gates.behaviour, measurement)
    else:
        expectations = latency_expectations(gates.latency, measurement, baseline)
    evaluation = evaluate(gate, expectations)
    outcome = _outcome(evaluation.checks)
    verdict = GateVerdict(
        gate=gate,
        plan_id=plan_id,
        target=target,
        measurement_id=measurement.measurement_id,
        outcome=outcome,
        checks=evaluation.checks,
        baseline="" if baseline is None else baseline.measurement_id,
        summary=_summary(gate, outcome, evaluation.checks),
        raw_data=tuple(_raw_data(measurement, baseline)),
    )
    return Derived(verdict, evaluation.result)


def _raw_data(*measurements: Measurement | None) -> Iterator[str]:
    """Yield the keys of what the figures of a verdict come from."""
    for each in measurements:
        if each is not None:
            yield f"measurements/{each.measurement_id}.json"
            if each.samples:
                yield each.samples
            if each.parity is not None:
                yield each.parity.reference


def _outcome(checks: Sequence[Check]) -> Literal["pass", "warn", "fail"]:
    """Return the worst outcome; a gate that checked nothing fails."""
    outcomes = {check.outcome for check in checks}
    if "fail" in outcomes or outcomes <= {"skipped", "info"}:
        return "fail"
    return "warn" if "warn" in outcomes else "pass"


def _summary(
    gate: GateName, outcome: Literal["pass", "warn", "fail"], checks: Sequence[Check]
) -> str:
    counted = [check for check in checks if check.outcome not in ("skipped", "info")]
    if outcome == "pass":
        behaviour = sum(_of_behaviour(check) for check in counted)
        figures = _list([check for check in counted if not _of_behaviour(check)], _kept)
        held = f"; {behaviour} checks of the behaviour held" if behaviour else ""
        return f"The {gate} gate passed: {figures}{held}."
    named = [check for check in counted if check.outcome == outcome]
    if outcome == "warn":
        return f"The {gate} gate passed with warnings: {_list(named, _broken)}."
    if not named:
        return f"The {gate} gate failed: nothing could be checked."
    return f"The {gate} gate failed: {_list(named, _broken)}."


def warnings_of(verdict: GateVerdict) -> tuple[str, ...]:
    """Return what whoever serves a release should know: its warnings, and what was not checked.

    A comparison that had no stable release to compare with is none of it.
    """
    return tuple(
        f"{_broken(check) if check.outcome == 'warn' else check.what}. {check.note}".strip()
        for check in verdict.checks
        if check.outcome == "warn" or (check.outcome == "skipped" and _of_behaviour(check))
    )


def _of_behaviour(check: Check) -> bool:
    return check.what.startswith(PREFIX)


def _list(checks: Sequence[Check], words: Callable[[Check], str]) -> str:
    listed = "; ".join(words(check) for check in checks[:_SHOWN])
    more = len(checks) - _SHOWN
    return f"{listed}; and {more} more" if more > 0 else listed


def _kept(check: Check) -> str:
    return f"{check.what} {_figure(check)} ({check.bound})"


def _broken(check: Check) -> str:
    if check.observed is None:
        return f"{check.what} has no figure ({check.bound} is needed)"
    return f"{check.what} is {_figure(check)} ({check.bound} is needed)"


def _figure(check: Check) -> str:
    return "none" if check.observed is None else number(check.observed)
