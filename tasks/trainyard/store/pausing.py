"""How long to wait before something is tried again."""

from __future__ import annotations

import random

_MOST_DOUBLINGS = 32
"""So that the power cannot overflow."""


def doubled_s(failures: int, *, first_s: float, longest_s: float) -> float:
    """Return the seconds to wait after so many failures in a row (1, 2, …)."""
    return min(longest_s, first_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS))


def spread_s(failures: int, *, first_s: float, longest_s: float) -> float:
    """Return a random part of that, so that those who failed together do not come back together."""
    return random.uniform(0, doubled_s(failures, first_s=first_s, longest_s=longest_s))
