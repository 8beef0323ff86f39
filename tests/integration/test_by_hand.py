"""What people do to rollouts, with a driver that lives and without one, in a simulated world."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
from tests.integration.test_rollout_crashes import QUICK, begin, world_with_a_stable_release
from tests.rollout_world import (
    ENVIRONMENT,
    MODEL,
    Behaviour,
    FakeLease,
    Killed,
    World,
    driven,
    mortal,
)

from trainyard.documents.channel import Channel
from trainyard.errors import BadInput, Busy, NotFound, Refused, Transient
from trainyard.releases import list_attestations
from trainyard.rollout import by_hand
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.driver import Settled
from trainyard.rollout.rollouts import Rollouts, Tick
from trainyard.rollout.standing import take_standing, take_standings
from trainyard.rollout.watcher import watch_all
from trainyard.serving.guard_events import GuardEvent
from trainyard.serving.protocol import LeaseSight
from trainyard.store.layout import channel_key

pytestmark = pytest.mark.integration

WHO = {"reason": "It is odd.", "who": "ann"}


@cache
def _stable() -> tuple[World, str, str]:
    return world_with_a_stable_release()


@cache
def _promoted() -> tuple[World, str, str]:
    world, old, new = copy.deepcopy(_stable())
    assert world.run(begin(world, new)).outcome == "promoted"
    world.advance(10)
    return world, old, new


@pytest.fixture
def yard() -> tuple[World, str, str]:
    """A world, its stable release, and one to promote."""
    return copy.deepcopy(_stable())


def at_weight(weight: int) -> Callable[[Channel], bool]:
    return lambda c: (
        c.rollout is not None and c.rollout.phase == "holding" and c.weights.candidate == weight
    )


def forsaken(world: World) -> RolloutDeps:
    """Return the world of a person, while nobody else does anything."""
    return world.deps(sleep=lambda seconds: world.advance(max(seconds, 0.1)))


def roll_back(world: World, deps: RolloutDeps, to: str | None = None, **other: Any) -> Channel:
    values: dict[str, Any] = {
        "release_id": to,
        "run_id": "cli/ann",
        "say": world.said.append,
        "timeout_s": 600.0,
        **WHO,
        **other,
    }
    return by_hand.roll_back(deps, MODEL, ENVIRONMENT, **values)


def abort(world: World, deps: RolloutDeps, **other: Any) -> Channel:
    values: dict[str, Any] = {
        "run_id": "cli/ann",
        "say": world.said.append,
        "timeout_s": 600.0,
        **WHO,
        **other,
    }
    return by_hand.abort_rollout(deps, MODEL, ENVIRONMENT, **values)


def serves(world: World, release: str) -> bool:
    """Tell whether a release has everything, and no server of another one is left."""
    world.advance(5)
    others = {s.release_id for s in world.servers.values()} - {release}
    stable = world.channel.stable
    return (
        stable is not None
        and stable.release_id == release
        and world.effective.get(release) == 100
        and not others
        and not world.channel.in_progress
    )


# --- pause, resume, promote now -------------------------------------------------------------------


def test_a_paused_rollout_waits_for_people_and_then_goes_on(yard: tuple[World, str, str]) -> None:
    world, _, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    rollouts = Rollouts(world.deps())
    rollouts.pause(model=MODEL, environment=ENVIRONMENT, **WHO)
    end = world.now + timedelta(seconds=60)
    world.run(tick, until=lambda c: world.now >= end)
    assert world.channel.weights.candidate == 10
    assert world.effective[new] == 10
    assert world.lease_alive()
    assert any("paused at 10 %" in line and "asked for by ann" in line for line in world.told)
    rollouts.resume(model=MODEL, environment=ENVIRONMENT, who="bob")
    assert world.run(tick).outcome == "promoted"
    assert serves(world, new)


def test_harm_in_a_pause_is_rolled_back() -> None:
    world, old, new = world_with_a_stable_release(bad=True)
    tick = begin(world, new)
    world.run(tick, until=at_weight(50))
    by_hand.pause(world.deps(), MODEL, ENVIRONMENT, **WHO)
    assert world.run(tick).outcome == "rolled_back"
    assert serves(world, old)


def test_a_pause_that_nobody_ends_is_withdrawn() -> None:
    world, old, _ = world_with_a_stable_release()
    new = world.publish("other", **{**QUICK, "max_pause_s": 30})
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    by_hand.pause(world.deps(), MODEL, ENVIRONMENT, **WHO)
    since = world.now
    assert world.run(tick).outcome == "withdrawn"
    assert (world.now - since).total_seconds() < 120
    assert serves(world, old)
    assert world.channel.rejected == ()


def test_what_is_wished_needs_a_reason_and_a_rollout(yard: tuple[World, str, str]) -> None:
    world, _, _ = yard
    deps = world.deps()
    for wish in (by_hand.pause, by_hand.promote_now):
        with pytest.raises(BadInput, match="needs a reason"):
            wish(deps, MODEL, ENVIRONMENT, reason=" ")
        with pytest.raises(NotFound, match="No rollout of adder is under way"):
            wish(deps, MODEL, ENVIRONMENT, reason="Because.")
    with pytest.raises(NotFound, match="No rollout of adder is under way"):
        by_hand.resume(deps, MODEL, ENVIRONMENT)


def test_a_promotion_by_hand_bakes_and_stays_on_record(yard: tuple[World, str, str]) -> None:
    world, _, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    channel = by_hand.promote_now(driven(world, tick), MODEL, ENVIRONMENT, **WHO)
    assert channel.rollout is not None
    assert channel.rollout.phase == "baking"
    assert world.run(tick).outcome == "promoted"
    assert serves(world, new)
    (attestation,) = list_attestations(world.store, MODEL, new, "promotion")
    assert attestation.subject["by_hand"]["who"] == "ann"
    assert attestation.subject["by_hand"]["reason"] == "It is odd."


def test_late_harm_rolls_a_promotion_by_hand_back(yard: tuple[World, str, str]) -> None:
    world, old, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    by_hand.promote_now(driven(world, tick), MODEL, ENVIRONMENT, **WHO)
    world.advance(1)
    tick()
    world.behaviour[new].fails_to_start = True
    world.crash(f"{new}-0")
    assert world.run(tick).outcome == "rolled_back"
    assert serves(world, old)


def test_a_blown_fuse_refuses_a_promotion_by_hand(yard: tuple[World, str, str]) -> None:
    world, _, new = yard
    world.run(begin(world, new), until=at_weight(10))
    rollout = world.channel.rollout
    assert rollout is not None
    blown = GuardEvent(
        model=MODEL,
        environment=ENVIRONMENT,
        rollout=rollout.number,
        at=world.now,
        event="fuse",
        reason="ten requests failed",
        release_id=new,
        weights={},
    )
    before = world.channel
    deps = world.deps(guard_events=lambda *_: (blown,))
    with pytest.raises(Refused, match="A fuse blew: ten requests failed"):
        by_hand.promote_now(deps, MODEL, ENVIRONMENT, **WHO)
    world.guard = ("fuse", "no ready server")
    with pytest.raises(Refused, match="The guard does not follow the channel"):
        by_hand.promote_now(world.deps(), MODEL, ENVIRONMENT, **WHO)
    assert world.channel == before


def test_nobody_answers_for_a_release_that_nobody_watches(yard: tuple[World, str, str]) -> None:
    world, _, new = yard
    world.run(begin(world, new), until=at_weight(10))
    before = world.channel
    with pytest.raises(Refused, match="Its driver has not been seen for 15 s"):
        by_hand.promote_now(forsaken(world), MODEL, ENVIRONMENT, **WHO)
    assert world.lease_alive(), "the lease says that it lived a minute ago"
    world.lease_until = None
    with pytest.raises(Refused, match="Nobody drives this rollout"):
        by_hand.promote_now(world.deps(), MODEL, ENVIRONMENT, **WHO)
    assert world.channel == before


def test_nobody_is_promoted_past_a_guard_that_does_not_answer(
    yard: tuple[World, str, str],
) -> None:
    world, _, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    world.router_mute = True
    with pytest.raises(Refused, match="The router cannot be asked"):
        by_hand.promote_now(driven(world, tick), MODEL, ENVIRONMENT, **WHO)
    assert world.channel.stable is not None
    assert world.channel.stable.release_id != new


# --- what a pause holds ---------------------------------------------------------------------------


def test_a_pause_says_what_the_route_does(yard: tuple[World, str, str]) -> None:
    world, old, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    deps = driven(world, tick)
    channel = by_hand.pause(deps, MODEL, ENVIRONMENT, **WHO)
    assert by_hand.what_a_pause_holds(deps, channel) == (
        f"The route gives 90 % to {old}, 10 % to {new}.",
    )
    world.router_mute = True
    (route,) = by_hand.what_a_pause_holds(deps, channel)
    assert route == "The router cannot be asked what the traffic does now."


def test_a_pause_without_a_driver_says_that_it_freezes_nothing(
    yard: tuple[World, str, str],
) -> None:
    world, old, new = yard
    world.run(begin(world, new), until=at_weight(10))
    deps = forsaken(world)
    channel = by_hand.pause(deps, MODEL, ENVIRONMENT, **WHO)
    route, driver = by_hand.what_a_pause_holds(deps, channel)
    assert route == f"The route gives 90 % to {old}, 10 % to {new}."
    assert "has not been seen for 15 s. Unless it comes back" in driver
    assert f"trainyard abort {MODEL} {ENVIRONMENT}" in driver
    assert world.lease_until is not None
    left_s = (world.lease_until - world.now).total_seconds()
    assert f"in {left_s:.0f} s, paused or not" in driver
    world.advance(left_s + 5)
    assert world.effective == {old: 100, new: 0}
    route, driver = by_hand.what_a_pause_holds(deps, channel)
    assert route.startswith(f"The route gives 100 % to {old}. The rollout's lease is expired")
    assert "this pause freezes no weights: the guard has them" in driver


def test_a_pause_before_any_traffic_waits_for_a_driver(yard: tuple[World, str, str]) -> None:
    world, _, new = yard
    begin(world, new)()
    deps = forsaken(world)
    channel = by_hand.pause(deps, MODEL, ENVIRONMENT, **WHO)
    assert "no share of a canary" in by_hand.what_a_pause_holds(deps, channel)[1]
    unknown = replace(deps, lease=ForbiddenLease(world))
    assert "Nobody can tell" in by_hand.what_a_pause_holds(unknown, channel)[1]


def pause_and_stay(world: World, deps: RolloutDeps, timeout_s: float) -> Channel:
    return by_hand.pause_and_stay(
        deps,
        MODEL,
        ENVIRONMENT,
        run_id="cli/ann",
        say=world.said.append,
        timeout_s=timeout_s,
        **WHO,
    )


def test_who_stays_with_a_pause_drives_for_a_driver_that_is_gone(
    yard: tuple[World, str, str],
) -> None:
    world, _, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    since = world.now
    with pytest.raises(Transient, match="It is not over yet"):
        pause_and_stay(world, forsaken(world), 300.0)
    assert (world.now - since).total_seconds() > 250, "longer than a lease"
    assert world.effective[new] == 10
    assert world.lease_alive()
    # Given again it goes on, also past the end of the pause.
    resumed = False

    def sleep(seconds: float) -> None:
        nonlocal resumed
        world.advance(max(seconds, 0.1))
        rollout = world.channel.rollout
        if not resumed and rollout is not None and rollout.driver.epoch > 2:
            resumed = True
            by_hand.resume(world.deps(), MODEL, ENVIRONMENT, who="bob")

    channel = pause_and_stay(world, world.deps(sleep=sleep), 3000.0)
    assert channel.rollout is not None
    assert channel.rollout.outcome == "promoted"
    assert world.unguarded_arrivals == 0
    assert serves(world, new)
    assert tick().outcome == "promoted", "the run that asked for it tells how it ended"


def test_harm_in_a_pause_is_rolled_back_by_who_stays() -> None:
    world, old, new = world_with_a_stable_release(bad=True)
    world.run(begin(world, new), until=at_weight(50))
    channel = pause_and_stay(world, forsaken(world), 1000.0)
    assert channel.rollout is not None
    assert channel.rollout.outcome == "rolled_back"
    assert serves(world, old)


def test_who_stays_with_a_pause_leaves_it_to_a_driver_that_lives(
    yard: tuple[World, str, str],
) -> None:
    world, _, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    with pytest.raises(Transient, match="It is not over yet"):
        pause_and_stay(world, driven(world, tick), 60.0)
    rollout = world.channel.rollout
    assert rollout is not None
    assert rollout.driver.run_id == "run"


# --- abort ----------------------------------------------------------------------------------------


def test_an_abort_leaves_the_rest_to_a_driver_that_lives(yard: tuple[World, str, str]) -> None:
    world, old, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    channel = abort(world, driven(world, tick))
    assert channel.rollout is not None
    assert (channel.rollout.outcome, channel.rollout.driver.run_id) == ("withdrawn", "run")
    assert any("withdrawn, may be tried again" in line for line in world.said)
    assert serves(world, old)


def test_without_a_driver_an_abort_does_everything_itself(yard: tuple[World, str, str]) -> None:
    world, old, new = yard
    world.run(begin(world, new), until=at_weight(10))
    began = world.now
    channel = abort(world, forsaken(world))
    assert channel.rollout is not None
    assert channel.rollout.outcome == "withdrawn"
    assert channel.rollout.driver.run_id == "cli/ann"
    # The driver's lease still lasted; that it was not renewed any more tells sooner.
    assert (world.now - began).total_seconds() < 60
    assert any("this command does" in line for line in world.said)
    assert serves(world, old)
    assert not world.lease_alive()


def test_an_abort_that_need_not_wait_goes_while_a_driver_lives(
    yard: tuple[World, str, str],
) -> None:
    world, old, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    channel = abort(world, driven(world, tick), wait=False)
    assert channel.in_progress
    world.advance(1)
    assert world.effective == {old: 100, new: 0}
    assert world.run(tick).outcome == "withdrawn"


def test_an_abort_that_comes_too_late_says_so(yard: tuple[World, str, str]) -> None:
    world, _, new = yard
    tick = begin(world, new)
    world.run(tick, until=lambda c: c.rollout is not None and c.rollout.ending == "promoted")
    before = world.channel
    for too_late in (
        lambda: abort(world, driven(world, tick)),
        # What neuron_control does, whose run must not succeed.
        lambda: Rollouts(world.deps()).abort(model=MODEL, environment=ENVIRONMENT, **WHO),
    ):
        with pytest.raises(Refused, match="too late") as refused:
            too_late()
        assert f"trainyard rollback {MODEL} {ENVIRONMENT}" in refused.value.hint
    assert world.channel == before
    assert world.run(tick).outcome == "promoted"
    with pytest.raises(NotFound, match="No rollout"):
        abort(world, forsaken(world))


def test_a_channel_that_is_gone_ends_no_command(yard: tuple[World, str, str]) -> None:
    """A network folder that is not mounted for a moment looks like a store without anything."""
    world, old, new = yard
    world.run(begin(world, new), until=at_weight(10))
    # The guard goes on with what it saw last, and cannot be asked.
    world.router_mute = world.router_frozen = True
    kept: dict[str, Any] = {}

    def sleep(seconds: float) -> None:
        world.advance(max(seconds, 0.1))
        if not kept:
            kept.update(world.store.keys)
            world.store.keys.clear()

    with pytest.raises(Transient, match="It is not over yet"):
        abort(world, world.deps(sleep=sleep), timeout_s=20)
    assert [line for line in world.said if "is gone from memory:" in line]
    assert world.store.keys == {}, "nothing is written where the store should be"
    world.store.keys.update(kept)
    world.router_mute = world.router_frozen = False
    assert abort(world, forsaken(world)).rollout.outcome == "withdrawn"  # type: ignore[union-attr]
    assert serves(world, old)


def test_a_command_whose_time_is_over_says_how_to_go_on(yard: tuple[World, str, str]) -> None:
    world, old, new = yard
    world.run(begin(world, new), until=at_weight(10))
    world.router_mute = True
    with pytest.raises(Transient, match="The same command again goes on"):
        abort(world, forsaken(world), timeout_s=20)
    world.router_mute = False
    assert abort(world, forsaken(world)).rollout is not None
    assert serves(world, old)


# --- rollback -------------------------------------------------------------------------------------


@pytest.fixture
def promoted() -> tuple[World, str, str]:
    """A world in which the new release has been promoted."""
    return copy.deepcopy(_promoted())


def test_a_rollback_needs_no_airflow(promoted: tuple[World, str, str]) -> None:
    world, old, new = promoted
    channel = roll_back(world, forsaken(world))
    assert channel.rollout is not None
    assert (channel.rollout.driver.run_id, channel.rollout.requested_by) == ("cli/ann", "ann")
    assert serves(world, old)
    assert sum(world.errors.values()) == 0
    assert world.servers_of(new) == []


def test_the_same_rollback_again_does_not_go_back_further(
    promoted: tuple[World, str, str],
) -> None:
    world, old, new = promoted
    third = world.publish("third", **QUICK)
    tick = world.promote(third, run_id="third")
    assert world.run(tick).outcome == "promoted"
    roll_back(world, forsaken(world))
    assert serves(world, new)
    with pytest.raises(Refused, match="no promotion to undo") as refused:
        roll_back(world, forsaken(world))
    assert f"--to {old}" in refused.value.hint
    assert roll_back(world, forsaken(world), to=new, run_id="cli/2").stable is not None
    assert roll_back(world, forsaken(world), to=old, run_id="cli/3").stable is not None
    assert serves(world, old)


def test_a_rollback_after_the_judges_own_loses_no_good_release() -> None:
    world, old, new = world_with_a_stable_release(bad=True)
    assert world.run(begin(world, new)).outcome == "rolled_back"
    with pytest.raises(NotFound):
        roll_back(world, forsaken(world))
    assert serves(world, old)


@pytest.mark.parametrize("alive", [True, False])
def test_a_rollback_ends_a_promotion_first(yard: tuple[World, str, str], alive: bool) -> None:
    world, old, new = yard
    tick = begin(world, new)
    world.run(tick, until=lambda c: c.rollout is not None and c.rollout.phase == "baking")
    deps = driven(world, tick) if alive else forsaken(world)
    channel = roll_back(world, deps)
    assert channel.rollout is not None
    assert channel.rollout.driver.run_id == ("run" if alive else "cli/ann")
    assert channel.rollout.outcome == "withdrawn"
    assert serves(world, old)


def test_a_rollback_that_was_cut_off_is_gone_on_with(promoted: tuple[World, str, str]) -> None:
    world, old, _ = promoted
    calls = 3
    for attempt in range(40):
        deps = mortal(forsaken(world), calls, after=bool(attempt % 2))
        try:
            roll_back(world, deps, run_id=f"cli/{attempt}")
        except Killed:
            calls += 5
            continue
        except Refused:
            # The attempt before had done everything but to say so.
            break
        break
    else:
        raise AssertionError("it is never done")
    assert serves(world, old)


def test_a_rollback_to_something_else_waits_for_the_one_under_way(
    promoted: tuple[World, str, str],
) -> None:
    world, old, new = promoted
    tick = world.roll_back(old)
    tick()
    with pytest.raises(Busy, match="A rollback to"):
        roll_back(world, driven(world, tick), to=new)
    assert roll_back(world, driven(world, tick), to=old).stable is not None
    assert serves(world, old)


def test_a_rollback_that_cannot_be_done_says_why(promoted: tuple[World, str, str]) -> None:
    world, old, new = promoted
    with pytest.raises(NotFound, match="no earlier release"):
        roll_back(world, forsaken(world), to=f"{MODEL}-000000000000")
    with pytest.raises(BadInput, match="needs a reason"):
        roll_back(world, forsaken(world), reason="")
    world.behaviour[old] = Behaviour(fails_to_start=True)
    with pytest.raises(Refused, match="is not stable"):
        roll_back(world, forsaken(world))
    assert serves(world, new)


def test_a_driver_that_comes_back_is_watched(promoted: tuple[World, str, str]) -> None:
    world, old, _ = promoted
    tick: list[Tick] = []

    def sleep(seconds: float) -> None:
        if not tick:
            # Another command takes the rollout over.
            by_other = world.deps()
            rollout = world.channel.rollout
            assert rollout is not None
            from trainyard.rollout.channel_store import change_channel
            from trainyard.rollout.driver import drive
            from trainyard.rollout.events import DriverClaimed
            from trainyard.rollout.state_machine import step

            channel = change_channel(
                by_other.store,
                MODEL,
                ENVIRONMENT,
                lambda c: step(c, DriverClaimed("other"), world.now)[0],
            )
            assert channel.rollout is not None
            driver = channel.rollout.driver
            tick.append(lambda: drive(by_other, MODEL, ENVIRONMENT, driver))
        tick[0]()
        world.advance(max(seconds, 0.1))

    channel = roll_back(world, world.deps(sleep=sleep))
    assert channel.rollout is not None
    assert channel.rollout.driver.run_id == "other"
    assert any("only watches now" in line for line in world.said)
    assert serves(world, old)


def test_an_abort_says_when_the_route_has_followed(yard: tuple[World, str, str]) -> None:
    world, old, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    abort(world, driven(world, tick))
    expected = [
        f"The channel gives all traffic to {old}.",
        f"The traffic is not back yet: the route still gives 10 % to {new}.",
        f"The route gives all traffic to {old}.",
    ]
    assert [line for line in world.said if line in expected] == expected


def test_an_abort_names_the_router_that_does_not_answer(yard: tuple[World, str, str]) -> None:
    world, old, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    world.router_mute = True
    with pytest.raises(Transient, match="The router cannot be asked whether the traffic is back"):
        abort(world, driven(world, tick), timeout_s=3.0)
    assert len([line for line in world.said if "The router cannot be asked" in line]) == 1
    world.router_mute = False
    assert abort(world, driven(world, tick)).rollout.outcome == "withdrawn"  # type: ignore[union-attr]
    assert serves(world, old)


@pytest.mark.parametrize(
    "command", [by_hand.pause, by_hand.resume, by_hand.promote_now, abort, roll_back]
)
def test_no_reason_is_as_long_as_a_book(
    yard: tuple[World, str, str], command: Callable[..., Channel]
) -> None:
    world, _, new = yard
    world.run(begin(world, new), until=at_weight(10))
    before = world.channel
    long = {"reason": "x" * (by_hand.LONGEST_REASON + 1), "who": "ann"}
    place = (
        (world, forsaken(world))
        if command in (abort, roll_back)
        else (world.deps(), MODEL, ENVIRONMENT)
    )
    with pytest.raises(BadInput, match="500 are the most"):
        command(*place, **long)
    assert world.channel == before


# --- a user who may write the store, but not what the platform keeps of its rollouts --------------


class ForbiddenLease(FakeLease):
    """A lease that this user may not read."""

    def look(self, environment: str, model: str) -> LeaseSight:
        raise BadInput("run/leases/production/adder.json cannot be read: this user may not.")


class ReadOnlyLease(FakeLease):
    """A lease that this user may read and not renew."""

    def look(self, environment: str, model: str) -> LeaseSight:
        return replace(super().look(environment, model), may_renew=False)


@pytest.mark.parametrize("command", [abort, roll_back])
@pytest.mark.parametrize("lease", [ForbiddenLease, ReadOnlyLease])
def test_who_may_not_see_the_driver_moves_the_traffic_and_watches(
    yard: tuple[World, str, str],
    command: Callable[..., Channel],
    lease: type[FakeLease],
) -> None:
    world, old, new = yard
    tick = begin(world, new)
    world.run(tick, until=at_weight(10))
    deps = replace(driven(world, tick), lease=lease(world))
    channel = command(world, deps)
    assert channel.rollout is not None
    assert channel.rollout.outcome == "withdrawn"
    assert serves(world, old)
    unknown = [line for line in world.said if "cannot be read" in line]
    assert len(unknown) == (lease is ForbiddenLease)
    # Once it is over, there is nothing to be seen to.
    with pytest.raises((NotFound, Refused)):
        command(world, deps)


@pytest.mark.parametrize("command", [abort, roll_back])
def test_who_may_not_drive_says_that_nobody_does(
    yard: tuple[World, str, str], command: Callable[..., Channel]
) -> None:
    world, old, new = yard
    world.run(begin(world, new), until=at_weight(10))
    world.lease_until = None
    with pytest.raises(BadInput, match="Nobody drives this rollout") as told:
        command(world, replace(forsaken(world), lease=ReadOnlyLease(world)))
    assert "the same command" in told.value.hint
    world.advance(5)
    assert world.effective[old] == 100
    assert command(world, forsaken(world)).rollout.outcome == "withdrawn"  # type: ignore[union-attr]
    assert serves(world, old)


def test_no_rollback_begins_that_its_user_could_not_drive() -> None:
    world, _, new = copy.deepcopy(_promoted())
    before = world.channel
    for lease in (ReadOnlyLease, ForbiddenLease):
        with pytest.raises(BadInput):
            roll_back(world, replace(forsaken(world), lease=lease(world)))
    assert world.channel == before
    assert serves(world, new)


# --- where it stands ------------------------------------------------------------------------------


def test_a_standing_tells_what_there_is_and_what_can_be_done(yard: tuple[World, str, str]) -> None:
    world, old, new = yard
    world.run(begin(world, new), until=at_weight(10))
    by_hand.pause(world.deps(), MODEL, ENVIRONMENT, **WHO)
    one = take_standing(world.deps(), world.channel)
    assert (one.stable, one.candidate, one.lease) == (old, new, "alive")
    assert one.route is not None
    assert one.route.weights == {old: 90, new: 10}
    assert one.servers is not None
    assert {server.state for server in one.servers} == {"ready"}
    assert one.paused is not None
    assert one.can == ("resume", "promote-now", "abort", "rollback")
    world.host_mute = world.router_mute = True
    silent = take_standing(world.deps(), world.channel)
    assert (silent.route, silent.servers) == (None, None)


def test_only_commands_that_are_not_refused_can_be_given() -> None:
    world, old, _ = copy.deepcopy(_promoted())
    assert take_standing(world.deps(), world.channel).can == ("rollback",)
    bad = world.publish("bad", behaviour=Behaviour(refuses=True), **QUICK)
    assert world.run(begin(world, bad)).outcome == "rolled_back"
    # What was taken back is no promotion to undo: which release is meant must be said.
    with pytest.raises(Refused):
        roll_back(world, forsaken(world))
    assert take_standing(world.deps(), world.channel).can == (f"rollback --to {old}",)
    roll_back(world, forsaken(world), old)
    assert serves(world, old)
    assert take_standing(world.deps(), world.channel).can == ()


def test_a_router_that_hangs_is_waited_for_once(
    yard: tuple[World, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, _, _ = yard
    clock = [0.0]
    monkeypatch.setattr("trainyard.rollout.standing.time.monotonic", lambda: clock[0])

    class Hanging:
        def status(self, environment: str, model: str) -> None:
            clock[0] += 2.0

    deps = world.deps(router=Hanging())
    other = world.channel.model_copy(update={"model": "other"})
    elsewhere = other.model_copy(update={"environment": "staging"})
    found = take_standings(deps, [world.channel, other, elsewhere], with_servers=False)
    assert [one.route for one in found] == [None] * 3
    assert clock == [4.0], "once in each environment"


# --- whoever comes back after somebody else has ended the rollout ---------------------------------

RUN = "neuron_promote__production/night"


def ended_by_a_command(world: World) -> None:
    abort(world, forsaken(world))


def ended_by_a_rollback(world: World) -> None:
    roll_back(world, forsaken(world))


def ended_by_the_watch(world: World) -> None:
    """neuron_control aborts, the triggerer dies, and neuron_watch ends what is left."""
    by_hand.abort(world.deps(), MODEL, ENVIRONMENT, **WHO)
    world.advance(200)
    (found,) = watch_all(forsaken(world), lambda finding: None)
    assert found.kind == "ended"


def ended_by_another_run(world: World) -> None:
    world.run(world.roll_back(run_id="neuron_rollback__production/ann"))


ENDINGS = [ended_by_a_command, ended_by_a_rollback, ended_by_the_watch, ended_by_another_run]


def settle(world: World, release: str) -> Settled:
    return Rollouts(world.deps()).settle(
        model=MODEL, environment=ENVIRONMENT, run_id=RUN, release_id=release
    )


@pytest.mark.parametrize("end", ENDINGS)
def test_a_triggerer_that_comes_back_does_not_promote_again(
    yard: tuple[World, str, str], end: Callable[[World], None]
) -> None:
    world, old, new = yard
    world.run(world.promote(new, run_id=RUN), until=at_weight(10))
    world.advance(40)
    end(world)
    over = world.channel
    said = Rollouts(world.deps()).check(
        model=MODEL, environment=ENVIRONMENT, release_id=new, run_id=RUN
    )
    assert "was withdrawn" in said
    for _ in range(2):
        result = world.run(world.promote(new, run_id=RUN))
        assert result.outcome == "withdrawn"
        assert "It is odd." in result.summary or "A rollback was requested" in result.summary
    assert world.channel == over
    assert serves(world, old)
    assert settle(world, new).outcome == "withdrawn"
    # Once it has taken note, whoever clears the run means it.
    assert world.run(world.promote(new, run_id=RUN)).outcome == "promoted"


@pytest.mark.parametrize("end", ENDINGS)
def test_nor_does_it_after_the_channel_has_gone_on(
    yard: tuple[World, str, str], end: Callable[[World], None]
) -> None:
    world, _, new = yard
    other = world.publish("other", **QUICK)
    world.run(world.promote(new, run_id=RUN), until=at_weight(10))
    world.advance(40)
    end(world)
    later = world.promote(other, run_id="later")
    later()
    assert world.run(world.promote(new, run_id=RUN)).outcome == "withdrawn"
    assert world.run(later).outcome == "promoted"
    result = world.run(world.promote(new, run_id=RUN))
    assert result.outcome == "withdrawn"
    assert serves(world, other)
    for _ in range(2):
        assert settle(world, new).outcome == "withdrawn"
        assert RUN not in {each.run_id for each in world.channel.unsettled}
    assert serves(world, other)
    assert world.run(world.promote(new, run_id=RUN)).outcome == "promoted"


def test_a_triggerer_that_comes_back_watches_whoever_ends_its_rollout(
    yard: tuple[World, str, str],
) -> None:
    world, old, new = yard
    rules = world.environments[ENVIRONMENT]
    world.environments[ENVIRONMENT] = rules.model_copy(update={"concurrent_requests": "queue"})
    world.run(world.promote(new, run_id=RUN), until=at_weight(10))
    back: list[Tick] = []

    def sleep(seconds: float) -> None:
        world.advance(max(seconds, 0.1))
        rollout = world.channel.rollout
        assert rollout is not None
        if rollout.driver.run_id == "cli/ann" and world.channel.in_progress:
            back.append(world.promote(new, run_id=RUN))
            assert not back[-1]().done

    abort(world, world.deps(sleep=sleep))
    assert back
    assert world.channel.rollout is not None
    assert world.channel.rollout.driver.run_id == "cli/ann"
    assert world.channel.waiting == ()
    assert back[0]().outcome == "withdrawn"
    assert serves(world, old)


def test_a_rollback_that_comes_back_undoes_nothing_that_came_since(
    yard: tuple[World, str, str],
) -> None:
    world, old, new = yard
    back = "neuron_rollback__production/ann"
    world.run(world.promote(new, run_id=RUN), until=at_weight(10))
    # It begins to end the promotion; then its triggerer dies, and the watch does the rest.
    world.roll_back(run_id=back)()
    world.advance(200)
    watch_all(forsaken(world), lambda finding: None)
    assert world.run(world.roll_back(run_id=back)).outcome == "promoted"
    assert serves(world, old)
    other = world.publish("other", **QUICK)
    assert world.run(world.promote(other, run_id="later")).outcome == "promoted"
    assert world.run(world.roll_back(run_id=back)).outcome == "promoted"
    assert serves(world, other)


def test_a_rollback_that_others_ended_is_not_made_twice(promoted: tuple[World, str, str]) -> None:
    world, _, _ = promoted
    back = "neuron_rollback__production/ann"
    world.roll_back(run_id=back)()
    world.advance(200)
    watch_all(forsaken(world), lambda finding: None)
    other = world.publish("other", **QUICK)
    assert world.run(world.promote(other, run_id="later")).outcome == "promoted"
    result = world.run(world.roll_back(run_id=back))
    assert (result.outcome, world.channel.rollout and world.channel.rollout.number) == (
        "promoted",
        4,
    )
    assert serves(world, other)


def test_a_rollout_of_an_older_version_has_its_owner_in_the_history(
    yard: tuple[World, str, str],
) -> None:
    world, old, new = yard
    world.run(world.promote(new, run_id=RUN), until=at_weight(10))
    written = world.channel
    assert written.rollout is not None
    older = written.rollout.model_copy(update={"owner": ""})
    write = written.model_copy(update={"rollout": older}).to_bytes()
    world.store.put(channel_key(MODEL, ENVIRONMENT), write)
    assert world.channel.owner == RUN
    world.advance(40)
    abort(world, forsaken(world))
    assert world.run(world.promote(new, run_id=RUN)).outcome == "withdrawn"
    assert serves(world, old)


# --- whoever dies at the very end -----------------------------------------------------------------


def all_is_done(world: World) -> bool:
    """Tell whether nothing is left to be done of the last rollout."""
    stable = world.channel.stable
    assert stable is not None
    told = "withdrawn" in " ".join(world.told) or "promoted" in " ".join(world.told)
    return world.autoscaling == stable.release_id and world.lease_until is None and told


def unfinished(begin_one: Callable[[], World], finish: Callable[[World, RolloutDeps], None]) -> Any:
    """Yield worlds in which `finish` died when the rollout was over and work was left."""
    for calls in range(1, 200):
        for after in (False, True):
            world = begin_one()
            try:
                finish(world, mortal(forsaken(world), calls, after=after))
            except Killed:
                if not world.channel.in_progress and not all_is_done(world):
                    yield world
            else:
                return


def held_at_10() -> World:
    world, _, new = copy.deepcopy(_stable())
    world.run(world.promote(new, run_id=RUN), until=at_weight(10))
    world.advance(40)
    return world


def again_at_once(world: World) -> None:
    channel = abort(world, forsaken(world), run_id="cli/again")
    assert channel.rollout is not None
    assert channel.rollout.outcome == "withdrawn"


def the_watch(world: World) -> None:
    world.advance(130)
    (found,) = [f for f in watch_all(forsaken(world), lambda f: None) if f.kind != "note"]
    assert (found.kind, found.is_news) == ("ended", False)
    assert "work was left" in found.message


def its_own_teardown(world: World) -> None:
    world.advance(130)
    rollout = world.channel.rollout
    assert rollout is not None
    assert settle(world, rollout.release_id).outcome == "withdrawn"


@pytest.mark.parametrize("finish", [again_at_once, the_watch, its_own_teardown])
def test_what_a_command_has_left_that_died_at_the_end_is_done(
    finish: Callable[[World], None],
) -> None:
    count = 0
    for world in unfinished(held_at_10, lambda w, deps: (abort(w, deps), None)[1]):
        count += 1
        finish(world)
        assert all_is_done(world)
        generation = world.channel.generation
        assert [f for f in watch_all(forsaken(world), lambda f: None) if f.kind != "note"] == []
        assert world.channel.generation == generation
    assert count >= 2


def test_a_promotion_is_attested_whoever_dies_at_the_end() -> None:
    def before_the_end() -> World:
        return copy.deepcopy(_almost())

    def promote(world: World, deps: RolloutDeps) -> None:
        new = world.channel.rollout
        assert new is not None
        tick = Rollouts(deps).begin(
            kind="promote",
            model=MODEL,
            environment=ENVIRONMENT,
            release_id=new.release_id,
            run_id=RUN,
        )
        world.run(tick)

    count = 0
    for world in unfinished(before_the_end, promote):
        count += 1
        the_watch(world)
        assert all_is_done(world)
        assert world.channel.stable is not None
        stable = world.channel.stable.release_id
        assert len(list_attestations(world.store, MODEL, stable, "promotion")) == 1
    assert count >= 2


@cache
def _almost() -> World:
    """Return a world in which a promotion is about to end."""
    world, _, new = copy.deepcopy(_stable())
    tick = world.promote(new, run_id=RUN)
    world.run(tick, until=lambda c: c.rollout is not None and c.rollout.ending == "promoted")
    return world


def test_a_rollback_does_not_wait_for_what_is_left(promoted: tuple[World, str, str]) -> None:
    world, old, _ = promoted
    deps = forsaken(world)

    def away(*_: object) -> Any:
        raise Transient("The lease cannot be read.")

    lease = deps.lease
    lease.look = away  # type: ignore[method-assign]
    channel = roll_back(world, deps)
    assert channel.stable is not None
    assert channel.stable.release_id == old
    assert any("is not done: The lease cannot be read." in line for line in world.said)
