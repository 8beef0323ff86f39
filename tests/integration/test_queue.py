"""Requests for a channel that is in use: refused, or waiting for their turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache

import pytest
from tests.integration.test_rollout_crashes import QUICK, world_with_a_stable_release
from tests.rollout_world import ENVIRONMENT, MODEL, World

from trainyard.documents.channel import WAITING_LIMIT
from trainyard.errors import BadInput, Busy, Closed, NotFound, Refused
from trainyard.rollout.rollouts import Rollouts, Tick
from trainyard.rollout.standing import take_standing
from trainyard.spec.environments import Environment
from trainyard.spec.windows import FreezeWindow

pytestmark = pytest.mark.integration


@cache
def _stable() -> World:
    return world_with_a_stable_release()[0]


@pytest.fixture
def world() -> World:
    """A world whose environment lets requests wait, with a stable release."""
    made = copy.deepcopy(_stable())
    rules = made.environments[ENVIRONMENT]
    made.environments[ENVIRONMENT] = rules.model_copy(
        update={"concurrent_requests": "queue", "queue_timeout_s": 900.0}
    )
    return made


def publish(world: World, *names: str) -> list[str]:
    return [world.publish(name, **QUICK) for name in names]


def run_all(world: World, ticks: dict[str, Tick], *, limit_s: float = 3000.0) -> list[str]:
    """Tick all until they are done; return the names in the order in which they ended."""
    ended: list[str] = []
    spent = 0.0
    world.slice_s = 1.0
    while len(ended) < len(ticks):
        for name, tick in ticks.items():
            if name not in ended and tick().done:
                ended.append(name)
        world.advance(1.0)
        spent += 1.0
        assert spent < limit_s, world.channel
    return ended


def stable_of(world: World) -> str:
    stable = world.channel.stable
    assert stable is not None
    return stable.release_id


def test_by_default_a_second_request_is_refused() -> None:
    world, _, new = world_with_a_stable_release()
    other = world.publish("other", **QUICK)
    world.promote(new)
    with pytest.raises(Busy, match="is under way in production"):
        world.promote(other, run_id="second")
    with pytest.raises(Busy):
        Rollouts(world.deps()).check(model=MODEL, environment=ENVIRONMENT, release_id=other)


def test_requests_come_on_in_the_order_in_which_they_came(world: World) -> None:
    names = publish(world, "b", "c", "d")
    ticks = {name: world.promote(name, run_id=f"run-{name}") for name in names}
    first = ticks[names[1]]()
    assert not first.done
    assert "waits for the channel" in first.summary
    assert first.messages == (first.summary,)
    third = ticks[names[2]]()
    assert "1 request before it" in third.summary
    assert ticks[names[2]]().messages == ()
    waiting = take_standing(world.deps(), world.channel).waiting
    assert [each.release_id for each in waiting] == names[1:]
    assert run_all(world, ticks) == names
    assert stable_of(world) == names[2]
    assert world.channel.waiting == ()
    assert [t.release_id for t in world.channel.previous][:2] == [names[1], names[0]]


def test_what_would_be_refused_is_refused_before_it_waits(world: World) -> None:
    b, c = publish(world, "b", "c")
    world.promote(b)
    rollouts = Rollouts(world.deps())
    said = rollouts.check(model=MODEL, environment=ENVIRONMENT, release_id=c)
    assert said.startswith("It waits for its turn")
    wrong = world.releases[c].model_copy(
        update={"target": world.releases[c].target.model_copy(update={"name": "gpu"})}
    )
    world.releases[c] = wrong
    with pytest.raises(BadInput, match="is for target gpu"):
        Rollouts(world.deps()).check(model=MODEL, environment=ENVIRONMENT, release_id=c)


def test_a_request_keeps_its_place_when_its_process_is_started_again(world: World) -> None:
    b, c, d = publish(world, "b", "c", "d")
    for name in (b, c, d):
        world.promote(name, run_id=f"run-{name}")
    before = world.channel
    ticks = {name: world.promote(name, run_id=f"run-{name}") for name in (d, c)}
    assert world.channel == before
    assert [w.release_id for w in before.waiting] == [c, d]
    world.advance(40)
    ticks[c]()
    seen = {w.release_id: w.seen_at for w in world.channel.waiting}
    assert list(seen) == [c, d]
    assert seen[c] > seen[d]


def test_a_request_that_nobody_makes_any_more_keeps_nobody_waiting(world: World) -> None:
    b, c, d = publish(world, "b", "c", "d")
    ticks = {b: world.promote(b, run_id="run-b")}
    world.promote(c, run_id="run-c")
    ticks[d] = world.promote(d, run_id="run-d")
    assert run_all(world, ticks) == [b, d]
    assert stable_of(world) == d
    # It comes back, finds its place, and gets its turn.
    assert [w.release_id for w in world.channel.waiting] == [c]
    assert world.run(world.promote(c, run_id="run-c")).outcome == "promoted"


def test_a_request_waits_for_so_long_and_no_longer(world: World) -> None:
    b, c = publish(world, "b", "c")
    rules = world.environments[ENVIRONMENT]
    world.environments[ENVIRONMENT] = rules.model_copy(update={"queue_timeout_s": 10.0})
    world.promote(b)
    tick = world.promote(c, run_id="run-c")
    world.advance(11)
    with pytest.raises(Refused, match="has waited for 10 s"):
        tick()
    assert world.channel.waiting == ()


def test_a_request_whose_turn_comes_to_nothing_leaves_the_line(world: World) -> None:
    b, c, d = publish(world, "b", "c", "d")
    ticks = {b: world.promote(b, run_id="run-b")}
    again = world.promote(b, run_id="again")
    gone = world.promote(c, run_id="run-c")
    ticks[d] = world.promote(d, run_id="run-d")
    world.run(ticks[b])
    result = again()
    assert (result.done, result.outcome) == (True, "promoted")
    del world.releases[c]
    with pytest.raises(NotFound, match="There is no release"):
        gone()
    assert [w.release_id for w in world.channel.waiting] == [d]
    assert world.run(ticks[d]).outcome == "promoted"


def test_settling_a_run_that_waits_takes_it_out_of_the_line(world: World) -> None:
    b, c = publish(world, "b", "c")
    world.promote(b)
    world.promote(c, run_id="run-c")
    settled = Rollouts(world.deps()).settle(
        model=MODEL, environment=ENVIRONMENT, run_id="run-c", release_id=c
    )
    assert settled.outcome is None
    assert world.channel.waiting == ()
    assert world.channel.in_progress


def test_the_line_has_an_end(world: World) -> None:
    b, c = publish(world, "b", "c")
    world.promote(b)
    for number in range(WAITING_LIMIT):
        world.promote(c, run_id=f"run-{number}")
    with pytest.raises(Busy, match="20 requests wait"):
        world.promote(c, run_id="one-more")
    assert len(world.channel.waiting) == WAITING_LIMIT


def test_a_rollback_does_not_wait(world: World) -> None:
    b, c = publish(world, "b", "c")
    old = stable_of(world)
    tick = world.promote(b)
    world.promote(c, run_id="run-c")
    world.run(tick, until=lambda channel: channel.weights.candidate > 0)
    back = world.roll_back()
    back()
    assert world.channel.weights.candidate == 0
    assert world.run(back).done
    assert stable_of(world) == old


def test_a_freeze_that_is_declared_while_it_waits_is_kept(world: World) -> None:
    b, c = publish(world, "b", "c")
    first = world.promote(b)
    rules = dict(world.environments)
    reads: list[Callable[[], Mapping[str, Environment]]] = [lambda: dict(rules)]

    def half_written() -> Mapping[str, Environment]:
        raise BadInput("The environments file is half written.")

    second = Rollouts(
        world.deps(environments=dict(rules), read_environments=lambda: reads[-1]())
    ).begin(kind="promote", model=MODEL, environment=ENVIRONMENT, release_id=c, run_id="second")
    assert not second().done
    assert world.run(first).outcome == "promoted"
    until = world.now + timedelta(hours=1)
    freeze = FreezeWindow(start=world.now - timedelta(hours=1), end=until, reason="a holiday")
    rules[ENVIRONMENT] = rules[ENVIRONMENT].model_copy(update={"freeze": (freeze,)})
    for read in (reads[0], half_written):
        reads.append(read)
        with pytest.raises(Closed, match="a holiday") as closed:
            second()
        assert closed.value.until == until
        assert not world.channel.in_progress
    rules[ENVIRONMENT] = rules[ENVIRONMENT].model_copy(update={"freeze": ()})
    reads.append(reads[0])
    assert world.run(second).outcome == "promoted"
    assert stable_of(world) == c
