"""From snapshots of cumulative counters to the judge's blocks. Pure.

A slice is the time between two consecutive snapshots. It counts only where its ends compare:

* the router was asked at both ends, had not been restarted in between, and had the same weights in
  effect at both; otherwise nobody knows which share of the traffic the figures stand for;
* the server is the same start of the same server, no counter went backwards, and the figures are
  newer than the ones before; counters that stand still while the router sends the server requests
  are a source that has frozen, or a server that hangs;
* both ends lie in the candidate's exposure, or both before it: the latter are rows of stable alone
  with weight 0, from which the judge learns stable's noise. Weights may change there.

Latencies count only while a server of the candidate gets at most `LOAD_PARITY` times as many
requests as one of stable's: a busier server is slower, whatever it serves. A candidate that gets
fewer is compared all the same: that can hide harm for a while, not invent it, and the judge takes
no evidence for promotion from it (`judge.blocks.counts_for_promotion`). How answers end does not
depend on load, so `truncated`, `empty` and `refused` count at any. `aborted` and `unanswered` do
not: where clients wait longer, more of them go away.

Servers do not tell probes from users' requests, so users' latencies count in slices without a probe
only (see `rollout.probes.windows`): none was sent since the figures of the slice's beginning, and
none was under way then. Probes are rows of their own, in the stratum `probe`, from the prober's own
counters; those of two probers, or of two starts of one, are never compared.

Figures that somebody else has read off the servers (a Prometheus) are older than the look. They
count for a weight only if the router had it already when they were read.

Whatever is not comparable is missing. It is never taken for zero, and never negative.

Metrics:

=============  =======  ========================================================================
`ttft`         average  seconds to the first token, a request
`tpot`         average  seconds per output token after the first. One value a request where both
                        releases have it; else the mean over output events of both, counted as
                        many times as requests finished, because events of one request are not
                        independent (the two are different averages, so they are never mixed)
`errors`       count    requests that failed at the router, of those that ended there, by the
                        server they were sent to (see `rollout.failures`)
`ttft_tail`    count    requests whose first token came later than a bucket edge that is fixed
                        before exposure: the lowest one of both releases' servers that 99 % of
                        stable's requests kept; probes have an edge of their own
`quality`      count    probes only: pairs in which this release alone gave a wrong answer, of those
                        whose answers were compared
`truncated`    count    requests whose answer the server cut (`length`, `repetition`)
`empty`        count    requests with one output token at most, the one that ends an answer
`aborted`      count    requests that the engine gave up (`abort`, `error`), of which the router
                        sees nothing once a stream has begun
`unanswered`   count    requests that the router saw end without an answer and without an error: the
                        client left before the first byte, or the server was too busy (408, 429).
                        No server's own counters know them
`refused`      count    requests that were answered with another 4xx, as the router saw it
`prompts`      average  tokens of a prompt; for the judge's guard against another mix of prompts
`prefix_hits`  count    tokens found in the prefix cache, of those looked for; for its guard
                        against a cold cache
=============  =======  ========================================================================

`truncated`, `empty` and `aborted` are counted when a request ends, but they are shares of those
whose first token came in the slice (or, if more ended badly, of these). Among those that ended they
would have another share after each step up: short answers to the new traffic end first, so a
candidate would have too many of whatever is short. As it is, what takes long is missing for a while
where traffic rises, and stable has too much of it for a while where traffic falls. Both only hide
harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from math import inf

from trainyard.documents.evidence import PROBE, QUALITY, Block, Track
from trainyard.documents.look import (
    Histogram,
    PodCounters,
    ProbeCounters,
    ProbeReading,
    ReleaseCounters,
    RouteCounters,
    Snapshot,
)
from trainyard.rollout.failures import (
    ROUTER,
    failures_between,
    refused_between,
    unanswered_between,
)
from trainyard.rollout.probes.tally import EDGES_S

TAIL_SHARE = 0.01
"""Share of stable's requests that may be later than the edge."""

FEWEST_FOR_EDGE = 100
"""Requests of stable that fix the edge. With fewer before exposure, the edge is fixed as soon as
there are so many, and what came before it is not used."""

LOAD_PARITY = 1.25
"""Requests of a candidate's server for each request of a stable one, up to which latencies of the
two may be compared."""

