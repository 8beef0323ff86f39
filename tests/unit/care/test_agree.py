"""A store, a database and servers of different moments contradict each other, and are told so."""

from __future__ import annotations

from typing import Any

import pytest
from tests.serving_world import ENVIRONMENT, MODEL, NEW, OLD, make_channel

from trainyard.care.agree import Published, Run, Served, World, disagreements
from trainyard.care.verify import Problem
from trainyard.documents.channel import Channel

PLACE = (ENVIRONMENT, MODEL)
KEY = f"channels/{MODEL}/{ENVIRONMENT}.json"
PROMOTE, RELEASE = f"neuron_promote__{ENVIRONMENT}", "neuron_release"
SERVED = Served({OLD: 1}, 5)


def idle(**changes: Any) -> Channel:
    """A channel without a rollout, at generation 5."""
    return make_channel(phase=None, candidate=None, weight=0, generation=5, **changes)


def releases(*ids: str, dag_run: str = "") -> tuple[Published, ...]:
    return tuple(Published(MODEL, each, dag_run) for each in ids)


def problems(channel: Channel | None = None, **changes: Any) -> list[Problem]:
    values: dict[str, Any] = {
        "channels": (channel or idle(),),
        "releases": releases(OLD, NEW),
        "served": {PLACE: SERVED},
    }
    return disagreements(World(**{**values, **changes}))


def only(found: list[Problem]) -> Problem:
    (problem,) = found
    return problem


def test_what_agrees_has_no_problems() -> None:
    runs = (
        Run(RELEASE, "r1", "success"),
        Run(PROMOTE, f"promote__{OLD}__g3", "success"),
        Run(PROMOTE, "by-hand", "failed"),
    )

    assert problems(runs=runs, whole=frozenset({RELEASE, PROMOTE})) == []
    assert problems(releases=releases(OLD, dag_run=f"{RELEASE}/r1"), runs=runs) == []


def test_a_store_that_is_older_than_the_route_is_told() -> None:
    problem = only(problems(served={PLACE: Served({OLD: 1}, 9)}))

    assert (problem.key, problem.kind) == (KEY, "wrong")
    assert "at generation 5, but the route follows generation 9" in problem.message


def test_servers_of_a_release_that_the_restored_store_lost_are_told() -> None:
    found = problems(served={PLACE: Served({OLD: 1, NEW: 2}, 5)}, releases=releases(OLD))

    assert [(each.key, each.kind) for each in found] == [
        (KEY, "wrong"),
        (f"releases/{MODEL}/{NEW}.json", "missing"),
    ]
    assert f"{NEW} has 2 ready servers, but the channel gives it no role" in found[0].message


def test_a_stable_release_without_servers_is_told_unless_nobody_could_look() -> None:
    assert "has no ready server" in only(problems(served={PLACE: Served({}, 5)})).message
    assert problems(served={}) == []


def test_a_channel_that_was_restored_without_its_log_is_told() -> None:
    problem = only(problems(rollouts={PLACE: 4}))

    assert f"rollouts/{MODEL}/{ENVIRONMENT}/4/ is there" in problem.message
    known = idle().model_copy(update={"rollout": make_channel(number=4, ended=True).rollout})
    assert problems(known, rollouts={PLACE: 4}) == []


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((), "Airflow does not know its run"),
        ((("run", "failed"),), "its run neuron_promote__staging/run ended as failed"),
        ((("run", "running"),), None),
    ],
)
def test_a_rollout_whose_run_the_database_lost_has_no_driver(
    runs: tuple[tuple[str, str], ...], message: str | None
) -> None:
    channel = make_channel(generation=5)
    assert channel.rollout is not None
    driver = channel.rollout.driver.model_copy(update={"run_id": f"{PROMOTE}/run"})
    rollout = channel.rollout.model_copy(update={"driver": driver})
    found = problems(
        channel.model_copy(update={"rollout": rollout}),
        runs=tuple(Run(PROMOTE, *each) for each in runs),
        whole=frozenset({PROMOTE}),
    )

    wanted = (message or "").replace("neuron_promote__staging", PROMOTE)
    assert (found == []) if message is None else wanted in only(found).message


def test_a_rollout_that_is_over_needs_no_run() -> None:
    over = make_channel(ended=True, generation=5)
    assert over.rollout is not None
    driver = over.rollout.driver.model_copy(update={"run_id": f"{PROMOTE}/gone"})
    rollout = over.rollout.model_copy(update={"driver": driver})
    channel = over.model_copy(update={"rollout": rollout})
    problem = only(problems(channel, runs=(), whole=frozenset({PROMOTE})))

    assert problem.kind == "note"
    assert f"the run of its last rollout, {PROMOTE}/gone" in problem.message
    assert problems(channel, runs=(Run(PROMOTE, "gone", "success"),)) == []


def test_a_database_that_is_newer_than_the_store_is_told_by_its_runs() -> None:
    runs = (
        Run(PROMOTE, f"promote__{NEW}__g8__2", "success"),
        Run(PROMOTE, "promote__other-0123456789ab__g99", "success"),
    )
    found = problems(runs=runs, releases=releases(OLD))

    assert [(each.key, each.kind) for each in found] == [
        (KEY, "wrong"),
        (f"releases/{MODEL}/{NEW}.json", "missing"),
    ]
    assert "found generation 8: the store is older than Airflow's database" in found[0].message


def test_a_release_whose_run_is_forgotten_is_noted_and_harms_nobody() -> None:
    made = releases(OLD, dag_run=f"{RELEASE}/r7")
    problem = only(problems(releases=made, runs=(), whole=frozenset({RELEASE})))

    assert problem.kind == "note"
    assert not problem.is_wrong
    # With older runs that were not fetched, nobody can tell.
    assert problems(releases=made, runs=()) == []
    assert problems(releases=made) == []
