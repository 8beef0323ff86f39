"""What the guard did by itself during a rollout, for its driver and for people.

Each event is a document of its own below the rollout, written once:
`rollouts/<model>/<environment>/<n>/events/guard-<time>-<event>.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime

from trainyard.documents.base import Document, Frozen
from trainyard.serving.guard import Fuse, RouteDecision, Wish
from trainyard.serving.protocol import GuardState
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import rollout_prefix
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)

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


class GuardMemory(Frozen):
    """What the guard of one channel must know after a restart."""

    rollout: int | None = None
    guard: GuardState = "following"
    fuse: Fuse | None = None
    unwritten: tuple[GuardEvent, ...] = ()
    """Events that the store does not have yet."""


def remember(
    memory: GuardMemory, wish: Wish, decision: RouteDecision, now: datetime
) -> GuardMemory:
    """Return the memory after a decision, with an event if the guard changed its mind."""
    before = memory.guard if memory.rollout == wish.rollout else "following"
    events = memory.unwritten
    if wish.rollout is not None and decision.guard != before:
        events = (
            *events,
            GuardEvent(
                model=wish.model,
                environment=wish.environment,
                rollout=wish.rollout,
                at=now,
                event=decision.guard,
                reason=decision.reason or "The route follows the channel again.",
                release_id=wish.candidate or "",
                weights=dict(decision.weights),
            ),
        )
        log.warning("%s/%s: %s. %s", wish.environment, wish.model, decision.guard, decision)
    return GuardMemory(
        rollout=wish.rollout, guard=decision.guard, fuse=decision.fuse, unwritten=events
    )


def write_event(store: Store, event: GuardEvent) -> None:
    """Store an event; storing it again changes nothing."""
    create_document(store, event.key, event)


def guard_events(store: Store, model: str, environment: str, number: int) -> list[GuardEvent]:
    """Return the guard's events of one rollout, oldest first."""
    folder = f"{rollout_prefix(model, environment, number)}/events"
    keys = [entry.key for entry in store.list(folder)]
    own = [key for key in keys if key.removeprefix(f"{folder}/").startswith(_PREFIX)]
    return [read_document(store, key, GuardEvent) for key in own]
