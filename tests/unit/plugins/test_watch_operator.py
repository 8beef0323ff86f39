"""The watch as a task: what fails its run, and what it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.plugins.conftest import make_context
from tests.unit.yard import Yard

from trainyard.rollout.watcher import Finding

BACK = Finding(
    "adder",
    "production",
    "rollback",
    "Too many fail. " + "x" * 600,
    release_id="adder-0123456789ab",
    run_id="watch__adder__rollout-3",
)


@pytest.fixture
def watch(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what runs the task where the watch finds what is given."""

    def run(*findings: Finding) -> Any:
        from trainyard_airflow.watch_operator import WatchOperator

        def watch_all(deps: Any, roll_back: Callable[[Finding], None]) -> tuple[Finding, ...]:
            for finding in findings:
                if finding.kind == "rollback":
                    roll_back(finding)
            return findings

        monkeypatch.setattr("trainyard.rollout.watcher.watch_all", watch_all)
        return WatchOperator(task_id="watch").execute(make_context(dag_id="neuron_watch"))

    return run


def test_nothing_new_is_a_success(watch: Callable[..., Any]) -> None:
    assert watch() == 0
    note = Finding("adder", "staging", "note", "10 requests are too few to tell.")
    assert watch(note, Finding("adder", "staging", "recovered", "It is over.")) == 2


@pytest.mark.parametrize("kind", ["alarm", "trouble"])
def test_news_fails_the_run_so_that_people_hear_of_it(watch: Callable[..., Any], kind: Any) -> None:
    from trainyard_airflow.exceptions import StepRefused

    with pytest.raises(StepRefused, match=r"^adder in staging: Too many fail\.$"):
        watch(Finding("adder", "staging", kind, "Too many fail."))


def test_a_rollback_is_a_run_of_the_environments_own_dag(
    watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainyard_airflow.exceptions import StepRefused

    started: list[tuple[Any, ...]] = []

    def start_run(dag_id: str, run_id: str, conf: dict[str, Any], *, note: str) -> bool:
        started.append((dag_id, run_id, conf))
        return True

    monkeypatch.setattr("trainyard_airflow.dag_runs.start_run", start_run)
    with pytest.raises(StepRefused):
        watch(BACK)
    ((dag_id, run_id, conf),) = started
    assert (dag_id, run_id) == ("neuron_rollback__production", "watch__adder__rollout-3")
    assert (conf["model"], conf["release"]) == ("adder", "adder-0123456789ab")
    assert len(conf["reason"]) == 500
