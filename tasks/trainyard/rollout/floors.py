"""An absolute test for releases that have nothing to be compared with."""

from __future__ import annotations

from math import exp, log, log1p

EVIDENCE_THRESHOLD = 300.0
"""Evidence at which a share counts as proven: however often one looks, a share that keeps its
limit is called broken once in 300 rollouts at most."""

_RATIOS = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""Alternatives: so many times the limit."""

_MAX_SHARE = 0.95


def excess_evidence(bad: int, requests: int, limit: float) -> float:
    """Return the evidence that more than a share `limit` of requests is bad.

    It is the average of the likelihood ratios of some larger shares to `limit`: an e-process, so
    it may be looked at as often as one likes.

    Args:
        bad: how many requests were bad.
        requests: how many there were.
        limit: the share that is still allowed, above 0 and below 1.

    Raises:
        ValueError: `bad` is not within `requests`, or `limit` not within 0 and 1.
    """
    if not 0 <= bad <= requests:
        raise ValueError(f"{bad} bad of {requests} requests")
    if not 0 < limit < 1:
        raise ValueError(f"a limit of {limit} is no share")
    shares = sorted({min(ratio * limit, max(_MAX_SHARE, limit)) for ratio in _RATIOS})
    logs = [
        bad * log(share / limit) + (requests - bad) * (log1p(-share) - log1p(-limit))
        for share in shares
    ]
    highest = max(logs)
    mean_log = highest + log(sum(exp(value - highest) for value in logs) / len(logs))
    return exp(min(mean_log, 700.0))
