"""Whether live traffic is within the loads that a release was measured with. Pure.

==============  ===================================================================================
kind            live traffic is beyond what was measured if
==============  ===================================================================================
`prompts`       surely more than `LEAST_SHARE` of the newest prompts are longer than the longest
                that was measured; or their average is
`concurrency`   a server has more requests in hand (running and waiting) than ever were in flight
`rate`          a server surely answers more requests a second than the most that were measured
==============  ===================================================================================

A gate's figures say nothing about such traffic. That is a warning for people and decides nothing:
the judge compares the two releases under the very traffic that is there.

Only what the counters prove is said. Of prompts, the edges of the server's buckets tell which are
surely longer, so that the share is a lower bound. What a server does not show is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import sqrt

from trainyard.documents.channel import BeyondKind
from trainyard.documents.look import Histogram, PodCounters, Snapshot
from trainyard.documents.measurement import Envelope
from trainyard.rollout.slices import difference, start_of

WINDOW_S = 600.0
"""Seconds before a look whose requests are the newest ones."""

LEAST_SHARE = 0.01
"""Share of the prompts below which longer ones are odd ones out."""

ADDED_TOKENS = 8
"""Tokens that a server may add to a prompt (the beginning of a text) and a benchmark does not
count: a prompt that is longer by no more is not called longer."""

RATE_SCORE = 3.0
"""Standard errors by which a rate must be higher: requests come at random."""


@dataclass(frozen=True)
class Finding:
    """One way in which live traffic is beyond what was measured."""

    kind: BeyondKind
    why: str
    """With figures, as a part of a sentence."""


@dataclass(frozen=True)
class _Newest:
    """What one server did in the window."""

    pod: str
    prompts: Histogram
    seconds: float


def beyond_envelope(envelope: Envelope, snapshots: Sequence[Snapshot]) -> tuple[Finding, ...]:
    """Return in which ways the traffic of the newest snapshot is beyond an envelope.

    Args:
        envelope: of the release under test.
        snapshots: of one rollout, oldest first. Servers of both releases count: who serves the old
            one's traffic today serves the new one's tomorrow.
    """
    if not snapshots:
        return ()
    now = snapshots[-1]
    pods = [pod for pod in now.pods if _has_traffic(now, pod)]
    newest = [found for pod in pods if (found := _newest(snapshots, now, pod)) is not None]
    findings = (
        _prompts(envelope, newest),
        _concurrency(envelope, pods),
        _rate(envelope, newest),
    )
    return tuple(each for each in findings if each is not None)


def _has_traffic(snapshot: Snapshot, pod: PodCounters) -> bool:
    """Tell whether users' requests go to a server; those that warm it up are our own."""
    return snapshot.route is not None and snapshot.route.weights.get(pod.release_id, 0) > 0


def _newest(snapshots: Sequence[Snapshot], now: Snapshot, pod: PodCounters) -> _Newest | None:
    """Return what a server did since the first snapshot of the window with traffic for it."""
    for earlier in snapshots[:-1]:
        if (now.at - earlier.at).total_seconds() > WINDOW_S:
            continue
        for old in earlier.pods:
            if start_of(old) != start_of(pod) or not _has_traffic(earlier, old):
                continue
            prompts = difference(old.prompts, pod.prompts)
            seconds = (_read_at(pod, now) - _read_at(old, earlier)).total_seconds()
            if prompts is None or not prompts.count or seconds <= 0:
                return None
            return _Newest(pod.pod, prompts, seconds)
    return None


def _read_at(pod: PodCounters, snapshot: Snapshot) -> datetime:
    return pod.read_at or snapshot.at


def _prompts(envelope: Envelope, newest: Sequence[_Newest]) -> Finding | None:
    longest = envelope.input_tokens[1]
    count = sum(each.prompts.count for each in newest)
    if not count:
        return None
    longer = sum(_surely_longer(each.prompts, longest) for each in newest)
    measured = f"the longest that was measured has {longest} tokens"
    if longer / count > LEAST_SHARE:
        share = f"at least {longer / count:.0%} of the newest {count} prompts are longer"
        return Finding("prompts", f"{share}: {measured}")
    average = sum(each.prompts.total for each in newest) / count
    if average > longest + ADDED_TOKENS:
        mean = f"the newest {count} prompts have {average:.0f} tokens on average"
        return Finding("prompts", f"{mean}, and {measured}")
    return None


def _surely_longer(prompts: Histogram, longest: int) -> int:
    """Return how many prompts lie above the first edge that no measured prompt exceeds."""
    within = [
        number
        for edge, number in sorted(prompts.by_edge().items())
        if edge >= longest + ADDED_TOKENS
    ]
    return max(0, prompts.count - within[0]) if within else 0


def _concurrency(envelope: Envelope, pods: Sequence[PodCounters]) -> Finding | None:
    busy = [(pod.in_flight, pod.pod) for pod in pods if pod.in_flight is not None]
    most, name = max(busy, default=(0, ""))
    if most <= envelope.max_concurrency:
        return None
    return Finding(
        "concurrency",
        f"{name} has {most} requests in hand, and {envelope.max_concurrency} at once were measured",
    )


def _rate(envelope: Envelope, newest: Sequence[_Newest]) -> Finding | None:
    """Compare what each server surely answers with the highest rate, where that is known."""
    measured = envelope.max_requests_per_s
    sure = [
        ((each.prompts.count - RATE_SCORE * sqrt(each.prompts.count)) / each.seconds, each)
        for each in newest
    ]
    least, busiest = max(sure, key=lambda one: one[0], default=(0.0, None))
    if busiest is None or measured <= 0 or least <= measured:
        return None
    rate = busiest.prompts.count / busiest.seconds
    return Finding(
        "rate",
        f"{busiest.pod} answers {rate:.3g} requests a second, and {measured:.3g} were measured",
    )
