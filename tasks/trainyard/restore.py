"""`trainyard materialize`: a release from the store, through the node cache, to a server's folder.

Documents are written once, so copies of them in the node cache are as good as those in the store:
signature and digests are checked wherever they come from, and so are the files. A release that was
here needs no store to start again.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Protocol

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest
from trainyard.documents.channel import Channel
from trainyard.documents.release import Release
from trainyard.errors import BadInput, NotFound, Transient
from trainyard.lanes.registry import get_lane
from trainyard.lanes.start_check import refuse_misfit
from trainyard.materialize import (
    DEFAULT_MEANS,
    Materialized,
    Means,
    manifests_of,
    materialize_bundle,
    materialize_checkpoint,
)
from trainyard.names import check_release_id
from trainyard.node_cache.cache import GIB, NodeCache, files_of
from trainyard.node_cache.documents import RememberedDocuments
from trainyard.node_cache.policy import Eviction
from trainyard.node_cache.records import CachedRelease, Pin
from trainyard.releases import load_release
from trainyard.settings import Settings
from trainyard.store.documents import read_document
from trainyard.store.layout import channel_prefix
from trainyard.store.protocol import Store

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Who is told of the progress of a restore; called by several threads."""

    def total(self, size: int) -> None:
        """Learn how many bytes there are."""

    def moved(self, size: int) -> None:
        """Learn of bytes that are in place; a negative number if a file starts over."""


