"""Tells people about a rollout's events, and keeps each as a document.

An event is told first and written down as told afterwards: who is killed in between tells it again.
Each has the same key both times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from trainyard.documents.base import Document
from trainyard.documents.channel import HistoryEntry
from trainyard.rollout.events import Notify
from trainyard.rollout.words import describe_entry
from trainyard.store.documents import create_document
from trainyard.store.layout import rollout_prefix
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)


class RolloutEvent(Document):
    """`rollouts/<model>/<environment>/<n>/events/rollout-<generation>-<event>.json`."""

    model: str
    environment: str
    rollout: int
    entry: HistoryEntry
    message: str
    """One line for people."""


class Outbox:
    """Delivers events at least once."""

    def __init__(
        self,
        store: Store,
        tell: Callable[[str], None],
        notify: Callable[[RolloutEvent], None] = lambda _: None,
    ) -> None:
        """Keep events in `store`, hand each line to `tell` and each event to `notify`."""
        self._store = store
        self._tell = tell
        self._notify = notify
        self._delivered: set[str] = set()

    def deliver(self, model: str, environment: str, command: Notify) -> None:
        """Tell an event unless it was told before. Raises Transient."""
        entry = command.entry
        folder = rollout_prefix(model, environment, command.rollout)
        name = f"rollout-{entry.generation:08d}-{entry.event.replace('_', '-')}.json"
        key = f"{folder}/events/{name}"
        if key in self._delivered:
            return
        if not self._store.exists(key):
            message = describe_entry(entry)
            event = RolloutEvent(
                model=model,
                environment=environment,
                rollout=command.rollout,
                entry=entry,
                message=message,
            )
            try:
                self._tell(f"{model}/{environment}: {message}")
                self._notify(event)
            except Exception:
                # Whatever happens to a notice, the rollout goes on.
                log.exception("The notice of %s could not be given", key)
            create_document(self._store, key, event)
        self._delivered.add(key)
