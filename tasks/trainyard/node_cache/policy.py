"""Which files a full cache gives up: pure, a function of what it holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """One file in the cache."""

    name: str
    size: int
    """Bytes that removing it frees."""
    used_at: float
    """Seconds since the epoch when it was last used."""


@dataclass(frozen=True)
class Eviction:
    """What to remove, and what that leaves."""

    remove: tuple[str, ...]
    """Least recently used first."""
    bytes_after: int
    """Bytes held once that is done and what is coming has come."""
    over_bytes: int
    """Bytes of it beyond the limit, because everything else must stay."""


def choose_evictions(
    held: Iterable[Held],
    *,
    keep: Collection[str],
    incoming_bytes: int,
    limit_bytes: int | None,
) -> Eviction:
    """Return the fewest least recently used files whose removal makes room.

    Args:
        held: all files in the cache.
        keep: names of those that stay whatever happens: pinned, or in use.
        incoming_bytes: what is about to come.
        limit_bytes: what the cache may hold; None: anything.
    """
    files = list(held)
    total = sum(file.size for file in files) + incoming_bytes
    if limit_bytes is None:
        return Eviction((), total, 0)
    remove: list[str] = []
    candidates = [file for file in files if file.name not in keep and file.size > 0]
    for file in sorted(candidates, key=lambda file: (file.used_at, -file.size, file.name)):
        if total <= limit_bytes:
            break
        remove.append(file.name)
        total -= file.size
    return Eviction(tuple(remove), total, max(0, total - limit_bytes))
