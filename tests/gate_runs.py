"""The whole accuracy gate, made again and again of what a faithful server answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scipy.stats import binomtest
from tests.unit import yard

from trainyard.documents.behaviour import Behaviour
from trainyard.documents.measurement import GateVerdict
from trainyard.documents.parity import ParityFigures
from trainyard.gates.verdict import derive_verdict
from trainyard.spec.model import ParityCheck


def verdicts(
    check: ParityCheck, parity: Sequence[ParityFigures], behaviour: Sequence[Behaviour]
) -> Iterator[GateVerdict]:
    """Yield the accuracy gate's verdict on each run; its tasks are answered well enough.

    Args:
        check: the parity check with its bounds.
        parity: what it found in each run.
        behaviour: what the behaviour checks found in each run.
    """
    gates = yard.spec().gates
    accuracy = gates.accuracy.model_copy(update={"parity": check})
    gates = gates.model_copy(update={"accuracy": accuracy})
    for figures, found in zip(parity, behaviour, strict=True):
        yield derive_verdict(
            "accuracy",
            gates,
            plan_id="p1",
            target="cpu",
            measurement=yard.measurement(parity=figures, behaviour=found),
            baseline=None,
        ).verdict


def broken_cases(behaviour: Behaviour) -> list[str]:
    """Return what the behaviour checks found broken, in words."""
    return [
        f"{record.name}: {case.sent}; {case.came}; {case.expected}"
        for record in behaviour.records
        for case in record.cases
        if case.outcome == "broken"
    ]


def rate(stops: int, runs: int) -> str:
    """Return a rate with its 95 % interval after Clopper and Pearson, in words."""
    interval = binomtest(stops, runs).proportion_ci(0.95, "exact")
    return f"{stops} of {runs}, between {interval.low:.2%} and {interval.high:.2%} (95 %)"
