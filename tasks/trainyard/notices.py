"""What people are told about releases and rollouts, and which ways of telling want to know it.

Pure: how a notice is sent is the business of whoever has the connections.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from trainyard.documents.base import Frozen
from trainyard.documents.channel import HistoryEntry
from trainyard.spec.environments import Environments
from trainyard.spec.ways import NoticeKind, Notify

_KINDS: dict[str, NoticeKind] = {
    "promoted": "promoted",
    "rolled_back": "rolled_back",
    "returned": "rolled_back",
    "withdrawn": "withdrawn",
    "held": "held",
    "slo_missed": "slo_missed",
}
"""Kinds of notice by the event of a channel's history."""

_HEADLINES: dict[NoticeKind, str] = {
    "promoted": "{subject} is promoted{where}",
    "rolled_back": "{subject} was rolled back{where}",
    "withdrawn": "{subject} was withdrawn{where}",
    "held": "{subject} is held{where}: the judge cannot decide",
    "slo_missed": "{subject} misses its objectives{where}",
    "gate_failed": "{subject} did not pass its {what} gate",
    "waiting_approval": "{subject} waits for approval{where}",
    "stuck": "{subject} takes too long{where}",
}


class Notice(Frozen):
    """One thing that happened, for people."""

    id: str
    """The same each time this is told: who gets it twice can drop the second."""
    kind: NoticeKind
    model: str
    environment: str = ""
    """Empty: it happened before any environment was reached."""
    release_id: str = ""
    what: str = ""
    """Name of the gate."""
    serves_again: bool = False
    """A rollback that was asked for: `release_id` is the release that it went back to."""
    text: str
    """What happened, one or more sentences."""
    who: str = ""
    """Who asked for it."""
    at: datetime
    run: str = ""
    """DAG and run, `neuron_release/manual-1`."""
    link: str = ""
    """Address of a page that shows more."""

    @property
    def headline(self) -> str:
        """The notice in a few words."""
        where = f" in {self.environment}" if self.environment else ""
        subject = self.release_id or self.model or self.run
        if self.serves_again:
            return f"{subject} serves again{where}: it was rolled back to"
        return _HEADLINES[self.kind].format(subject=subject, where=where, what=self.what)

    def as_json(self) -> dict[str, Any]:
        """Return what a webhook is sent."""
        body = self.model_dump(mode="json", exclude={"what"})
        return {"schema": "trainyard/v1", "headline": self.headline, **body}


def notice_of(
    model: str, environment: str, rollout: int, entry: HistoryEntry, message: str, *, run: str = ""
) -> Notice | None:
    """Return the notice about an event of a rollout; None if nobody can ask to be told of it."""
    kind = _KINDS.get(entry.event)
    if kind is None:
        return None
    return Notice(
        id=f"{model}/{environment}/{rollout}/{entry.generation}/{entry.event}",
        kind=kind,
        model=model,
        environment=environment,
        release_id=entry.release_id,
        serves_again=entry.event == "returned",
        text=message[:1].upper() + message[1:],
        who=entry.who,
        at=entry.at,
        run=run,
    )


def ways_of_telling(
    environments: Environments, kind: NoticeKind, among: Iterable[str]
) -> tuple[Notify, ...]:
    """Return the ways by which people want to be told of something, each once.

    Args:
        environments: the file.
        kind: of what.
        among: the environments that it is about; the file's own `notify` gets what is about none of
            them in particular, and everything that goes wrong before.
    """
    found = list(environments.notify)
    for name in among:
        if name in environments.environments:
            found += environments.environments[name].notify
    return tuple(dict.fromkeys(each for each in found if kind in each.events))
