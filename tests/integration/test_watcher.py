"""The watch over whole channels in a simulated world: it rolls back, tells, forgets nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
from tests.integration.test_rollout_crashes import (
    QUICK,
    begin,
    simple_judge,
    world_with_a_stable_release,
)
from tests.rollout_world import (
    ENVIRONMENT,
    MODEL,
    Killed,
    World,
    check_that_it_serves_alone,
    mortal,
)

from trainyard.documents.channel import Channel
from trainyard.documents.watch import WatchState
from trainyard.errors import Transient
from trainyard.rollout import by_hand
from trainyard.rollout.watcher import KEPT_SLOTS, Finding, watch_all
from trainyard.store.documents import read_document

pytestmark = pytest.mark.integration

SLO = {"availability": 0.99, "ttft": {"within_s": 0.25, "share": 0.9}, "min_requests": 20}


class Watched(World):
    """A world in which a release with objectives was promoted over an older one."""

    def __init__(self, *, warm_s: float = 7200.0, slo: Any = SLO) -> None:
        super().__init__(rate=4.0)
        rules = self.environments[ENVIRONMENT]
        self.environments[ENVIRONMENT] = rules.model_copy(update={"rollback_window_s": warm_s})
        self.old, self.new = (self.publish(n, **{**QUICK, "slo": slo}) for n in ("old", "new"))
        self.judge = simple_judge()
        self.run(self.promote(self.old, run_id="first"))
        assert self.run(begin(self, self.new)).outcome == "promoted"
        self.told.clear()
        self.backs: list[Finding] = []

    @classmethod
    def made(cls, *, warm_s: float = 7200.0) -> Watched:
        """Return a fresh copy of such a world."""
        return copy.deepcopy(_watched(warm_s))

    def watch(self, minutes: int = 1) -> list[Finding]:
        """Let time pass, and look every minute; return all that was found."""
        found: list[Finding] = []
        self.slice_s = 10.0
        for _ in range(minutes):
            self.advance(60.0)
            found.extend(watch_all(self.deps(), self.backs.append))
        self.slice_s = 0.5
        return found

    def kinds(self, found: list[Finding]) -> set[str]:
        return {finding.kind for finding in found}

    def states(self) -> list[str]:
        return [key for key in self.store.keys if "/watch/" in key]


@cache
def _watched(warm_s: float) -> Watched:
    return Watched(warm_s=warm_s)


def test_a_release_that_keeps_its_objectives_is_left_alone() -> None:
    world = Watched.made()
    found = world.watch(8)
    assert world.kinds(found) <= {"note"}
    assert len(world.states()) == KEPT_SLOTS
    assert world.told == []


def test_a_release_that_fails_is_rolled_back_while_the_old_servers_are_warm() -> None:
    world = Watched.made()
    world.watch(2)
    world.behaviour[world.new].error_share = 0.9
    found = world.watch(14)
    assert {"alarm", "rollback"} <= world.kinds(found)
    back = world.backs[0]
    assert (back.release_id, back.environment) == (world.old, ENVIRONMENT)
    assert len({finding.run_id for finding in world.backs}) == 1
    assert len([f for f in found if f.kind == "alarm"]) == 1
    assert len([line for line in world.told if "misses its objectives" in line]) == 1
    assert [e.event for e in world.channel.history].count("slo_missed") == 1

    # The same code as a person's command, without Airflow.
    began = world.now
    by_hand.roll_back(
        world.deps(),
        MODEL,
        ENVIRONMENT,
        release_id=back.release_id,
        reason=back.message,
        who="watch",
        run_id=back.run_id,
        say=world.said.append,
        timeout_s=600,
    )
    stable = world.channel.stable
    assert stable is not None
    assert stable.release_id == world.old
    assert (world.now - began).total_seconds() < 30
    world.behaviour[world.old].error_share = 0.9
    again = world.watch(14)
    assert "alarm" in world.kinds(again)
    assert "rollback" not in world.kinds(again), "a rollback is not rolled back"


def test_after_the_window_it_alarms_and_does_nothing() -> None:
    world = Watched.made(warm_s=0.0)
    world.behaviour[world.new].error_share = 0.9
    found = world.watch(14)
    assert world.backs == []
    (alarm,) = [finding for finding in found if finding.kind == "alarm"]
    assert "Nothing is done by itself" in alarm.message
    world.behaviour[world.new].error_share = 0.0
    world.now += timedelta(minutes=35)
    assert "recovered" in world.kinds(world.watch(7))
    assert world.channel.history[-1].event == "slo_met"


def test_what_cannot_be_read_is_told_and_does_not_roll_back() -> None:
    world = Watched.made()
    world.watch(2)
    world.blind = {world.new}
    world.router_mute = True
    found = world.watch(16)
    assert world.backs == []
    alarms = [finding.message for finding in found if finding.kind == "alarm"]
    assert len(alarms) == 2
    assert all("could not be read for" in message for message in alarms)


def test_a_host_that_does_not_answer_makes_blind_and_no_more() -> None:
    world = Watched.made()
    world.watch(2)
    world.host_mute = True
    assert world.kinds(world.watch(3)) <= {"note"}
    world.now += timedelta(minutes=20)
    assert [f.kind for f in world.watch() if f.is_news] == ["alarm", "alarm"]
    world.host_mute = False
    assert world.kinds(world.watch(2)) <= {"note", "recovered"}


def test_a_channel_that_cannot_be_read_keeps_nobody_from_looking_at_the_others() -> None:
    world = Watched.made()
    world.store.put("channels/aaa/production.json", b"{")
    found = watch_all(world.deps(), world.backs.append)
    assert [(f.model, f.kind) for f in found if f.is_news] == [("aaa", "trouble")]
    assert len(world.states()) == 1
    world.store.away = True
    with pytest.raises(Transient):
        watch_all(world.deps(), world.backs.append)


def test_nobody_is_watched_without_objectives_or_during_a_rollout() -> None:
    world = Watched(slo=None)
    found = world.watch(2)
    assert world.kinds(found) == {"note"}
    assert not any(one.is_news for one in found)
    assert found[0].message == f"{world.new} is not watched: it has no rollout.slo."
    assert world.states() == []
    busy = Watched.made()
    third = busy.publish("third", **QUICK)
    busy.promote(third, run_id="third")
    assert watch_all(busy.deps(), busy.backs.append) == ()


def test_a_rollout_that_comes_to_nothing_is_no_reason_to_forget() -> None:
    world = Watched.made()
    world.watch(3)
    third = world.publish("third", **{**QUICK, "slo": SLO})
    world.promote(third, run_id="third")()
    deps = replace(world.deps(), sleep=lambda seconds: world.advance(max(seconds, 0.1)))
    by_hand.abort_rollout(
        deps,
        MODEL,
        ENVIRONMENT,
        reason="Enough.",
        who="ann",
        run_id="cli/ann",
        say=world.said.append,
        timeout_s=600,
    )
    world.watch()
    state = read_document(world.store, sorted(world.states())[-1], WatchState)
    assert world.channel.rollout is not None
    assert state.rollout == world.channel.rollout.number
    assert len(state.samples) == 3


def test_it_looks_once_a_slot_however_often_it_is_asked() -> None:
    world = Watched.made()
    world.watch()
    keys = world.states()
    assert watch_all(world.deps(), world.backs.append) == ()
    assert world.states() == keys


def test_a_watch_that_dies_at_any_line_forgets_nothing() -> None:
    world = Watched.made()
    world.watch(2)
    world.behaviour[world.new].error_share = 0.9
    world.slice_s = 10.0
    for call in range(1, 40):
        world.advance(60)
        deps = mortal(world.deps(), call % 7, after=bool(call % 2))
        with contextlib.suppress(Killed):
            watch_all(deps, world.backs.append)
        if world.backs and call > 14:
            break
    assert world.backs
    assert [e.event for e in world.channel.history].count("slo_missed") == 1
    world.watch()
    assert any("misses its objectives" in line for line in world.told)
    state = read_document(world.store, sorted(world.states())[-1], WatchState)
    assert state.release_id == world.new
    assert len(state.samples) > 5


def test_a_decided_rollout_whose_driver_has_gone_is_ended() -> None:
    world = Watched.made()
    third = world.publish("third", **QUICK)
    world.run(world.promote(third, run_id="third"), until=lambda c: c.weights.candidate > 0)
    deps = replace(world.deps(), sleep=lambda seconds: world.advance(max(seconds, 0.1)))
    by_hand.abort(deps, MODEL, ENVIRONMENT, reason="Enough.", who="ann")
    assert watch_all(deps, world.backs.append) == (), "its driver may still live"
    world.advance(130)
    (found,) = watch_all(deps, world.backs.append)
    assert (found.kind, found.is_news) == ("ended", False)
    assert not world.channel.in_progress


# --- undecided rollouts that nobody drives any more -----------------------------------------------


def phase(name: str) -> Callable[[Channel], bool]:
    return lambda c: c.rollout is not None and c.rollout.phase == name


def forsaken(until: str = "holding", **settings: Any) -> tuple[World, str, str]:
    """Return a world whose promotion has lost its run for good, and the two releases."""
    world, old, _ = world_with_a_stable_release()
    new = world.publish("next", **{**QUICK, **settings})
    world.run(world.promote(new, run_id="deleted"), until=phase(until))
    world.slice_s = 5.0
    return world, old, new


def watch_for(world: World, seconds: float) -> list[Finding]:
    """Let time pass, and look every two minutes, as the DAG does."""
    deps = replace(world.deps(), sleep=lambda s: world.advance(max(s, 0.1)))
    found: list[Finding] = []
    end = world.now + timedelta(seconds=seconds)
    while world.now < end:
        world.advance(120)
        found.extend(watch_all(deps, lambda finding: None))
    return found


@pytest.mark.parametrize("at", ["deploying", "holding", "baking"])
def test_a_rollout_whose_run_is_gone_is_told_of_and_then_ended(at: str) -> None:
    world, old, new = forsaken(at)
    assert watch_for(world, 360) == [], "its triggerer may come back"
    told = [finding for finding in watch_for(world, 600) if finding.is_news]
    assert [finding.kind for finding in told] == ["trouble"]
    assert "has had no driver for" in told[0].message
    assert f"trainyard abort {MODEL} {ENVIRONMENT}" in told[0].message
    assert world.channel.in_progress
    (ended,) = [finding for finding in watch_for(world, 600) if finding.is_news]
    assert "It is ended: withdrawn." in ended.message
    assert not world.channel.in_progress
    check_that_it_serves_alone(world, old, new)
    assert world.autoscaling == old
    assert world.run(world.promote(new, run_id="deleted")).outcome == "withdrawn"
    assert not world.promote(new, run_id="other")().done


def test_a_driver_that_comes_back_in_time_goes_on() -> None:
    world, _, new = forsaken("deploying")
    watch_for(world, 840)
    tick = world.promote(new, run_id="deleted")
    tick()
    assert watch_for(world, 1) == []
    assert world.run(tick).outcome == "promoted"


def test_time_counts_from_the_first_sight_of_it() -> None:
    """After a day without Airflow its triggerer and its watch come back together."""
    world, _, _ = forsaken()
    world.slice_s = 60.0
    world.advance(24 * 3600)
    assert watch_for(world, 1) == []
    assert world.channel.in_progress


def test_a_bake_without_a_way_back_is_driven_on() -> None:
    world, old, new = forsaken("baking")
    world.behaviour[old].start_s = 10**6
    world.crash(f"{old}-0")
    found = [finding for finding in watch_for(world, 1500) if finding.is_news]
    assert "It is ended: promoted." in found[-1].message
    assert world.channel.stable is not None
    assert world.channel.stable.release_id == new
