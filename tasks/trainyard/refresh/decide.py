"""What a refresh does about what it saw. Pure.

A *subject* is one revision with one toolchain. It gets one run of `neuron_release`, whose id
follows from it, and another one only if that failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Literal

from trainyard.canonical import digest, short
from trainyard.documents.refresh import (
    KEPT_SUBJECTS,
    RefreshAttempt,
    RefreshRecord,
    RefreshSubject,
)
from trainyard.spec.environments import Environment

Outcome = Literal["nothing_new", "under_way", "given_up", "deferred", "start"]

MISSING, UNKNOWN = "", "unknown"
"""States of a run that Airflow does not have, and of one that nobody can be asked about."""

_MORE_WINDOWS = 100
"""Windows of several environments that are followed one after the other."""


@dataclass(frozen=True)
class Subject:
    """What would be released."""

    model: str
    revision: str
    toolchain_id: str = ""
    """Short digest of the toolchains of its targets; empty: they are not followed."""

    @property
    def id(self) -> str:
        """12 hex digits."""
        return short(digest([self.model, self.revision, self.toolchain_id]))

    def run_id(self, number: int) -> str:
        """Return the id of its run of `neuron_release`, counted from 1."""
        first = f"refresh__{self.model}__{self.id}"
        return first if number == 1 else f"{first}__{number}"


@dataclass(frozen=True)
class Hold:
    """An environment that takes nothing now."""

    until: datetime
    """In UTC."""
    reason: str
    """One sentence."""


@dataclass(frozen=True)
class Facts:
    """What a refresh saw."""

    subject: Subject
    record: RefreshRecord
    released: tuple[str, ...] = ()
    """Releases of the subject in the store, or that the record knows."""
    run_states: Mapping[str, str] = field(default_factory=dict)
    """State of the subject's last run by its id, as Airflow says it."""
    hold: Hold | None = None
    max_attempts: int = 2
    again: bool = False
    """Does a person want another run, whatever became of the others?"""


@dataclass(frozen=True)
class Decision:
    """What a refresh does."""

    outcome: Outcome
    reason: str
    """One sentence, or two."""
    run_id: str = ""
    """Of `neuron_release`: the one to start, or the one that there is."""
    until: datetime | None = None
    """Only for `deferred`."""


def decide(facts: Facts) -> Decision:
    """Return what to do."""
    subject = facts.subject
    known = facts.record.subject(subject.id)
    attempts = known.attempts if known else ()
    last = attempts[-1] if attempts else None
    state = (last.state or facts.run_states.get(last.run_id, MISSING)) if last else MISSING
    if last is not None and state not in (MISSING, "success", "failed"):
        doubt = " Whether it runs, Airflow knows." if state == UNKNOWN else ""
        return Decision(
            "under_way",
            f"Revision {subject.revision} was asked for at {last.asked_at:%Y-%m-%d %H:%M} UTC by "
            f"run {last.run_id}.{doubt}",
            last.run_id,
        )
    if not facts.again:
        settled = _settled(facts, last, state, len(attempts))
        if settled is not None:
            return settled
    # A run that Airflow does not have was cut off before it began: it is the one to start.
    number = len(attempts) if last is not None and state == MISSING else len(attempts) + 1
    run_id = subject.run_id(number)
    if facts.hold is not None:
        hold = facts.hold
        return Decision("deferred", f"{_news(facts)} {hold.reason}", run_id, hold.until)
    return Decision("start", _why(facts, number), run_id)


def _settled(facts: Facts, last: RefreshAttempt | None, state: str, count: int) -> Decision | None:
    """Return why nothing is to be done unless somebody insists; None if there is something."""
    revision = facts.subject.revision
    if facts.released:
        ids = ", ".join(facts.released)
        return Decision("nothing_new", f"Revision {revision} is released as {ids}.")
    if last is None:
        return None
    if state == "success":
        return Decision(
            "nothing_new", f"Run {last.run_id} of revision {revision} ended well.", last.run_id
        )
    if state == "failed" and count >= facts.max_attempts:
        return Decision(
            "given_up",
            f"Revision {revision} failed in {count} of {facts.max_attempts} runs, the last is "
            f"{last.run_id}. It is left alone until somebody asks for it again.",
            last.run_id,
        )
    return None


def _why(facts: Facts, number: int) -> str:
    if facts.again:
        return f"Somebody asked for revision {facts.subject.revision} again."
    if number > 1:
        return f"{_news(facts)} Run {number} of {facts.max_attempts}: the one before failed."
    return _news(facts)


def _news(facts: Facts) -> str:
    """Say what is new."""
    subject = facts.subject
    others = [each for each in facts.record.subjects if each.subject_id != subject.id]
    if any(each.revision == subject.revision for each in others):
        return f"The toolchain of revision {subject.revision} has changed."
    before = f" (before: {others[-1].revision})" if others else ""
    return f"Revision {subject.revision} is new{before}."


def hold_of(
    names: Sequence[str], environments: Mapping[str, Environment], now: datetime
) -> Hold | None:
    """Return what holds a release that goes to several environments; None if nothing does.

    Args:
        names: where it goes; all of them must take it at the same time.
        environments: all there are.
        now: in UTC.
    """
    until, reason = now, ""
    for _ in range(_MORE_WINDOWS):
        closed = [
            (closure.until, f"{name} takes no promotions: {closure.reason}")
            for name in names
            if name in environments and (closure := environments[name].closure(until)) is not None
        ]
        if not closed:
            break
        reason = reason or closed[0][1]
        until = max(end for end, _ in closed)
    return Hold(until, f"{reason}, until {until:%Y-%m-%d %H:%M} UTC.") if reason else None


def remembered(
    record: RefreshRecord,
    subject: Subject,
    *,
    attempt: RefreshAttempt | None = None,
    states: Mapping[str, str] = MappingProxyType({}),
    released: Iterable[str] = (),
) -> RefreshRecord:
    """Return the record with what became known of a subject; the same record if that is nothing.

    Args:
        record: as it is now.
        subject: what was looked at.
        attempt: the run that is asked for now.
        states: of the runs, by id; those that ended are kept, as Airflow may forget them.
        released: its releases.
    """
    known = record.subject(subject.id)
    entry = known or RefreshSubject(
        subject_id=subject.id, revision=subject.revision, toolchain_id=subject.toolchain_id
    )
    attempts = [
        each.model_copy(update={"state": states[each.run_id]})
        if not each.state and states.get(each.run_id) in ("success", "failed")
        else each
        for each in entry.attempts
    ]
    if attempt is not None and attempt.run_id not in {each.run_id for each in attempts}:
        attempts.append(attempt)
    found = (*entry.released, *(each for each in released if each not in entry.released))
    changed = entry.model_copy(update={"attempts": tuple(attempts), "released": found})
    if changed == known or not (attempts or found):
        return record
    others = tuple(each for each in record.subjects if each.subject_id != subject.id)
    # What was asked for last is last, also when an older revision came back.
    moved = attempt is not None or known is None
    subjects = (
        (*others, changed)
        if moved
        else tuple(changed if each.subject_id == subject.id else each for each in record.subjects)
    )
    return record.model_copy(update={"subjects": subjects[-KEPT_SUBJECTS:]})
