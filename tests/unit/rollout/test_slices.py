"""Blocks from snapshots: what is comparable counts, everything else is missing."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tests.unit.rollout.machine import NEW, NOW, OLD

from trainyard.documents.evidence import Block
from trainyard.documents.look import (
    Histogram,
    PodCounters,
    ProbeCounters,
    ProbeReading,
    ReleaseCounters,
    RouteCounters,
    ServerCounters,
    Snapshot,
)
from trainyard.rollout.probes.tally import EDGES_S
from trainyard.rollout.slices import FEWEST_FOR_EDGE, blocks_from_snapshots, tail_edge


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def histogram(count: int, total: float, **buckets: int) -> Histogram:
    return Histogram(
        count=count,
        total=total,
        buckets={**{name.replace("_", "."): n for name, n in buckets.items()}, "+Inf": count},
    )


def pod(
    release: str = OLD, *, number: int = 0, start_s: float = -100.0, **metrics: Any
) -> PodCounters:
    return PodCounters(
        pod=f"{release}-{number}", release_id=release, started_at=at(start_s), **metrics
    )


def both(old: Histogram, new: Histogram) -> tuple[PodCounters, ...]:
    return (pod(OLD, ttft=old), pod(NEW, ttft=new))


def route(weight: int = 50, *, epoch: str = "1", **counts: tuple[int, int, int]) -> RouteCounters:
    names = {"old": OLD, "new": NEW}
    return RouteCounters(
        epoch=epoch,
        weights={OLD: 100 - weight, NEW: weight},
        releases={
            names[name]: ReleaseCounters(arrivals=a, errors=e, in_flight=f)
            for name, (a, e, f) in counts.items()
        },
    )


def snapshot(
    seconds: float, pods: tuple[PodCounters, ...] = (), seen: RouteCounters | None = None
) -> Snapshot:
    return Snapshot(at=at(seconds), phase="holding", step_index=0, pods=pods, route=seen or route())


def blocks(*snapshots: Snapshot, metric: str | None = None) -> list[Block]:
    found = blocks_from_snapshots(snapshots, exposed_since=NOW, candidate=NEW, stable=OLD)
    return [block for block in found if metric in (None, block.metric)]


def test_a_slice_is_the_difference_of_two_snapshots() -> None:
    first = snapshot(0, both(histogram(100, 10.0), histogram(5, 1.0)))
    second = snapshot(30, both(histogram(160, 19.0), histogram(25, 4.0)))
    old, new = blocks(first, second, metric="ttft")
    assert (old.track, old.release, old.requests, old.total) == ("stable", OLD, 60, 9.0)
    assert (new.track, new.release, new.requests, new.total) == ("candidate", NEW, 20, 3.0)
    assert (new.t, new.duration_s, new.weight_candidate) == (30.0, 30.0, 50)


def test_every_pod_has_its_own_rows() -> None:
    pods = [
        (
            pod(OLD, number=n, ttft=histogram(n, 0.1 * n)),
            pod(OLD, number=n, ttft=histogram(10 * n + 10, n + 1.0)),
        )
        for n in (0, 1)
    ]
    others = (pod(NEW, ttft=histogram(0, 0.0)), pod(NEW, ttft=histogram(9, 1.0)))
    found = blocks(
        snapshot(0, (pods[0][0], pods[1][0], others[0]), route(30)),
        snapshot(30, (pods[0][1], pods[1][1], others[1]), route(30)),
        metric="ttft",
    )
    assert [(block.pod, block.requests) for block in found] == [
        (f"{OLD}-0", 10),
        (f"{OLD}-1", 19),
        (f"{NEW}-0", 9),
    ]


def test_order_does_not_matter() -> None:
    shots = [snapshot(30 * n, both(histogram(n, n), histogram(n, n))) for n in range(5)]
    assert blocks(*reversed(shots)) == blocks(*shots)


def test_a_slice_that_began_before_exposure_does_not_count() -> None:
    shots = [snapshot(s, both(histogram(0, 0.0), histogram(0, 0.0))) for s in (-30, 10, 40)]
    assert {block.t for block in blocks(*shots)} == {40.0}


def test_what_stable_did_alone_before_exposure_is_history() -> None:
    shots = [
        snapshot(
            s,
            both(*[histogram(n, 0.1 * n, **{"0_5": n})] * 2),
            route(0, old=(n, 1, 0), new=(0, 0, 0)),
        )
        for s, n in ((-60, 100), (-30, 300), (0, 500))
    ]
    rows = blocks(*shots)
    assert {(row.track, row.release, row.weight_candidate) for row in rows} == {("stable", OLD, 0)}
    assert [(row.t, row.requests) for row in rows if row.metric == "ttft"] == [(-30, 200), (0, 200)]
    assert {row.metric for row in rows} == {"ttft", "ttft_tail", "errors"}


def test_errors_of_history_need_one_start_of_the_router_and_no_gap_but_no_equal_weights() -> None:
    def shot(seconds: float, weight: int, ended: int, epoch: str = "1") -> Snapshot:
        return snapshot(seconds, (), route(weight, epoch=epoch, old=(ended, 1, 0)))

    steps = [shot(-1500, 90, 100), shot(-1470, 50, 130), shot(-1440, 0, 170)]
    restarted = [shot(-1410, 0, 500, "2"), shot(-1380, 0, 550, "2")]
    unasked = [Snapshot(at=at(-1350), phase="idle", step_index=0, pods=(), route=None)]
    after_gap = [shot(-1320, 0, 570, "2"), shot(-700, 0, 900, "2"), shot(-100, 0, 960, "2")]
    found = blocks(*steps, *restarted, *unasked, *after_gap)
    assert [(row.metric, row.t, row.requests) for row in found] == [
        ("errors", -1470, 30),
        ("errors", -1440, 40),
        ("errors", -1380, 50),
        ("errors", -100, 60),
    ]


def test_an_edge_that_was_fixed_after_exposure_says_nothing_about_history() -> None:
    counts = ((-30, 0), (0, 50), (30, 500), (60, 900))
    shots = [snapshot(s, both(*[histogram(n, 0.1 * n, **{"0_5": n})] * 2)) for s, n in counts]
    tails = [row.t for row in blocks(*shots, metric="ttft_tail")]
    assert tails
    assert min(tails) > 0


def test_a_restarted_server_is_missing_for_one_slice() -> None:
    one = snapshot(0, both(histogram(100, 10.0), histogram(50, 5.0)))
    two = snapshot(
        30,
        (pod(OLD, ttft=histogram(160, 16.0)), pod(NEW, start_s=20, ttft=histogram(70, 7.0))),
    )
    three = snapshot(
        60,
        (pod(OLD, ttft=histogram(200, 20.0)), pod(NEW, start_s=20, ttft=histogram(80, 8.5))),
    )
    found = [(b.t, b.track, b.requests) for b in blocks(one, two, three, metric="ttft")]
    assert found == [(30, "stable", 60), (60, "stable", 40), (60, "candidate", 10)]


@pytest.mark.parametrize(
    "later",
    [histogram(99, 11.0), histogram(110, 9.0), histogram(110, 11.0, **{"0_1": 3})],
    ids=["count", "sum", "bucket"],
)
def test_a_counter_that_went_backwards_is_missing_never_negative(later: Histogram) -> None:
    earlier = histogram(100, 10.0, **{"0_1": 5})
    shots = (
        snapshot(0, both(earlier, earlier)),
        snapshot(30, both(later, histogram(120, 12.0, **{"0_1": 6}))),
    )
    assert {block.track for block in blocks(*shots, metric="ttft")} == {"candidate"}


def test_a_failed_scrape_is_missing_and_the_next_slice_is_not_made_longer() -> None:
    full = [both(histogram(10 * n, n), histogram(10 * n, n)) for n in range(4)]
    shots = [snapshot(30 * n, pods) for n, pods in enumerate(full)]
    shots[1] = snapshot(30, full[1][:1])
    found = [(b.t, b.track) for b in blocks(*shots, metric="ttft")]
    assert found == [(30, "stable"), (60, "stable"), (90, "stable"), (90, "candidate")]


def test_a_missed_look_makes_a_longer_slice() -> None:
    shots = [snapshot(s, both(histogram(s, s), histogram(s, s))) for s in (0, 30, 90)]
    assert [(b.t, b.duration_s) for b in blocks(*shots, metric="ttft")][-1] == (90, 60)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (route(10), route(50)),
        (route(50, epoch="1"), route(50, epoch="2")),
        (None, route(50)),
        (route(50), None),
    ],
    ids=["weights changed", "router restarted", "mute before", "mute after"],
)
def test_without_a_steady_route_nothing_is_comparable(before: Any, after: Any) -> None:
    pods = both(histogram(0, 0.0), histogram(0, 0.0))
    shots = [
        Snapshot(at=at(s), phase="holding", step_index=0, pods=pods, route=seen)
        for s, seen in ((0, before), (30, after))
    ]
    assert blocks(*shots) == []


def test_weights_of_zero_may_be_named_or_not() -> None:
    pods = both(histogram(0, 0.0), histogram(0, 0.0))
    named = RouteCounters(epoch="1", weights={OLD: 0, NEW: 100}, releases={})
    bare = RouteCounters(epoch="1", weights={NEW: 100}, releases={})
    seen = {OLD: ReleaseCounters(arrivals=0, errors=0, in_flight=0)}
    shots = (
        snapshot(0, pods, named.model_copy(update={"releases": seen})),
        snapshot(30, pods, bare.model_copy(update={"releases": seen})),
    )
    assert [block.metric for block in blocks(*shots)] == ["errors"]


def test_latencies_count_only_while_the_candidate_is_not_the_busier_one() -> None:
    def shots(weight: int, new_pods: int) -> list[Snapshot]:
        made = []
        for n in (1, 2):
            old = pod(OLD, ttft=histogram(100 * n, n))
            new = [pod(NEW, number=i, ttft=histogram(100 * n, n)) for i in range(new_pods)]
            seen = route(weight, old=(100 * n, 0, 0), new=(100 * n, 0, 0))
            made.append(snapshot(30 * n, (old, *new), seen))
        return made

    assert {b.metric for b in blocks(*shots(50, 1))} == {"ttft", "errors"}
    assert {b.metric for b in blocks(*shots(10, 1))} == {"ttft", "errors"}
    assert {b.metric for b in blocks(*shots(90, 1))} == {"errors"}
    assert {b.metric for b in blocks(*shots(66, 2))} == {"ttft", "errors"}


# --- errors ---------------------------------------------------------------------------------------


def test_errors_are_of_requests_that_have_ended() -> None:
    first = snapshot(0, (), route(50, old=(100, 2, 4), new=(10, 0, 0)))
    second = snapshot(30, (), route(50, old=(160, 3, 10), new=(40, 3, 1)))
    old, new = blocks(first, second, metric="errors")
    assert (old.requests, old.bad, old.kind) == (54, 1, "count")
    assert (new.requests, new.bad, new.pod) == (29, 3, "router")


@pytest.mark.parametrize("later", [(90, 2, 0), (160, 1, 0), (102, 9, 0)])
def test_contradictory_router_counts_are_missing(later: tuple[int, int, int]) -> None:
    first = snapshot(0, (), route(50, old=(100, 2, 0), new=(10, 0, 0)))
    second = snapshot(30, (), route(50, old=later, new=(20, 0, 0)))
    assert [block.track for block in blocks(first, second, metric="errors")] == ["candidate"]


def test_what_appears_later_is_missing_until_it_can_be_compared() -> None:
    """A server whose histograms come with its first request; a release that the router learns."""
    first = snapshot(0, (pod(OLD), pod(NEW)), route(50, old=(100, 0, 0)))
    rest = [
        snapshot(
            30.0 * n,
            (
                pod(OLD, ttft=histogram(9 * n, 1.0 * n), tpot=histogram(9 * n, 1.0 * n)),
                pod(NEW, ttft=histogram(9 * n, 1.0 * n), tpot=histogram(9 * n, 1.0 * n)),
            ),
            route(50, old=(100, 0, 0), new=(9 * n, 0, 0)),
        )
        for n in (1, 2)
    ]
    found = [(b.t, b.track, b.metric) for b in blocks(first, *rest)]
    assert found == [
        (30, "stable", "errors"),
        (60, "stable", "ttft"),
        (60, "stable", "tpot"),
        (60, "stable", "errors"),
        (60, "candidate", "ttft"),
        (60, "candidate", "tpot"),
        (60, "candidate", "errors"),
    ]


def test_a_change_of_how_tpot_is_counted_is_missing() -> None:
    def shot(n: int, requests: int | None) -> Snapshot:
        return snapshot(
            30 * n, (pod(OLD, tpot=histogram(20 * n, 0.2 * n), tpot_requests=requests),)
        )

    assert blocks(shot(0, None), shot(1, 5), metric="tpot") == []
    assert blocks(shot(0, 5), shot(1, None), metric="tpot") == []


# --- tails ----------------------------------------------------------------------------------------


def stable_ttft(count: int, late: int) -> PodCounters:
    """Return a stable server of whose requests `late` were later than 0.1 s."""
    return pod(OLD, ttft=histogram(count, 1.0, **{"0_1": count - late, "0_5": count}))


def test_the_edge_is_the_lowest_that_99_percent_kept() -> None:
    assert tail_edge([snapshot(-1, (stable_ttft(200, 2),))], stable=OLD, exposed_since=NOW) == (
        0.1,
        0,
    )
    assert tail_edge([snapshot(-1, (stable_ttft(200, 3),))], stable=OLD, exposed_since=NOW) == (
        0.5,
        0,
    )


def test_the_edge_is_fixed_by_the_last_snapshot_before_exposure() -> None:
    shots = [
        snapshot(-60, (stable_ttft(200, 0),)),
        snapshot(-30, (stable_ttft(400, 50),)),
        snapshot(30, (stable_ttft(9000, 50),)),
    ]
    assert tail_edge(shots, stable=OLD, exposed_since=NOW) == (0.5, 1)


def test_an_edge_that_comes_late_is_not_used_for_what_was_before() -> None:
    shots = [
        snapshot(
            30 * n,
            (
                stable_ttft(60 * n, 0),
                pod(NEW, ttft=histogram(50 * n, 1.0, **{"0_1": 40 * n, "0_5": 50 * n})),
            ),
        )
        for n in range(5)
    ]
    assert FEWEST_FOR_EDGE == 100
    tails = blocks(*shots, metric="ttft_tail")
    assert [(b.t, b.track, b.requests, b.bad) for b in tails] == [
        (90, "stable", 60, 0),
        (90, "candidate", 50, 10),
        (120, "stable", 60, 0),
        (120, "candidate", 50, 10),
    ]


def test_releases_with_other_edges_are_compared_at_one_that_both_have() -> None:
    """A new version of vLLM may have them, and may write them in another way."""
    shots = [
        snapshot(
            s,
            (
                pod(OLD, ttft=histogram(200 + s, 1.0, **{"0_1": 200 + s, "1_0": 200 + s})),
                pod(NEW, ttft=histogram(s, 1.0, **{"0_25": s // 3, "1": s // 2})),
            ),
        )
        for s in (0, 30)
    ]
    assert tail_edge(shots, stable=OLD, exposed_since=NOW) == (1.0, 0)
    tails = blocks(*shots, metric="ttft_tail")
    assert [(b.track, b.requests, b.bad) for b in tails] == [
        ("stable", 30, 0),
        ("candidate", 30, 15),
    ]


def test_releases_without_an_edge_in_common_have_no_tail() -> None:
    shots = [
        snapshot(s, (stable_ttft(200 + s, 0), pod(NEW, ttft=histogram(s, 1.0, **{"0_25": s // 2}))))
        for s in (0, 30)
    ]
    assert blocks(*shots, metric="ttft_tail") == []


@pytest.mark.parametrize("label", ["0,25", "abc", "", "NaN"])
def test_a_stored_look_with_an_edge_that_is_no_number_stops_nothing(label: str) -> None:
    """Looks of older versions were written once and may have one."""
    shots = [
        snapshot(
            s,
            (
                stable_ttft(200 + s, 0),
                pod(
                    NEW,
                    ttft=histogram(s, 1.0, **{"0_1": s, "0_5": s, label if s == 60 else "1": s}),
                ),
            ),
        )
        for s in (0, 30, 60, 90)
    ]
    tails = blocks(*shots, metric="ttft_tail")
    assert {(row.t, row.track) for row in tails} == {
        (t, track) for t in (30, 60, 90) for track in ("stable", "candidate")
    }


def test_requests_beyond_every_edge_fix_none() -> None:
    beyond = pod(OLD, ttft=histogram(200, 900.0, **{"0_1": 10}))
    assert tail_edge([snapshot(-1, (beyond,))], stable=OLD, exposed_since=NOW) is None


# --- time per output token ------------------------------------------------------------------------


def test_tpot_has_one_value_a_request_where_the_server_has_it() -> None:
    shots = [
        snapshot(
            30 * n,
            (
                pod(OLD, tpot=histogram(20 * n, 0.2 * n)),
                pod(NEW, tpot=histogram(10 * n, 0.3 * n)),
            ),
        )
        for n in (0, 1)
    ]
    old, new = blocks(*shots, metric="tpot")
    assert (old.requests, old.total) == (20, pytest.approx(0.2))
    assert (new.requests, new.total) == (10, pytest.approx(0.3))


def test_tpot_of_output_events_counts_requests() -> None:
    def shot(n: int) -> Snapshot:
        old = pod(OLD, tpot=histogram(2000 * n, 20.0 * n), tpot_requests=20 * n)
        new = pod(NEW, tpot=histogram(0, 0.0), tpot_requests=0)
        return snapshot(30 * n, (old, new))

    old, new = blocks(shot(0), shot(1), metric="tpot")
    assert (old.requests, old.total) == (20, pytest.approx(20 * 0.01))
    assert (new.requests, new.total) == (0, 0.0)


# --- properties -----------------------------------------------------------------------------------

counters = st.tuples(st.integers(0, 50), st.integers(0, 3), st.booleans(), st.booleans())


@given(st.lists(counters, min_size=2, max_size=12))
def test_rows_never_claim_more_than_was_counted(steps: list[tuple[int, int, bool, bool]]) -> None:
    """Whatever is restarted or unreadable: rows are valid, and their sum is what was observed."""
    shots: list[Snapshot] = []
    count = restarts = 0
    served = 0
    for n, (requests, weight, restarted, unread) in enumerate(steps):
        if restarted:
            restarts, count = restarts + 1, 0
        count += requests
        served += requests
        old = pod(OLD, start_s=-100.0 + restarts, ttft=histogram(count, 0.1 * count))
        new = pod(NEW, ttft=histogram(0, 0.0))
        pods = (new,) if unread else (old, new)
        shots.append(snapshot(10.0 * n, pods, route((10, 20, 30, 50)[weight])))
    rows = blocks(*shots, metric="ttft")
    assert all(row.requests >= 0 and row.total >= 0 for row in rows)
    assert sum(row.requests for row in rows if row.track == "stable") <= served
    assert len({(row.t, row.pod) for row in rows}) == len(rows)


@given(st.integers(1, 8))
def test_rows_of_the_past_do_not_change(cut: int) -> None:
    """What one look derives, every later look derives again: the log of rows only grows."""
    shots = [
        snapshot(
            30.0 * (n - 3),
            (
                stable_ttft(70 * n, n % 2),
                pod(NEW, ttft=histogram(50 * n, 0.2 * n, **{"0_1": 45 * n, "0_5": 50 * n})),
            ),
            route(10 if n < 6 else 50, old=(70 * n, 0, 0), new=(50 * n, n, 0)),
        )
        for n in range(10)
    ]
    early, late = blocks(*shots[:cut]), blocks(*shots)
    assert [row for row in late if row in early] == early


# --- probes ---------------------------------------------------------------------------------------


def probes(*pods: ProbeCounters, epoch: str = "one", cursor: int = 0) -> ProbeReading:
    return ProbeReading(epoch=epoch, cursor=cursor, pods=pods)


def probed(
    release: str = OLD,
    *,
    sent: int = 0,
    ended: int | None = None,
    failed: int = 0,
    worse: int = 0,
    late: int = 0,
) -> ProbeCounters:
    done = sent if ended is None else ended
    answered = done - failed
    return ProbeCounters(
        pod=f"{release}-0",
        release_id=release,
        sent=sent,
        ended=done,
        answered=answered,
        failed=failed,
        ttft=Histogram(
            count=answered,
            total=0.1 * answered,
            buckets={
                **{f"{edge:g}": (answered - late) * (edge >= 0.1) for edge in EDGES_S},
                "+Inf": answered,
            },
        ),
        tpot=Histogram(count=answered, total=0.01 * answered),
        pairs=answered,
        worse=worse,
    )


def with_probes(seconds: float, reading: ProbeReading | None, count: int) -> Snapshot:
    """Return a snapshot with the same counters of both servers: `count` requests of users."""
    users = histogram(count, 0.05 * count, **{"0_1": count})
    made = snapshot(seconds, both(users, users), route(50, old=(count, 0, 0), new=(count, 0, 0)))
    return made.model_copy(update={"probes": reading})


def test_probes_are_a_stratum_with_a_quality_of_its_own() -> None:
    first = with_probes(0, probes(), 200)
    last = with_probes(
        30, probes(probed(OLD, sent=40, worse=1), probed(NEW, sent=40, worse=5)), 300
    )
    found = {
        (block.track, block.metric): block
        for block in blocks(first, last)
        if block.stratum == "probe"
    }
    assert {metric for _, metric in found} == {"errors", "quality", "ttft", "tpot"}
    quality = found["candidate", "quality"]
    assert (quality.requests, quality.bad, quality.pod) == (40, 5, f"{NEW}-0")
    assert found["stable", "quality"].bad == 1
    assert (found["stable", "ttft"].requests, found["stable", "ttft"].total) == (40, 4.0)
    assert (found["stable", "errors"].requests, found["stable", "errors"].bad) == (40, 0)


def test_late_probes_are_those_beyond_the_edge_of_stables_probes() -> None:
    log = [
        with_probes(0, probes(probed(OLD), probed(NEW)), 200),
        # With too few probes there is no edge, whatever users' requests say.
        with_probes(30, probes(probed(OLD, sent=60), probed(NEW, sent=60)), 300),
        with_probes(60, probes(probed(OLD, sent=120), probed(NEW, sent=120)), 400),
        with_probes(90, probes(probed(OLD, sent=160), probed(NEW, sent=160, late=3)), 500),
    ]
    tail = {(b.t, b.track): b.bad for b in blocks(*log, metric="ttft_tail") if b.stratum}
    assert tail == {(90, "stable"): 0, (90, "candidate"): 3}


def test_users_latencies_count_in_slices_without_a_probe_only() -> None:
    readings = [
        (0, probes(probed(OLD), probed(NEW))),
        (30, probes(probed(OLD, sent=40), probed(NEW, sent=40))),
        (60, probes(probed(OLD, sent=40), probed(NEW, sent=40))),
        (90, probes(probed(OLD, sent=80, ended=79), probed(NEW, sent=80))),
        (120, probes(probed(OLD, sent=80), probed(NEW, sent=80))),
    ]
    found = blocks(*(with_probes(t, reading, 200 + int(t)) for t, reading in readings))
    users = {(b.t, b.track) for b in found if b.metric == "ttft" and not b.stratum}
    # At 90 s one of stable's was still under way, so it may have ended in the last slice.
    assert users == {(60, "stable"), (60, "candidate"), (120, "candidate")}
    errors = {b.t for b in found if b.metric == "errors" and not b.stratum}
    assert errors == {30, 60, 90, 120}


def test_figures_from_before_a_probe_do_not_count_as_users_either() -> None:
    def read(seconds: float, read_at: float, count: int, sent: int) -> Snapshot:
        made = with_probes(seconds, probes(probed(OLD, sent=sent), probed(NEW, sent=sent)), count)
        pods = tuple(p.model_copy(update={"read_at": at(read_at)}) for p in made.pods)
        return made.model_copy(update={"pods": pods})

    log = [
        read(0, -10, 200, 0),
        read(30, 20, 230, 40),
        read(60, 50, 260, 40),
        read(90, 80, 290, 40),
    ]
    users = {b.t for b in blocks(*log, metric="ttft") if not b.stratum}
    # The figures at 30 s are of 20 s, when probes were still sent; those at 60 s are of 50 s.
    assert users == {90}


@pytest.mark.parametrize(
    "readings",
    [
        (None, probes(probed(OLD), probed(NEW))),
        (probes(probed(OLD), probed(NEW)), None),
        (probes(probed(OLD), probed(NEW)), probes(probed(OLD), probed(NEW), epoch="two")),
    ],
    ids=["begins", "ends", "another prober"],
)
def test_where_the_prober_changed_nobody_knows_what_was_sent(
    readings: tuple[ProbeReading | None, ProbeReading | None],
) -> None:
    found = blocks(*(with_probes(30.0 * i, one, 200 + i) for i, one in enumerate(readings)))
    assert {(block.metric, block.stratum) for block in found} == {("errors", "")}


def test_probes_of_a_busier_candidate_have_no_latencies() -> None:
    readings = (probes(), probes(probed(OLD, sent=40), probed(NEW, sent=40, failed=2)))
    log = [
        with_probes(30.0 * i, one, 200).model_copy(update={"route": route(90)})
        for i, one in enumerate(readings)
    ]
    found = {b.metric for b in blocks(*log) if b.stratum}
    assert found == {"errors", "quality"}


# --- how requests ended ---------------------------------------------------------------------------

NAMES = ("truncated", "empty", "aborted")


def ending(release: str, begun: int, *, short: int | None = 0, **ended: int) -> PodCounters:
    """Return counters of a server that answered so many; reasons that are not named have none."""
    reasons = {"stop": 0, "length": 0, "abort": 0, **ended}
    return pod(release, ttft=histogram(begun, 0.1 * begun), ended=reasons, short=short)


def ends(*shots: Snapshot) -> dict[tuple[str, str], tuple[int, int]]:
    """Return (requests, bad) by metric and track of rows about how requests ended."""
    rows = [row for row in blocks(*shots) if row.metric in NAMES]
    assert all(row.kind == "count" and not row.stratum for row in rows)
    return {(row.metric, row.track): (row.requests, row.bad) for row in rows}


def test_how_requests_ended_is_a_share_of_those_that_were_begun() -> None:
    # A server counts every reason that it knows from its start; the candidate's knows fewer.
    before = (
        ending(OLD, 100, length=10, short=4, error=0, repetition=0),
        ending(NEW, 10, length=1),
    )
    after = (
        ending(OLD, 160, stop=40, length=16, short=7, abort=1, error=1, repetition=2),
        ending(NEW, 40, stop=20, length=6, short=2),
    )
    assert ends(snapshot(0, before), snapshot(30, after)) == {
        ("truncated", "stable"): (60, 8),
        ("empty", "stable"): (60, 3),
        ("aborted", "stable"): (60, 2),
        ("truncated", "candidate"): (30, 5),
        ("empty", "candidate"): (30, 2),
        ("aborted", "candidate"): (30, 0),
    }


def test_a_slice_in_which_more_end_badly_than_begin_counts_these() -> None:
    before = (ending(OLD, 100), ending(NEW, 100))
    after = (ending(OLD, 102, length=50), ending(NEW, 102))
    found = ends(snapshot(0, before), snapshot(30, after))
    assert found["truncated", "stable"] == (50, 50)
    assert found["truncated", "candidate"] == (2, 0)


@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        ({"ended": None}, {}, {"truncated", "aborted"}),
        ({}, {"ended": None}, {"truncated", "aborted"}),
        ({"short": None}, {}, {"empty"}),
        ({}, {"short": None}, {"empty"}),
        ({"short": 9}, {"short": 8}, {"empty"}),
        ({"ended": {"length": 9, "abort": 0}}, {}, {"truncated"}),
        ({"ended": {"length": 0, "abort": 9}}, {}, {"aborted"}),
        ({"ended": {"abort": 0}}, {"ended": {"abort": 1}}, {"truncated"}),
        ({}, {"ended": {"length": 1, "abort": 0, "repetition": 1}}, {"truncated"}),
        ({"ttft": None}, {}, set(NAMES)),
        ({}, {"ttft": histogram(5, 0.5)}, set(NAMES)),
        ({}, {"started_at": at(10)}, set(NAMES)),
    ],
)
def test_what_cannot_be_compared_is_missing_never_zero(
    before: dict[str, Any], after: dict[str, Any], missing: set[str]
) -> None:
    old, new = ending(OLD, 10), ending(OLD, 40, length=1)
    found = ends(
        snapshot(0, (old.model_copy(update=before),)),
        snapshot(30, (new.model_copy(update=after),)),
    )
    assert {metric for metric, _ in found} == set(NAMES) - missing


def test_counters_that_stand_still_while_requests_come_are_missing() -> None:
    same = (ending(OLD, 100, length=3),)
    shots = [
        snapshot(s, same, route(50, old=(n, 0, 0), new=(0, 0, 0))) for s, n in ((0, 0), (30, 50))
    ]
    assert ends(*shots) == {}


def test_a_busier_candidate_is_still_compared_by_how_its_answers_end() -> None:
    """But not by requests that were aborted: clients of a busier server wait longer."""
    shots = [
        snapshot(s, (ending(OLD, n), ending(NEW, n, length=n // 10)), route(80))
        for s, n in ((0, 0), (30, 100))
    ]
    assert {metric for metric, _ in ends(*shots)} == {"truncated", "empty"}
    assert ends(*shots)["truncated", "candidate"] == (100, 10)
    assert "ttft" not in {row.metric for row in blocks(*shots)}


def router_told(weight: int, **figures: tuple[int, int, int]) -> RouteCounters:
    """Return the router's counters: sent, unanswered and refused, of one server a release."""
    names = {"old": OLD, "new": NEW}
    return RouteCounters(
        epoch="1",
        weights={OLD: 100 - weight, NEW: weight},
        releases={
            names[name]: ReleaseCounters(
                arrivals=sent,
                errors=0,
                in_flight=0,
                servers={
                    f"{names[name]}-0": ServerCounters(
                        ended=sent, errors=0, arrivals=sent, unanswered=left, refused=refused
                    )
                },
            )
            for name, (sent, left, refused) in figures.items()
        },
    )


