"""Errors by server: whose they are, and that none is lost or counted twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tests.unit.rollout.machine import NEW, NOW, OLD

from trainyard.documents.evidence import Block, JudgeSpec, MetricVerdict, default_metrics
from trainyard.documents.look import ReleaseCounters, RouteCounters, ServerCounters, Snapshot
from trainyard.rollout.failures import (
    ROUTER,
    Ended,
    failures_between,
    refused_between,
    unanswered_between,
)
from trainyard.rollout.judge import judge
from trainyard.rollout.judge.blocks import PairedBlock, closed_blocks
from trainyard.rollout.judge.guards import share_is_off, stable_is_sick
from trainyard.rollout.judge.history import bins_of, dispersion_of
from trainyard.rollout.slices import blocks_from_snapshots

Figures = tuple[int, int]
"""Requests that ended, and those of them that failed."""


def counters(ended: int, errors: int, *, in_flight: int = 0, **servers: Figures) -> ReleaseCounters:
    return ReleaseCounters(
        arrivals=ended + in_flight,
        errors=errors,
        in_flight=in_flight,
        servers={name: ServerCounters(ended=n, errors=bad) for name, (n, bad) in servers.items()},
    )


BEFORE = counters(100, 5, a=(60, 2), b=(40, 3))


def test_each_server_has_its_own_failures() -> None:
    after = counters(150, 16, in_flight=7, a=(80, 12), b=(70, 4))
    assert failures_between(BEFORE, after) == {"a": Ended(20, 10), "b": Ended(30, 1)}


def test_what_reached_no_server_is_the_routers() -> None:
    after = counters(133, 11, a=(70, 2), b=(60, 6))
    assert failures_between(BEFORE, after) == {
        "a": Ended(10, 0),
        "b": Ended(20, 3),
        ROUTER: Ended(3, 3),
    }


def test_a_server_that_appears_began_at_zero() -> None:
    after = counters(120, 7, a=(60, 2), b=(45, 3), c=(15, 2))
    assert failures_between(BEFORE, after) == {"b": Ended(5, 0), "c": Ended(15, 2)}
    first = counters(0, 0)
    assert failures_between(first, BEFORE) == {"a": Ended(60, 2), "b": Ended(40, 3)}


@pytest.mark.parametrize("of_b", [{}, {"b": (7, 0)}, {"b": (41, 2)}], ids=["gone", "back", "odd"])
def test_what_a_forgotten_server_did_is_the_routers(of_b: dict[str, Figures]) -> None:
    after = counters(120, 8, a=(75, 3), **of_b)
    assert failures_between(BEFORE, after) == {"a": Ended(15, 1), ROUTER: Ended(5, 2)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (counters(100, 5), counters(130, 7)),
        (BEFORE, counters(130, 7)),
        (counters(100, 5), counters(130, 7, a=(80, 4), b=(50, 3))),
        (counters(100, 5), counters(130, 7, a=(10, 1))),
        (BEFORE, counters(130, 7, a=(95, 2), b=(40, 3))),
        (BEFORE, counters(130, 7, a=(75, 5), b=(55, 3))),
        (BEFORE, counters(130, 7, a=(90, 3), b=(40, 3))),
    ],
    ids=[
        "sums only",
        "sums at the end",
        "sums at the beginning",
        "sums at the beginning of many",
        "more requests than there were",
        "more failures than there were",
        "more failures left than requests",
    ],
)
def test_where_servers_cannot_be_told_apart_the_release_counts(
    before: ReleaseCounters, after: ReleaseCounters
) -> None:
    assert failures_between(before, after) == {ROUTER: Ended(30, 2)}


def test_looks_of_older_versions_know_sums_only() -> None:
    old = ReleaseCounters.model_validate_json('{"arrivals": 100, "errors": 5, "in_flight": 0}')
    assert failures_between(old, BEFORE) == {ROUTER: Ended(0, 0)}
    assert ReleaseCounters.model_validate_json(BEFORE.model_dump_json()) == BEFORE


def test_a_slice_without_requests_was_seen_all_the_same() -> None:
    assert failures_between(BEFORE, BEFORE) == {ROUTER: Ended(0, 0)}


@pytest.mark.parametrize(("ended", "errors"), [(90, 5), (130, 4), (102, 9)])
def test_counts_of_the_release_that_went_backwards_are_missing(ended: int, errors: int) -> None:
    assert failures_between(BEFORE, counters(ended, errors, a=(70, 2))) == {}


def told(ended: int, **servers: tuple[int | None, int | None, int | None]) -> ReleaseCounters:
    """Return counters with arrivals, unanswered and refused requests by server."""
    made = {
        name: ServerCounters(ended=ended, errors=0, arrivals=n, unanswered=left, refused=refused)
        for name, (n, left, refused) in servers.items()
    }
    return ReleaseCounters(arrivals=ended, errors=0, in_flight=0, servers=made)


def test_who_left_or_was_refused_is_a_share_of_what_was_sent() -> None:
    before, after = told(9, a=(100, 4, 1), b=(50, 0, 0)), told(19, a=(140, 9, 1), b=(51, 3, 7))
    assert unanswered_between(before, after) == {"a": Ended(40, 5), "b": Ended(3, 3)}
    assert refused_between(before, after) == {"a": Ended(40, 0), "b": Ended(7, 7)}


def test_of_these_a_server_that_appears_began_at_zero_too() -> None:
    before, after = told(9, a=(100, 4, 1)), told(19, a=(100, 4, 1), b=(51, 3, 7))
    assert unanswered_between(before, after) == {"a": Ended(0, 0), "b": Ended(51, 3)}
    assert unanswered_between(told(0), after)["a"] == Ended(100, 4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (told(9), told(19, a=(140, 9, 1))),
        (told(9, a=(100, 4, 1)), told(19)),
        (told(9, a=(None, None, None)), told(19, a=(140, 9, 1))),
        (told(9, a=(100, 4, 1)), told(19, a=(None, None, None))),
        (told(9, a=(100, None, 1)), told(19, a=(140, None, 1))),
        (told(9, a=(100, 4, 1)), told(19, a=(90, 5, 1))),
        (told(9, a=(100, 4, 1)), told(19, a=(140, 3, 1))),
    ],
    ids=["sums", "forgotten", "older look", "older router", "not told", "fewer sent", "went back"],
)
def test_who_left_is_missing_where_nobody_knows_never_zero(
    before: ReleaseCounters, after: ReleaseCounters
) -> None:
    assert unanswered_between(before, after) == {}


SERVERS = ("a", "b", "c", "")
"""The last one is none."""


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(SERVERS), st.integers(1, 9), st.integers(0, 9)),
            st.sampled_from(SERVERS[:-1]),
            st.none(),
        ),
        max_size=40,
    )
)
def test_nothing_is_lost_and_nothing_is_negative(
    events: Sequence[tuple[str, int, int] | str | None],
) -> None:
    """Requests end at servers or nowhere, servers are forgotten at any time, looks come between."""
    ended = errors = 0
    servers: dict[str, Figures] = {}
    looks = [counters(0, 0)]
    for event in events:
        if event is None:
            looks.append(counters(ended, errors, **servers))
        elif isinstance(event, str):
            servers.pop(event, None)
        else:
            name, requests, failed = event
            bad = min(failed, requests) if name else requests
            ended, errors = ended + requests, errors + bad
            if name:
                n, k = servers.get(name, (0, 0))
                servers[name] = (n + requests, k + bad)
    for before, after in pairwise(looks):
        found = failures_between(before, after)
        assert sum(one.requests for one in found.values()) == after.arrivals - before.arrivals
        assert sum(one.bad for one in found.values()) == after.errors - before.errors
        assert all(one.is_sound for one in found.values())


# --- as the judge sees them -----------------------------------------------------------------------

SLICE_S = 30
SPEC = JudgeSpec(
    metrics=tuple(one for one in default_metrics() if one.name == "errors"), max_duration_s=1800
)
Bad = Callable[[int, str, int], int]
"""Failures in a slice, by its number, release and number of the server."""


def snapshots(
    bad: Bad,
    *,
    slices: int = 20,
    by_server: bool = True,
    each: tuple[int, int] = (60, 60),
    nowhere: int = 0,
    first: int = 0,
) -> list[Snapshot]:
    """Return looks at two releases of four servers each, at equal weights.

    Args:
        bad: what fails.
        slices: how many.
        by_server: does the router tell servers apart?
        each: requests to a server in a slice, stable's and the candidate's.
        nowhere: requests to stable in the fifth slice for which there was no server.
        first: number of the first slice; below 0: before the exposure.
    """
    totals = {(release, n): [0, 0] for release in (OLD, NEW) for n in range(4)}
    lost = 0
    looks = [_look(first, totals, lost, by_server)]
    for index in range(first, first + slices):
        for (release, n), figures in totals.items():
            figures[0] += each[0] if release == OLD else each[1]
            figures[1] += bad(index, release, n)
        lost += nowhere if index == first + 5 else 0
        looks.append(_look(index + 1, totals, lost, by_server))
    return looks


def _look(
    index: int, totals: dict[tuple[str, int], list[int]], lost: int, by_server: bool
) -> Snapshot:
    releases = {}
    for release in (OLD, NEW):
        own = {f"{release}-{n}": f for (name, n), f in totals.items() if name == release}
        rest = lost if release == OLD else 0
        releases[release] = ReleaseCounters(
            arrivals=sum(f[0] for f in own.values()) + rest,
            errors=sum(f[1] for f in own.values()) + rest,
            in_flight=0,
            servers={
                name: ServerCounters(ended=f[0], errors=f[1])
                for name, f in own.items()
                if by_server and f[0]
            },
        )
    return Snapshot(
        at=NOW + timedelta(seconds=SLICE_S * index),
        phase="holding",
        step_index=0,
        pods=(),
        route=RouteCounters(epoch="1", weights={OLD: 50, NEW: 50}, releases=releases),
    )


def rows(looks: Sequence[Snapshot]) -> list[Block]:
    return blocks_from_snapshots(looks, exposed_since=NOW, candidate=NEW, stable=OLD)


def judged(looks: Sequence[Snapshot]) -> MetricVerdict:
    (found,) = judge(rows(looks), SPEC).metrics
    return found


def closed(looks: Sequence[Snapshot]) -> tuple[PairedBlock, ...]:
    return closed_blocks(rows(looks), SPEC.metrics[0], SPEC)


def at_once(index: int, release: str, number: int) -> int:
    return 20 if (release, number, index) == (NEW, 2, 5) else 0


def a_few(index: int, release: str, number: int) -> int:
    return 3 if (release, number, index) == (NEW, 2, 5) else 0


def spread(index: int, release: str, number: int) -> int:
    return 5 if (release, index) == (NEW, 5) else 0


def test_what_one_server_loses_at_once_argues_like_a_few_errors() -> None:
    """Of 60 requests to a server of a release that may fail 0.5 %, three errors count."""
    burst, few, many = (judged(snapshots(bad)).harm_evidence for bad in (at_once, a_few, spread))
    assert burst == pytest.approx(few, abs=1e-5)
    assert burst < many
    by_release = [
        judged(snapshots(bad, by_server=False)).harm_evidence for bad in (at_once, spread)
    ]
    assert by_release == pytest.approx([by_release[0]] * 2)


def bursts(index: int, release: str, number: int) -> int:
    """Now and then a server loses 20 requests at once; the candidate fails 5 % besides."""
    burst = 20 if index % 8 == 0 and index // 8 % 4 == number else 0
    return burst + (3 if release == NEW and index >= 0 else 0)


def test_bursts_of_servers_do_not_hide_what_all_of_them_fail() -> None:
    by_server, by_release = (
        judged(snapshots(bursts, by_server=known, first=-80, slices=120)) for known in (True, False)
    )
    assert (by_server.outcome, by_release.outcome) == ("HARM", "UNDECIDED")


@pytest.mark.parametrize("by_server", [True, False])
def test_guards_see_the_same_whoever_counts(by_server: bool) -> None:
    def ill(index: int, release: str, number: int) -> int:
        return 9 if release == OLD else 0

    def well(index: int, release: str, number: int) -> int:
        return 0

    fair = closed(snapshots(well, by_server=by_server))
    assert not share_is_off(fair)
    assert not stable_is_sick(fair)
    assert share_is_off(closed(snapshots(well, by_server=by_server, each=(60, 20))))
    assert stable_is_sick(closed(snapshots(ill, by_server=by_server)))


def test_what_reached_no_server_makes_stables_servers_no_more_alike_or_different() -> None:
    def steady(index: int, release: str, number: int) -> int:
        return int(release == OLD and index % 4 == number)

    plain, outage = (
        [row for row in rows(snapshots(steady, slices=80, first=-80, nowhere=lost)) if row.t <= 0]
        for lost in (0, 1)
    )
    assert {row.pod for row in plain} == {f"{OLD}-{n}" for n in range(4)}
    assert outage == plain
    bins = bins_of(plain, SPEC.metrics[0], length_s=SLICE_S, least_pods=1)
    assert bins is not None
    assert dispersion_of(bins, least_share=0.005) == 1.0


def test_what_reached_no_server_counts_while_the_candidate_is_exposed() -> None:
    def none(index: int, release: str, number: int) -> int:
        return 0

    (rest,) = (row for row in rows(snapshots(none, nowhere=7)) if row.pod == ROUTER)
    assert (rest.track, rest.requests, rest.bad, rest.t) == ("stable", 7, 7, 180)
