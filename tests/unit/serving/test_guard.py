"""The guard's decisions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serving_world import NEW, NOW, OLD, make_channel

from trainyard.documents.channel import Channel
from trainyard.serving.guard import (
    CONNECTION_FAILURES,
    FIRST_ANSWERS,
    Fuse,
    ReleaseHealth,
    RouteDecision,
    Wish,
)
from trainyard.serving.guard import decide as decide_on
from trainyard.serving.lease import LeaseState


def decide(
    channel: Channel,
    lease: LeaseState,
    health: Mapping[str, ReleaseHealth],
    fuse: Fuse | None,
    now: datetime,
) -> RouteDecision:
    return decide_on(Wish.of(channel), lease, health, fuse, now)


FINE = {OLD: ReleaseHealth(ready_servers=1), NEW: ReleaseHealth(ready_servers=1)}
PHASES = ("deploying", "warming", "scaling", "shifting", "holding", "baking", "rolling_back")

healths = st.builds(
    ReleaseHealth,
    ready_servers=st.integers(0, 2),
    answers=st.integers(0, 30),
    failures=st.integers(0, FIRST_ANSWERS),
    connection_failures=st.integers(0, 10),
)
fuses = st.none() | st.builds(
    Fuse,
    rollout=st.integers(1, 3),
    release_id=st.sampled_from([OLD, NEW]),
    reason=st.just("before"),
    at=st.just(NOW),
)
channels = st.builds(
    make_channel,
    stable=st.sampled_from([OLD, None]),
    candidate=st.sampled_from([NEW, None]),
    weight=st.integers(0, 100),
    phase=st.sampled_from([*PHASES, None]),
    number=st.integers(1, 3),
    ended=st.booleans(),
    stable_replicas=st.integers(0, 2),
)
leases = st.sampled_from(["alive", "expired", "absent"])


def test_follows_the_channel_while_the_lease_is_alive() -> None:
    decision = decide(make_channel(weight=25), "alive", FINE, None, NOW)
    assert (decision.weights, decision.guard, decision.reason) == (
        {OLD: 75, NEW: 25},
        "following",
        "",
    )


@pytest.mark.parametrize("lease", ["expired", "absent"])
def test_takes_all_traffic_back_without_a_living_lease(lease: str) -> None:
    decision = decide(make_channel(weight=25), lease, FINE, None, NOW)  # type: ignore[arg-type]
    assert decision.weights == {OLD: 100, NEW: 0}
    assert decision.guard == "lease_expired"
    assert lease in decision.reason
    assert NEW in decision.reason


def test_needs_no_lease_while_the_candidate_has_no_traffic() -> None:
    decision = decide(make_channel(weight=0, phase="warming"), "absent", {}, None, NOW)
    assert (decision.weights, decision.guard) == ({OLD: 100, NEW: 0}, "following")


def test_needs_no_lease_once_the_rollout_is_over() -> None:
    channel = make_channel(stable=NEW, candidate=None, weight=0, phase="baking", ended=True)
    decision = decide(channel, "absent", FINE, None, NOW)
    assert (decision.weights, decision.guard) == ({NEW: 100}, "following")


@pytest.mark.parametrize(
    ("health", "word"),
    [
        (ReleaseHealth(ready_servers=0), "no ready server"),
        (ReleaseHealth(1, answers=FIRST_ANSWERS, failures=FIRST_ANSWERS), "all failed"),
        (ReleaseHealth(1, connection_failures=CONNECTION_FAILURES), "connections in a row"),
    ],
)
def test_a_broken_candidate_blows_the_fuse(health: ReleaseHealth, word: str) -> None:
    decision = decide(make_channel(), "alive", {**FINE, NEW: health}, None, NOW)
    assert decision.weights == {OLD: 100, NEW: 0}
    assert decision.guard == "fuse"
    assert word in decision.reason
    assert decision.fuse is not None


@pytest.mark.parametrize(
    "health",
    [
        ReleaseHealth(1, answers=FIRST_ANSWERS - 1, failures=FIRST_ANSWERS - 1),
        ReleaseHealth(1, answers=50, failures=FIRST_ANSWERS - 1),
        ReleaseHealth(1, connection_failures=CONNECTION_FAILURES - 1),
    ],
)
def test_less_than_that_is_the_judges_matter(health: ReleaseHealth) -> None:
    assert decide(make_channel(), "alive", {**FINE, NEW: health}, None, NOW).guard == "following"


def test_a_fuse_stays_blown_until_the_channel_takes_the_weight_away() -> None:
    broken = decide(make_channel(), "alive", {OLD: FINE[OLD]}, None, NOW)
    again = decide(make_channel(weight=50), "alive", FINE, broken.fuse, NOW)
    assert (again.guard, again.fuse) == ("fuse", broken.fuse)
    taken = decide(make_channel(weight=0), "alive", FINE, again.fuse, NOW)
    assert (taken.guard, taken.fuse) == ("following", None)


def test_a_fuse_does_not_outlive_its_rollout() -> None:
    broken = decide(make_channel(number=1), "alive", {OLD: FINE[OLD]}, None, NOW)
    following = decide(make_channel(number=2), "alive", FINE, broken.fuse, NOW)
    assert (following.guard, following.fuse) == ("following", None)


def test_the_first_release_gets_traffic_only_whole() -> None:
    bootstrap = make_channel(stable=None, weight=100)
    assert decide(bootstrap, "alive", FINE, None, NOW).weights == {NEW: 100}
    assert decide(bootstrap, "expired", FINE, None, NOW).weights == {}
    half = make_channel(stable=None, weight=50)
    assert decide(half, "alive", FINE, None, NOW).weights == {}


def test_the_candidate_stands_in_for_a_stable_release_that_is_down() -> None:
    health = {NEW: ReleaseHealth(ready_servers=1)}
    decision = decide(make_channel(weight=10), "alive", health, None, NOW)
    assert (decision.weights, decision.guard) == ({NEW: 100, OLD: 0}, "failover")
    assert f"{OLD} has no ready server" in decision.reason


def test_a_release_without_traffic_does_not_stand_in() -> None:
    health = {NEW: ReleaseHealth(ready_servers=1)}
    decision = decide(make_channel(weight=0, phase="warming"), "alive", health, None, NOW)
    assert decision.weights == {OLD: 100, NEW: 0}


@pytest.mark.parametrize("lease", ["alive", "expired", "absent"])
@pytest.mark.parametrize("up", [OLD, NEW])
def test_a_withdrawn_release_answers_as_long_as_stable_cannot(lease: str, up: str) -> None:
    channel = ending("withdrawn")
    decision = decide(channel, lease, {up: FINE[up]}, None, NOW)  # type: ignore[arg-type]
    assert decision.weights == ({NEW: 100, OLD: 0} if up == NEW else {OLD: 100, NEW: 0})
    assert decision.guard == ("failover" if up == NEW else "following")


@pytest.mark.parametrize(
    ("outcome", "changes"),
    [
        ("rolled_back", {}),
        ("withdrawn", {"cleanup": "removing"}),
        ("withdrawn", {"capacity": "single"}),
    ],
    ids=["rejected", "servers go", "no room for both"],
)
def test_other_losers_get_nothing_back(outcome: str, changes: dict[str, str]) -> None:
    decision = decide(ending(outcome, **changes), "alive", {NEW: FINE[NEW]}, None, NOW)
    assert (decision.weights, decision.guard) == ({OLD: 100, NEW: 0}, "following")


def test_what_blew_a_fuse_does_not_stand_in_either() -> None:
    broken = decide(make_channel(), "alive", {OLD: FINE[OLD]}, None, NOW)
    once = decide(ending("withdrawn"), "alive", {NEW: FINE[NEW]}, broken.fuse, NOW)
    again = decide(ending("withdrawn"), "alive", {NEW: FINE[NEW]}, once.fuse, NOW)
    assert once == again
    assert (again.weights, again.guard) == ({OLD: 100, NEW: 0}, "following")


@pytest.mark.parametrize("lease", ["alive", "expired", "absent"])
def test_servers_are_exchanged_with_and_without_a_lease(lease: str) -> None:
    channel = ending("promoted", cleanup="exchanging", capacity="replace", weight=75)
    decision = decide(channel, lease, FINE, None, NOW)  # type: ignore[arg-type]
    assert (decision.weights, decision.guard) == ({OLD: 25, NEW: 75}, "following")
    decision = decide(channel, lease, {NEW: FINE[NEW]}, None, NOW)  # type: ignore[arg-type]
    assert (decision.weights, decision.guard) == ({OLD: 0, NEW: 100}, "failover")
    decision = decide(channel, lease, {OLD: FINE[OLD]}, None, NOW)  # type: ignore[arg-type]
    assert (decision.weights, decision.guard) == ({OLD: 100, NEW: 0}, "failover")


def ending(
    outcome: str, *, cleanup: str = "traffic", capacity: str = "surge", weight: int = 0
) -> Channel:
    """Return a channel whose rollout gives all traffic back."""
    channel = make_channel(weight=weight, phase="rolling_back")
    assert channel.rollout is not None
    plan = channel.rollout.plan.model_copy(update={"capacity": capacity})
    stage = {"ending": outcome, "cleanup": cleanup, "plan": plan}
    return channel.model_copy(update={"rollout": channel.rollout.model_copy(update=stage)})


@pytest.mark.parametrize(
    ("lease", "stable_replicas"), [("alive", 1), ("expired", 2)], ids=["driven", "too small"]
)
def test_in_the_bake_the_proven_release_stands_in_for_the_new_one(
    lease: str, stable_replicas: int
) -> None:
    baking = make_channel(
        stable=NEW, candidate=OLD, phase="baking", stable_replicas=stable_replicas
    )
    health = {OLD: ReleaseHealth(ready_servers=1)}
    decision = decide(baking, lease, health, None, NOW)  # type: ignore[arg-type]
    assert (decision.weights, decision.guard) == ({OLD: 100, NEW: 0}, "failover")


@pytest.mark.parametrize("lease", ["expired", "absent"])
def test_a_bake_that_nobody_drives_goes_to_the_proven_release(lease: str) -> None:
    baking = make_channel(stable=NEW, candidate=OLD, phase="baking")
    decision = decide(baking, lease, FINE, None, NOW)  # type: ignore[arg-type]
    assert (decision.weights, decision.guard) == ({OLD: 100, NEW: 0}, "lease_expired")
    assert f"{NEW} gets no traffic" in decision.reason


@pytest.mark.parametrize(
    ("ready", "stable_replicas"),
    [(1, 2), (1, 0)],
    ids=["has fewer servers than it had", "nobody knows how many it had"],
)
def test_an_old_release_that_may_be_too_small_does_not_get_a_bake_that_nobody_drives(
    ready: int, stable_replicas: int
) -> None:
    baking = make_channel(
        stable=NEW, candidate=OLD, phase="baking", stable_replicas=stable_replicas
    )
    health = {**FINE, OLD: ReleaseHealth(ready_servers=ready)}
    decision = decide(baking, "expired", health, None, NOW)
    assert (decision.weights, decision.guard) == ({NEW: 100, OLD: 0}, "lease_expired")
    assert f"{OLD} gets no traffic" in decision.reason


def test_an_old_release_without_servers_does_not_get_a_bake_that_nobody_drives() -> None:
    baking = make_channel(stable=NEW, candidate=OLD, phase="baking")
    decision = decide(baking, "expired", {NEW: FINE[NEW]}, None, NOW)
    assert (decision.weights, decision.guard) == ({NEW: 100, OLD: 0}, "lease_expired")


def test_in_the_bake_a_lost_holdback_is_no_fuse() -> None:
    baking = make_channel(stable=NEW, candidate=OLD, phase="baking")
    health = {NEW: ReleaseHealth(ready_servers=1)}
    decision = decide(baking, "alive", health, None, NOW)
    assert (decision.weights, decision.guard) == ({NEW: 100, OLD: 0}, "failover")


@given(channel=channels, lease=leases, old=healths, new=healths, fuse=fuses)
def test_no_candidate_traffic_in_a_rollout_without_a_living_lease(  # type: ignore[no-untyped-def]
    channel, lease, old, new, fuse
) -> None:
    decision = decide(channel, lease, {OLD: old, NEW: new}, fuse, NOW)
    unproven = channel.in_progress and channel.rollout.phase != "baking"
    if unproven and lease != "alive":
        assert decision.weights.get(NEW, 0) == 0


@given(lease=leases, old=healths, new=healths, weight=st.integers(1, 50), full=st.integers(0, 2))
def test_a_bake_never_goes_to_a_release_that_has_no_server_while_the_other_has(  # type: ignore[no-untyped-def]
    lease, old, new, weight, full
) -> None:
    baking = make_channel(
        stable=NEW, candidate=OLD, phase="baking", weight=weight, stable_replicas=full
    )
    decision = decide(baking, lease, {OLD: old, NEW: new}, None, NOW)
    for down, up, name in ((old, new, OLD), (new, old, NEW)):
        if down.ready_servers == 0 and up.ready_servers > 0:
            assert decision.weights[name] == 0
    if lease != "alive" and old.ready_servers >= full > 0:
        assert decision.weights == {OLD: 100, NEW: 0}


@given(channel=channels, lease=leases, old=healths, new=healths, fuse=fuses)
def test_weights_are_whole_and_only_for_releases_of_the_channel(  # type: ignore[no-untyped-def]
    channel, lease, old, new, fuse
) -> None:
    decision = decide(channel, lease, {OLD: old, NEW: new}, fuse, NOW)
    assert sum(decision.weights.values()) in (0, 100)
    tracks = {t.release_id for t in (channel.stable, channel.candidate) if t}
    assert set(decision.weights) <= tracks
    assert all(share >= 0 for share in decision.weights.values())
    if channel.stable is not None:
        assert sum(decision.weights.values()) == 100
    assert bool(decision.reason) == (decision.guard != "following")


@given(channel=channels, lease=leases, old=healths, new=healths, fuse=fuses)
def test_the_candidate_never_gets_traffic_that_the_channel_does_not_wish(  # type: ignore[no-untyped-def]
    channel, lease, old, new, fuse
) -> None:
    decision = decide(channel, lease, {OLD: old, NEW: new}, fuse, NOW)
    if channel.weights.candidate == 0:
        assert decision.weights.get(NEW, 0) == 0


@given(channel=channels, lease=leases, old=healths, new=healths, fuse=fuses)
def test_deciding_again_with_the_same_sight_changes_nothing(  # type: ignore[no-untyped-def]
    channel, lease, old, new, fuse
) -> None:
    once = decide(channel, lease, {OLD: old, NEW: new}, fuse, NOW)
    assert decide(channel, lease, {OLD: old, NEW: new}, once.fuse, NOW) == once
