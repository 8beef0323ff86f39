"""Runs one step: its lock, its status document, its signals, its exit code.

`run_step` is what every heavy command of the CLI goes through, on a laptop, in a pod and under an
Airflow operator. It never raises: whatever happens becomes an exit code (see `trainyard.errors`), a
line on the terminal and the final state of the status document.
"""

from __future__ import annotations

import errno
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from trainyard.documents.plan import Plan
from trainyard.errors import BadInput, Busy, NotFound, OutOfCapacity, TrainyardError, Transient
from trainyard.settings import Settings
from trainyard.steps.after_failure import after_failure, compile_workers_of
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.status import StatusWriter
from trainyard.steps.stopping import GRACE_S, LOCK_LOST, StepStopped, Stopper
from trainyard.steps.terminal import StepReporter, print_line
from trainyard.store.documents import read_document
from trainyard.store.layout import plan_key
from trainyard.store.locks import HeldElsewhere, HeldLock, acquire_lock
from trainyard.store.protocol import Store

DEFECT_EXIT_CODE = 1

Body = Callable[[StepContext], StepResult]


@dataclass(frozen=True)
class _Outcome:
    """How an attempt ended."""

    exit_code: int
    reason: str
    hint: str = ""
    code: str = ""
    trace: str = ""
    result: StepResult | None = None


