"""The client of Airflow's REST API against a scripted transport."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from trainyard.errors import BadInput, NotFound, Transient
from trainyard.platform.airflow_api import AirflowApi
from trainyard.platform.pools import LOCAL_POOL

Handler = Callable[[httpx.Request], httpx.Response]


def api(handler: Handler) -> AirflowApi:
    def with_login(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/auth/token":
            return httpx.Response(201, json={"access_token": "token"})
        return handler(request)

    return AirflowApi("http://airflow", "admin", "x", transport=httpx.MockTransport(with_login))


def test_a_run_is_started_once() -> None:
    seen: list[dict[str, object]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200 if len(seen) == 1 else 409, json={})

    client = api(answer)
    assert client.trigger("neuron_release", "r1", {"model": "adder"}) is True
    assert client.trigger("neuron_release", "r1", {"model": "adder"}) is False
    assert seen[0]["logical_date"] is None
    assert seen[0]["conf"] == {"model": "adder"}


def test_a_run_is_asked_for_again_where_airflow_failed_by_itself() -> None:
    codes = iter([500, 503, 200, 500, 409])
    client = api(lambda request: httpx.Response(next(codes), json={}))
    assert client.trigger("neuron_release", "r1", {}) is True
    assert client.trigger("neuron_release", "r1", {}) is False


@pytest.mark.parametrize(
    ("code", "error"), [(404, NotFound), (400, BadInput), (422, BadInput), (500, Transient)]
)
def test_refusals_become_errors_with_airflows_words(code: int, error: type[Exception]) -> None:
    client = api(lambda request: httpx.Response(code, json={"detail": "because"}))
    with pytest.raises(error, match="because"):
        client.trigger("neuron_release", "r1", {})


def test_an_expired_token_is_renewed() -> None:
    codes = iter([401, 200])
    client = api(lambda request: httpx.Response(next(codes), json={"state": "running"}))
    assert client.run_state("neuron_release", "r1") == "running"


@pytest.mark.parametrize(
    ("embedded", "hint"), [(True, "trainyard where"), (False, "TRAINYARD_AIRFLOW_PASSWORD")]
)
def test_a_wrong_password_says_where_the_right_one_is(embedded: bool, hint: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(401))
    client = AirflowApi("http://airflow", "admin", "x", embedded=embedded, transport=transport)
    with pytest.raises(BadInput) as caught:
        client.run_state("neuron_release", "r1")
    assert hint in caught.value.hint


def test_a_login_that_is_not_possible_just_now_is_not_a_wrong_one() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(502))
    client = AirflowApi("http://airflow", "admin", "x", transport=transport)
    with pytest.raises(Transient, match="502"):
        client.run_state("neuron_release", "r1")


@pytest.mark.parametrize(
    ("embedded", "hint"), [(True, "trainyard up"), (False, "TRAINYARD_AIRFLOW_URL")]
)
def test_an_absent_airflow_can_be_tried_again(embedded: bool, hint: str) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    transport = httpx.MockTransport(refuse)
    client = AirflowApi("http://airflow", "admin", "x", embedded=embedded, transport=transport)
    with pytest.raises(Transient, match="cannot be reached") as caught:
        client.run_state("neuron_release", "r1")
    assert hint in caught.value.hint


def test_pools_count_deferred_tasks_and_existing_ones_are_adjusted() -> None:
    seen: list[tuple[str, dict[str, object]]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, json.loads(request.content)))
        return httpx.Response(409 if request.method == "POST" else 200, json={})

    api(answer).ensure_pool(LOCAL_POOL)
    assert [method for method, _ in seen] == ["POST", "PATCH"]
    assert all(body["include_deferred"] is True for _, body in seen)


def test_runs_are_read_page_by_page() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        offset = int(request.url.params["offset"])
        page = [{"dag_run_id": f"r{number}"} for number in range(offset, min(offset + 100, 150))]
        return httpx.Response(200, json={"dag_runs": page})

    client = api(answer)
    assert [run["dag_run_id"] for run in client.runs("d")] == [f"r{n}" for n in range(150)]
    assert len(client.runs("d", most=100)) == 100
    assert api(lambda request: httpx.Response(404, json={})).runs("d") == []