def router_rows(*shots: Snapshot) -> dict[tuple[str, str, str], tuple[int, int]]:
    return {
        (row.metric, row.track, row.pod): (row.requests, row.bad)
        for row in blocks(*shots)
        if row.metric in ("unanswered", "refused")
    }


def test_requests_of_which_no_server_knows_that_they_ended_badly_are_the_routers_to_tell() -> None:
    pods = tuple(pod(release, ttft=histogram(9, 1.0)) for release in (OLD, NEW))
    shots = (
        snapshot(0, pods, router_told(50, old=(100, 1, 0), new=(10, 0, 0))),
        snapshot(30, (), router_told(50, old=(160, 3, 1), new=(70, 48, 5))),
    )
    # Servers need not be there any more.
    assert router_rows(shots[0], shots[1].model_copy(update={"pods": pods})) == {
        ("unanswered", "stable", f"{OLD}-0"): (60, 2),
        ("unanswered", "candidate", f"{NEW}-0"): (60, 48),
        ("refused", "stable", f"{OLD}-0"): (60, 1),
        ("refused", "candidate", f"{NEW}-0"): (60, 5),
    }


def test_clients_of_a_busier_candidate_may_leave_sooner_but_are_not_refused_more() -> None:
    pods = tuple(pod(release) for release in (OLD, NEW))
    shots = (
        snapshot(0, pods, router_told(80, old=(0, 0, 0), new=(0, 0, 0))),
        snapshot(30, pods, router_told(80, old=(40, 0, 0), new=(160, 80, 80))),
    )
    assert {metric for metric, *_ in router_rows(*shots)} == {"refused"}


