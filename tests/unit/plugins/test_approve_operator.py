"""The task that asks people: whose answer counts, and that nothing else lets a release pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.page_world import PageWorld
from tests.unit.plugins.conftest import make_context, write_environments
from tests.unit.yard import Yard

from trainyard.approvals import Round, round_of_run
from trainyard.releases import list_attestations
from trainyard.store.folder import FolderStore

DAG = "neuron_promote__production"
POLICY: Mapping[str, Any] = {
    "allowed": {"approve": {"users": ["bob", "eve", "ada"]}},
    "approval": {"needs": 1, "timeout_s": 3600},
}


class Asking:
    """A promotion that waits in a store with a release that can be verified."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = FolderStore(home / "store")
        self.world = PageWorld(home, store=self.store)
        self.release_id = self.world.publish("first")
        self.monkeypatch = monkeypatch
        self.asked: list[dict[str, Any]] = []
        self.results: list[Any] = []
        self.told: list[str] = []
        monkeypatch.setattr(
            "airflow.providers.standard.operators.hitl.upsert_hitl_detail",
            lambda **values: self.asked.append(values),
        )
        monkeypatch.setattr(
            "trainyard_airflow.notify.tell", lambda notice, among: self.told.append(notice.kind)
        )
        self.operator = self.make()

    def make(self) -> Any:
        from trainyard_airflow.approve_operator import ApproveOperator

        return ApproveOperator(task_id="approve", environment="production")

    @property
    def context(self) -> Any:
        ti = SimpleNamespace(
            id="ti-1",
            try_number=1,
            task=SimpleNamespace(),
            xcom_push=lambda key, value: self.results.append(value),
        )
        params = {"model": "adder", "release": self.release_id, "reason": "because"}
        return make_context(params, dag_id=DAG, run_id="p-1") | {"task_instance": ti, "ti": ti}

    def waits(self, do: Callable[[], Any]) -> Any:
        from airflow.sdk.exceptions import TaskAwaitingInput

        with pytest.raises(TaskAwaitingInput) as parked:
            do()
        return parked.value

    def ask(self) -> Any:
        return self.waits(lambda: self.operator.execute(self.context))

    def answer(self, who: str, option: str = "Approve", note: str = "") -> Any:
        event = {
            "chosen_options": [option],
            "params_input": {"note": note},
            "responded_at": datetime.now(UTC),
            "responded_by_user": {"id": f"id-{who}", "name": who},
        }
        # Another process takes the answer.
        self.operator = self.make()
        return self.operator.execute_complete(self.context, event)

    @property
    def round(self) -> Round | None:
        return round_of_run(
            self.store,
            "adder",
            self.release_id,
            environment="production",
            run_id=f"{DAG}/p-1",
        )


@pytest.fixture
def asking(yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asking:
    write_environments(tmp_path, monkeypatch, POLICY)
    return Asking(tmp_path / "home", monkeypatch)


def test_it_asks_with_the_report_and_waits_without_a_worker(asking: Asking) -> None:
    parked = asking.ask()
    (asked,) = asking.asked
    assert asked["options"] == ["Approve", "Reject"]
    assert not asked["defaults"]
    assert list(asked["params"]) == ["note"]
    assert asking.release_id in asked["subject"]
    assert "Accuracy gate: ✓ pass" in asked["body"]
    assert "ada: because" in asked["body"]
    assert timedelta(minutes=59) < parked.timeout <= timedelta(hours=1)
    assert asking.told == ["waiting_approval"]
    # SimpleAuthManager knows people by their names.
    assert [user["id"] for user in asked["assigned_users"]] == ["bob", "eve", "ada"]


def test_an_approval_lets_the_release_pass_and_is_kept(asking: Asking) -> None:
    asking.ask()
    assert asking.answer("bob", note="looks good") == ["bob"]
    (kept,) = [
        each
        for each in list_attestations(asking.store, "adder", asking.release_id, "approval")
        if each.subject["answer"] == "approved"
    ]
    assert (kept.subject["who"], kept.subject["note"]) == ("bob", "looks good")
    assert kept.provenance.requested_by == "bob"
    # Run again, it does not ask again.
    assert asking.operator.execute(asking.context) == ["bob"]
    assert len(asking.asked) == 1


def test_a_rejection_ends_it_with_the_note(asking: Asking) -> None:
    from trainyard_airflow.exceptions import StepRefused

    asking.ask()
    with pytest.raises(StepRefused, match=r"bob has rejected it \(not on a Friday\)"):
        asking.answer("bob", "Reject", "not on a Friday")
    assert asking.round is not None
    assert asking.round.ended == "rejected"
    (result,) = asking.results
    assert (result["outcome"], result["release"]) == ("refused", asking.release_id)
    assert "not on a Friday" in result["reason"]


def test_time_that_runs_out_approves_nothing(asking: Asking) -> None:
    from trainyard_airflow.exceptions import StepRefused

    asking.ask()
    late = {"error": "too late", "error_type": "timeout"}
    with pytest.raises(StepRefused, match="nobody answered in time"):
        asking.make().execute_complete(asking.context, late)
    assert asking.round is not None
    assert asking.round.ended == "closed"


@pytest.mark.parametrize(
    ("who", "why"),
    [("ada", "does not approve it"), ("mallory", "may not approve"), ("", "nobody knows")],
)
@pytest.mark.parametrize("option", ["Approve", "Reject"])
def test_an_answer_that_does_not_count_is_kept_and_waited_on(
    asking: Asking, who: str, why: str, option: str
) -> None:
    asking.ask()
    asking.waits(lambda: asking.answer(who, option))
    assert len(asking.asked) == 2
    ignored = [
        each.subject
        for each in list_attestations(asking.store, "adder", asking.release_id, "approval")
        if each.subject["answer"] == "ignored"
    ]
    assert [each["who"] for each in ignored] == [who]
    assert why in ignored[0]["note"]
    assert asking.answer("bob") == ["bob"]


def test_two_people_are_asked_one_after_the_other(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_environments(tmp_path, monkeypatch, {**POLICY, "approval": {"needs": 2}})
    asking.ask()
    asking.waits(lambda: asking.answer("bob"))
    asking.waits(lambda: asking.answer("bob"))
    assert asking.answer("eve") == ["bob", "eve"]
    # People were told once, not for each answer.
    assert asking.told == ["waiting_approval"]


def test_the_requester_may_where_the_file_says_so(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_environments(tmp_path, monkeypatch, {**POLICY, "approval": {"by_requester": True}})
    asking.ask()
    assert asking.answer("ada") == ["ada"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({}, None),
        ({"bob": "7"}, None),
        ({"bob": "7", "eve": "8", "ada": "9"}, ["7", "8", "9"]),
    ],
)
def test_other_auth_managers_refuse_others_if_they_know_all_ids(
    asking: Asking,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ids: dict[str, str],
    expected: list[str] | None,
) -> None:
    from trainyard_airflow.identity import FAB

    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", FAB)
    write_environments(tmp_path, monkeypatch, {**POLICY, "approval": {"user_ids": ids}})
    asking.ask()
    users = asking.asked[0]["assigned_users"]
    assert (users and [user["id"] for user in users]) == expected


def test_what_is_stable_already_is_not_asked_about(asking: Asking) -> None:
    asking.world.promote("first")
    assert asking.operator.execute(asking.context) == []
    assert asking.asked == []
