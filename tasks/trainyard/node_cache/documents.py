"""Copies of the store's documents on this machine, for times when the store cannot be reached."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from trainyard.errors import BadInput, CorruptFile, NotFound, Transient
from trainyard.store.folder import FolderStore
from trainyard.store.protocol import Entry, Store, Stored

log = logging.getLogger(__name__)


class RememberedDocuments(FolderStore):
    """Reads documents from the store and keeps copies; reads the copies while the store fails.

    With `copies_first`, the store is asked for what there is no copy of only: what was here once is
    then read at once, while a store that is down takes minutes to be sure of it.

    Only for reading, and only for documents that are written once, such as releases and manifests,
    whose signatures and digests the reader checks: a copy of another kind could be out of date.

    That a document does not exist, or is damaged, is an answer, not a failure. Everything else is,
    wrong credentials included: a server that ran yesterday must start today.
    """

    def __init__(self, store: Store, root: Path, *, copies_first: bool = False) -> None:
        """Remember below `root` what is read from `store`."""
        super().__init__(root)
        self._store = store
        self._copies_first = copies_first
        self._read: list[str] = []
        self.asked = False
        """Did the store answer?"""
        self.problem: Transient | BadInput | None = None
        """Why the store could not be read, if it could not."""

    @property
    def url(self) -> str:
        """What people call the store."""
        return self._store.url

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of the documents that were read."""
        return tuple(dict.fromkeys(self._read))

    def read(self, key: str) -> Stored:
        """Return the content of `key`, from the copy if the store fails. Raises as the store."""
        self._read.append(key)
        copy = self._copy(key)
        if copy is not None and self._copies_first:
            return copy
        stored = self._fresh(key) if self.problem is None else None
        if stored is not None:
            if copy is None or copy.data != stored.data:
                super().put(key, stored.data)
            return stored
        if copy is None:
            assert self.problem is not None
            raise self.problem
        return copy

    def _copy(self, key: str) -> Stored | None:
        try:
            return super().read(key)
        except NotFound:
            return None

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the keys below `prefix`, those of the copies if the store fails."""
        if self.problem is None:
            try:
                yield from tuple(self._store.list(prefix))
                return
            except (Transient, BadInput) as error:
                self._give_up(error)
        yield from super().list(prefix)

    def _fresh(self, key: str) -> Stored | None:
        try:
            stored = self._store.read(key)
            self.asked = True
            return stored
        except (NotFound, CorruptFile):
            raise
        except (Transient, BadInput) as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Transient | BadInput) -> None:
        self.problem = error
        log.warning("The store cannot be read, so the copies on this machine count: %s", error)
