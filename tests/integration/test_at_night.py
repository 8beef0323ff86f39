"""Status, pause, abort, rollback and the like with real servers and proxy, and no Airflow."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.serving_world import ENVIRONMENT, MODEL, eventually
from tests.stream_world import StreamYard, stream_yard
from typer.testing import CliRunner, Result

from trainyard.cli import app
from trainyard.documents.release import Release
from trainyard.rollout import by_hand
from trainyard.settings import get_settings

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StreamYard]:
    """A home with a stable release `first`, which the tests of this file share."""
    with stream_yard(tmp_path_factory.mktemp("night")) as world:
        world.first()
        yield world


@pytest.fixture(autouse=True)
def _settings(night: StreamYard, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "HOME": night.settings.home,
        "ENVIRONMENTS": night.settings.environments,
        "GUARD_INTERVAL_S": "0.1",
        "DRAIN_TIMEOUT_S": "20",
        "REQUESTED_BY": "ann",
    }.items():
        monkeypatch.setenv(f"TRAINYARD_{name}", str(value))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(by_hand, "DRIVER_SILENT_S", 3.0)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def status() -> dict[str, Any]:
    result = run("status", MODEL, ENVIRONMENT, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def canary(night: StreamYard, revision: str) -> Release:
    """Bring a release to its first step; then nobody drives it any more."""
    release = night.publish(revision, steps=[{"weight": 50, "hold_s": 200}], holdback_weight=50)
    night.drive(
        night.promote(release),
        until=lambda c: c.rollout is not None and c.rollout.phase == "holding",
    )
    return release


def stable_of(night: StreamYard) -> str:
    stable = night.channel.stable
    assert stable is not None
    return stable.release_id


def test_an_abort_at_night_returns_the_traffic_and_cleans_up(night: StreamYard) -> None:
    before = stable_of(night)
    with night.clients(8.0) as answers:
        new = canary(night, "night")
        told = run("pause", MODEL, ENVIRONMENT, "--reason", "What is this?")
        assert told.exit_code == 0, told.output
        assert f"The route gives 50 % to {before}, 50 % to {new.release_id}." in told.output
        assert "Its driver has not been seen for 3 s. Unless it comes back" in told.output
        found = status()
        assert (found["paused"]["who"], found["paused"]["reason"]) == ("ann", "What is this?")
        assert found["weights"] == {"stable": 50, "candidate": 50}
        assert found["lease"] == "alive"
        assert found["can"] == ["resume", "promote-now", "abort", "rollback"]
        ended = run("abort", MODEL, ENVIRONMENT, "--reason", "It is odd.")
        assert ended.exit_code == 0, ended.output
        since = time.time()
        time.sleep(1)
    assert "this command does" in ended.output
    assert "withdrawn" in ended.output
    assert [answer for answer in answers if answer.problem] == []
    assert not [a for a in answers if a.release == new.release_id and a.sent > since]
    assert stable_of(night) == before
    servers = {server["release_id"] for server in status()["servers"]}
    assert servers == {before}
    table = run("status").output
    assert "withdrawn" in table
    assert before in table
    entries = {e.event: e.who for e in night.channel.history if e.who}
    assert entries["paused"] == entries["ending"] == "ann"


def test_a_promotion_by_hand_and_a_rollback_at_night(night: StreamYard) -> None:
    before = stable_of(night)
    with night.clients(8.0) as answers:
        new = canary(night, "dawn")
        assert run("promote-now", MODEL, ENVIRONMENT).exit_code == 10
        promote = ("promote-now", MODEL, ENVIRONMENT, "--reason", "The old one leaks.")
        silent = run(*promote)
        assert silent.exit_code == 20
        assert "Its driver has not been seen for 3 s" in silent.output
        with ThreadPoolExecutor() as elsewhere:
            ended = elsewhere.submit(night.drive, night.promote(new))
            told = run(*promote)
            assert told.exit_code == 0, told.output
            assert stable_of(night) == new.release_id
            assert ended.result().outcome == "promoted"
        # Airflow is down, and the new release is no good after all.
        back = run("rollback", MODEL, ENVIRONMENT, "--reason", "It is no good.")
        assert back.exit_code == 0, back.output
        eventually(
            lambda: night.yard.status(MODEL).weights == {before: 100}, why="all traffic is back"
        )
    assert stable_of(night) == before
    assert [answer for answer in answers if answer.problem] == []
    again = run("rollback", MODEL, ENVIRONMENT, "--reason", "Once more.")
    assert again.exit_code == 10
    unknown = run("abort", MODEL, "moon", "--reason", "Why not.")
    assert unknown.exit_code == 10
    assert "There is no environment moon" in unknown.output
