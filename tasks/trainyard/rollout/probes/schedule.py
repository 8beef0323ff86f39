"""Which prompt is next, and which servers get it. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """One prompt and the servers that get it, at the same moment."""

    prompt: int
    """Its place in the set."""
    scored: bool
    """Do the answers count? Only the first time that a prompt is sent in a rollout: a set has no
    more to say about a release than what it says once, however often it is repeated. Repeats count
    for errors and latencies."""
    stable: tuple[str, ...]
    """Names of servers, the first of which answers for its release."""
    candidate: tuple[str, ...]


class Schedule:
    """Goes through the set in an order that is its own for each rollout, again and again."""

    def __init__(self, prompts: int, seed: str, cursor: int = 0) -> None:
        """Begin.

        Args:
            prompts: size of the set, at least 1.
            seed: another one gives another order.
            cursor: rounds that there were already, by an earlier process.
        """
        self._order = list(range(prompts))
        random.Random(seed).shuffle(self._order)
        self.cursor = cursor
        self._given: dict[str, int] = {"stable": 0, "candidate": 0}
        self._owed = 0.0

    def next(self, stable: Sequence[str], candidate: Sequence[str]) -> Round:
        """Return the next round.

        A prompt goes to at least one server of each release. Where one release has more servers,
        as many more of them get it, so that over some rounds each server of either release has as
        many requests: a server with more of them would be slower, whatever it serves.

        Args:
            stable: names of ready servers, at least one.
            candidate: the same.
        """
        larger = max(len(stable), len(candidate))
        self._owed += larger / min(len(stable), len(candidate))
        # Of 3 to 2, the shares add up to whole numbers but for rounding.
        more = max(1, int(self._owed + 1e-9))
        self._owed -= more
        number = self.cursor
        self.cursor += 1
        return Round(
            prompt=self._order[number % len(self._order)],
            scored=number < len(self._order),
            stable=self._take("stable", stable, more if len(stable) == larger else 1),
            candidate=self._take("candidate", candidate, more if len(candidate) == larger else 1),
        )

    def _take(self, side: str, names: Sequence[str], count: int) -> tuple[str, ...]:
        first = self._given[side]
        self._given[side] += count
        return tuple(names[(first + index) % len(names)] for index in range(count))
