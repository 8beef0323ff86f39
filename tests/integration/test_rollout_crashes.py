"""Rollouts whose drivers die at any line, come twice, or sleep for too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.rollout_world import (
    ENVIRONMENT,
    MODEL,
    Behaviour,
    Killed,
    World,
    mortal,
)

from trainyard.documents.channel import EXPOSED_PHASES, Channel
from trainyard.documents.evidence import Block, JudgeSpec, Outcome, Verdict
from trainyard.errors import Transient
from trainyard.releases import list_attestations
from trainyard.rollout.driver import DriveResult, drive
from trainyard.rollout.rollouts import Rollouts, Tick

pytestmark = pytest.mark.integration

QUICK: dict[str, Any] = {
    "steps": [{"weight": 10, "hold_s": 5}, {"weight": 50, "hold_s": 10}],
    "bake_s": 10,
    "max_duration_s": 900,
    "max_hold_s": 60,
    "deploy_timeout_s": 900,
    "judge": {"block_s": 5, "min_requests_per_block": 5},
}


def simple_judge(bad: frozenset[str] = frozenset()) -> Any:
    """Return a judge that knows which releases are bad once it has seen enough of them."""

    def judge(blocks: Sequence[Block], spec: JudgeSpec) -> Verdict:
        ttft = [b for b in blocks if b.metric == "ttft" and b.track == "candidate"]
        requests = sum(block.requests for block in ttft)
        late = sum(block.weight_candidate >= spec.last_weight for block in ttft)
        outcome: Outcome = "UNDECIDED"
        if late >= 2:
            outcome = "HARM" if ttft[-1].release in bad else "NON_INFERIOR"
        return Verdict(
            outcome=outcome,
            metrics=(),
            looks=len(ttft),
            exposed_requests=requests,
            at=max((block.t for block in blocks), default=0.0),
            reason=f"{requests} requests seen.",
        )

    return judge


def world_with_a_stable_release(*, bad: bool = False) -> tuple[World, str, str]:
    """Return a world, its stable release, and one to promote."""
    world = World(rate=20.0)
    old, new = world.publish("old", **QUICK), world.publish("new", **QUICK)
    world.judge = simple_judge(frozenset({new}) if bad else frozenset())
    assert world.run(world.promote(old, run_id="first")).outcome == "promoted"
    world.told.clear()
    return world, old, new


def begin(world: World, release: str, *, calls: int = 10**6, after: bool = False) -> Tick:
    """Begin or go on with a promotion in a process that dies at its change number `calls`."""
    return Rollouts(mortal(world.deps(), calls, after=after)).begin(
        kind="promote",
        model=MODEL,
        environment=ENVIRONMENT,
        release_id=release,
        run_id="run",
    )


def watch(channel: Channel) -> None:
    """Check what must hold in every stored channel."""
    assert channel.weights.stable + channel.weights.candidate == 100
    if channel.weights.candidate:
        assert channel.rollout is not None
        assert channel.in_progress
        assert channel.rollout.phase in EXPOSED_PHASES


def drive_to_the_end(world: World, tick: Tick) -> DriveResult:
    """Tick until the rollout is done, and check each channel on the way."""
    for _ in range(5000):
        result = tick()
        watch(world.channel)
        if result.done:
            return result
        world.advance(max(result.next_in_s, 0.1))
    raise AssertionError(f"the rollout does not end: {world.channel.rollout}")


def run_with_deaths(
    world: World, release: str, deaths: list[tuple[int, bool, float]]
) -> DriveResult:
    """Drive a promotion in processes that die one after the other; the last one lives."""
    left = list(deaths)
    while True:
        calls, after, pause_s = left.pop(0) if left else (10**6, False, 0.0)
        try:
            return drive_to_the_end(world, begin(world, release, calls=calls, after=after))
        except Killed:
            watch(world.channel)
            world.advance(pause_s)


deaths = st.lists(
    st.tuples(st.integers(0, 60), st.booleans(), st.sampled_from([0.5, 5.0, 18.0])), max_size=6
)
"""Changes before each death, and seconds until the next driver: all of them together last less
than the lease, also where a driver dies before its first renewal."""


@settings(max_examples=30)
@given(deaths=deaths, bad=st.booleans())
def test_deaths_change_nothing_but_the_time(
    deaths: list[tuple[int, bool, float]], bad: bool
) -> None:
    die_and_go_on(deaths, bad)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_1_000_schedules_of_deaths_change_nothing_but_the_time() -> None:
    schedules: Counter[str] = Counter()

    @settings(max_examples=1000, deadline=None)
    @given(deaths=deaths, bad=st.booleans())
    def one(deaths: list[tuple[int, bool, float]], bad: bool) -> None:
        die_and_go_on(deaths, bad)
        schedules["schedules"] += 1
        schedules["deaths"] += len(deaths)

    one()
    print(f"{dict(schedules)}: every rollout came to its right end")
    assert schedules["schedules"] >= 1000


def die_and_go_on(deaths: list[tuple[int, bool, float]], bad: bool) -> None:
    """Check that a rollout whose drivers die comes to the end that it had come to anyway."""
    world, old, new = world_with_a_stable_release(bad=bad)
    result = run_with_deaths(world, new, deaths)
    channel = world.channel
    assert result.outcome == ("rolled_back" if bad else "promoted")
    winner, loser = (old, new) if bad else (new, old)
    assert channel.stable is not None
    assert channel.stable.release_id == winner
    assert channel.candidate is None
    world.advance(5)
    assert world.effective.get(winner) == 100
    assert world.effective.get(loser, 0) == 0
    assert [s.state for s in world.servers_of(winner)] == ["ready"]
    assert world.servers_of(loser) == []
    assert [a.kind for a in list_attestations(world.store, MODEL, new)] == [
        "rejection" if bad else "promotion"
    ]
    assert world.unguarded_arrivals == 0
    assert sum(world.errors.values()) == 0
    ends = [line for line in world.told if "promoted:" in line or "rejected:" in line]
    assert ends, "people are told about the end at least once"


@pytest.mark.parametrize("after", [False, True])
def test_a_death_at_every_single_change(after: bool) -> None:
    """One death a rollout, at each of the changes that matter, and at some of the many renewals."""
    change = 1
    died = True
    while died:
        world, _, new = world_with_a_stable_release()
        died = False
        try:
            drive_to_the_end(world, begin(world, new, calls=change, after=after))
        except Killed:
            died = True
            world.advance(1)
            drive_to_the_end(world, begin(world, new))
        assert world.channel.rollout is not None
        assert world.channel.rollout.outcome == "promoted"
        assert world.errors.get(new, 0) == 0
        change += 7 if change > 40 else 1
    assert change > 100


@settings(max_examples=25)
@given(
    trouble=st.lists(
        st.tuples(
            st.floats(0, 60),
            st.sampled_from(["router restarts", "router mute", "host mute", "store away", "blind"]),
            st.sampled_from([1.0, 8.0]),
        ),
        max_size=4,
    )
)
def test_troubles_around_it_do_not_harm_a_good_release(
    trouble: list[tuple[float, str, float]],
) -> None:
    world, _, new = world_with_a_stable_release()
    tick = begin(world, new)
    started = world.now
    for _ in range(5000):
        elapsed = (world.now - started).total_seconds()
        active = {what for start, what, length in trouble if start <= elapsed < start + length}
        world.router_mute = "router mute" in active
        world.host_mute = "host mute" in active
        world.blind = {new} if "blind" in active else set()
        for start, what, _ in trouble:
            if what == "router restarts" and 0 <= elapsed - start < 0.5:
                world.restart_router()
        world.store.away = "store away" in active
        try:
            result = tick()
        except Transient:
            result = None
        world.store.away = False
        if result is not None and result.done:
            break
        watch(world.channel)
        world.advance(0.5)
    assert result is not None
    assert result.outcome == "promoted"
    assert world.channel.rejected == ()


# --- several drivers ------------------------------------------------------------------------------


def test_a_second_attempt_takes_over_and_the_first_only_watches() -> None:
    world, _, new = world_with_a_stable_release()
    first = begin(world, new)
    world.run(first, until=lambda c: c.rollout is not None and c.rollout.phase == "holding")
    second = begin(world, new)
    watched = first()
    assert not watched.done
    assert "is driven by run (epoch 3)" in watched.messages[0]
    generation = world.channel.generation
    assert first().messages == ()
    assert world.channel.generation == generation
    result = world.run(second)
    assert result.outcome == "promoted"
    assert first().done
    assert first().outcome == "promoted"


def test_two_processes_with_one_epoch_write_every_look_once() -> None:
    world, _, new = world_with_a_stable_release()
    tick = begin(world, new)
    twin = begin_twin(world)
    for _ in range(5000):
        result = tick()
        twin_result = twin()
        world.advance(0.5)
        if result.done and twin_result.done:
            break
    assert result.outcome == twin_result.outcome == "promoted"
    assert [a.kind for a in list_attestations(world.store, MODEL, new)] == ["promotion"]
    assert len(world.told) == len(set(world.told))


def begin_twin(world: World) -> Tick:
    """Return the tick of a process that drives with the epoch of another one."""
    deps, channel = world.deps(), world.channel
    assert channel.rollout is not None
    driver = channel.rollout.driver
    return lambda: drive(deps, MODEL, ENVIRONMENT, driver)


def test_a_driver_that_slept_removes_nothing_that_is_wanted_by_now() -> None:
    """It wakes up between its look at the channel and the removal that it had decided on."""
    world, old, new = world_with_a_stable_release(bad=True)
    tick = begin(world, new)
    world.run(tick, until=lambda c: c.rollout is not None and c.rollout.cleanup == "removing")

    sleeper = world.deps()
    real_remove = sleeper.host.remove
    world.judge = simple_judge()

    class Sleepy:
        """A host that is reached only after all this has happened."""

        def __getattr__(self, name: str) -> Any:
            return getattr(sleeper.host, name)

        def servers(self, environment: str, model: str) -> Any:
            seen = sleeper.host.servers(environment, model)
            world.run(tick)
            again = Rollouts(world.deps()).begin(
                kind="promote",
                model=MODEL,
                environment=ENVIRONMENT,
                release_id=new,
                run_id="forced",
                force=True,
                reason="the machine was broken",
            )
            assert world.run(again).outcome == "promoted"
            return seen

        def remove(self, environment: str, release_id: str) -> None:
            removed.append(release_id)
            real_remove(environment, release_id)

    removed: list[str] = []
    assert world.channel.rollout is not None
    driver = world.channel.rollout.driver
    drive(replace(sleeper, host=Sleepy()), MODEL, ENVIRONMENT, driver)
    assert removed == []
    world.advance(5)
    assert world.effective == {new: 100}
    assert [s.state for s in world.servers_of(new)] == ["ready"]
    assert world.servers_of(old) == []


# --- nobody drives any more -----------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["shifting", "holding"])
def test_without_a_driver_the_guard_takes_the_traffic_and_the_rollout_is_withdrawn(
    phase: str,
) -> None:
    world, old, new = world_with_a_stable_release()
    tick = begin(world, new)
    world.run(tick, until=lambda c: c.rollout is not None and c.rollout.phase == phase)
    world.advance(130)
    assert world.effective == {old: 100, new: 0}
    assert world.unguarded_arrivals == 0
    result = world.run(begin(world, new))
    assert result.outcome == "withdrawn"
    assert "The controller was lost" in result.summary
    assert world.channel.rejected == ()
    world.advance(2)
    assert world.effective == {old: 100}


def until_it_bakes(world: World, new: str) -> None:
    """Drive a promotion into its bake, and let its driver die there."""
    world.run(
        begin(world, new),
        until=lambda c: (
            c.rollout is not None and c.rollout.phase == "baking" and c.weights.candidate > 0
        ),
    )


def test_a_bake_without_a_driver_goes_back_to_the_old_release_and_stays_there() -> None:
    world, old, new = world_with_a_stable_release()
    until_it_bakes(world, new)
    world.advance(5)
    assert world.effective == {new: 90, old: 10}
    world.advance(130)
    assert world.effective == {old: 100, new: 0}
    before = world.arrivals[new]
    result = world.run(begin(world, new))
    assert result.outcome == "withdrawn"
    assert "The controller was lost" in result.summary
    world.advance(2)
    assert world.effective == {old: 100}
    assert world.arrivals[new] == before, "the new release got requests again on the way back"
    assert world.channel.rejected == ()
    assert [server.state for server in world.servers_of(old)] == ["ready"]
    assert world.servers_of(new) == []


def test_a_bake_without_a_driver_stays_with_the_new_release_if_the_old_one_is_down() -> None:
    world, old, new = world_with_a_stable_release()
    until_it_bakes(world, new)
    world.advance(130)
    assert world.effective == {old: 100, new: 0}
    world.behaviour[old].start_s = 10**6
    world.crash(f"{old}-0")
    world.advance(1)
    assert world.effective == {new: 100, old: 0}
    before = dict(world.errors)
    result = world.run(begin(world, new))
    assert result.outcome == "promoted"
    world.advance(2)
    assert world.effective == {new: 100}
    assert world.errors == before, "nobody answered for a while"


def test_a_withdrawn_release_may_be_promoted_again() -> None:
    world, _, new = world_with_a_stable_release()
    world.run(begin(world, new), until=lambda c: c.weights.candidate > 0)
    settled = Rollouts(world.deps()).settle(
        model=MODEL, environment=ENVIRONMENT, run_id="run", release_id=new
    )
    assert settled.outcome == "withdrawn"
    result = world.run(begin(world, new))
    assert result.outcome == "promoted"
    assert world.channel.rollout is not None
    assert world.channel.rollout.number == 3


# --- settling -------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    ticks=st.integers(0, 150),
    deaths=st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=3),
)
def test_settling_ends_every_rollout_safely(ticks: int, deaths: list[tuple[int, bool]]) -> None:
    world, old, new = world_with_a_stable_release()
    tick = begin(world, new)
    for _ in range(ticks):
        world.advance(max(tick().next_in_s, 0.1))
    before = world.channel
    for calls, after in [*deaths, (10**6, False)]:
        try:
            settled = Rollouts(mortal(world.deps(), calls, after=after)).settle(
                model=MODEL, environment=ENVIRONMENT, run_id="run", release_id=new
            )
            break
        except Killed:
            watch(world.channel)
            world.advance(1)
    assert before.rollout is not None
    sure = before.rollout.ending or before.rollout.outcome
    assert settled.outcome == (sure or "withdrawn")
    winner = new if settled.outcome == "promoted" else old
    channel = world.channel
    assert channel.stable is not None
    assert channel.stable.release_id == winner
    assert channel.weights.candidate == 0
    assert not channel.in_progress
    assert channel.rejected == ()
    again = Rollouts(world.deps()).settle(
        model=MODEL, environment=ENVIRONMENT, run_id="run", release_id=new
    )
    assert again.outcome == settled.outcome
    assert world.channel.generation == channel.generation


def test_settling_a_run_without_a_rollout_tells_what_is_stable() -> None:
    world, old, new = world_with_a_stable_release()
    rollouts = Rollouts(world.deps())

    def settle(release: str) -> Any:
        return rollouts.settle(
            model=MODEL, environment=ENVIRONMENT, run_id="nobody", release_id=release
        )

    assert settle(old).outcome == "promoted"
    assert settle(new).outcome is None


def test_settling_leaves_the_rollouts_of_others_alone() -> None:
    world, old, new = world_with_a_stable_release()
    begin(world, new)
    before = world.channel
    settled = Rollouts(world.deps()).settle(
        model=MODEL, environment=ENVIRONMENT, run_id="first", release_id=old
    )
    assert settled.outcome == "promoted"
    after = world.channel
    # It only takes note of its own, which the other one has followed.
    assert [each.run_id for each in before.unsettled] == ["first"]
    assert after.unsettled == ()
    assert (after.rollout, after.weights, after.candidate) == (
        before.rollout,
        before.weights,
        before.candidate,
    )


def test_a_cleared_run_has_promoted_only_what_is_stable_now() -> None:
    world, _, new = world_with_a_stable_release()
    other = world.publish("other", **QUICK)
    rollouts = Rollouts(world.deps())

    def settle(run_id: str, release: str) -> Any:
        return rollouts.settle(
            model=MODEL, environment=ENVIRONMENT, run_id=run_id, release_id=release
        )

    assert world.run(begin(world, new)).outcome == "promoted"
    assert world.run(world.promote(other, run_id="later")).outcome == "promoted"
    assert settle("run", new).outcome == "promoted", "it tells of it late, but for the first time"
    again = settle("run", new)
    assert again.outcome is None
    assert f"promoted {new} before, but {other} is stable" in again.summary
    assert settle("later", other).outcome == "promoted"
    assert settle("later", other).outcome == "promoted"


def test_a_run_that_has_ended_reports_the_same_outcome_until_it_is_settled() -> None:
    world, _, new = world_with_a_stable_release(bad=True)
    assert world.run(begin(world, new)).outcome == "rolled_back"
    generation = world.channel.generation
    assert world.run(begin(world, new)).outcome == "rolled_back"
    assert world.channel.generation == generation


def test_servers_that_fail_to_start_are_taken_away() -> None:
    world, old, new = world_with_a_stable_release()
    world.behaviour[new] = Behaviour(fails_to_start=True)
    result = world.run(begin(world, new))
    assert result.outcome == "withdrawn"
    assert "no memory" in result.summary
    world.advance(5)
    assert world.servers_of(new) == []
    assert world.effective == {old: 100}