class Nobody:
    """A watcher that does not care."""

    def total(self, size: int) -> None:
        """Do nothing."""

    def moved(self, size: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Restored:
    """A release that is ready to be served from this machine."""

    release_id: str
    where: Materialized
    size_bytes: int
    seconds: float
    over_limit_bytes: int
    """Bytes by which the node cache had to grow beyond its limit."""
    store_problem: str
    """Why documents could not be read from the store; empty if they could, or need not be."""


def open_cache(settings: Settings) -> NodeCache:
    """Return the node cache that the settings name.

    Raises:
        BadInput: they name none.
    """
    if settings.node_cache is None:
        raise BadInput(
            "There is no node cache: TRAINYARD_NODE_CACHE is not set.",
            hint="Set it to a folder on the disk of this machine that its servers share.",
        )
    limit_bytes = int(settings.node_cache_gib * GIB) or None
    return NodeCache(settings.node_cache, limit_bytes=limit_bytes)


def restore_release(
    store: Store,
    release_id: str,
    dest: Path,
    settings: Settings,
    *,
    pin_owner: str = "",
    watcher: Watcher | None = None,
    means: Means = DEFAULT_MEANS,
) -> Restored:
    """Restore a release below `dest`, as `materialize_release`, through the node cache if any.

    Args:
        store: where the release is.
        release_id: which one.
        dest: gets the folders `model` and `cache`; belongs to one server.
        settings: name the node cache and the trusted keys.
        pin_owner: pin the release in the node cache for this owner.
        watcher: told of progress.
        means: how transfers are done.

    Raises:
        NotFound: there is no such release, or a part of it is missing.
        BadInput: its signature is not that of a trusted key.
        CorruptFile: a document or a file is damaged.
        Refused: the bundle is not what the release's target asks for.
        Transient, StorageFull: the store cannot be reached and not all of the release is in the
            node cache, or the disk fails.
    """
    model = check_release_id(release_id).rpartition("-")[0]
    watcher = watcher or Nobody()
    means = replace(means, on_bytes=watcher.moved)
    if settings.node_cache is None:
        if pin_owner:
            open_cache(settings)
        release = load_release(store, model, release_id, settings)
        return _restore(store, release, manifests_of(store, release), dest, watcher, means)
    cache = open_cache(settings)
    documents, release, manifests = _documents(store, cache, model, release_id, settings)
    wanted = CachedRelease(
        release_id=release_id,
        model=model,
        files=files_of(*(manifest.files for manifest in manifests)),
        documents=documents.keys,
        used_at=datetime.now(UTC),
    )
    cache.remember(wanted)
    if pin_owner:
        cache.pin(Pin(release_id=release_id, owner=pin_owner, since=datetime.now(UTC)))
    # A store that is down takes minutes to say so: it is not asked for what can wait.
    if documents.asked or (documents.problem is None and cache.is_tight(wanted)):
        follow_channels(store, cache)
    with cache.use(wanted) as over_bytes:
        if over_bytes:
            log.warning(
                "The node cache %s grows %.2f GiB beyond its limit: all else in it is pinned or in "
                "use (`trainyard node-cache ls`)",
                cache.root,
                over_bytes / GIB,
            )
        restored = _restore(store, release, manifests, dest, watcher, replace(means, cache=cache))
    problem = str(documents.problem or "")
    return replace(restored, over_limit_bytes=over_bytes, store_problem=problem)


def _documents(
    store: Store, cache: NodeCache, model: str, release_id: str, settings: Settings
) -> tuple[RememberedDocuments, Release, tuple[CheckpointManifest, BundleManifest]]:
    """Return a release and its manifests, from their copies where these are good."""
    try:
        documents = RememberedDocuments(store, cache.documents, copies_first=True)
        release = load_release(documents, model, release_id, settings)
        return documents, release, manifests_of(documents, release)
    except BadInput as error:
        if not documents.keys or isinstance(error, NotFound):
            raise
        log.warning("A copy in the node cache %s is not good: %s", cache.root, error)
    documents = RememberedDocuments(store, cache.documents)
    release = load_release(documents, model, release_id, settings)
    return documents, release, manifests_of(documents, release)


def _restore(
    store: Store,
    release: Release,
    manifests: tuple[CheckpointManifest, BundleManifest],
    dest: Path,
    watcher: Watcher,
    means: Means,
) -> Restored:
    started = monotonic()
    checkpoint, bundle = manifests
    size_bytes = sum(entry.size for entry in (*checkpoint.files, *bundle.files))
    watcher.total(size_bytes)
    where = Materialized(
        model_dir=materialize_checkpoint(store, checkpoint, dest / "model", means),
        cache_dir=materialize_bundle(store, bundle, dest / "cache", means),
    )
    refuse_misfit(get_lane(release.lane), release.target, where.cache_dir)
    return Restored(release.release_id, where, size_bytes, monotonic() - started, 0, "")


def evict_from_cache(store: Store, settings: Settings, limit_gib: float | None) -> Eviction:
    """Give up what is neither pinned nor in use; `limit_gib` None: down to the cache's own limit.

    Raises:
        BadInput: there is no node cache.
    """
    cache = open_cache(settings)
    follow_channels(store, cache)
    gib = settings.node_cache_gib or None if limit_gib is None else limit_gib
    return cache.evict(None if gib is None else int(gib * GIB))


def follow_channels(store: Store, cache: NodeCache) -> None:
    """Pin the cached releases that channels have as stable, and no longer those they had before.

    A store that fails changes nothing.
    """
    state = cache.state()
    cached = {release.release_id for release in state.releases}
    for model in sorted({release.model for release in state.releases}):
        try:
            stable = _stable_releases(store, model)
        except (Transient, BadInput) as error:
            log.warning("The channels of %s cannot be read, so its pins stay: %s", model, error)
            continue
        pinned = {
            (pin.owner, pin.release_id)
            for pin in state.pins
            if pin.owner.startswith(f"channel {model}/")
        }
        wanted = {each for each in stable if each[1] in cached}
        for owner, release_id in sorted(wanted - pinned):
            # Evicted by somebody since we looked: then there is nothing to keep.
            with suppress(NotFound):
                cache.pin(Pin(release_id=release_id, owner=owner, since=datetime.now(UTC)))
        for owner, release_id in sorted(pinned - wanted):
            cache.unpin(owner, release_id)


def _stable_releases(store: Store, model: str) -> set[tuple[str, str]]:
    """Return owner and release id of the pins that a model's channels call for."""
    channels = (
        read_document(store, entry.key, Channel) for entry in store.list(channel_prefix(model))
    )
    return {
        (f"channel {model}/{channel.environment}", channel.stable.release_id)
        for channel in channels
        if channel.stable is not None
    }
