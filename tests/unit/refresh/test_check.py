"""Models on a Hub are checked: one call each, and one release for each new revision."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.hub_server import HubServer
from tests.refresh_world import NOW, RefreshWorld
from tests.serving_world import make_release

from trainyard.errors import BadInput, NotFound, Transient
from trainyard.refresh.check import Check, exit_code
from trainyard.refresh.look import read_record
from trainyard.steps.toolchains import KnownToolchain
from trainyard.store.layout import refresh_key


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as made:
        yield made


@pytest.fixture
def world(server: HubServer, tmp_path: Path, tools: dict[str, Any]) -> RefreshWorld:
    server.repos.clear()
    server.seen.clear()
    server.faults.clear()
    server.latency_s = server.most_at_once = 0
    return RefreshWorld(tmp_path, server)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The toolchain of this machine, and how often it was asked for."""
    found: dict[str, Any] = {"versions": {"vllm": "0.32.0"}, "asked": 0}

    def toolchain_for(*_: Any, **__: Any) -> KnownToolchain:
        found["asked"] += 1
        return KnownToolchain(found["versions"])

    monkeypatch.setattr("trainyard.refresh.look.toolchain_for", toolchain_for)
    return found


def outcome(check: Check) -> str:
    assert check.decision is not None, check.error
    return check.decision.outcome


def test_a_new_revision_becomes_one_run_with_all_it_needs(world: RefreshWorld) -> None:
    commit = world.add("adder")
    check = world.refresher().check("adder")
    assert (outcome(check), check.started, check.revision) == ("start", True, commit)
    ((run_id, conf, note),) = world.runs.started
    assert run_id.startswith("refresh__adder__")
    assert conf == {
        "model": "adder",
        "revision": commit,
        "environments": ["production"],
        "wait_for_window": True,
    }
    assert note == f"Revision {commit} is new."
    (subject,) = read_record(world.store, "adder").subjects
    assert [each.run_id for each in subject.attempts] == [run_id]
    assert subject.attempts[0].asked_by == "neuron_refresh__adder/scheduled"


def test_what_goes_nowhere_waits_for_nothing(world: RefreshWorld) -> None:
    commit = world.add("adder", environments=[])
    world.frozen("production", hours=2)
    assert outcome(world.refresher().check("adder")) == "start"
    assert world.runs.started[0][1] == {"model": "adder", "revision": commit}


def test_announced_twice_restarted_and_triggered_by_hand_it_is_one_release(
    world: RefreshWorld,
) -> None:
    """Many checks at the same time, then a crash after the record and before the run, then more."""
    world.add("adder")
    world.runs.refuses = Transient("Airflow is gone.")
    with pytest.raises(Transient):
        world.refresher().check("adder")
    assert world.runs.started == []
    world.runs.refuses = None
    with ThreadPoolExecutor(8) as pool:
        checks = list(pool.map(lambda _: world.refresher().check("adder"), range(16)))
    checks += [world.refresher().check("adder") for _ in range(2)]
    assert sum(check.started for check in checks) == 1
    assert len(world.runs.started) == 1
    (subject,) = read_record(world.store, "adder").subjects
    assert len(subject.attempts) == 1


def test_a_failed_revision_gets_a_second_run_and_is_then_left_alone(world: RefreshWorld) -> None:
    world.add("adder")
    for number in (1, 2):
        assert outcome(world.refresher().check("adder")) == "start"
        world.runs.states[world.runs.started[-1][0]] = "failed"
        assert len(world.runs.started) == number
    assert outcome(world.refresher().check("adder")) == "given_up"
    # Airflow forgets old runs; the record does not.
    world.runs.states.clear()
    assert outcome(world.refresher().check("adder")) == "given_up"
    assert outcome(world.refresher().check("adder", again=True)) == "start"
    world.commit("adder", fill=1)
    assert outcome(world.refresher().check("adder")) == "start"
    assert len({run for run, _, _ in world.runs.started}) == 4


