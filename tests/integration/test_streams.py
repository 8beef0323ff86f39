"""Clients that stream while releases come and go: none of them sees anything of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.stream_world import StreamYard, stream_yard

pytestmark = pytest.mark.integration


def roll_out(world: StreamYard, rollouts: int, *, at_least: int, rate: float) -> None:
    """Promote good releases and roll slow ones back, by turns, under streaming clients."""
    stable = world.first()
    outcomes: Counter[str] = Counter()
    with world.clients(rate, at_least=at_least) as answers:
        for number in range(rollouts):
            name = f"{'slow' if number % 2 else 'good'}-{number}"
            release = world.publish(name)
            result = world.drive(world.promote(release))
            assert result.outcome == ("rolled_back" if number % 2 else "promoted"), result.summary
            outcomes[str(result.outcome)] += 1
            if result.outcome == "promoted":
                stable = release
            served = world.channel.stable
            assert served is not None
            assert served.release_id == stable.release_id
    problems = [answer for answer in answers if answer.problem]
    by_release = Counter(answer.release for answer in answers)
    print(
        f"{len(answers)} streams through {sum(outcomes.values())} rollouts {dict(outcomes)}, "
        f"{len(by_release)} releases: {len(problems)} errors or cut streams"
    )
    assert problems == []
    assert len(answers) >= at_least
    assert len(by_release) == rollouts + 1


def test_500_streams_through_2_rollouts_see_nothing_of_them(tmp_path: Path) -> None:
    with stream_yard(tmp_path) as world:
        roll_out(world, 2, at_least=500, rate=16.0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_10_000_streams_through_20_rollouts_see_nothing_of_them(tmp_path: Path) -> None:
    with stream_yard(tmp_path) as world:
        roll_out(world, 20, at_least=10_000, rate=40.0)
