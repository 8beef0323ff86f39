"""A verdict is the worst of its checks and says which figures decided."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.yard import FIGURES, measurement, spec

from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import GateName
from trainyard.gates.verdict import derive_verdict
from trainyard.spec.model import Bound, Gates
from trainyard.store.documents import substance


def verdict(
    gate: GateName,
    measured: Measurement,
    baseline: Measurement | None = None,
    gates: Gates | None = None,
) -> GateVerdict:
    return derive_verdict(
        gate,
        gates or spec().gates,
        plan_id="adder-plan",
        target="cpu",
        measurement=measured,
        baseline=baseline,
    ).verdict


def test_good_accuracy_passes_and_the_missing_comparison_is_shown() -> None:
    found = verdict("accuracy", measurement(score=0.97))

    assert found.outcome == "pass"
    assert [check.outcome for check in found.checks] == ["pass", "skipped", *["pass"] * 8]
    assert found.summary == (
        "The accuracy gate passed: sums exact_match 0.97 (>= 0.9); 8 checks of the behaviour held."
    )
    assert (found.gate, found.measurement_id, found.baseline) == ("accuracy", "candidate", "")


def test_bad_accuracy_fails_with_its_figure() -> None:
    found = verdict("accuracy", measurement(score=0.4))

    assert found.outcome == "fail"
    assert found.summary == "The accuracy gate failed: sums exact_match is 0.4 (>= 0.9 is needed)."


def test_a_drop_from_stable_fails_though_the_minimum_is_kept() -> None:
    found = verdict("accuracy", measurement(score=0.93), measurement("stable", score=0.97))

    assert [check.outcome for check in found.checks[:3]] == ["pass", "fail", "warn"]
    assert found.summary == (
        "The accuracy gate failed: sums exact_match is 0.93 (>= stable (0.97) - 0.02 is needed)."
    )
    assert found.baseline == "stable"


def test_a_task_that_was_not_measured_fails() -> None:
    found = verdict("accuracy", measurement(accuracy=()))

    assert found.outcome == "fail"
    assert "sums exact_match has no figure (>= 0.9 is needed)" in found.summary


def test_good_latency_passes() -> None:
    found = verdict("latency", measurement(), measurement("stable"))

    assert found.outcome == "pass"
    assert {check.outcome for check in found.checks} == {"pass"}
    assert len(found.checks) == 6
    assert found.summary.endswith("; and 3 more.")


def test_a_warning_lets_pass_and_is_named() -> None:
    found = verdict("latency", measurement(figures={**FIGURES, "output_tokens_per_s": 45.0}))

    assert found.outcome == "warn"
    assert found.summary == (
        "The latency gate passed with warnings: level busy: output_tokens_per_s is 45 "
        "(>= 50 is needed)."
    )


def test_a_failure_outweighs_a_warning() -> None:
    slow = measurement(figures={**FIGURES, "output_tokens_per_s": 45.0, "ttft_p99_ms": 500.0})

    found = verdict("latency", slow)

    assert found.outcome == "fail"
    assert "ttft_p99_ms is 500 (<= 400 is needed)" in found.summary
    assert "output_tokens_per_s" not in found.summary


def test_a_gate_that_could_check_nothing_fails() -> None:
    nothing = Gates.model_construct(
        accuracy=spec().gates.accuracy.model_copy(update={"tasks": ()}),
        latency=spec().gates.latency,
    )

    found = verdict("accuracy", measurement(), gates=nothing)

    assert found.outcome == "fail"
    assert found.summary == "The accuracy gate failed: nothing could be checked."


def test_what_is_only_information_changes_nothing_and_alone_passes_nothing() -> None:
    gates = spec().gates.model_copy(deep=True)
    (level,) = gates.latency.levels
    info = Bound(max=1, severity="info")
    bounds = {**level.bounds, "ttft_p99_ms": info}
    shown = level.model_copy(update={"bounds": bounds, "max_regression": {}})
    latency = gates.latency.model_copy(update={"levels": (shown,)})

    found = verdict("latency", measurement(), gates=gates.model_copy(update={"latency": latency}))

    assert found.outcome == "pass"
    assert [check.outcome for check in found.checks].count("info") == 1
    assert "ttft_p99_ms" not in found.summary


def test_a_verdict_points_to_its_raw_data() -> None:
    measured = measurement(samples="samples/candidate/abc.json")

    found = verdict("accuracy", measured, measurement("stable"))

    assert found.raw_data == (
        "measurements/candidate.json",
        "samples/candidate/abc.json",
        "measurements/stable.json",
    )


@pytest.mark.parametrize("gate", ["accuracy", "latency"])
def test_the_same_figures_give_the_same_verdict(gate: GateName) -> None:
    arguments: tuple[Any, ...] = (gate, measurement(), measurement("stable", score=0.98))

    assert substance(verdict(*arguments)) == substance(verdict(*arguments))
