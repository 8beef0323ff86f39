"""A real rollout whose driver is killed again and again, with SIGKILL, between any two changes.

Channel, agent, proxy, servers and clients are real processes and files; nothing is simulated but
the model.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kills import attempted, forking
from tests.serving_world import ENVIRONMENT, MODEL
from tests.stream_world import StreamYard, stream_yard

from trainyard.documents.release import Release
from trainyard.releases import list_attestations

pytestmark = pytest.mark.integration

EVENTS = 250
"""A driver lives for so many changes of a file at most, before the last one, which lives on."""


@pytest.fixture
def attempts() -> Iterator[subprocess.Popen[str]]:
    """The process that forks drivers."""
    with forking("tests.killed_driver") as process:
        yield process


def drive(
    world: StreamYard, process: subprocess.Popen[str], release: Release, deaths: list[int]
) -> tuple[str, int]:
    """Drive a promotion in processes of which each but the last dies at its n-th change.

    Returns:
        The outcome, and how many died. (One may reach the end before its time.)
    """
    report = world.settings.home / f"{release.revision}.json"
    for number, die_at in enumerate([*deaths, 0]):
        job = {
            "settings": world.settings.model_dump(mode="json", exclude_defaults=True),
            "kind": "promote",
            "model": MODEL,
            "environment": ENVIRONMENT,
            "release_id": release.release_id,
            "run_id": f"run-{release.revision}",
            "die_at": die_at,
            "report": str(report),
        }
        code = attempted(process, job)
        assert code in (0, -9), f"attempt {number} of {release.revision} ended with {code}"
        if code == 0:
            return json.loads(report.read_text())["outcome"], number
    raise AssertionError(f"the last driver of {release.revision} was killed")


def roll_out(
    world: StreamYard, process: subprocess.Popen[str], rollouts: int, *, most: int, seed: int
) -> None:
    """Promote good releases and have slow ones taken back, by turns, with up to `most` deaths."""
    chance = random.Random(seed)
    stable, killed = world.first(), 0
    seen: Counter[str] = Counter()
    with world.clients(16.0) as answers:
        for number in range(rollouts):
            slow = number % 2 == 1
            release = world.publish(f"{'slow' if slow else 'good'}-{number}")
            deaths = [chance.randint(1, EVENTS) for _ in range(chance.randint(most // 2, most))]
            outcome, died = drive(world, process, release, deaths)
            killed += died
            seen[outcome] += 1
            assert outcome == ("rolled_back" if slow else "promoted")
            stable = stable if slow else release
            channel = world.channel
            assert channel.stable is not None
            assert channel.stable.release_id == stable.release_id
            assert (channel.candidate, channel.in_progress) == (None, False)
            assert (channel.weights.stable, channel.weights.candidate) == (100, 0)
            kept = list_attestations(world.yard.store, MODEL, release.release_id)
            assert [each.kind for each in kept] == ["rejection" if slow else "promotion"]
            servers = world.rollouts.deps.host.servers(ENVIRONMENT, MODEL)
            assert {each.release_id for each in servers} == {stable.release_id}
    problems = [answer for answer in answers if answer.problem]
    print(
        f"{killed} drivers were killed in {rollouts} rollouts {dict(seen)}; "
        f"{len(answers)} streams, {len(problems)} errors or cut streams"
    )
    assert killed > 0
    assert problems == []


def test_rollouts_whose_drivers_are_killed_end_as_they_should(
    tmp_path: Path, attempts: subprocess.Popen[str]
) -> None:
    with stream_yard(tmp_path) as world:
        roll_out(world, attempts, 2, most=8, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_rollouts_whose_drivers_are_killed_very_often_end_as_they_should(
    tmp_path: Path, attempts: subprocess.Popen[str]
) -> None:
    with stream_yard(tmp_path) as world:
        roll_out(world, attempts, 40, most=25, seed=2)
