"""A rollout that is over can be judged again from the store."""

from __future__ import annotations

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
    blocks, spec = stored_log(world.store, MODEL, ENVIRONMENT, number)
    replayed = list(replay(blocks, spec))
    assert replayed[-1].outcome == said[-1].outcome
    by_time = {verdict.at: verdict for verdict in replayed}
    assert [by_time[verdict.at] for verdict in said if verdict.at in by_time]
    for verdict in said:
        assert by_time.get(verdict.at, verdict) == verdict


def test_a_rollout_that_never_was_is_not_found(world: World) -> None:
    with pytest.raises(NotFound, match="no looks"):
        stored_log(world.store, MODEL, ENVIRONMENT, 99)


def test_a_first_release_was_compared_with_nothing(world: World) -> None:
    with pytest.raises(NotFound):
        stored_log(world.store, MODEL, ENVIRONMENT, 1)
