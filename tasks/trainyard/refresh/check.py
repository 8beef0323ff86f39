"""Checks models: looks, decides, and has at most one run started for each new revision.

The run is written down before it is asked for. Whoever comes second, or later, or after a crash
between the two, finds the same subject, and with it the same run id, which Airflow allows once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from trainyard.documents.base import Provenance
from trainyard.documents.refresh import RefreshAttempt, RefreshRecord
from trainyard.errors import TrainyardError
from trainyard.refresh.decide import Decision, Facts, decide, hold_of, remembered
from trainyard.refresh.look import (
    RELEASE_DAG,
    Seen,
    Toolchains,
    look,
    read_record,
    releases_of,
    state_in_store,
)
from trainyard.settings import Settings
from trainyard.spec.environments import Environments
from trainyard.store.documents import update_document
from trainyard.store.layout import refresh_key
from trainyard.store.protocol import Store


class Runs(Protocol):
    """The runs of `neuron_release`, wherever Airflow is asked from. Safe to call from threads."""

    def state(self, run_id: str) -> str:
        """Return the state of a run; empty if there is none. Raises Transient."""

    def start(self, run_id: str, conf: Mapping[str, Any], note: str) -> bool:
        """Start a run; False if it exists already."""


@dataclass(frozen=True)
class Check:
    """What became of one model."""

    model: str
    decision: Decision | None
    """None: it could not be checked."""
    revision: str = ""
    started: bool = False
    """Was the run started by this check?"""
    error: TrainyardError | None = None


@dataclass
class Refresher:
    """Checks models of this installation.

    Args:
        settings: of this installation.
        store: where records and releases are.
        environments: with their windows, and where steps run.
        runs: Airflow; None only looks: nothing is written or started.
        asked_by: who asks, for the record.
        now: the time in UTC.
    """

    settings: Settings
    store: Store
    environments: Environments
    runs: Runs | None
    asked_by: str = ""
    now: Callable[[], datetime] = field(default=partial(datetime.now, UTC))
    toolchains: Toolchains = field(init=False)

    def __post_init__(self) -> None:
        """Make what all checks share."""
        self.toolchains = Toolchains(self.settings, self.store, self.environments.steps)

    def check(self, model: str, *, again: bool = False) -> Check:
        """Check one model, and start the run of its new revision if there is one.

        Raises:
            BadInput, NotFound: spec, source or toolchain is wrong.
            Transient: source, store or Airflow cannot be reached now.
        """
        seen = look(model, self.settings, self.toolchains)
        facts = self._facts(seen, again)
        decision = decide(facts)
        started = self.runs is not None and self._act(seen, facts, decision, self.runs)
        return Check(model, decision, seen.subject.revision, started)

    def check_all(self, models: Sequence[str], *, again: bool = False) -> list[Check]:
        """Check models, several at a time, in their order; what goes wrong with one stops none."""
        if not models:
            return []
        threads = min(self.settings.refresh_concurrency, len(models))
        with ThreadPoolExecutor(threads, thread_name_prefix="refresh") as pool:
            return list(pool.map(lambda model: self._check_safely(model, again), models))

    def _check_safely(self, model: str, again: bool) -> Check:
        try:
            return self.check(model, again=again)
        except TrainyardError as error:
            return Check(model, None, error=error)

    def _facts(self, seen: Seen, again: bool) -> Facts:
        subject, record = seen.subject, read_record(self.store, seen.subject.model)
        known = record.subject(subject.id)
        released = known.released if known else ()
        states: dict[str, str] = {}
        last = known.attempts[-1] if known and known.attempts else None
        # What became of it matters only where it decides: a call of Airflow for each model adds up.
        if last is not None and not last.state and (again or not released):
            states[last.run_id] = self._state(subject.model, last.run_id)
        return Facts(
            subject=subject,
            record=record,
            released=released or releases_of(seen, self.store),
            run_states=states,
            hold=hold_of(seen.refresh.environments, self.environments.environments, self.now()),
            max_attempts=seen.refresh.max_attempts,
            again=again,
        )

    def _state(self, model: str, run_id: str) -> str:
        if self.runs is None:
            return state_in_store(self.store, model, run_id)
        return self.runs.state(run_id)

    def _act(self, seen: Seen, facts: Facts, decision: Decision, runs: Runs) -> bool:
        """Write down what is known now; start the run if one is to be started."""
        attempt = None
        if decision.outcome == "start":
            attempt = RefreshAttempt(
                run_id=decision.run_id, asked_at=self.now(), asked_by=self.asked_by
            )
        change = partial(
            remembered,
            subject=facts.subject,
            attempt=attempt,
            states=facts.run_states,
            released=facts.released,
        )
        if change(facts.record) != facts.record:
            update_document(
                self.store,
                refresh_key(facts.subject.model),
                RefreshRecord,
                change,
                absent=lambda: RefreshRecord(
                    model=facts.subject.model, provenance=Provenance.of(self.settings)
                ),
            )
        if attempt is None:
            return False
        return runs.start(decision.run_id, conf_of(seen), decision.reason)


def conf_of(seen: Seen) -> dict[str, Any]:
    """Return the conf of the run that releases what was seen."""
    conf: dict[str, Any] = {"model": seen.subject.model, "revision": seen.subject.revision}
    if seen.refresh.environments:
        conf["environments"] = list(seen.refresh.environments)
        # The release takes hours, and a window may have begun when it is there.
        conf["wait_for_window"] = True
    return conf


def exit_code(checks: Iterable[Check]) -> int:
    """Return the worst exit code of several checks; one that a retry may mend counts less."""
    codes = [each.error.exit_code for each in checks if each.error is not None]
    return min(codes, default=0)


__all__ = ["RELEASE_DAG", "Check", "Refresher", "Runs", "conf_of", "exit_code"]
