"""A model's own DAG checks it, and tells what became of it in the run's result."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.unit.plugins.conftest import make_context
from tests.unit.yard import Yard

from trainyard.errors import BadInput, TrainyardError, Transient
from trainyard.refresh.check import Check
from trainyard.refresh.decide import Decision

RUN = "refresh__adder__0123456789ab"


class FakeRefresher:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, answer: Check | TrainyardError) -> None:
        self.answer = answer
        self.asked: list[tuple[str, bool]] = []

    def check(self, model: str, *, again: bool = False) -> Check:
        self.asked.append((model, again))
        if isinstance(self.answer, TrainyardError):
            raise self.answer
        return self.answer


def checked(outcome: Any, *, started: bool = False, until: datetime | None = None) -> Check:
    return Check("adder", Decision(outcome, "Because.", RUN, until), "r2", started)


def operator(answer: Check | TrainyardError, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Any:
    from trainyard_airflow.refresh_operator import RefreshOperator

    made = RefreshOperator(task_id="check", model="adder", **how)
    fake = FakeRefresher(answer)
    monkeypatch.setattr(type(made), "_refresher", lambda self, context: fake)
    return made, fake


def context(run_id: str = "scheduled__2026-11-23T03:00:00+00:00", **params: Any) -> Any:
    return make_context({"again": False, **params}, dag_id="neuron_refresh__adder", run_id=run_id)


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        (checked("start", started=True), "started"),
        # Another check, or a person, was a moment faster.
        (checked("start", started=False), "under_way"),
        (checked("nothing_new"), "nothing_new"),
        (checked("given_up"), "given_up"),
    ],
)
def test_the_result_says_what_became_of_the_model(
    check: Check, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, fake = operator(check, monkeypatch)
    assert made.execute(context()) == {
        "model": "adder",
        "revision": "r2",
        "outcome": outcome,
        "reason": "Because.",
        "run_id": RUN,
    }
    assert fake.asked == [("adder", False)]
    assert made.returns_dag_result


def test_a_person_may_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, fake = operator(checked("start", started=True), monkeypatch)
    made.execute(context("manual__1", again=True))
    assert fake.asked == [("adder", True)]


SOON = datetime.now(UTC) + timedelta(minutes=1)
YEARLY = "0 0 1 1 *" if SOON.month != 1 else "0 0 1 7 *"


def test_a_window_is_waited_for_where_no_other_check_comes_before_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from airflow.sdk.exceptions import TaskDeferred

    made, _ = operator(checked("deferred", until=SOON), monkeypatch, cron=YEARLY)
    with pytest.raises(TaskDeferred) as deferred:
        made.execute(context())
    assert deferred.value.method_name == "resume"
    assert deferred.value.trigger.moment == SOON
    made, fake = operator(checked("start", started=True), monkeypatch, cron=YEARLY)
    assert made.resume(context(), SOON)["outcome"] == "started"
    assert fake.asked == [("adder", False)]


@pytest.mark.parametrize(
    ("cron", "run_id"), [("* * * * *", "scheduled__x"), (YEARLY, "manual__x"), ("", "scheduled__x")]
)
def test_otherwise_it_only_says_until_when(
    cron: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = datetime.now(UTC) + timedelta(hours=2)
    made, _ = operator(checked("deferred", until=until), monkeypatch, cron=cron)
    result = made.execute(context(run_id))
    assert (result["outcome"], result["until"]) == ("deferred", until.isoformat())


def test_failures_are_what_retries_know_and_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard_airflow.exceptions import StepRefused, StepTransient

    for error, raised in (
        (Transient("The Hub is away."), StepTransient),
        (BadInput("There is no such model on the Hub."), StepRefused),
    ):
        made, _ = operator(error, monkeypatch)
        task = context()
        with pytest.raises(raised, match=error.message):
            made.execute(task)
        assert task["ti"].pushed["return_value"] == {
            "outcome": "refused",
            "reason": error.message,
            "model": "adder",
        }
        assert task["ti"].task.returns_dag_result


def test_a_spec_with_a_mistake_is_refused_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard_airflow.exceptions import StepRefused

    made, fake = operator(checked("start"), monkeypatch, problem="adder.yaml:3: no cron.")
    with pytest.raises(StepRefused, match=r"adder\.yaml:3: no cron"):
        made.execute(context())
    assert fake.asked == []


def test_unknown_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard_airflow.exceptions import StepRefused

    made, fake = operator(checked("start"), monkeypatch)
    with pytest.raises(StepRefused, match="unknown keys: agian"):
        made.execute(make_context({"again": False}, conf={"agian": True}))
    assert fake.asked == []


def test_it_works_on_the_store_and_as_who_asked(yard: Yard) -> None:
    from trainyard_airflow.refresh_operator import RefreshOperator

    refresher = RefreshOperator(task_id="check", model="adder")._refresher(context("manual__1"))
    assert refresher.store.url == yard.store.url
    assert refresher.asked_by == "neuron_refresh__adder/manual__1 (ada)"
    assert list(refresher.environments.environments) == ["staging", "production"]


def test_runs_are_those_of_the_release_dag(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard_airflow.refresh_operator import ReleaseRuns

    asked: list[Any] = []
    monkeypatch.setattr("trainyard_airflow.dag_runs.run_state", lambda *a: asked.append(a))
    monkeypatch.setattr(
        "trainyard_airflow.dag_runs.start_run",
        lambda *a, note: bool(asked.append((*a, note))) or True,
    )
    assert ReleaseRuns().state(RUN) == ""
    assert ReleaseRuns().start(RUN, {"model": "adder"}, "It is new.") is True
    assert asked == [
        ("neuron_release", RUN),
        ("neuron_release", RUN, {"model": "adder"}, "It is new."),
    ]
