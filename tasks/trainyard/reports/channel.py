"""A channel as a table: what it serves, and what happened last."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from trainyard.documents.channel import Channel

SHOWN_EVENTS = 15


def channel_table(channel: Channel) -> RenderableType:
    """Return the tracks, the rollout and the newest events of a channel."""
    tracks = Table("Track", "Release", "Weight", "Since", box=None, pad_edge=False)
    for name, track, weight in (
        ("stable", channel.stable, channel.weights.stable),
        ("candidate", channel.candidate, channel.weights.candidate),
    ):
        if track is not None:
            since = f"{track.since:%Y-%m-%d %H:%M:%S} UTC"
            tracks.add_row(name, track.release_id, f"{weight} %", since)
    events = Table("When", "Rollout", "Event", "Release", "Detail", box=None, pad_edge=False)
    for entry in channel.history[-SHOWN_EVENTS:]:
        detail = ", ".join(f"{key} {value}" for key, value in entry.detail.items())
        number = "" if entry.rollout is None else str(entry.rollout)
        events.add_row(f"{entry.at:%H:%M:%S}", number, entry.event, entry.release_id, detail)
    rollout = channel.rollout
    line = "No rollout yet."
    if rollout is not None:
        state = rollout.outcome or rollout.phase
        line = f"Rollout {rollout.number}: {state}. {rollout.reason}"
    return Group(tracks, "", line, "", events)
