"""The node cache in words and tables, for people."""

from __future__ import annotations

from rich.table import Table

from trainyard.node_cache.cache import GIB, CacheState
from trainyard.node_cache.policy import Eviction


def gib(size: int) -> str:
    """Return bytes as GiB with two digits."""
    return f"{size / GIB:.2f} GiB"


def node_cache_table(state: CacheState) -> Table:
    """Return one row a release, last used first."""
    table = Table("Release", "Here", "Of", "Last used", "Why it stays", box=None, pad_edge=False)
    for release in state.releases:
        owners = [pin.owner for pin in state.pins if pin.release_id == release.release_id]
        reasons = [f"pinned by {owner}" for owner in owners]
        if any(sha256 in state.linked for sha256 in release.files):
            reasons.append("in use by a restored folder")
        table.add_row(
            release.release_id,
            gib(sum(state.sizes.get(sha256, 0) for sha256 in release.files)),
            gib(sum(release.files.values())),
            f"{release.used_at:%Y-%m-%d %H:%M} UTC",
            "; ".join(reasons),
        )
    return table


def node_cache_total(state: CacheState) -> str:
    """Return one sentence about the whole; releases may share files."""
    limit = "no limit" if state.limit_bytes is None else f"a limit of {gib(state.limit_bytes)}"
    partial = f", {gib(state.partial_bytes)} of it under way" if state.partial_bytes else ""
    return f"{len(state.sizes)} files, {gib(state.bytes)}{partial}; {limit}."


def eviction_sentence(eviction: Eviction) -> str:
    """Return what was removed and what is left."""
    count = len(eviction.remove)
    text = f"{count} file{'s' if count != 1 else ''} removed; {gib(eviction.bytes_after)} left"
    if eviction.over_bytes:
        text += f", {gib(eviction.over_bytes)} more than wanted: the rest is pinned or in use"
    return f"{text}."
