"""A rollout that is over can be judged again from the store."""

from __future__ import annotations

import copy

import pytest
from tests.rollout_world import ENVIRONMENT, MODEL, Behaviour, World, release_id

from trainyard.errors import NotFound
from trainyard.rollout.block_log import stored_log
from trainyard.rollout.judge import replay
from trainyard.rollout.looks import LookLog

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world() -> World:
    """A world in which `b` was promoted over `a`, and `c`, which is slow, rolled back."""
    made = World()
    made.publish("a")
    made.run(made.promote(release_id("a"), run_id="first"))
    made.publish("b")
    assert made.run(made.promote(release_id("b"), run_id="second")).outcome == "promoted"
    made.publish("c", behaviour=Behaviour(ttft_s=0.12))
    assert made.run(made.promote(release_id("c"), run_id="third")).outcome == "rolled_back"
    return made


@pytest.mark.parametrize("number", [2, 3])
def test_the_replay_says_what_the_looks_said(world: World, number: int) -> None:
    looks = LookLog(world.store).read(MODEL, ENVIRONMENT, number)
    said = [look.verdict for look in looks if look.verdict is not None]
    blocks, spec, _ = stored_log(world.store, MODEL, ENVIRONMENT, number)
    replayed = list(replay(blocks, spec))
    assert replayed[-1].outcome == said[-1].outcome
    by_time = {verdict.at: verdict for verdict in replayed}
    assert [by_time[verdict.at] for verdict in said if verdict.at in by_time]
    for verdict in said:
        assert by_time.get(verdict.at, verdict) == verdict


def test_a_rollout_that_never_was_is_not_found(world: World) -> None:
    for environment in (ENVIRONMENT, "producton"):
        with pytest.raises(NotFound, match="no looks") as told:
            stored_log(world.store, MODEL, environment, 99)
        assert told.value.hint == f"Rollouts with looks: 2-3 in {ENVIRONMENT}."
    with pytest.raises(NotFound) as unknown:
        stored_log(world.store, "other", ENVIRONMENT, 1)
    assert "No rollout of other has any" in unknown.value.hint


def test_the_ending_says_who_was_compared_and_what_became_of_it(world: World) -> None:
    a, b, c = (release_id(name) for name in "abc")
    promoted = stored_log(world.store, MODEL, ENVIRONMENT, 2).ending
    assert promoted.startswith(f"Rollout 2 of {MODEL} in {ENVIRONMENT} ({b} against {a}) was prom")
    harmed = stored_log(world.store, MODEL, ENVIRONMENT, 3).ending
    assert f"({c} against {b}) was rolled back: " in harmed
    assert "did not find harm" not in harmed


def test_a_rollback_that_was_not_the_judges_is_told_as_such(world: World) -> None:
    night = copy.deepcopy(world)
    night.publish("d")
    tick = night.promote(release_id("d"), run_id="fourth")
    night.run(tick, until=lambda c: c.weights.candidate == 50)
    under_way = stored_log(night.store, MODEL, ENVIRONMENT, 4).ending
    assert under_way.endswith("is under way: shifting.")
    night.advance(20)
    night.run(tick, until=lambda c: c.rollout is not None and c.rollout.phase == "holding")
    for server in night.servers_of(release_id("d")):
        server.state = "failed"
    assert night.run(tick).outcome == "rolled_back"
    ending = stored_log(night.store, MODEL, ENVIRONMENT, 4).ending
    assert " was rolled back: " in ending
    assert ending.endswith("The judge did not find harm; that was not what ended it.")


def test_a_first_release_was_compared_with_nothing(world: World) -> None:
    with pytest.raises(NotFound):
        stored_log(world.store, MODEL, ENVIRONMENT, 1)
