"""Where the links of tasks lead, and what events of assets say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.page_world import PageWorld
from tests.unit.plugins.conftest import make_context
from tests.unit.yard import Yard

from trainyard.store.folder import FolderStore

KEY = SimpleNamespace(dag_id="neuron_promote__production", run_id="asked by/ada", task_id="t")
RELEASE = "adder-0123456789ab"
PAGE = "https://airflow.example/plugin/trainyard/trainyard"


@pytest.fixture(autouse=True)
def _address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/")


def operator(**values: Any) -> Any:
    return SimpleNamespace(**values)


def test_links_lead_to_what_a_task_is_about() -> None:
    from trainyard_airflow.links import ChannelLink, ReleaseLink, ReportLink, RunLink

    request = json.dumps({"model": "adder", "release": RELEASE})
    rollout = operator(request=request, environment="production")
    assert ChannelLink().get_link(rollout, ti_key=KEY) == f"{PAGE}/channels/production/adder"
    assert ReleaseLink().get_link(rollout, ti_key=KEY) == f"{PAGE}/releases/adder/{RELEASE}"
    assert RunLink().get_link(rollout, ti_key=KEY) == (
        "https://airflow.example/dags/neuron_promote__production/runs/asked%20by%2Fada"
        "/plugin/trainyard-run"
    )
    gate = operator(output_key="verdicts/adder-plan/cpu/accuracy.json")
    assert ReportLink().get_link(gate, ti_key=KEY) == f"{PAGE}/reports/adder-plan/cpu/accuracy"
    publish = operator(output_key=f"releases/adder/{RELEASE}.json")
    assert ReleaseLink().get_link(publish, ti_key=KEY) == f"{PAGE}/releases/adder/{RELEASE}"
    assert ReportLink().get_link(publish, ti_key=KEY) == f"{PAGE}/releases/adder/{RELEASE}/report"


@pytest.mark.parametrize(
    "task",
    [
        operator(output_key=""),
        operator(request="{{ params | tojson }}", environment="production"),
        operator(request="[]"),
        operator(),
    ],
)
def test_a_task_that_made_nothing_has_no_link(task: Any) -> None:
    from trainyard_airflow.links import ChannelLink, ReleaseLink, ReportLink

    for link in (ChannelLink(), ReleaseLink(), ReportLink()):
        assert link.get_link(task, ti_key=KEY) == ""


class Outlet:
    """Takes the events of an alias."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, dict[str, Any]]] = []

    def add(self, asset: Any, *, extra: dict[str, Any]) -> None:
        self.events.append((asset, extra))


class TestPromoted:
    @pytest.fixture
    def world(self, yard: Yard, tmp_path: Path) -> PageWorld:
        home = tmp_path / "home"
        made = PageWorld(home, store=FolderStore(home / "store"))
        made.publish("first")
        made.promote("first")
        return made

    def finish(
        self, world: PageWorld, monkeypatch: pytest.MonkeyPatch, *, run_id: str, outcome: str
    ) -> Outlet:
        from trainyard_airflow.assets import promoted
        from trainyard_airflow.rollout_operator import RolloutOperator

        rollouts = SimpleNamespace(note_requester=lambda **_: world.channel)
        monkeypatch.setattr("trainyard.wiring.open_rollout", lambda *_, **__: rollouts)
        outlet = Outlet()
        dag_id, _, name = run_id.partition("/")
        context = make_context({"model": "adder"}, dag_id=dag_id, run_id=name)
        context["outlet_events"] = {promoted("production"): outlet}
        task = RolloutOperator(task_id="rollout", environment="production", kind="promote")
        task.finish(context, {"outcome": outcome, "message": "It is stable."})
        return outlet

    def test_a_promotion_is_told_with_what_is_needed_to_verify_it(
        self, world: PageWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rollout = world.channel.rollout
        assert rollout is not None
        outlet = self.finish(world, monkeypatch, run_id=rollout.driver.run_id, outcome="promoted")
        ((asset, extra),) = outlet.events
        assert (asset.name, asset.group) == ("trainyard/adder/production", "trainyard")
        assert extra["release"] == world.ids["first"]
        assert extra["environment"] == "production"
        assert extra["digest"].startswith("sha256:")
        assert extra["key"] == f"releases/adder/{world.ids['first']}.json"

    def test_a_run_that_found_nothing_to_do_tells_nothing(
        self, world: PageWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outlet = self.finish(
            world, monkeypatch, run_id="neuron_promote__production/another", outcome="promoted"
        )
        assert outlet.events == []


class TestControl:
    @pytest.fixture
    def asked(
        self, yard: Yard, monkeypatch: pytest.MonkeyPatch
    ) -> list[tuple[str, dict[str, Any]]]:
        found: list[tuple[str, dict[str, Any]]] = []
        from tests.serving_world import make_channel

        def take(action: str) -> Any:
            def do(**request: Any) -> Any:
                found.append((action, request))
                return make_channel()

            return do

        names = ("pause", "resume", "promote_now", "abort")
        rollouts = SimpleNamespace(
            **{name: take(name) for name in names},
            what_a_pause_holds=lambda channel: ("The route gives all to it.",),
        )
        monkeypatch.setattr("trainyard.wiring.open_rollout", lambda *_, **__: rollouts)
        return found

    def run(self, action: str, user: str = "ada") -> Any:
        from trainyard_airflow.control_operator import ControlOperator

        task = ControlOperator(task_id="control", environment="production")
        params = {"model": "adder", "action": action, "reason": "because"}
        return task.execute(make_context(params, user=user))

    @pytest.mark.parametrize("action", ["pause", "resume", "promote_now", "abort"])
    def test_it_is_done_as_whoever_asked(self, asked: list[Any], action: str) -> None:
        said = self.run(action)
        assert "of the traffic for the candidate" in said
        assert said.endswith("The route gives all to it.") == (action == "pause")
        ((done, request),) = asked
        assert done == action
        assert request == {
            "model": "adder",
            "environment": "production",
            "reason": "because",
            "who": "ada",
        }

    def test_aborting_needs_the_right_to_roll_back_and_pausing_the_right_to_promote(
        self, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tests.unit.plugins.conftest import write_environments

        from trainyard_airflow.exceptions import StepRefused

        allowed = {"promote": {"users": ["ada"]}, "rollback": {"users": ["bob"]}}
        write_environments(tmp_path, monkeypatch, {"allowed": allowed})
        self.run("pause", "ada")
        self.run("abort", "bob")
        for action, user in (("pause", "bob"), ("promote_now", "bob"), ("abort", "ada")):
            with pytest.raises(StepRefused, match=f"{user} may not"):
                self.run(action, user)
        assert [done for done, _ in asked] == ["pause", "abort"]
