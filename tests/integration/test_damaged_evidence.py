"""A look or a history that nobody can read is blindness: every rollout still comes to an end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta

import pytest
from tests.integration.test_blind_rollouts import QUICK, A, B, at_weight, gullible, promote, watch
from tests.rollout_world import ENVIRONMENT, MODEL, World, check_that_it_serves_alone, release_id

from trainyard.errors import CorruptFile, Transient
from trainyard.rollout.by_hand import abort_rollout
from trainyard.rollout.driver import DriveResult, drive
from trainyard.rollout.history_log import HistoryLog, history_key
from trainyard.rollout.looks import LookLog
from trainyard.rollout.rollouts import Rollouts
from trainyard.store.layout import rollout_prefix

pytestmark = pytest.mark.integration

LEFT_BYTES = 300


@pytest.fixture(scope="module")
def started() -> World:
    """A world with the stable release `a` and a good release `b`, half of whose traffic it has."""
    made = World(rate=20.0)
    made.publish("a")
    assert made.run(made.promote(A, run_id="first")).outcome == "promoted"
    made.publish("b", **QUICK)
    return made


@pytest.fixture(params=["look", "history"])
def world(request: pytest.FixtureRequest, started: World) -> World:
    """The world in the middle of a rollout of which one document was cut. Nobody drives it."""
    made = copy.deepcopy(started)
    made.judge = gullible
    tick = promote(made)
    made.run(tick, until=at_weight(50))
    end = made.now + timedelta(seconds=12)
    made.run(tick, until=lambda _: made.now >= end)
    cut(made, newest_look(made) if request.param == "look" else history_of(made))
    return made


def number_of(world: World) -> int:
    assert world.channel.rollout is not None
    return world.channel.rollout.number


def newest_look(world: World) -> str:
    folder = f"{rollout_prefix(MODEL, ENVIRONMENT, number_of(world))}/looks"
    return [entry.key for entry in world.store.list(folder)][-1]


def history_of(world: World) -> str:
    return history_key(MODEL, ENVIRONMENT, number_of(world))


def cut(world: World, key: str) -> None:
    world.store.put(key, world.store.read(key).data[:LEFT_BYTES])


def a_new_driver(world: World) -> DriveResult:
    """Another process goes on with the run."""
    result, _, most = watch(world, world.promote(B, run_id="run"), limit_s=300)
    assert most == 50, "nobody is promoted blind"
    return result


def an_abort(world: World) -> None:
    world.lease_until = None
    abort_rollout(
        world.deps(),
        MODEL,
        ENVIRONMENT,
        reason="Odd.",
        who="ann",
        run_id="cli/ann",
        say=world.said.append,
        timeout_s=600.0,
    )


def a_teardown(world: World) -> None:
    assert world.channel.owner is not None
    settled = Rollouts(world.deps()).settle(
        model=MODEL, environment=ENVIRONMENT, run_id=world.channel.owner, release_id=B
    )
    assert settled.outcome == "withdrawn"


@pytest.mark.parametrize("end", [an_abort, a_teardown])
def test_whoever_ends_the_rollout_brings_it_to_an_end(
    world: World, end: Callable[[World], None]
) -> None:
    end(world)
    assert world.channel.rollout is not None
    assert world.channel.rollout.outcome == "withdrawn"
    check_that_it_serves_alone(world, A, B)


def test_a_new_driver_is_blind_and_says_what_it_could_not_read(world: World) -> None:
    result = a_new_driver(world)
    assert result.outcome == "withdrawn"
    assert "CorruptFile" in result.summary
    assert rollout_prefix(MODEL, ENVIRONMENT, number_of(world)) in result.summary
    check_that_it_serves_alone(world, A, B)


def test_a_store_that_is_away_is_no_blindness(started: World) -> None:
    """It ends the tick, as ever; a look that was taken without the others would be of no use."""
    world = copy.deepcopy(started)
    tick = promote(world)
    world.run(tick, until=at_weight(10))
    deps = world.deps()

    def away(*_: object) -> object:
        raise Transient("The store is away.")

    object.__setattr__(deps.looks, "read", away)
    assert world.channel.rollout is not None
    before = world.channel
    with pytest.raises(Transient):
        drive(deps, MODEL, ENVIRONMENT, world.channel.rollout.driver)
    assert world.channel == before


def test_a_damaged_look_of_the_rollout_before_only_costs_its_history(started: World) -> None:
    world = copy.deepcopy(started)
    assert world.run(promote(world)).outcome == "promoted"
    cut(world, newest_look(world))
    with pytest.raises(CorruptFile):
        LookLog(world.store).read(MODEL, ENVIRONMENT, number_of(world))
    world.publish("c", **QUICK)
    assert world.run(world.promote(release_id("c"), run_id="later")).outcome == "promoted"
    kept = HistoryLog(world.store).read(MODEL, ENVIRONMENT, number_of(world))
    assert kept is not None
    assert kept.source == "none"
