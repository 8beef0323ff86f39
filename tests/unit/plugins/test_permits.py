"""Who asked for a run, whether they may, and which rights of DAGs follow from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.plugins.conftest import make_context, write_environments
from tests.unit.yard import Yard

from trainyard.permissions import Asker
from trainyard.spec.ways import Allowed

NAMED = {"file": {"groups": {"managers": ["ada"]}}, "allowed": {
    "promote": {"groups": ["managers"]},
    "rollback": {"users": ["bob"]},
}}  # fmt: skip


PARAMS = {"model": "adder"}


@pytest.fixture
def fab(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard_airflow.identity import FAB

    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", FAB)


class TestWhoAsks:
    @pytest.mark.parametrize("user", ["ada", None])
    def test_is_the_user_of_the_run(self, user: str | None) -> None:
        from trainyard_airflow.identity import asker_of

        assert asker_of(make_context(user=user)) == Asker(user or "")

    @pytest.mark.usefixtures("fab")
    @pytest.mark.parametrize(
        ("run_type", "checked"),
        [("manual", True), ("operator_triggered", False), ("scheduled", False)],
    )
    def test_roles_are_checked_by_fab_for_who_starts_the_dag_itself(
        self, run_type: str, checked: bool
    ) -> None:
        from trainyard_airflow.identity import asker_of

        assert asker_of(make_context(run_type=run_type)) == Asker(
            "ada", checked_roles=checked, through_run=run_type == "operator_triggered"
        )


class TestPermit:
    def operator(self, act: Any = "rollback") -> Any:
        from trainyard_airflow.permits import PermitOperator

        return PermitOperator(task_id="permit", environment="production", act=act)

    def test_whoever_may_passes(
        self, yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_environments(tmp_path, monkeypatch, NAMED)
        assert self.operator().execute(make_context(PARAMS, user="bob")) == "bob"
        assert self.operator("promote").execute(make_context(PARAMS, user="ada")) == "ada"

    @pytest.mark.parametrize(
        ("act", "user"), [("rollback", "ada"), ("promote", "bob"), ("promote", None)]
    )
    def test_others_are_refused_with_a_reason(
        self,
        yard: Yard,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        act: str,
        user: str | None,
    ) -> None:
        from trainyard_airflow.exceptions import StepRefused

        write_environments(tmp_path, monkeypatch, NAMED)
        with pytest.raises(StepRefused, match=r"may not|only people may"):
            self.operator(act).execute(make_context(PARAMS, user=user))

    @pytest.mark.parametrize(
        ("run_type", "user"), [("operator_triggered", "eve"), ("manual", None)]
    )
    def test_what_trainyard_itself_rolls_back_is_never_refused(
        self,
        yard: Yard,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        run_type: str,
        user: str | None,
    ) -> None:
        """The watch starts the rollback's DAG, whoever may have started the watch."""
        write_environments(tmp_path, monkeypatch, NAMED)
        context = make_context(PARAMS, user=user, run_type=run_type)
        assert self.operator().execute(context) == (user or "")

    def test_unknown_keys_are_refused(self, yard: Yard) -> None:
        from trainyard_airflow.exceptions import StepRefused

        with pytest.raises(StepRefused, match="unknown keys: modell"):
            self.operator().execute(make_context({"model": "a"}, conf={"modell": "b"}))


class TestRightsOfDags:
    def test_no_rule_needs_no_task(self) -> None:
        from trainyard_airflow.permits import needs_task

        assert not needs_task(None)
        assert needs_task(Allowed(users=("ada",)))
        assert needs_task(Allowed())

    @pytest.mark.usefixtures("fab")
    def test_roles_alone_are_airflows_to_check_so_that_a_rollback_needs_no_worker(self) -> None:
        from trainyard_airflow.permits import needs_task

        assert not needs_task(Allowed(roles=("Lead",)))
        assert needs_task(Allowed(roles=("Lead",), groups=("managers",)))
        assert needs_task(Allowed())

    def test_roles_that_nobody_checks_need_a_task_that_refuses(self) -> None:
        from trainyard_airflow.permits import access_control, needs_task

        assert needs_task(Allowed(roles=("Lead",)))
        assert access_control([Allowed(roles=("Lead",))]) is None

    @pytest.mark.usefixtures("fab")
    def test_roles_become_rights_of_the_dag(self) -> None:
        from trainyard_airflow.permits import access_control

        starts, answers = Allowed(roles=("Lead",)), Allowed(roles=("Owner", "Lead"))
        assert access_control([starts, None], answers=answers) == {
            "Lead": {"DAGs": {"can_read", "can_edit"}, "DAG Runs": {"can_read", "can_create"}},
            "Owner": {"DAGs": {"can_read", "can_edit"}, "DAG Runs": {"can_read"}},
        }
        assert access_control([Allowed(users=("ada",)), None]) is None
