"""The one retry policy of all steps."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

from trainyard_airflow.exceptions import StepCapacity, StepRefused, StepTransient

STEP_RETRIES = 3

STEP_RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(
            exception=StepRefused,
            action=RetryAction.FAIL,
            reason="The step says no; trying again would give the same answer.",
        ),
        RetryRule(
            exception=StepCapacity,
            action=RetryAction.RETRY,
            retry_delay=timedelta(minutes=5),
            reason="Out of memory or devices; a later try may find room.",
        ),
        RetryRule(
            exception=StepTransient,
            action=RetryAction.RETRY,
            retry_delay=timedelta(seconds=15),
            reason="Something failed for now.",
        ),
    ]
)