FROZEN_REQUESTS = 20
"""Requests that a server must have been sent for counters that stand still to be a frozen source:
at equal shares it gets none of so many by accident once in 10**8 slices."""

_NOTHING_YET = Histogram(
    count=0, total=0.0, buckets={**{f"{edge:g}": 0 for edge in EDGES_S}, "+Inf": 0}
)
"""Of a server that had no probe before."""

ENDS: Mapping[str, tuple[str, ...]] = {
    "truncated": ("length", "repetition"),
    "aborted": ("abort", "error"),
}
"""Reasons by which a server's requests count for a metric. The first is known to every vLLM; what
is not known to one is none of its reasons. Releases may differ in `repetition`: where it is not
looked for, such an answer goes on until it is cut by its length."""

LONGEST_HISTORY_SLICE_S = 600.0
"""A slice of history that is longer is a gap, over which pods' noise has averaged out."""


def blocks_from_snapshots(
    snapshots: Sequence[Snapshot],
    *,
    exposed_since: datetime,
    candidate: str,
    stable: str,
) -> list[Block]:
    """Return the rows of all slices, oldest first.

    Args:
        snapshots: in whatever order.
        exposed_since: when the candidate first got traffic; the origin of the rows' time. History
            ends at or before 0.
        candidate: the release under test, also while it bakes in the role of stable.
        stable: the release it is compared with.
    """
    ordered = sorted(snapshots, key=lambda snapshot: snapshot.at)
    fixed = tail_edge(ordered, stable=stable, exposed_since=exposed_since)
    fixed_of_probes = tail_edge(ordered, stable=stable, exposed_since=exposed_since, probes=True)
    blocks: list[Block] = []
    by_events = False
    for index, (before, after) in enumerate(pairwise(ordered)):
        by_events = by_events or _has_events_only(after)
        if after.at <= before.at:
            continue
        if after.at <= exposed_since:
            early = fixed is not None and ordered[fixed[1]].at <= exposed_since
            edge = fixed[0] if fixed is not None and early else None
            if (after.at - before.at).total_seconds() <= LONGEST_HISTORY_SLICE_S:
                earlier = ordered[: index + 1]
                blocks.extend(_history(earlier, after, stable, exposed_since, edge, by_events))
            continue
        if before.at < exposed_since:
            continue
        route = _comparable(before.route, after.route)
        if route is None:
            continue
        edge, probe_edge = (
            one[0] if one is not None and one[1] <= index else None
            for one in (fixed, fixed_of_probes)
        )
        tracks: tuple[tuple[Track, str], ...] = (("stable", stable), ("candidate", candidate))
        for track, release_id in tracks:
            slice_ = _Slice(
                t=(after.at - exposed_since).total_seconds(),
                duration_s=(after.at - before.at).total_seconds(),
                release_id=release_id,
                track=track,
                weight=route[1].weights.get(candidate, 0),
            )
            alike = load_ratio(after, candidate=candidate, stable=stable) <= LOAD_PARITY
            earlier = ordered[: index + 1]
            pairs = [
                (old, new)
                for old, new in comparable_pods(before, after, release_id)
                if _had_weights(earlier, old.read_at, route[1])
                and _had_no_probes(earlier, old.read_at, after, new.pod)
            ]
            if alike:
                blocks.extend(_server_blocks(slice_, pairs, edge, by_events))
            blocks.extend(_ending_blocks(slice_, pairs, alike))
            blocks.extend(_error_blocks(slice_, *route))
            blocks.extend(_router_ending_blocks(slice_, *route, alike=alike))
            blocks.extend(_probe_blocks(slice_, before, after, probe_edge, alike))
    return blocks


def _has_events_only(snapshot: Snapshot) -> bool:
    """Tell whether a server has no time per output token a request, only times of events."""
    return any(pod.tpot is not None and pod.tpot_requests is not None for pod in snapshot.pods)


def _had_weights(earlier: Sequence[Snapshot], since: datetime | None, now: RouteCounters) -> bool:
    """Tell whether the router has had the weights of now ever since a moment.

    Args:
        earlier: snapshots up to the slice's beginning, oldest first.
        since: None is the slice's beginning, at which the weights are known to have been there.
        now: the weights.
    """
    if since is None:
        return True
    for snapshot in reversed(earlier):
        if snapshot.route is None or _comparable(snapshot.route, now) is None:
            return False
        if snapshot.at <= since:
            return True
    return False