def test_a_person_may_ask_again_as_often_as_it_fails(world: RefreshWorld) -> None:
    commit = world.add("adder", follow_toolchain=False)
    make_release(world.settings, world.store, commit)
    for number in (1, 2, 3):
        assert world.refresher().check("adder", again=True).started
        # Twice at the same time is once.
        assert not world.refresher().check("adder", again=True).started
        assert outcome(world.refresher().check("adder")) == "nothing_new"
        world.runs.states[world.runs.started[-1][0]] = "failed"
        assert len(world.runs.started) == number


def test_a_release_by_hand_counts(world: RefreshWorld, tools: dict[str, Any]) -> None:
    commit = world.add("adder")
    release = make_release(world.settings, world.store, commit)
    tools["versions"] = release.toolchain
    check = world.refresher().check("adder")
    assert outcome(check) == "nothing_new"
    assert check.decision is not None
    assert release.release_id in check.decision.reason
    assert world.runs.started == []
    (subject,) = read_record(world.store, "adder").subjects
    assert subject.released == (release.release_id,)


def test_another_toolchain_makes_one_more_release(
    world: RefreshWorld, tools: dict[str, Any]
) -> None:
    world.add("adder")
    assert outcome(world.refresher().check("adder")) == "start"
    world.runs.states[world.runs.started[-1][0]] = "success"
    assert outcome(world.refresher().check("adder")) == "nothing_new"
    tools["versions"] = {"vllm": "0.33.0"}
    check = world.refresher().check("adder")
    assert outcome(check) == "start"
    assert check.decision is not None
    assert "toolchain" in check.decision.reason
    assert outcome(world.refresher().check("adder")) == "under_way"


def test_a_spec_may_leave_the_toolchain_out(world: RefreshWorld, tools: dict[str, Any]) -> None:
    world.add("adder", follow_toolchain=False)
    assert outcome(world.refresher().check("adder")) == "start"
    assert tools["asked"] == 0


def test_in_a_freeze_only_the_newest_revision_is_released_afterwards(world: RefreshWorld) -> None:
    world.add("adder")
    world.frozen("production", hours=2)
    check = world.refresher().check("adder")
    assert outcome(check) == "deferred"
    assert check.decision is not None
    assert check.decision.until == NOW + timedelta(hours=2)
    newest = world.commit("adder", fill=1)
    world.now += timedelta(hours=2)
    assert outcome(world.refresher().check("adder")) == "start"
    assert [conf["revision"] for _, conf, _ in world.runs.started] == [newest]


def test_a_look_writes_and_starts_nothing(world: RefreshWorld) -> None:
    world.add("adder")
    looker = world.refresher()
    looker.runs = None
    check = looker.check("adder")
    assert (outcome(check), check.started) == ("start", False)
    assert not world.store.exists(refresh_key("adder"))
    world.refresher().check("adder")
    # Without Airflow nobody knows how far the run is.
    assert outcome(looker.check("adder")) == "under_way"


def test_a_model_without_a_refresh_is_refused(world: RefreshWorld) -> None:
    world.add("adder", cron=None)
    with pytest.raises(BadInput, match="is never refreshed"):
        world.refresher().check("adder")


def test_many_models_cost_one_call_each_and_a_bounded_number_at_once(
    world: RefreshWorld, tools: dict[str, Any]
) -> None:
    names = [f"model-{number:02d}" for number in range(40)]
    for name in names:
        world.add(name)
    world.hub.seen.clear()
    world.hub.latency_s = 0.01
    checks = world.refresher().check_all(names)
    assert [check.model for check in checks] == names
    assert {outcome(check) for check in checks} == {"start"}
    assert len(world.hub.seen) == len(names)
    assert len({seen.path for seen in world.hub.seen}) == len(names)
    assert 1 < world.hub.most_at_once <= world.settings.refresh_concurrency
    assert tools["asked"] == 1


def test_what_is_wrong_with_one_model_stops_no_other(world: RefreshWorld) -> None:
    for name in ("good", "gone"):
        world.add(name)
    del world.hub.repos["yard/gone"]
    good, gone, unknown = world.refresher().check_all(["good", "gone", "unknown"])
    assert outcome(good) == "start"
    assert isinstance(gone.error, BadInput)
    assert isinstance(unknown.error, NotFound)
    assert exit_code([good, gone, unknown]) == 10
    assert exit_code([good]) == 0
