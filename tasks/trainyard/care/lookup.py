"""Finds what somebody means by a name, and where a release serves."""

from __future__ import annotations

from trainyard.care.facts import channel_facts
from trainyard.errors import BadInput, NotFound
from trainyard.names import check_relative_path, check_release_id
from trainyard.rollout.channel_store import list_channels
from trainyard.store.layout import MANIFEST_NAME, release_key
from trainyard.store.objects import Place, place_of
from trainyard.store.protocol import Store

MAX_DOCUMENT_BYTES = 64 << 20
"""Bytes that are read at most: weights are not shown."""


def find_key(store: Store, text: str) -> tuple[Place, bytes]:
    """Return what `text` means, and the content of its document.

    Args:
        store: where to look.
        text: a key, the folder of a checkpoint or bundle, or a release id.

    Raises:
        NotFound: there is no such thing.
        BadInput: `text` is no name of anything.
    """
    for key in _candidates(text):
        try:
            with store.open(key) as stream:
                data = stream.read(MAX_DOCUMENT_BYTES + 1)
        except NotFound:
            continue
        if len(data) > MAX_DOCUMENT_BYTES:
            raise BadInput(f"{key} is too large for a document.", hint="It is a file of a model.")
        return place_of(key), data
    raise NotFound(
        f"There is no {text!r} in {store.url}.", hint="`trainyard store ls` shows what there is."
    )


def roles_of(store: Store, release: str) -> list[str]:
    """Return what a release (its key) is in which channel, a line each.

    What may be in a channel that cannot be read is said to be unknown.
    """
    listed = list_channels(store)
    roles = [
        f"{track.role} in {facts.title}"
        for facts in map(channel_facts, listed.channels)
        for track in facts.tracks
        if track.release == release
    ]
    return [*roles, *(f"unknown in {key}, which cannot be read" for key in listed.unreadable)]


def _candidates(text: str) -> list[str]:
    key = check_relative_path(text.rstrip("/"))
    found = [key, f"{key}/{MANIFEST_NAME}", f"{key}.json"]
    try:
        model = check_release_id(key).rpartition("-")[0]
    except BadInput:
        return found
    return [release_key(model, key), *found]
