"""What a node cache remembers beside the files: which release needs which, and who pinned it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from trainyard.documents.base import Frozen
from trainyard.store.locks import Holder


class CachedRelease(Frozen):
    """`releases/<release id>.json` in the cache."""

    release_id: str
    model: str
    files: dict[str, int]
    """Size in bytes by sha256."""
    documents: tuple[str, ...] = ()
    """Keys of the store's documents that were read for it, kept below `documents`."""
    used_at: datetime


class Pin(Frozen):
    """`pins/<digest>.json` in the cache: somebody needs a release to stay.

    It ends when its owner takes it back, or with its owner: the process or the folder.
    """

    release_id: str
    owner: str
    """For people, and to take it back by."""
    since: datetime
    process: Holder | None = None
    folder: Path | None = None
    """What was restored for the owner; a cache never forgets what a folder still uses."""

    def is_orphaned(self) -> bool:
        """Tell whether its owner is certainly gone."""
        if self.process is not None and self.process.is_gone():
            return True
        # Where not even the parent can be seen, another container may still see the folder.
        return self.folder is not None and self.folder.parent.is_dir() and not self.folder.exists()


class Session(Frozen):
    """`sessions/<name>.json` in the cache, locked while its process lives: a restore under way."""

    release_id: str
    pid: int
    since: datetime
    files: dict[str, int]
    """Size in bytes by sha256: neither of them may be evicted now."""
