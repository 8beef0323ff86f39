"""People's answers to "may this release come here?", as attestations beside the release.

A promotion that needs approval asks in rounds: a round begins with `asked` and ends with enough
`approved`, one `rejected`, or `closed` (time was up, or the run ended). Whatever starts the rollout
looks here, not at the state of a task, so that a task which somebody marked as done approves
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from trainyard.documents.base import Provenance
from trainyard.documents.release import Attestation
from trainyard.errors import Refused
from trainyard.releases import list_attestations, record_attestation
from trainyard.store.protocol import Store

Answer = Literal["asked", "approved", "rejected", "ignored", "closed"]
"""`ignored`: somebody answered whose answer does not count."""


@dataclass(frozen=True)
class Round:
    """The last time that a run asked for approval of a release."""

    environment: str
    run_id: str
    """DAG and run, such as `neuron_promote__production/promote__adder-0123456789ab__g7`."""
    release_id: str
    asked_at: datetime
    expires_at: datetime
    needs: int
    requested_by: str
    approved: tuple[str, ...] = ()
    """Who has approved, in their order."""
    ended: Literal["", "rejected", "closed"] = ""
    last: str = ""
    """The last thing that was said, in words."""

    @property
    def is_approved(self) -> bool:
        """Did enough people approve, and nobody reject?"""
        return not self.ended and len(self.approved) >= self.needs

    def waits(self, now: datetime) -> bool:
        """Tell whether an answer can still change anything."""
        return not self.ended and not self.is_approved and now < self.expires_at


def record_answer(
    store: Store,
    model: str,
    release_id: str,
    answer: Answer,
    *,
    environment: str,
    run_id: str,
    at: datetime,
    who: str = "",
    note: str = "",
    provenance: Provenance | None = None,
    **details: Any,
) -> None:
    """Store what was asked or answered; the same twice is one.

    Args:
        store: where.
        model: of the release.
        release_id: what is to come.
        answer: what was said.
        environment: where it is to come.
        run_id: the run that asks.
        at: when; makes each answer its own.
        who: said it.
        note: said with it.
        provenance: of the attestation.
        details: more to keep.
    """
    subject = {
        "answer": answer,
        "environment": environment,
        "run_id": run_id,
        "at": at.isoformat(),
        "who": who,
        "note": note,
        **details,
    }
    record_attestation(store, model, release_id, "approval", subject, provenance=provenance)


def round_of_run(
    store: Store, model: str, release_id: str, *, environment: str, run_id: str
) -> Round | None:
    """Return the last round in which a run asked; None if it never did."""
    found = list_attestations(store, model, release_id, "approval")
    rounds = rounds_in(found)
    return next(
        (each for each in rounds if (each.environment, each.run_id) == (environment, run_id)), None
    )


def rounds_in(attestations: Iterable[Attestation]) -> tuple[Round, ...]:
    """Return the last round of each run among these attestations, newest first."""
    rounds: dict[tuple[str, str, str], Round] = {}
    said = [each for each in attestations if each.kind == "approval"]
    for each in sorted(said, key=lambda one: str(one.subject.get("at", ""))):
        subject = each.subject
        key = (each.release_id, str(subject.get("environment")), str(subject.get("run_id")))
        if subject.get("answer") == "asked":
            rounds[key] = _begun(each)
        elif key in rounds:
            rounds[key] = _after(rounds[key], subject)
    return tuple(sorted(rounds.values(), key=lambda each: each.asked_at, reverse=True))


def demand_approval(
    store: Store, model: str, release_id: str, *, environment: str, run_id: str
) -> None:
    """Raise Refused unless enough people have approved what this run promotes."""
    found = round_of_run(store, model, release_id, environment=environment, run_id=run_id)
    if found is not None and found.is_approved:
        return
    raise Refused(
        f"{environment} takes a release only with approval, and {release_id} has none for this "
        f"run{f': {found.last}' if found is not None and found.last else ''}.",
        hint="Ask again: clear the run's task `approve`, or start a new run.",
    )


def close_round(
    store: Store,
    model: str,
    release_id: str,
    *,
    environment: str,
    run_id: str,
    at: datetime,
    note: str,
) -> None:
    """End the round of a run if it is open, so that nobody is asked for nothing."""
    found = round_of_run(store, model, release_id, environment=environment, run_id=run_id)
    if found is None or found.ended or found.is_approved:
        return
    record_answer(
        store,
        model,
        release_id,
        "closed",
        environment=environment,
        run_id=run_id,
        at=at,
        note=note,
    )


def _begun(asked: Attestation) -> Round:
    subject = asked.subject
    return Round(
        environment=str(subject["environment"]),
        run_id=str(subject["run_id"]),
        release_id=asked.release_id,
        asked_at=datetime.fromisoformat(str(subject["at"])),
        expires_at=datetime.fromisoformat(str(subject["expires_at"])),
        needs=int(subject["needs"]),
        requested_by=str(subject.get("requested_by", "")),
    )


def _after(before: Round, subject: dict[str, Any]) -> Round:
    """Return a round after something more was said in it."""
    answer, who, note = (str(subject.get(name, "")) for name in ("answer", "who", "note"))
    said = f"{who} {answer}".strip() + (f" ({note})" if note else "")
    values = dict(vars(before)) | {"last": said}
    if answer == "approved" and who not in before.approved:
        values["approved"] = (*before.approved, who)
    elif answer == "rejected":
        values["ended"] = "rejected"
    elif answer == "closed":
        values["ended"] = "closed"
    return Round(**values)
