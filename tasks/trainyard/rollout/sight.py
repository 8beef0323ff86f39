"""Whether a look has seen the releases at all. Pure.

A rollout must not take silence for peace: a candidate whose counters nobody can read may be broken.
A release was seen in a look if

* the router could be asked, by the same start of it as before;
* every ready server of the release could be read, with the figures that are judged;
* no server's counters went backwards or stood still while requests went there;
* at least one server could be compared with the look before.

That nothing has happened (no requests) is no blindness. One look without sight happens (a server
started anew, a page came late) and means nothing; what lasting blindness leads to is the state
machine's matter.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainyard.documents.look import Histogram, PodCounters, Snapshot
from trainyard.rollout.slices import is_frozen, sent_to, start_of
from trainyard.serving.protocol import ServerStatus


def unseen(
    past: Sequence[Snapshot],
    after: Snapshot,
    release_id: str,
    servers: Sequence[ServerStatus],
) -> str:
    """Return why a release was not seen in a look, in a few words; empty if it was.

    Args:
        past: the looks before, oldest first.
        after: the look.
        release_id: the release.
        servers: the ready servers, of whatever release.
    """
    if after.route is None:
        return "the router could not be asked"
    before = past[-1] if past else None
    if before is None or before.route is None or before.route.epoch != after.route.epoch:
        return "the router has not been asked twice since it started"
    wanted = [server.name for server in servers if server.release_id == release_id]
    pods = {pod.pod: pod for pod in after.pods if pod.release_id == release_id}
    blank = [name for name in wanted if name not in pods or not _has_figures(pods[name])]
    if blank or not wanted:
        return f"no counters of {', '.join(blank) or release_id}"
    return _incomparable(past, after, list(pods.values()))


def _has_figures(pod: PodCounters) -> bool:
    return pod.ttft is not None and pod.tpot is not None


def _incomparable(past: Sequence[Snapshot], after: Snapshot, pods: Sequence[PodCounters]) -> str:
    earlier = {start_of(pod): pod for pod in past[-1].pods}
    pairs = [(earlier[start_of(pod)], pod) for pod in pods if start_of(pod) in earlier]
    for old, new in pairs:
        if _went_back(old.ttft, new.ttft) or _went_back(old.tpot, new.tpot):
            return f"the counters of {new.pod} went backwards"
        since = _unchanged_since(past, new)
        if is_frozen(old, new, sent=sent_to(new, since, after, servers=len(pods))):
            return f"the counters of {new.pod} stand still"
    return "" if pairs else f"no server of {pods[0].release_id} was there before"


def _unchanged_since(past: Sequence[Snapshot], pod: PodCounters) -> Snapshot:
    """Return the first of the looks, up to the last, that showed a server's counters of now.

    With few requests a source that stands still shows only over several looks.
    """
    found = past[-1]
    for snapshot in reversed(past):
        same = [
            one
            for one in snapshot.pods
            if start_of(one) == start_of(pod) and (one.ttft, one.tpot) == (pod.ttft, pod.tpot)
        ]
        if not same:
            break
        found = snapshot
    return found


def _went_back(old: Histogram | None, new: Histogram | None) -> bool:
    return old is not None and new is not None and new.count < old.count
