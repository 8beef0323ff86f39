"""Requests to an Airflow from outside: their ids, what they attach to, how they end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from trainyard.errors import BadInput, NotFound, Refused, TrainyardError, Transient
from trainyard.platform.airflow_api import AirflowApi
from trainyard.platform.request import (
    MOST_MISSES,
    RunRequest,
    ask,
    parse_overrides,
    promote_request,
    release_request,
    rollback_request,
    run_url,
    wait,
)

RELEASE = "adder-0123456789ab"
PROMOTION = promote_request("adder", RELEASE, "production")


@dataclass
class FakeAirflow:
    """The part of Airflow's API that requests use."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: list[list[dict[str, Any]]] = field(default_factory=list)
    """What one look after the other shows; the last one stays."""
    log: list[dict[str, Any]] = field(default_factory=list)
    results: str = ""
    status: int = 200
    seen: list[str] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    """For each look at a run: a status to answer instead, 0 for no answer, 200 for a good one."""

    def api(self, **login: str) -> AirflowApi:
        login = login or {"token": "secret-token"}
        return AirflowApi("http://airflow", transport=httpx.MockTransport(self.answer), **login)

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.seen.append(request.headers.get("authorization", ""))
        if path == "/auth/token":
            return httpx.Response(201, json={"access_token": "made"})
        if self.status != 200:
            return httpx.Response(self.status, json={"detail": "because"})
        if request.method == "POST":
            return self.start(json.loads(request.content))
        if path.endswith("/wait"):
            return httpx.Response(200, text=self.results)
        if "/logs/" in path:
            return httpx.Response(200, json={"content": self.log})
        if path.endswith("/taskInstances"):
            look = self.tasks.pop(0) if len(self.tasks) > 1 else (self.tasks or [[]])[0]
            return httpx.Response(200, json={"task_instances": look})
        status = self.misses.pop(0) if self.misses else 200
        if status == 0:
            raise httpx.ReadTimeout("timed out")
        return httpx.Response(status, json=self.runs[path.rpartition("/")[2]])

    def start(self, body: dict[str, Any]) -> httpx.Response:
        if body["dag_run_id"] in self.runs:
            return httpx.Response(409, json={"detail": "exists"})
        self.runs[body["dag_run_id"]] = {"state": "running", "conf": body["conf"]}
        return httpx.Response(200, json={})

    def end(self, run_id: str, state: str) -> None:
        self.runs[run_id]["state"] = state


def test_a_request_is_a_run_of_its_dag() -> None:
    wanted = release_request("adder", revision="r2", environments=("staging",))
    assert wanted.dag_id == "neuron_release"
    assert wanted.conf == {"model": "adder", "revision": "r2", "environments": ["staging"]}
    assert PROMOTION.dag_id == "neuron_promote__production"
    assert PROMOTION.conf == {"model": "adder", "release": RELEASE}
    back = rollback_request("adder", "production", release_id=RELEASE, reason="slow")
    assert back.dag_id == "neuron_rollback__production"
    assert back.conf == {"model": "adder", "release": RELEASE, "reason": "slow"}


def test_the_id_follows_from_the_request() -> None:
    assert PROMOTION.run_id == promote_request("adder", RELEASE, "production").run_id
    others = {
        PROMOTION.run_id,
        promote_request("adder", RELEASE, "production", reason="why").run_id,
        promote_request("adder", RELEASE, "production", key="job 7").run_id,
        promote_request("adder", "adder-fedcba987654", "production").run_id,
    }
    assert len(others) == 4
    assert PROMOTION.run_id.startswith(f"promote__{RELEASE}__")


@pytest.mark.parametrize(
    "make",
    [
        lambda: release_request("Adder"),
        lambda: release_request("adder", environments=("no/place",)),
        lambda: promote_request("adder", "latest", "production"),
        lambda: promote_request("adder", RELEASE, "production", force=True),
        lambda: rollback_request("adder", "production"),
        lambda: parse_overrides("{"),
        lambda: parse_overrides("[1]"),
    ],
)
def test_a_wrong_request_is_refused_before_airflow_is_asked(make: Any) -> None:
    with pytest.raises(BadInput):
        make()


def test_the_same_request_attaches_to_the_run_under_way() -> None:
    airflow = FakeAirflow()
    first, second = ask(airflow.api(), PROMOTION), ask(airflow.api(), PROMOTION)
    assert first.started
    assert not second.started
    assert second.run_id == first.run_id
    assert second.state == "running"
    assert len(airflow.runs) == 1


def test_after_the_end_asking_again_starts_the_next_run() -> None:
    airflow = FakeAirflow()
    airflow_run = ask(airflow.api(), PROMOTION).run_id
    airflow.end(airflow_run, "success")
    again = ask(airflow.api(), PROMOTION)
    assert again.started
    assert again.run_id == f"{airflow_run}__2"
    assert ask(airflow.api(), PROMOTION).run_id == again.run_id


def test_a_key_is_the_same_request_for_ever() -> None:
    airflow = FakeAirflow()
    wanted = rollback_request("adder", "production", key="incident 12")
    airflow.end(ask(airflow.api(), wanted).run_id, "failed")
    again = ask(airflow.api(), wanted)
    assert (again.started, again.state) == (False, "failed")
    assert len(airflow.runs) == 1


def test_a_run_of_another_request_is_not_taken_for_ours() -> None:
    airflow = FakeAirflow(runs={PROMOTION.run_id: {"state": "running", "conf": {"model": "x"}}})
    with pytest.raises(BadInput, match="another conf"):
        ask(airflow.api(), PROMOTION)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, BadInput), (401, BadInput), (403, Refused), (404, NotFound), (503, Transient)],
)
def test_a_refusal_has_its_exit_code(status: int, kind: type[TrainyardError]) -> None:
    with pytest.raises(kind, match="because") as caught:
        ask(FakeAirflow(status=status).api(), PROMOTION)
    assert type(caught.value) is kind