def _had_no_probes(
    earlier: Sequence[Snapshot], since: datetime | None, after: Snapshot, pod: str
) -> bool:
    """Tell whether a server has had no probe ever since a moment, and none under way then.

    Args:
        earlier: snapshots up to the slice's beginning, oldest first.
        since: the moment of the figures at the slice's beginning. None: just then.
        after: the slice's end.
        pod: the server.
    """
    for snapshot in reversed(earlier):
        if not _sent_none(snapshot.probes, after.probes, pod):
            return False
        if since is None or snapshot.at <= since:
            return True
    return False


def _sent_none(before: ProbeReading | None, after: ProbeReading | None, pod: str) -> bool:
    if before is None or after is None:
        # Without a prober at either end, nobody has sent any in between.
        return before is None and after is None
    old, new = _probed(before, pod), _probed(after, pod)
    ended, sent = old.ended if old else 0, new.sent if new else 0
    return before.epoch == after.epoch and ended == sent


def _probed(reading: ProbeReading, pod: str) -> ProbeCounters | None:
    return next((one for one in reading.pods if one.pod == pod), None)


def _history(
    earlier: Sequence[Snapshot],
    after: Snapshot,
    stable: str,
    exposed_since: datetime,
    edge: float | None,
    by_events: bool,
) -> list[Block]:
    """Return the rows of stable alone, before exposure: what its noise is learned from.

    They are compared with nothing, so the router's weights do not matter, only its counters.
    """
    before = earlier[-1]
    slice_ = _Slice(
        t=(after.at - exposed_since).total_seconds(),
        duration_s=(after.at - before.at).total_seconds(),
        release_id=stable,
        track="stable",
        weight=0,
    )
    pairs = [
        (old, new)
        for old, new in comparable_pods(before, after, stable)
        if _had_no_probes(earlier, old.read_at, after, new.pod)
    ]
    blocks = _server_blocks(slice_, pairs, edge, by_events)
    blocks += _ending_blocks(slice_, pairs, alike=True)
    route = _of_one_start(before.route, after.route)
    if route is not None:
        blocks += _errors_of_history(slice_, *route)
        blocks += _router_ending_blocks(slice_, *route, alike=True)
    return blocks


def _errors_of_history(slice_: _Slice, before: RouteCounters, after: RouteCounters) -> list[Block]:
    """Return the rows of errors from which it is learned how much servers differ.

    Where servers are told apart, the rest is left out: among them it would be one that fails all
    it gets. So is a slice in which nothing ended, which would be one more server as well.
    """
    counters = after.releases.get(slice_.release_id)
    by_server = counters is not None and bool(counters.servers)
    return [
        row
        for row in _error_blocks(slice_, before, after)
        if row.requests and not (by_server and row.pod == ROUTER)
    ]


def load_ratio(snapshot: Snapshot, *, candidate: str, stable: str) -> float:
    """Return a candidate server's share of the traffic over a stable server's, as weighted."""
    weights = snapshot.route.weights if snapshot.route else {}
    share = {}
    for release_id in (candidate, stable):
        servers = sum(pod.release_id == release_id for pod in snapshot.pods)
        share[release_id] = weights.get(release_id, 0) / servers if servers else 0.0
    return share[candidate] / share[stable] if share[stable] > 0 else inf


def tail_edge(
    ordered: Sequence[Snapshot], *, stable: str, exposed_since: datetime, probes: bool = False
) -> tuple[float, int] | None:
    """Return the edge of the tail and the index of the snapshot that fixed it.

    Args:
        ordered: oldest first.
        stable: the release whose requests fix it.
        exposed_since: the last snapshot before it counts, if stable had enough requests then.
        probes: that of probes, whose prompts may take another time than users'.

    Returns:
        The edge in seconds, which the servers of all releases have, as far as they were read: other
        versions of vLLM may have others. None while stable had too few requests.
    """
    early = [index for index, snapshot in enumerate(ordered) if snapshot.at <= exposed_since]
    for index in range(max(early, default=0), len(ordered)):
        edge = _edge_of(ordered[index], stable, probes=probes)
        if edge is not None:
            return edge, index
    return None


