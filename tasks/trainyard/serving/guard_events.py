"""What the guard did by itself during a rollout, for its driver and for people.

Each event is a document of its own below the rollout, written once:
`rollouts/<model>/<environment>/<n>/events/guard-<time>-<event>.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from trainyard.documents.base import Document
from trainyard.serving.protocol import GuardState
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import rollout_prefix
from trainyard.store.protocol import Store

_PREFIX = "guard-"


class GuardEvent(Document):
    """The guard began to do something else than before."""

    model: str
    environment: str
    rollout: int
    at: datetime
    event: GuardState
    """What it does from then on; `following` ends the others."""
    reason: str
    release_id: str
    """The release in track `candidate` at that time."""
    weights: Mapping[str, int]
    """Percent by release id, as in effect from then on."""

    @property
    def key(self) -> str:
        """Where the event is stored; the same event always has the same key."""
        when = self.at.astimezone(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        folder = rollout_prefix(self.model, self.environment, self.rollout)
        return f"{folder}/events/{_PREFIX}{when}-{self.event.replace('_', '-')}.json"


def write_event(store: Store, event: GuardEvent) -> None:
    """Store an event; storing it again changes nothing."""
    create_document(store, event.key, event)


def guard_events(store: Store, model: str, environment: str, number: int) -> list[GuardEvent]:
    """Return the guard's events of one rollout, oldest first."""
    folder = f"{rollout_prefix(model, environment, number)}/events"
    keys = [entry.key for entry in store.list(folder)]
    own = [key for key in keys if key.removeprefix(f"{folder}/").startswith(_PREFIX)]
    return [read_document(store, key, GuardEvent) for key in own]
