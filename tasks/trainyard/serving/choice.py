"""Which release gets the next request: weights that hold in every short run of requests."""

from __future__ import annotations

from collections.abc import Mapping

_STEP = (5**0.5 - 1) / 2
"""The golden ratio's fraction: its multiples fill [0, 1) more evenly than any other number's."""


class WeightedChoice:
    """Chooses keys by weight, deterministically and evenly.

    The n-th request gets the point `n * golden ratio mod 1` of the unit interval, which is divided
    among the keys by weight. So 10 % is 10 % within two or three requests at any time, not only on
    average as with random numbers. The sequence has no period, so a client that sends its kinds of
    requests in a fixed rhythm still has each kind divided by weight, which a round robin would not
    do.
    """

    def __init__(self, start: float = 0.0) -> None:
        """Begin at the point `start`, in [0, 1)."""
        self._point = start % 1.0

    def choose(self, weights: Mapping[str, int]) -> str | None:
        """Return the key for the next request, or None if all weights are 0."""
        total = sum(weights.values())
        if total <= 0:
            return None
        self._point = (self._point + _STEP) % 1.0
        position = self._point * total
        chosen = None
        for key, weight in weights.items():
            if weight <= 0:
                continue
            chosen = key
            if position < weight:
                break
            position -= weight
        return chosen
