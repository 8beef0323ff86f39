"""Tells whoever takes traffic back whether the route has come to that: the channel only wishes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trainyard.documents.channel import Channel
from trainyard.errors import TrainyardError
from trainyard.rollout.deps import RolloutDeps


class RouteSight:
    """Looks at the route of one channel until all its traffic is back.

    It says so then, and once if it is not so yet.
    """

    def __init__(self, deps: RolloutDeps, say: Callable[[str], None]) -> None:
        """Begin to look; `say` takes a line for people."""
        self._deps = deps
        self._say = say
        self._is_back = False
        self.trouble = ""
        """Why the traffic is not known to be back; empty: it is, or nobody waits for that."""

    def look(self, channel: Channel) -> None:
        """Look once, if the channel takes traffic back and it was not seen to be there."""
        if self._is_back or not _takes_back(channel):
            return
        assert channel.stable is not None
        stable = channel.stable.release_id
        before, self.trouble = self.trouble, self._trouble(channel, stable)
        if not self.trouble:
            self._is_back = True
            self._say(f"The route gives all traffic to {stable}.")
        elif not before:
            self._say(self.trouble)

    def _trouble(self, channel: Channel, stable: str) -> str:
        try:
            route = self._deps.router.status(channel.environment, channel.model)
        except (TrainyardError, OSError) as error:
            why = error.message if isinstance(error, TrainyardError) else error
            return f"The router cannot be asked whether the traffic is back: {why}"
        if route is None:
            return "The router cannot be asked whether the traffic is back: it does not answer."
        others = {name: share for name, share in route.weights.items() if share and name != stable}
        if not others:
            return ""
        return f"The traffic is not back yet: the route still gives {shares_in_words(others)}."


def shares_in_words(weights: Mapping[str, int]) -> str:
    """Return who gets how much of the traffic, as the end of a sentence; empty: nobody."""
    return ", ".join(f"{share} % to {name}" for name, share in weights.items() if share)


def _takes_back(channel: Channel) -> bool:
    rollout = channel.rollout
    return (
        rollout is not None
        and rollout.ending in ("withdrawn", "rolled_back")
        and channel.in_progress
        and channel.weights.candidate == 0
        and channel.stable is not None
    )
