"""The tasks around a rollout: the checks before it, its report, the settling after it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.serving_world import NOW, make_channel
from tests.unit.plugins.conftest import make_context, write_environments
from tests.unit.yard import Yard

from trainyard.errors import (
    BadInput,
    Busy,
    Closed,
    NotFound,
    Refused,
    TrainyardError,
    Transient,
)
from trainyard.rollout.driver import Settled

RELEASE = "adder-0123456789ab"
PARAMS = {"model": "adder", "release": RELEASE, "force": False, "reason": None}


@dataclass
class FakeRollouts:
    """Rollouts that answer as they are told, and remember what they were asked."""

    check_error: TrainyardError | None = None
    settled: Settled | None = None
    note_error: TrainyardError | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def check(self, **request: Any) -> str:
        self.asked.append(request)
        if self.check_error is not None:
            raise self.check_error
        return "It goes to production in steps."

    def note_requester(self, **request: Any) -> None:
        self.asked.append(request)
        if self.note_error is not None:
            raise self.note_error

    def settle(self, **request: Any) -> Settled:
        self.asked.append(request)
        assert self.settled is not None
        return self.settled


@pytest.fixture
def rollouts(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> FakeRollouts:
    made = FakeRollouts()
    monkeypatch.setattr("trainyard.wiring.open_rollout", lambda settings, **_: made)
    return made


class TestRollout:
    def operator(self, kind: str = "promote") -> Any:
        from trainyard_airflow.rollout_operator import RolloutOperator

        return RolloutOperator(task_id="rollout", environment="production", kind=kind)

    @pytest.mark.parametrize("kind", ["promote", "rollback"])
    def test_it_starts_in_the_triggerer_with_what_the_trigger_takes(self, kind: str) -> None:
        from trainyard_airflow.rollout_trigger import RolloutTrigger

        operator = self.operator(kind)
        arguments = operator.start_trigger_args
        assert operator.start_from_trigger
        assert arguments.next_method == "finish"
        assert hasattr(operator, arguments.next_method)
        path, kwargs = RolloutTrigger(**arguments.trigger_kwargs).serialize()
        assert path == arguments.trigger_cls
        assert kwargs == arguments.trigger_kwargs
        assert kwargs["kind"] == kind

    def test_templates_fill_in_who_asked_for_what(self) -> None:
        """Airflow renders these fields when it creates the trigger."""
        import jinja2

        operator = self.operator()
        assert set(operator.template_fields) == {"request", "requested_by", "run_id"}
        context = make_context(PARAMS, dag_id="neuron_promote__production", run_id="p-1")
        rendered = {
            name: jinja2.Template(getattr(operator, name)).render(context)
            for name in operator.template_fields
        }
        assert json.loads(rendered["request"]) == PARAMS
        assert rendered["requested_by"] == "ada"
        assert rendered["run_id"] == "neuron_promote__production/p-1"

    def test_without_a_start_in_the_triggerer_it_defers(self) -> None:
        from airflow.sdk.exceptions import TaskDeferred

        operator = self.operator()
        with pytest.raises(TaskDeferred) as deferred:
            operator.execute(make_context())
        assert deferred.value.method_name == "finish"
        expected = (operator.start_trigger_args.trigger_cls,
                    operator.start_trigger_args.trigger_kwargs)  # fmt: skip
        assert deferred.value.trigger.serialize() == expected

    def context(self) -> Any:
        return make_context(PARAMS, dag_id="neuron_promote__production", run_id="p-1")

    def test_a_promotion_is_a_success(self, rollouts: FakeRollouts) -> None:
        event = {"outcome": "promoted", "message": "It is stable."}
        assert self.operator().finish(self.context(), event) == {
            "outcome": "promoted",
            "reason": "It is stable.",
            "model": "adder",
            "environment": "production",
        }

    @pytest.mark.parametrize("outcome", ["rolled_back", "withdrawn", "refused"])
    def test_everything_else_fails_with_the_reason(
        self, rollouts: FakeRollouts, outcome: str
    ) -> None:
        from trainyard_airflow.exceptions import StepRefused

        event = {"outcome": outcome, "message": "Three times slower."}
        context = self.context()
        with pytest.raises(StepRefused, match=r"^Three times slower\.$"):
            self.operator().finish(context, event)
        result = context["ti"].pushed["return_value"]
        assert (result["outcome"], result["reason"]) == (outcome, "Three times slower.")

    def test_a_rollback_is_a_result_of_its_own(self, rollouts: FakeRollouts) -> None:
        operator = self.operator("rollback")
        event = {"outcome": "promoted", "message": "Traffic is back."}
        assert operator.finish(self.context(), event)["outcome"] == "rolled_back"
        assert operator.returns_dag_result
        assert not self.operator().returns_dag_result

    def test_the_trigger_is_told_which_keys_the_form_has(self) -> None:
        from airflow.sdk import DAG

        with DAG("neuron_rollback__production", params={"release": None, "model": "adder"}):
            operator = self.operator("rollback")
        assert operator.start_trigger_args.trigger_kwargs["known_keys"] == ["model", "release"]

    def test_it_notes_who_asked_which_the_triggerer_is_not_told(
        self, rollouts: FakeRollouts
    ) -> None:
        self.operator().finish(self.context(), {"outcome": "promoted", "message": "Stable."})
        assert rollouts.asked == [
            {
                "model": "adder",
                "environment": "production",
                "run_id": "neuron_promote__production/p-1",
                "who": "ada",
            }
        ]

    def test_a_store_that_is_away_then_does_not_fail_the_promotion(
        self, rollouts: FakeRollouts
    ) -> None:
        rollouts.note_error = Transient("Away.", hint="Wait.")
        event = {"outcome": "promoted", "message": "It is stable."}
        assert self.operator().finish(self.context(), event) == {
            "outcome": "promoted",
            "reason": "It is stable.",
            "model": "adder",
            "environment": "production",
        }


class TestVerify:
    def operator(self) -> Any:
        from trainyard_airflow.rollout_operator import VerifyReleaseOperator

        return VerifyReleaseOperator(task_id="verify", environment="production")

    def test_it_returns_the_release(self, rollouts: FakeRollouts) -> None:
        params = {**PARAMS, "force": True, "reason": "It was the network."}
        context = make_context(
            params, conf=params, dag_id="neuron_promote__production", run_id="p-1"
        )
        assert self.operator().execute(context) == RELEASE
        assert rollouts.asked == [
            {
                "model": "adder",
                "environment": "production",
                "release_id": RELEASE,
                "force": True,
                "reason": "It was the network.",
                "run_id": "neuron_promote__production/p-1",
            }
        ]

    @pytest.mark.parametrize(
        "error",
        [
            NotFound("There is no such release.", hint="List them."),
            BadInput("It is for another target.", hint="Promote that one."),
            Refused("It was rejected.", hint="Force it."),
        ],
    )
    def test_what_would_be_refused_is_refused_now(
        self, rollouts: FakeRollouts, error: TrainyardError
    ) -> None:
        from trainyard_airflow.exceptions import StepRefused

        rollouts.check_error = error
        with pytest.raises(StepRefused) as raised:
            self.operator().execute(make_context(PARAMS))
        assert str(raised.value) == str(error)

    def test_a_refusal_is_the_runs_result(self, rollouts: FakeRollouts) -> None:
        from trainyard_airflow.exceptions import StepRefused

        rollouts.check_error = Refused("It was rejected.", hint="Force it.")
        context = make_context(PARAMS)
        with pytest.raises(StepRefused):
            self.operator().execute(context)
        assert context["ti"].pushed["return_value"] == {
            "outcome": "refused",
            "reason": "It was rejected. Force it.",
            "model": "adder",
            "environment": "production",
            "release": RELEASE,
        }

    @pytest.mark.parametrize("wish", [{}, {"wait_for_window": False}])
    def test_a_freeze_is_a_refusal(self, rollouts: FakeRollouts, wish: dict[str, Any]) -> None:
        from trainyard_airflow.exceptions import StepRefused

        rollouts.check_error = Closed("It is frozen.", until=NOW)
        with pytest.raises(StepRefused, match="It is frozen"):
            self.operator().execute(make_context({**PARAMS, **wish}))

    def test_a_freeze_is_waited_for_if_that_is_wished(self, rollouts: FakeRollouts) -> None:
        from airflow.sdk.exceptions import TaskDeferred

        rollouts.check_error = Closed("It is frozen.", until=NOW)
        context = make_context({**PARAMS, "wait_for_window": True})
        with pytest.raises(TaskDeferred) as deferred:
            self.operator().execute(context)
        assert deferred.value.trigger.moment == NOW
        assert deferred.value.method_name == "resume"
        rollouts.check_error = None
        assert self.operator().resume(context, NOW) == RELEASE
        assert len(rollouts.asked) == 2

    @pytest.mark.parametrize("error", [Transient("Away.", hint="Wait."), Busy("Another one.")])
    def test_what_may_pass_is_no_refusal(
        self, rollouts: FakeRollouts, error: TrainyardError
    ) -> None:
        rollouts.check_error = error
        with pytest.raises(type(error)) as raised:
            self.operator().execute(make_context(PARAMS))
        assert raised.value is error

    def test_unknown_keys_are_refused_before_anything_is_looked_at(
        self, rollouts: FakeRollouts
    ) -> None:
        from trainyard_airflow.exceptions import StepRefused

        with pytest.raises(StepRefused, match="unknown keys: forced"):
            self.operator().execute(make_context(PARAMS, conf={"forced": True}))
        assert rollouts.asked == []

    def test_who_may_not_is_refused_before_anything_is_looked_at(
        self, rollouts: FakeRollouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if it was `neuron_release` that started the run: it has the user's name."""
        from trainyard_airflow.exceptions import StepRefused

        write_environments(tmp_path, monkeypatch, {"allowed": {"promote": {"users": ["bob"]}}})
        refused = make_context(PARAMS, user="ada", run_type="operator_triggered")
        with pytest.raises(StepRefused, match="ada may not promote to production: only bob may"):
            self.operator().execute(refused)
        assert rollouts.asked == []
        assert self.operator().execute(make_context(PARAMS, user="bob")) == RELEASE