def _edge_of(snapshot: Snapshot, stable: str, *, probes: bool) -> float | None:
    pods: Sequence[PodCounters | ProbeCounters] = snapshot.pods
    if probes:
        pods = snapshot.probes.pods if snapshot.probes is not None else ()
    histograms = [pod.ttft for pod in pods if pod.release_id == stable and pod.ttft is not None]
    count = sum(histogram.count for histogram in histograms)
    if count < FEWEST_FOR_EDGE:
        return None
    shared = set.intersection(*(set(pod.ttft.by_edge()) for pod in pods if pod.ttft is not None))
    kept = [histogram.by_edge() for histogram in histograms]
    for edge in sorted(shared):
        within = sum(each[edge] for each in kept)
        if edge < inf and count - within <= TAIL_SHARE * count:
            return edge
    return None


class _Slice:
    """What all rows of one release in one slice have in common."""

    def __init__(
        self,
        *,
        t: float,
        duration_s: float,
        release_id: str,
        track: Track,
        weight: int,
        stratum: str = "",
    ) -> None:
        self.release_id = release_id
        self._stratum = stratum
        self._t = t
        self._duration_s = duration_s
        self._track = track
        self._weight = weight

    def of_probes(self) -> _Slice:
        """Return the same for probes."""
        return _Slice(
            t=self._t,
            duration_s=self._duration_s,
            release_id=self.release_id,
            track=self._track,
            weight=self._weight,
            stratum=PROBE,
        )

    def mean(self, pod: str, metric: str, requests: int, total: float) -> Block:
        """Return a row of an average."""
        return Block(
            t=self._t,
            duration_s=self._duration_s,
            release=self.release_id,
            track=self._track,
            pod=pod,
            metric=metric,
            kind="mean",
            requests=requests,
            total=total,
            weight_candidate=self._weight,
            stratum=self._stratum,
        )

    def count(self, pod: str, metric: str, requests: int, bad: int) -> Block:
        """Return a row of a count."""
        return Block(
            t=self._t,
            duration_s=self._duration_s,
            release=self.release_id,
            track=self._track,
            pod=pod,
            metric=metric,
            kind="count",
            requests=requests,
            bad=bad,
            weight_candidate=self._weight,
            stratum=self._stratum,
        )


def _comparable(
    before: RouteCounters | None, after: RouteCounters | None
) -> tuple[RouteCounters, RouteCounters] | None:
    route = _of_one_start(before, after)
    if route is None:
        return None
    weights = [{name: share for name, share in r.weights.items() if share} for r in route]
    return route if weights[0] == weights[1] else None


def _of_one_start(
    before: RouteCounters | None, after: RouteCounters | None
) -> tuple[RouteCounters, RouteCounters] | None:
    """Return the router's counters, if it was asked at both ends and not restarted in between."""
    if before is None or after is None or before.epoch != after.epoch:
        return None
    return before, after


Pair = tuple[PodCounters, PodCounters]
"""The counters of one start of one server at both ends of a slice."""


def comparable_pods(before: Snapshot, after: Snapshot, release_id: str) -> list[Pair]:
    """Return those servers of a release whose counters can be compared over a slice."""
    earlier = {start_of(pod): pod for pod in before.pods if pod.release_id == release_id}
    pods = [pod for pod in after.pods if pod.release_id == release_id]
    pairs = [(earlier[start_of(pod)], pod) for pod in pods if start_of(pod) in earlier]
    return [
        (old, new)
        for old, new in pairs
        if not is_old(old, new)
        and not is_frozen(old, new, sent=sent_to(new, before, after, servers=len(pods)))
    ]


def start_of(pod: PodCounters) -> tuple[str, datetime | None, float | None]:
    """Return what tells one start of a server from another."""
    return pod.pod, pod.started_at, pod.process_started_s


def is_old(old: PodCounters, new: PodCounters) -> bool:
    """Tell whether the figures of the slice's end are those of its beginning."""
    return old.read_at is not None and new.read_at is not None and new.read_at <= old.read_at


def is_frozen(old: PodCounters, new: PodCounters, *, sent: float) -> bool:
    """Tell whether counters stand still although the server was sent `sent` requests."""
    still = old.ttft == new.ttft and old.tpot == new.tpot
    return sent >= FROZEN_REQUESTS and still and not is_old(old, new)


