"""Who failed requests in a slice, and who left or refused them. Pure.

All of it is from the router's counters of one release at both ends.

A server that fails loses all its requests at once, so the judge must know whose errors they are.
Where both ends tell servers apart, each server has its own figures:

* they are the router's own counts, so a server that was started anew goes on with its old ones;
* a server that the router learned in between began at zero;
* one that it has forgotten, or whose counts went backwards, has none.

What is in the release's sums and in no server's figures is the **rest**. It has the name `ROUTER`:
requests for which there was no server, and those of servers that the router has forgotten. If the
figures contradict each other (servers have more than the release), or an end knows sums only, the
release as a whole stands under that name.

Requests that were left unanswered, or refused, are told by server or not at all. They are shares of
the requests that were **sent** to it in the slice (or, if more ended so, of these). Among those
that ended they would have another share after each step up: clients with little patience and bad
requests end first, so a candidate would have too many of them. Slow ones are missing for a while
after a step up, and stable has too many for a while after it, which both only hides harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainyard.documents.look import ReleaseCounters, ServerCounters

ROUTER = "router"
"""Name under which the router's counts of a release appear in place of a server's."""

_NEVER_SEEN = ServerCounters(ended=0, errors=0, arrivals=0, unanswered=0, refused=0)
"""Of a server that the router learned in the slice."""


@dataclass(frozen=True)
class Ended:
    """Requests that ended in a slice."""

    requests: int
    bad: int
    """Those that failed, at most all."""

    @property
    def is_sound(self) -> bool:
        """Can there be such figures at all?"""
        return 0 <= self.bad <= self.requests


def failures_between(old: ReleaseCounters, new: ReleaseCounters) -> dict[str, Ended]:
    """Return what ended, by the server's name; at least one entry, unless counts went backwards.

    Args:
        old: counters of a release at the slice's beginning.
        new: at its end, in the same epoch of the router.

    Returns:
        Servers by name, without those that got nothing; then the rest, if there is any or nothing
        else. Requests and failures add up to those of the release.
    """
    whole = Ended(_ended(new) - _ended(old), new.errors - old.errors)
    if not whole.is_sound:
        return {}
    servers = _by_server(old, new)
    rest = Ended(
        whole.requests - sum(one.requests for one in servers.values()),
        whole.bad - sum(one.bad for one in servers.values()),
    )
    if not rest.is_sound:
        return {ROUTER: whole}
    return {**servers, ROUTER: rest} if rest.requests or not servers else servers


def _by_server(old: ReleaseCounters, new: ReleaseCounters) -> dict[str, Ended]:
    if _ended(old) and not old.servers:
        # Nobody says which servers these were, so nobody knows where theirs began.
        return {}
    found = {}
    for name, now in sorted(new.servers.items()):
        before = old.servers.get(name)
        requests = now.ended - (before.ended if before is not None else 0)
        bad = now.errors - (before.errors if before is not None else 0)
        if requests and Ended(requests, bad).is_sound:
            found[name] = Ended(requests, bad)
    return found


def unanswered_between(old: ReleaseCounters, new: ReleaseCounters) -> dict[str, Ended]:
    """Return how many requests were left without an answer, by server; empty: nobody knows."""
    return _told_between(old, new, lambda server: server.unanswered)


def refused_between(old: ReleaseCounters, new: ReleaseCounters) -> dict[str, Ended]:
    """Return how many requests were refused, by server; empty: nobody knows."""
    return _told_between(old, new, lambda server: server.refused)


def _told_between(
    old: ReleaseCounters, new: ReleaseCounters, figure: Callable[[ServerCounters], int | None]
) -> dict[str, Ended]:
    if _ended(old) and not old.servers:
        return {}
    found = {}
    for name, now in sorted(new.servers.items()):
        before = old.servers.get(name, _NEVER_SEEN)
        counts = (before.arrivals, now.arrivals, figure(before), figure(now))
        if None in counts:
            continue
        sent, bad = counts[1] - counts[0], counts[3] - counts[2]  # type: ignore[operator]
        if sent >= 0 and bad >= 0:
            found[name] = Ended(max(sent, bad), bad)
    return found


def _ended(counters: ReleaseCounters) -> int:
    return counters.arrivals - counters.in_flight