class TestSettle:
    def operator(self) -> Any:
        from trainyard_airflow.rollout_operator import SettleOperator

        return SettleOperator(task_id="settle", environment="production")

    def context(self) -> Any:
        return make_context(PARAMS, dag_id="neuron_promote__production", run_id="p-1")

    def test_a_promotion_is_a_success(self, rollouts: FakeRollouts) -> None:
        rollouts.settled = Settled("promoted", "It is stable.", make_channel())
        assert self.operator().execute(self.context()) == {
            "outcome": "promoted",
            "reason": "It is stable.",
            "model": "adder",
            "environment": "production",
            "release": RELEASE,
        }
        assert rollouts.asked == [
            {
                "model": "adder",
                "environment": "production",
                "release_id": RELEASE,
                "run_id": "neuron_promote__production/p-1",
            }
        ]

    @pytest.mark.parametrize("outcome", ["rolled_back", "withdrawn", None])
    def test_everything_else_fails_the_run(self, rollouts: FakeRollouts, outcome: Any) -> None:
        from trainyard_airflow.exceptions import StepRefused

        rollouts.settled = Settled(outcome, "TTFT 3 times that of stable.", make_channel())
        context = self.context()
        with pytest.raises(StepRefused, match="TTFT 3 times that of stable"):
            self.operator().execute(context)
        result = context["ti"].pushed["return_value"]
        assert result["outcome"] == (outcome or "nothing")
        assert result["reason"] == "TTFT 3 times that of stable."

    def test_what_was_refused_before_is_the_reason_why_nothing_happened(
        self, rollouts: FakeRollouts
    ) -> None:
        from trainyard_airflow.exceptions import StepRefused

        rollouts.settled = Settled(None, "There is no rollout of this run.", make_channel())
        context = self.context()
        refusal = {"outcome": "refused", "reason": "It was rejected."}
        context["ti"].others["verify"] = refusal
        with pytest.raises(StepRefused, match="no rollout of this run"):
            self.operator().execute(context)
        assert context["ti"].pushed["return_value"] == refusal
