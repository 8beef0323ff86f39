"""The highest request rate that meets the SLO: first doubled until one fails, then bisected.

Pure: what a rate does to the server is told by a function. Starting low keeps a server from being
flooded far beyond what it can do, which would take as long to drain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from trainyard.documents.measurement import RateFound, RateProbe
from trainyard.measure.latency import MIN_PROBE_REQUESTS
from trainyard.spec.model import RateSearch

Try = Callable[[float, int], RateProbe]
"""Tries a rate (requests a second); the number counts the tries from 0."""

DIGITS = 4
"""Significant digits of a rate that is tried."""


def find_rate(search: RateSearch, attempt: Try, *, clock: Callable[[], float]) -> RateFound:
    """Return the highest rate between the search's limits that meets the SLO, as far as it was
    found in the time that it has.

    No attempt is begun that would, by its own length, end after `max_duration_s`; the first one is
    always made.

    Args:
        search: the limits.
        attempt: tries a rate; what it raises ends the search.
        clock: seconds, as `time.monotonic`.
    """
    started = clock()
    probes: list[RateProbe] = []
    best: float | None = None
    failing: float | None = None
    reason = ""
    while not reason:
        rate = _next_rate(search, best, failing)
        left = search.max_duration_s - (clock() - started)
        if probes and left < _expected_s(search, rate):
            reason = f"No time was left to try {rate:g} a second ({search.max_duration_s:g} s)."
            break
        probe = attempt(rate, len(probes))
        probes.append(probe)
        if probe.meets:
            best = rate
        else:
            failing = rate
        reason = _finished(search, best, failing)
    complete = not reason.startswith("No time")
    return RateFound(
        level=search.level,
        rate_per_s=best,
        failing_rate_per_s=failing,
        complete=complete,
        reason=reason,
        probes=tuple(probes),
    )


def _next_rate(search: RateSearch, best: float | None, failing: float | None) -> float:
    if best is None:
        return search.min_rate
    if failing is None:
        return min(2 * best, search.max_rate)
    rate = math.sqrt(best * failing)
    digits = DIGITS - 1 - math.floor(math.log10(rate))
    rounded = round(rate, digits)
    return rounded if best < rounded < failing else rate


def _finished(search: RateSearch, best: float | None, failing: float | None) -> str:
    """Return why there is nothing left to try, or nothing."""
    if best is None:
        return f"Not even {search.min_rate:g} a second meets the SLO."
    if failing is None:
        return f"It was not looked for above {best:g} a second." if best >= search.max_rate else ""
    if failing <= best * (1 + search.precision):
        return f"{failing:g} a second does not meet the SLO any more."
    return ""


def _expected_s(search: RateSearch, rate: float) -> float:
    """Return how long it takes to send the requests of an attempt."""
    return max(search.probe_s, MIN_PROBE_REQUESTS / rate)
