"""What becomes of a step after a failure: what its next try changes, or that there need be none."""

from __future__ import annotations

from datetime import UTC, datetime

from trainyard.documents.base import Provenance
from trainyard.documents.plan import Plan
from trainyard.documents.status import StepStatus
from trainyard.errors import OutOfCapacity, Refused
from trainyard.failures.recognise import Failure
from trainyard.failures.table import row_of
from trainyard.failures.tuning import FRAMEWORK_WORKERS, Tuning, next_tuning
from trainyard.settings import Settings
from trainyard.steps.status import read_status
from trainyard.store.layout import status_key
from trainyard.store.protocol import Store

NOTHING_LEFT = "Every setting that another try could change has been tried."


def compile_workers_of(plan: Plan | None, step: str, target: str) -> int | None:
    """Return how many compiler processes a step runs at a time unless a try changes it.

    None: it has no such setting. Only the plugin of lane `neuron-native` does.
    """
    if plan is None or step != "compile":
        return None
    for planned in plan.targets:
        neuron = planned.target.neuron
        if planned.target.name == target and planned.target.lane == "neuron-native" and neuron:
            return neuron.parallel_compile_workers or FRAMEWORK_WORKERS
    return None


def after_failure(
    code: str, *, exit_code: int, hint: str, tuning: Tuning, workers: int | None
) -> tuple[int, str, Tuning]:
    """Return exit code, hint and tuning for the next try after a known failure.

    Args:
        code: of the failure.
        exit_code: that it has by itself.
        hint: that it has by itself.
        tuning: what the failed try changed.
        workers: compiler processes of a try that changes nothing; None: no such setting.
    """
    row = row_of(code)
    if row is None or not row.change or exit_code != OutOfCapacity.exit_code:
        return exit_code, hint, tuning
    following = next_tuning(row.change, tuning, workers=workers)
    if following is None:
        return Refused.exit_code, f"{NOTHING_LEFT} {hint}", tuning
    return exit_code, hint, following


def record_killed(
    store: Store,
    settings: Settings,
    plan: Plan,
    step: str,
    target: str,
    failure: Failure,
    *,
    since: datetime,
) -> StepStatus:
    """Write the end of an attempt whose process could not, and return the status document.

    A pod that is out of memory or whose node is gone writes no last words. What it reported so far
    (attempt, log) is kept; what was reported before `since` was another attempt's.

    Raises:
        TrainyardError: the store cannot be read or written.
    """
    now = datetime.now(UTC)
    found = read_status(store, plan.plan_id, step, target)
    status = found or StepStatus(
        plan_id=plan.plan_id,
        step=step,
        target=target,
        state="failed",
        attempt=0,
        started_at=since,
        updated_at=now,
    )
    if found is None or found.started_at < since:
        fresh = {"attempt": status.attempt + 1, "started_at": since, "log_tail": ()}
        status = status.model_copy(update=fresh)
    exit_code, hint, tuning = after_failure(
        failure.code,
        exit_code=failure.exit_code,
        hint=failure.hint,
        tuning=Tuning.from_json(status.tuning),
        workers=compile_workers_of(plan, step, target),
    )
    written = status.model_copy(
        update={
            "provenance": Provenance.of(settings),
            "state": "failed",
            "exit_code": exit_code,
            "reason": failure.reason,
            "hint": hint,
            "code": failure.code,
            "tuning": tuning.to_json(),
            "updated_at": now,
        }
    )
    store.put(status_key(plan.plan_id, step, target), written.to_bytes())
    return written
