"""Great Expectations checks the figures, and nothing passes for lack of one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from trainyard.documents.measurement import Check
from trainyard.gates import expectations as module
from trainyard.gates.expectations import Expectation, evaluate


def expectation(observed: float | None, **changes: Any) -> Expectation:
    values: dict[str, Any] = {
        "figure": "busy/ttft_p99_ms",
        "what": "level busy: ttft_p99_ms",
        "observed": observed,
        "bound": "<= 400",
        "maximum": 400.0,
    }
    return Expectation(**{**values, **changes})


def outcome(observed: float | None, **changes: Any) -> str:
    return evaluate("latency", [expectation(observed, **changes)]).checks[0].outcome


@pytest.mark.parametrize(
    ("observed", "bounds", "expected"),
    [
        (400.0, {}, "pass"),
        (400.0001, {}, "fail"),
        (400.0001, {"severity": "warning"}, "warn"),
        (400.0001, {"severity": "info"}, "info"),
        (-0.04, {"minimum": -0.05, "maximum": None, "paired": True}, "pass"),
        (-0.06, {"minimum": -0.05, "maximum": None, "paired": True}, "fail"),
        (0.95, {"minimum": 0.95, "maximum": None}, "pass"),
        (0.9499, {"minimum": 0.95, "maximum": None}, "fail"),
        (2.0, {"minimum": 1.0, "maximum": 3.0}, "pass"),
        (0.0, {"maximum": 0.0}, "pass"),
    ],
)
def test_a_figure_is_held_against_its_bounds(
    observed: float, bounds: dict[str, Any], expected: str
) -> None:
    assert outcome(observed, **bounds) == expected


@pytest.mark.parametrize("observed", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("severity", ["critical", "warning", "info"])
def test_no_figure_fails_whatever_the_severity(observed: float | None, severity: str) -> None:
    evaluation = evaluate("latency", [expectation(observed, severity=severity)])

    (check,) = evaluation.checks
    assert (check.outcome, check.observed) == ("fail", None)
    assert check.note == "There is no usable figure."
    assert evaluation.result["success"] is False


def test_checks_come_in_the_order_of_their_expectations() -> None:
    several = [
        expectation(500.0, figure="b"),
        expectation(1.0, figure="a", skipped="Nothing to compare with."),
        expectation(300.0, figure="c"),
        expectation(300.0, figure="c", bound="<= 200", maximum=200.0, severity="warning"),
        expectation(None, figure="d", note="It was not measured."),
        expectation(300.0, figure="c"),
    ]

    checks = evaluate("latency", several).checks

    assert [check.outcome for check in checks] == [
        "fail",
        "skipped",
        "pass",
        "warn",
        "fail",
        "pass",
    ]
    assert checks[1] == Check(
        what="level busy: ttft_p99_ms",
        observed=1.0,
        bound="<= 400",
        maximum=400.0,
        outcome="skipped",
        note="Nothing to compare with.",
    )
    assert checks[4].note == "It was not measured."


def test_nothing_to_check_is_no_success() -> None:
    assert evaluate("latency", []).result["success"] is False
    only_skipped = evaluate("latency", [expectation(1.0, skipped="No baseline.")])
    assert only_skipped.result["success"] is False


def test_the_result_is_json_and_the_same_every_time() -> None:
    several = [expectation(500.0), expectation(None, figure="b")]

    first, second = (evaluate("latency", several).result for _ in range(2))

    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    assert first["suite_name"] == "latency"
    assert {each["expectation_config"]["severity"] for each in first["results"]} == {"critical"}


RAISED = {
    "exception_message": "Error: The column is gone.\nTraceback …",
    "exception_traceback": "Traceback …",
    "raised_exception": True,
}
FINE = {"exception_message": None, "exception_traceback": None, "raised_exception": False}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"exception_info": RAISED}, "It could not be checked: Error: The column is gone."),
        ({"exception_info": {"metric": FINE, "other": RAISED}}, "The column is gone."),
        ({"exception_info": {**RAISED, "exception_message": ""}}, "no message"),
        ({"result": {}}, "not exactly one figure"),
        ({"result": {"element_count": 0}}, "not exactly one figure"),
    ],
)
def test_a_check_that_could_not_run_fails_even_if_it_calls_itself_a_success(
    change: dict[str, Any], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = module._validate

    def broken(name: str, checked: Any) -> dict[str, Any]:
        result = validate(name, checked)
        result["results"][-1].update(change)
        return result

    monkeypatch.setattr(module, "_validate", broken)

    (check,) = evaluate("latency", [expectation(1.0, severity="warning")]).checks

    assert check.outcome == "fail"
    assert note in check.note
    assert "Traceback" not in check.note


@pytest.mark.parametrize("kept", [0, 1])
def test_results_that_do_not_come_back_fail(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = module._validate

    def partial(name: str, checked: Any) -> dict[str, Any]:
        result = validate(name, checked)
        return {**result, "results": result["results"][:kept]}

    monkeypatch.setattr(module, "_validate", partial)

    (check,) = evaluate("latency", [expectation(1.0)]).checks

    assert check.outcome == "fail"
    assert f"{kept} results came back where 2 were due" in check.note


def test_a_paired_difference_has_an_expectation_of_its_own() -> None:
    evaluation = evaluate(
        "accuracy", [expectation(-0.01, minimum=-0.05, maximum=None, paired=True)]
    )

    types = {each["expectation_config"]["type"] for each in evaluation.result["results"]}
    assert types == {
        "expect_column_values_to_not_be_null",
        "expect_paired_difference_to_be_proven_above",
    }


def test_checks_carry_their_severity() -> None:
    severities = ("critical", "warning", "info")
    found = evaluate("latency", [expectation(1.0, severity=each) for each in severities]).checks

    assert tuple(each.severity for each in found) == severities