def sent_to(pod: PodCounters, before: Snapshot, after: Snapshot, *, servers: int) -> float:
    """Return how many requests a server should have counted in a slice, if the router knows.

    It is the share of one of its release's servers. A server that hangs ends nothing, so what
    ended there says too little; but one that the router sent nothing, such as where sessions or
    prefixes choose the server, should have counted nothing.

    Args:
        pod: the server's counters at the end.
        before: the slice's beginning.
        after: its end.
        servers: of the release.
    """
    route = _of_one_start(before.route, after.route)
    old, new = (one.releases.get(pod.release_id) for one in route) if route else (None, None)
    if old is None or new is None or _got_nothing(pod, old, new):
        return 0.0
    good = [(one.arrivals - one.in_flight - one.errors) for one in (old, new)]
    return (good[1] - good[0]) / servers


def _got_nothing(pod: PodCounters, old: ReleaseCounters, new: ReleaseCounters) -> bool:
    """Tell whether the router says that a server had no request in a slice, not even one that
    hangs."""
    if not new.servers or not old.servers:
        return False
    before, now = old.servers.get(pod.pod), new.servers.get(pod.pod)
    if (now.ended if now else 0) != (before.ended if before else 0):
        return False
    if any(server.arrivals is None for server in new.servers.values()):
        # A router of an older version, which does not say what is under way there.
        return pod.in_flight == 0
    return now is None or now.arrivals == now.ended


def _server_blocks(
    slice_: _Slice, pairs: Sequence[Pair], edge: float | None, by_events: bool
) -> list[Block]:
    blocks: list[Block] = []
    for old, pod in pairs:
        ttft = difference(old.ttft, pod.ttft)
        if ttft is not None:
            blocks.extend(_ttft_blocks(slice_, pod.pod, ttft, edge))
        tpot = _by_events(old, pod) if by_events else _difference_of_tpot(old, pod)
        if tpot is not None:
            blocks.append(slice_.mean(pod.pod, "tpot", *tpot))
        blocks.extend(_prompt_blocks(slice_, old, pod))
    return blocks


def _ttft_blocks(slice_: _Slice, pod: str, ttft: Histogram, edge: float | None) -> list[Block]:
    """Return the rows of times to the first token: their mean, and how many were late."""
    blocks = [slice_.mean(pod, "ttft", ttft.count, ttft.total)]
    within = ttft.by_edge().get(edge) if edge is not None else None
    if within is not None and within <= ttft.count:
        blocks.append(slice_.count(pod, "ttft_tail", ttft.count, ttft.count - within))
    return blocks


def _prompt_blocks(slice_: _Slice, old: PodCounters, new: PodCounters) -> list[Block]:
    """Return what the prompts were like: covariates, which nobody judges."""
    blocks: list[Block] = []
    prompts = difference(old.prompts, new.prompts)
    if prompts is not None:
        blocks.append(slice_.mean(new.pod, "prompts", prompts.count, prompts.total))
    figures = (old.prefix_queries, new.prefix_queries, old.prefix_hits, new.prefix_hits)
    if all(figure is not None for figure in figures):
        queries, hits = figures[1] - figures[0], figures[3] - figures[2]  # type: ignore[operator]
        if 0 <= hits <= queries:
            blocks.append(slice_.count(new.pod, "prefix_hits", queries, hits))
    return blocks


def _difference_of_tpot(old: PodCounters, new: PodCounters) -> tuple[int, float] | None:
    """Return requests and the sum of their times per output token, where each has one."""
    if old.tpot_requests is not None or new.tpot_requests is not None:
        return None
    observed = difference(old.tpot, new.tpot)
    return (observed.count, observed.total) if observed is not None else None


def _by_events(old: PodCounters, new: PodCounters) -> tuple[int, float] | None:
    """Return requests and, so many times, the mean time between output events."""
    (events, finished), (later, later_finished) = _events_of(old), _events_of(new)
    observed = difference(events, later)
    if observed is None or finished is None or later_finished is None:
        return None
    requests = later_finished - finished
    if requests < 0:
        return None
    if observed.count == 0:
        return 0, 0.0
    return requests, requests * observed.total / observed.count


def _events_of(pod: PodCounters) -> tuple[Histogram | None, int | None]:
    if pod.tpot_requests is not None:
        return pod.tpot, pod.tpot_requests
    return pod.events, pod.finished