def run_step(
    name: str,
    *,
    plan_id: str,
    body: Body,
    settings: Settings,
    store: Store,
    target: str = "",
    lock_on: str = "",
    force: bool = False,
    die_with_parent: bool = False,
    console: Console | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Run `body` as step `name` of a plan and return the exit code.

    Args:
        name: the step, such as `download`.
        plan_id: the plan it belongs to.
        body: the step itself; gets the context, returns its result or raises.
        settings: of this installation.
        store: where its documents are.
        target: the target it works for; empty if for all.
        lock_on: names the work; two processes with the same name exclude each other. Empty: the key
            of the document that the plan says this step makes, so that two plans that need the same
            checkpoint or bundle make it once.
        force: passed on to the body.
        die_with_parent: stop when standard input ends.
        console: where lines go; standard output if empty.
        grace_s: seconds that a stopped step may take to clean up.

    Returns:
        0 if it is done, else as in `trainyard.errors`: 10 bad input, 20 refused, 30 transient (also
        if it was stopped), 40 no capacity, 75 somebody else does it; 1 for a defect.
    """
    console = console or Console()
    try:
        status = StatusWriter(store, settings, plan_id=plan_id, step=name, target=target)
    except BadInput as error:
        _print(console, name, _outcome_of(error))
        return error.exit_code
    reporter = StepReporter(console, status)
    run = _Run(
        name=name,
        plan_id=plan_id,
        target=target,
        lock_on=lock_on,
        body=body,
        settings=settings,
        store=store,
        status=status,
        reporter=reporter,
        force=force,
    )
    stopper = Stopper(
        die_with_parent=die_with_parent, grace_s=grace_s, on_hard_end=run.note_hard_end
    )
    with stopper, reporter.logging():
        try:
            outcome = run.to_its_end(stopper)
        except StepStopped as late:
            # It came in the instant between the end of the body and `disarm`.
            outcome = _outcome_of(late)
    _print(console, name, outcome)
    return outcome.exit_code


@dataclass(frozen=True)
class _Run:
    """One attempt at one step."""

    name: str
    plan_id: str
    target: str
    lock_on: str
    body: Body
    settings: Settings
    store: Store
    status: StatusWriter
    reporter: StepReporter
    force: bool

    @property
    def work(self) -> str:
        """What this attempt does; other attempts at the same have the same text."""
        return " ".join(part for part in (self.name, self.target, "of plan", self.plan_id) if part)

    def to_its_end(self, stopper: Stopper) -> _Outcome:
        """Take the lock, run the body, write the end."""
        try:
            lock = self._lock(stopper)
        except BaseException as error:
            stopper.disarm()
            outcome = _outcome_of(error)
            if not self._belongs_to_another(error):
                outcome = self._finish(outcome)
            self.status.stop()
            self.reporter.close()
            return outcome
        with lock:
            outcome = self._attempt(lock, stopper)
            self.reporter.close()
            if lock.lost and outcome.exit_code != 0:
                outcome = _Outcome(Busy.exit_code, LOCK_LOST, "Nothing is lost; look at that one.")
            if lock.lost and lock.successor is not None and lock.successor.work == self.work:
                # The status document now tells about that attempt.
                self.status.stop()
            else:
                outcome = self._finish(outcome)
        return outcome

    def note_hard_end(self, reason: str) -> None:
        """Write the end of a step that does not react any more."""
        self._finish(_Outcome(Transient.exit_code, reason, "Look at its log, then try again."))

    def _lock(self, stopper: Stopper) -> HeldLock:
        def say_who(waiting: HeldElsewhere) -> None:
            if waiting.holder.work != self.work:
                self.status.begin()
            self.reporter.say(f"Waiting. {waiting.message}")

        return acquire_lock(
            self.store,
            self.lock_on or self._planned_key(),
            work=self.work,
            duration_s=self.settings.step_lock_s,
            wait_s=self.settings.step_lock_wait_s,
            on_wait=say_who,
            on_lost=lambda: stopper.request(LOCK_LOST),
        )

    def _plan(self) -> Plan | None:
        try:
            return read_document(self.store, plan_key(self.plan_id), Plan)
        except NotFound:
            return None

    def _planned_key(self) -> str:
        plan = self._plan()
        for step in plan.steps if plan else ():
            if step.step == self.name and step.target == self.target and step.key:
                return step.key
        return "/".join(part for part in (self.plan_id, self.name, self.target) if part)

    def _belongs_to_another(self, error: BaseException) -> bool:
        """Is the status document that of another attempt at this very step, which still runs?"""
        if isinstance(error, HeldElsewhere):
            return error.holder.work == self.work
        return isinstance(error, StepStopped) and not self.status.begun

    def _attempt(self, lock: HeldLock, stopper: Stopper) -> _Outcome:
        try:
            self.status.begin()
            work_dir = self._make_work_dir()
            result = self.body(
                StepContext(
                    settings=self.settings,
                    store=self.store,
                    progress=self.reporter,
                    work_dir=work_dir,
                    force=self.force,
                    tuning=self.status.tuning,
                    ensure_held=lock.ensure_held,
                )
            )
            stopper.disarm()
            shutil.rmtree(work_dir, ignore_errors=True)
        except BaseException as error:
            stopper.disarm()
            return _outcome_of(error)
        return _Outcome(0, result.message, result=result)

    def _make_work_dir(self) -> Path:
        folder = self.settings.work_root / self.plan_id / self.name
        if self.target:
            folder = folder / self.target
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _next_try(self, outcome: _Outcome) -> tuple[_Outcome, dict[str, int]]:
        """Return the outcome, and what the next try does differently.

        If nothing is left that it could, the outcome is that there need be no next try.
        """
        if not outcome.code:
            return outcome, self.status.tuning.to_json()
        try:
            plan = self._plan()
        except TrainyardError:
            plan = None
        exit_code, hint, tuning = after_failure(
            outcome.code,
            exit_code=outcome.exit_code,
            hint=outcome.hint,
            tuning=self.status.tuning,
            workers=compile_workers_of(plan, self.name, self.target),
        )
        return replace(outcome, exit_code=exit_code, hint=hint), tuning.to_json()

    def _finish(self, outcome: _Outcome) -> _Outcome:
        if outcome.trace:
            self.reporter.note(outcome.trace.splitlines())
        result = outcome.result
        outcome, tuning = self._next_try(outcome)
        try:
            self.status.finish(
                state="done" if outcome.exit_code == 0 else "failed",
                exit_code=outcome.exit_code,
                reason=outcome.reason,
                hint=outcome.hint,
                code=outcome.code,
                tuning=tuning,
                **(
                    {}
                    if result is None
                    else {
                        "progress": 1.0,
                        "output_key": result.key,
                        "reused": result.reused,
                        "detail": dict(result.detail),
                    }
                ),
            )
        except (TrainyardError, ValueError, TypeError) as error:
            self.reporter.note([f"The status document could not be written: {error}"])
        return outcome


def _outcome_of(error: BaseException) -> _Outcome:
    match error:
        case TrainyardError():
            return _Outcome(error.exit_code, error.message, error.hint, error.code)
        case StepStopped():
            return _Outcome(
                Transient.exit_code, str(error), "Nothing half-done counts; run it again."
            )
        case MemoryError():
            return _Outcome(
                OutOfCapacity.exit_code,
                "The step ran out of memory.",
                "Run it with less parallelism, or where there is more memory.",
                "host-out-of-memory",
                _trace(error),
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            return _Outcome(
                Transient.exit_code,
                f"No room is left on the disk{where}.",
                "Free space in the store and the work folder, then run it again.",
                trace=_trace(error),
            )
    return _Outcome(
        DEFECT_EXIT_CODE,
        f"The step failed with {type(error).__name__}: {error}",
        "This is a defect of Trainyard or of its installation; the end of the log says where.",
        trace=_trace(error),
    )


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _print(console: Console, name: str, outcome: _Outcome) -> None:
    if outcome.result is not None:
        verb = "found" if outcome.result.reused else "made"
        text = f"{name}: {outcome.reason} ({verb} {outcome.result.key})"
    else:
        text = f"{name} failed (exit {outcome.exit_code}): {outcome.reason} {outcome.hint}".rstrip()
    print_line(console, text)