def test_who_left_stable_before_exposure_is_history() -> None:
    pods = (pod(OLD),)
    shots = (
        snapshot(-60, pods, router_told(0, old=(0, 0, 0))),
        snapshot(-30, pods, router_told(0, old=(40, 2, 1))),
    )
    assert router_rows(*shots) == {
        ("unanswered", "stable", f"{OLD}-0"): (40, 2),
        ("refused", "stable", f"{OLD}-0"): (40, 1),
    }


def test_answers_of_a_slice_with_a_probe_are_not_told_from_users() -> None:
    pods = [(ending(OLD, n, length=n), ending(NEW, n, length=n)) for n in (0, 100)]
    quiet, more = (probes(probed(OLD, sent=n), probed(NEW, sent=n)) for n in (5, 6))
    shots = [
        snapshot(30 * n, each).model_copy(update={"probes": quiet}) for n, each in enumerate(pods)
    ]
    assert ends(*shots)
    assert ends(shots[0], shots[1].model_copy(update={"probes": more})) == {}


def test_how_answers_of_stable_ended_before_exposure_is_history() -> None:
    shots = [snapshot(s, (ending(OLD, n, length=n // 10),)) for s, n in ((-60, 0), (-30, 100))]
    rows = [row for row in blocks(*shots) if row.metric in NAMES]
    assert {(row.metric, row.weight_candidate, row.requests) for row in rows} == {
        (name, 0, 100) for name in NAMES
    }