def difference(old: Histogram | None, new: Histogram | None) -> Histogram | None:
    """Return what was observed in between, or None if the counters cannot be compared."""
    if old is None or new is None:
        return None
    buckets = {
        label: value - old.buckets[label]
        for label, value in new.buckets.items()
        if label in old.buckets
    }
    count, total = new.count - old.count, new.total - old.total
    if count < 0 or total < 0 or any(value < 0 for value in buckets.values()):
        return None
    return Histogram(count=count, total=total, buckets=buckets)


def _ending_blocks(slice_: _Slice, pairs: Sequence[Pair], alike: bool) -> Iterator[Block]:
    """Yield the rows of how requests ended.

    Args:
        slice_: the slice.
        pairs: servers' counters at both ends.
        alike: are the loads of the two releases comparable?
    """
    for old, new in pairs:
        begun = difference(old.ttft, new.ttft)
        if begun is None:
            continue
        ended = {
            "truncated": _ended(old, new, ENDS["truncated"]),
            "empty": _grown(old.short, new.short),
            "aborted": _ended(old, new, ENDS["aborted"]) if alike else None,
        }
        for metric, bad in ended.items():
            if bad is not None:
                yield slice_.count(new.pod, metric, max(begun.count, bad), bad)


def _ended(old: PodCounters, new: PodCounters, reasons: Sequence[str]) -> int | None:
    """Return how many requests ended for some reasons; None if that cannot be told."""
    if old.ended is None or new.ended is None or reasons[0] not in new.ended:
        return None
    known = [reason for reason in reasons if reason in new.ended]
    grown = [_grown(old.ended.get(reason), new.ended[reason]) for reason in known]
    told = [number for number in grown if number is not None]
    return sum(told) if len(told) == len(known) else None


def _grown(old: int | None, new: int | None) -> int | None:
    """Return by how much a counter grew; None if it is missing or went backwards."""
    return new - old if old is not None and new is not None and new >= old else None


def _error_blocks(slice_: _Slice, before: RouteCounters, after: RouteCounters) -> list[Block]:
    old, new = before.releases.get(slice_.release_id), after.releases.get(slice_.release_id)
    if old is None or new is None:
        return []
    return [
        slice_.count(name, "errors", ended.requests, ended.bad)
        for name, ended in failures_between(old, new).items()
    ]


def _router_ending_blocks(
    slice_: _Slice, before: RouteCounters, after: RouteCounters, *, alike: bool
) -> Iterator[Block]:
    """Yield the rows of requests of which no server's own counters know that they ended badly."""
    old, new = before.releases.get(slice_.release_id), after.releases.get(slice_.release_id)
    if old is None or new is None:
        return
    told = {"refused": refused_between(old, new)}
    if alike:
        told["unanswered"] = unanswered_between(old, new)
    for metric, servers in told.items():
        for name, ended in servers.items():
            yield slice_.count(name, metric, ended.requests, ended.bad)


def _probe_blocks(
    slice_: _Slice, before: Snapshot, after: Snapshot, edge: float | None, alike: bool
) -> list[Block]:
    """Return the rows of probes of one release.

    Args:
        slice_: the slice.
        before: its beginning.
        after: its end.
        edge: of their tail.
        alike: are latencies comparable?
    """
    if before.probes is None or after.probes is None or before.probes.epoch != after.probes.epoch:
        return []
    slice_ = slice_.of_probes()
    blocks: list[Block] = []
    for new in after.probes.pods:
        old = _probed(before.probes, new.pod)
        if new.release_id != slice_.release_id:
            continue
        failed = new.failed - (old.failed if old else 0)
        answered = new.answered - (old.answered if old else 0)
        pairs, worse = new.pairs - (old.pairs if old else 0), new.worse - (old.worse if old else 0)
        blocks.append(slice_.count(new.pod, "errors", failed + answered, failed))
        if new.pairs:
            # Before the first pair there may be nothing to compare by at all.
            blocks.append(slice_.count(new.pod, QUALITY, pairs, worse))
        if not alike:
            continue
        ttft = difference(old.ttft if old else _NOTHING_YET, new.ttft)
        tpot = difference(old.tpot if old else _NOTHING_YET, new.tpot)
        if ttft is not None:
            blocks.extend(_ttft_blocks(slice_, new.pod, ttft, edge))
        if tpot is not None:
            blocks.append(slice_.mean(new.pod, "tpot", tpot.count, tpot.total))
    return blocks
