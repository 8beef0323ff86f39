"""A caller learns from a run's result why it was refused."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.plugins.conftest import make_context

from trainyard.errors import Busy
from trainyard_airflow.exceptions import StepRefused
from trainyard_airflow.results import refusal_of, reported


@pytest.mark.parametrize("error", [StepRefused("It was rejected."), Busy("It was rejected.")])
def test_a_reason_is_stored_before_the_task_fails(error: Exception) -> None:
    context = make_context()
    with pytest.raises(type(error)), reported(context, release="adder-1"):
        raise error
    assert context["ti"].pushed == {
        "return_value": {
            "outcome": "refused",
            "reason": "It was rejected.",
            "release": "adder-1",
        }
    }
    assert context["ti"].task.returns_dag_result


def test_what_nobody_foresaw_is_no_result() -> None:
    context = make_context()
    with pytest.raises(ZeroDivisionError), reported(context):
        raise ZeroDivisionError
    assert context["ti"].pushed == {}


@pytest.mark.parametrize("found", [None, "adder-1", {"outcome": "promoted"}])
def test_only_a_refusal_counts_as_one(found: Any) -> None:
    context = make_context()
    context["ti"].others["verify"] = found
    assert refusal_of(context, "verify") is None


def test_a_refusal_is_found() -> None:
    context = make_context()
    context["ti"].others["verify"] = {"outcome": "refused", "reason": "No."}
    assert refusal_of(context, "verify") == {"outcome": "refused", "reason": "No."}
