"""What a run tells whoever asked for it: the typed results that `…/wait` returns.

Airflow keeps a result only of tasks that succeed. A caller wants the reason of a refusal just as
much, so it is stored before the task fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainyard.errors import TrainyardError
from trainyard_airflow.exceptions import StepOutcome

RESULT_KEY = "return_value"
"""Where Airflow looks for the result of a task."""

Result = dict[str, Any]
"""`outcome` (a word), `reason` (sentences for people), what it is about, and `code` if that is a
known failure (docs/failures.md)."""

REFUSED = "refused"


@contextmanager
def reported(context: Any, *, outcome: str = REFUSED, **about: Any) -> Iterator[None]:
    """Let the run's result say why a task fails, if it fails for a reason that we know.

    Args:
        context: of the task.
        outcome: what the failure is called.
        about: what it is about, such as `release`.
    """
    try:
        yield
    except (StepOutcome, TrainyardError) as error:
        known = {"code": error.code} if error.code else {}
        push_result(context, {"outcome": outcome, "reason": str(error), **about, **known})
        raise


def push_result(context: Any, result: Result) -> None:
    """Store the result of a task that is about to fail, as a result of its run."""
    instance = context["ti"]
    instance.task.returns_dag_result = True
    instance.xcom_push(key=RESULT_KEY, value=result)


def refusal_of(context: Any, task_id: str) -> Result | None:
    """Return the result of another task of the run if it refused; None if it did not."""
    found = context["ti"].xcom_pull(task_ids=task_id, key=RESULT_KEY)
    return found if isinstance(found, dict) and found.get("outcome") == REFUSED else None
