"""How the outcome of a step looks to Airflow: an exception for each thing a retry can do."""

from __future__ import annotations

from airflow.sdk.exceptions import AirflowException


class StepOutcome(AirflowException):
    """A step did not do what it was asked for, and why is known.

    Args:
        message: sentences for people.
        code: of the known failure that it is (docs/failures.md); may be empty.
    """

    def __init__(self, message: str = "", *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class StepRefused(StepOutcome):
    """Bad input, or the compiler, the model or a gate says no: a retry cannot help."""


class StepTransient(StepOutcome):
    """Something failed for now, or somebody else does this step: a retry can help."""


class StepCapacity(StepOutcome):
    """Out of memory or devices: a later retry can help."""


class StepDefect(StepOutcome):
    """The step ended in a way Trainyard does not know: a defect, or it was killed."""


def outcome_exception(exit_code: int) -> type[StepOutcome]:
    """Return the exception for a step's exit code (see `trainyard.errors`)."""
    by_code = {
        10: StepRefused,
        20: StepRefused,
        30: StepTransient,
        40: StepCapacity,
        75: StepTransient,
    }
    return by_code.get(exit_code, StepDefect)
