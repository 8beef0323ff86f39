"""Releases that somebody else deployed: they serve, but nothing of them was published here.

What a rollout must know of one to go back to it (how many servers, how to warm them up, what the
model is called) it takes from the release that took its place, which clients could not tell apart.
"""

from __future__ import annotations

from trainyard.documents.channel import Channel
from trainyard.documents.release import Release
from trainyard.rollout.deps import RolloutDeps


def is_adopted(channel: Channel, release_id: str) -> bool:
    """Tell whether a release of the channel was adopted."""
    tracks = (channel.stable, channel.candidate, *channel.previous)
    return any(
        track is not None and track.release_id == release_id and not track.verified
        for track in tracks
    )


def known_release(deps: RolloutDeps, channel: Channel, release_id: str) -> Release:
    """Return a release of the channel; for an adopted one what is known, from its successor.

    Raises:
        NotFound, BadInput, CorruptFile: as `load_release`.
    """
    if not is_adopted(channel, release_id):
        return deps.release(channel.model, release_id)
    others = (channel.stable, channel.candidate, *channel.previous)
    successor = next(
        (track for track in others if track is not None and track.verified), channel.stable
    )
    assert successor is not None
    known = deps.release(channel.model, successor.release_id)
    return known.model_copy(update={"release_id": release_id})
