"""Tasks that leave something to look at lead there."""

from __future__ import annotations

from typing import Any

import pytest


def operator(step: str, **changes: Any) -> Any:
    from trainyard_airflow.step_operator import StepOperator

    values = {"task_id": step, "step": step, "plan_id": "adder-1a2b", "target": "cpu", **changes}
    return StepOperator(**values)


@pytest.mark.parametrize(
    ("step", "arguments", "expected"),
    [
        ("publish", (), "/trainyard/reports/adder-1a2b/cpu"),
        ("gate", ("--gate", "latency"), "/trainyard/reports/adder-1a2b/cpu/latency"),
    ],
)
def test_the_button_leads_to_the_report(
    step: str, arguments: tuple[str, ...], expected: str
) -> None:
    task = operator(step, arguments=arguments)

    (link,) = task.operator_extra_links
    key: Any = None
    assert (link.name, link.get_link(task, ti_key=key)) == ("Report", expected)


def test_the_button_is_below_airflows_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://example.com/airflow/")
    task = operator("publish")

    (link,) = task.operator_extra_links
    key: Any = None
    assert link.get_link(task, ti_key=key) == "/airflow/trainyard/reports/adder-1a2b/cpu"


def test_other_steps_have_no_button() -> None:
    assert list(operator("compile").operator_extra_links) == []
