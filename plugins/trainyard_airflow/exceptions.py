"""How the outcome of a step looks to Airflow: an exception for each thing a retry can do."""

from __future__ import annotations

from airflow.sdk.exceptions import AirflowException


class StepRefused(AirflowException):
    """Bad input, or the compiler, the model or a gate says no: a retry cannot help."""


class StepTransient(AirflowException):
    """Something failed for now, or somebody else does this step: a retry can help."""


class StepCapacity(AirflowException):
    """Out of memory or devices: a later retry can help."""


class StepDefect(AirflowException):
    """The step ended in a way Trainyard does not know: a defect, or it was killed."""


OUTCOMES = (StepRefused, StepTransient, StepCapacity, StepDefect)
"""All of them."""


def outcome_exception(exit_code: int) -> type[AirflowException]:
    """Return the exception for a step's exit code (see `trainyard.errors`)."""
    by_code = {
        10: StepRefused,
        20: StepRefused,
        30: StepTransient,
        40: StepCapacity,
        75: StepTransient,
    }
    return by_code.get(exit_code, StepDefect)
