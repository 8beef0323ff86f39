"""The log of looks of one rollout: written once, read many times."""

from __future__ import annotations

from trainyard.documents.look import Look
from trainyard.store.documents import first_document, read_document
from trainyard.store.layout import rollout_prefix
from trainyard.store.protocol import Store


class LookLog:
    """Looks of all rollouts of a store. Each is read once; they never change."""

    def __init__(self, store: Store) -> None:
        """Keep looks in `store`."""
        self._store = store
        self._known: dict[str, Look] = {}

    def read(self, model: str, environment: str, number: int) -> list[Look]:
        """Return the looks of a rollout, oldest first. Raises CorruptFile."""
        folder = _folder(model, environment, number)
        keys = [entry.key for entry in self._store.list(folder)]
        # One rollout at a time is of interest; the looks of earlier ones need no memory.
        self._known = {key: self._known[key] for key in keys if key in self._known}
        for key in keys:
            if key not in self._known:
                self._known[key] = read_document(self._store, key, Look)
        return [self._known[key] for key in keys]

    def newest(self, model: str, environment: str, number: int) -> Look | None:
        """Return the newest look of a rollout that was read or written here; None if none was.

        Asks the store only if nothing is known of the rollout.
        """
        folder = f"{_folder(model, environment, number)}/"
        mine = [look for key, look in self._known.items() if key.startswith(folder)]
        if not mine:
            mine = self.read(model, environment, number)
        return max(mine, key=lambda look: look.snapshot.at, default=None)

    def write(self, model: str, environment: str, look: Look) -> tuple[str, Look]:
        """Store a look, unless another driver has written this slot: then that one counts.

        Returns:
            The key and what is stored there.
        """
        key = look_key(model, environment, look.rollout, look.slot)
        self._known[key] = first_document(self._store, key, look)
        return key, self._known[key]


def look_key(model: str, environment: str, number: int, slot: int) -> str:
    """Return the key of a look."""
    return f"{_folder(model, environment, number)}/{slot:06d}.json"


def _folder(model: str, environment: str, number: int) -> str:
    return f"{rollout_prefix(model, environment, number)}/looks"