def test_a_token_is_used_as_it_is_and_a_password_only_to_log_in() -> None:
    airflow = FakeAirflow()
    ask(airflow.api(), PROMOTION)
    assert airflow.seen == ["Bearer secret-token"]
    other = FakeAirflow()
    ask(other.api(username="ci", password="p"), PROMOTION)
    assert other.seen == ["", "Bearer made"]


def waiting(airflow: FakeAirflow, request: RunRequest = PROMOTION, **how: Any) -> Any:
    said: list[str] = []
    run_id = ask(airflow.api(), request).run_id
    looks = [0]

    def sleep(seconds: float) -> None:
        looks[0] += 1
        if looks[0] == 2:
            airflow.end(run_id, how.get("state", "success"))

    try:
        results = wait(
            airflow.api(),
            request.dag_id,
            run_id,
            said.append,
            timeout_s=how.get("timeout_s", 60),
            sleep=sleep,
            clock=how.get("clock", lambda: 0.0),
        )
    except TrainyardError as error:
        return error, said
    return results, said


def task(name: str, state: str, **more: Any) -> dict[str, Any]:
    return {"task_id": name, "state": state, "map_index": -1, **more}


def test_waiting_says_each_change_once_and_returns_the_results() -> None:
    airflow = FakeAirflow(
        tasks=[
            [task("verify", "running"), task("rollout", "scheduled")],
            [task("verify", "success"), task("rollout", "deferred")],
            [
                task("verify", "success"),
                task("rollout", "success"),
                task("compile", "success", map_index=0, rendered_map_index="cpu"),
            ],
        ],
        results='{"state": "running"}\n{"state": "success", "results": {"settle": {"ok": 1}}}\n',
    )
    results, said = waiting(airflow)
    assert results == {"settle": {"ok": 1}}
    assert said == [
        "verify: running",
        "verify: success",
        "rollout: deferred",
        "rollout: success",
        "compile[cpu]: success",
    ]


def test_an_airflow_without_results_is_no_error() -> None:
    results, _ = waiting(FakeAirflow(results="not json"))
    assert results == {}


def test_a_failed_run_ends_with_the_last_error_of_its_tasks() -> None:
    airflow = FakeAirflow(
        tasks=[[task("verify", "failed", end_date="2026-11-22", try_number=2)]],
        log=[
            {"level": "info", "event": "Looking"},
            {
                "level": "error",
                "event": "Task failed with exception",
                "error_detail": [{"exc_type": "StepRefused", "exc_value": "It was rejected."}],
            },
            {"level": "info", "event": "Done"},
        ],
    )
    error, said = waiting(airflow, state="failed")
    assert isinstance(error, Refused)
    assert error.message.endswith("failed. verify: It was rejected.")
    assert said == ["verify: failed"]


def test_waiting_has_an_end() -> None:
    ticks = iter(range(100))
    error, _ = waiting(FakeAirflow(), timeout_s=1, clock=lambda: float(next(ticks)))
    assert isinstance(error, Transient)
    assert "attaches" in error.hint


def test_an_airflow_that_starts_again_is_waited_for_and_told_once() -> None:
    airflow = FakeAirflow(misses=[502, 200, 502, 0, 503])
    results, said = waiting(airflow)
    assert results == {}
    assert airflow.misses == []
    assert ["502" in each for each in said] == [True, True]


def test_an_airflow_that_stays_away_is_given_up() -> None:
    airflow = FakeAirflow(misses=[0] * 100)
    error, said = waiting(airflow)
    assert isinstance(error, Transient)
    assert "timed out" in error.message
    assert len(airflow.misses) == 100 - MOST_MISSES
    assert len(said) == 1


def test_nobody_waits_past_the_deadline_for_an_airflow_that_is_away() -> None:
    ticks = iter(range(100))
    airflow = FakeAirflow(misses=[502] * 100)
    error, _ = waiting(airflow, timeout_s=3, clock=lambda: float(next(ticks)))
    assert isinstance(error, Transient)
    assert len(airflow.misses) == 96


def test_pauses_grow_while_airflow_is_away() -> None:
    airflow = FakeAirflow(misses=[200, 0, 0, 0, 0, 0, 200])
    run_id = ask(airflow.api(), PROMOTION).run_id
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 7:
            airflow.end(run_id, "success")

    wait(airflow.api(), PROMOTION.dag_id, run_id, print, timeout_s=60, sleep=sleep)
    assert pauses == [2, 4, 8, 16, 30, 30, 2]


def test_the_address_of_a_run_is_safe() -> None:
    assert run_url("http://a/", "dag", "a b/c") == "http://a/dags/dag/runs/a%20b%2Fc"


RESULT = {"outcome": "refused", "reason": "It was rejected."}


@pytest.mark.parametrize("result", [RESULT, [RESULT], ["a bundle", RESULT]])
def test_without_a_log_the_results_say_why_it_failed(result: Any) -> None:
    airflow = FakeAirflow(
        tasks=[[task("settle", "failed")]],
        results=json.dumps({"state": "failed", "results": {"settle": result}}),
    )
    error, _ = waiting(airflow, state="failed")
    assert isinstance(error, Refused)
    assert str(error).endswith("failed. settle: It was rejected.")


def test_a_window_may_be_waited_for() -> None:
    release = release_request("adder", environments=("production",), wait_for_window=True)
    promotion = promote_request("adder", RELEASE, "production", wait_for_window=True)
    assert release.conf["wait_for_window"] is promotion.conf["wait_for_window"] is True
    assert promotion.run_id != PROMOTION.run_id
