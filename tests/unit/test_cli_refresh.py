"""`trainyard refresh` says what it would do, and does it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.hub_server import HubServer
from tests.refresh_world import RefreshWorld
from typer.testing import CliRunner

from trainyard.cli import app
from trainyard.cli_refresh import ReleaseRuns
from trainyard.errors import BadInput
from trainyard.platform.airflow_api import AirflowApi
from trainyard.settings import get_settings

runner = CliRunner()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RefreshWorld]:
    with HubServer() as hub:
        made = RefreshWorld(tmp_path, hub)
        settings = made.settings
        settings.environments.write_text(json.dumps(made.environments))
        settings.catalogue.mkdir()
        for name in ("home", "catalogue", "environments"):
            monkeypatch.setenv(f"TRAINYARD_{name.upper()}", str(getattr(settings, name)))
        monkeypatch.setenv("TRAINYARD_HUB_ENDPOINT", hub.url)
        monkeypatch.setenv("TRAINYARD_SOURCE_ATTEMPTS", "1")
        monkeypatch.setenv("COLUMNS", "300")
        get_settings.cache_clear()
        yield made
        get_settings.cache_clear()


def refresh(*arguments: str) -> tuple[int, str]:
    result = runner.invoke(app, ["refresh", *arguments])
    return result.exit_code, result.output


def test_a_dry_run_needs_no_airflow_and_says_why(world: RefreshWorld) -> None:
    commit = world.add("adder", follow_toolchain=False)
    world.add("by-hand", cron=None)
    code, said = refresh("--dry-run")
    assert code == 0
    assert "by-hand" not in said
    assert "would start" in said
    assert f"Revision {commit} is new. Run refresh__adder__" in said
    (row,) = json.loads(refresh("--dry-run", "--json")[1])
    assert (row["outcome"], row["revision"], row["started"]) == ("start", commit, False)


def test_what_cannot_be_checked_is_named_and_sets_the_exit_code(world: RefreshWorld) -> None:
    world.add("adder", follow_toolchain=False)
    world.add("gone", follow_toolchain=False)
    del world.hub.repos["yard/gone"]
    code, said = refresh("--dry-run", "--json")
    assert code == 10
    adder, gone = json.loads(said)
    assert (adder["outcome"], gone["outcome"]) == ("start", "failed")
    assert "yard/gone" in gone["reason"]


def test_names_that_do_not_exist_are_refused_at_once(world: RefreshWorld) -> None:
    world.add("adder")
    code, said = refresh("ader", "--dry-run")
    assert code == 10
    assert "Did you mean adder?" in said
    code, said = refresh("--again")
    assert code == 10
    assert "Name the models." in said


def test_without_an_airflow_nothing_can_be_started(world: RefreshWorld) -> None:
    world.add("adder", follow_toolchain=False)
    code, said = refresh("adder")
    assert code == 10
    assert "TRAINYARD_AIRFLOW_URL" in said


def test_an_empty_catalogue_is_no_mistake(world: RefreshWorld) -> None:
    code, said = refresh("--dry-run")
    assert (code, said.strip()) == (0, "No model of the catalogue has a `refresh`.")


def test_airflow_is_asked_for_the_run_and_to_start_it(
    world: RefreshWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = world.add("adder", follow_toolchain=False)
    runs: dict[str, Any] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        run_id = request.url.path.rsplit("/", 1)[-1]
        if request.method == "GET":
            found = runs.get(run_id)
            return httpx.Response(200, json={"state": "running"}) if found else httpx.Response(404)
        body = json.loads(request.content)
        if body["dag_run_id"] in runs:
            return httpx.Response(409)
        runs[body["dag_run_id"]] = body
        return httpx.Response(200, json=body)

    api = AirflowApi("http://airflow", token="t", transport=httpx.MockTransport(answer))
    monkeypatch.setattr("trainyard.cli._airflow", lambda settings: (api, "http://airflow"))
    code, said = refresh("adder")
    assert code == 0, said
    assert "started" in said
    ((run_id, body),) = runs.items()
    assert body["conf"]["revision"] == commit
    assert body["note"] == f"Revision {commit} is new."
    (row,) = json.loads(refresh("adder", "--json")[1])
    assert (row["outcome"], row["run_id"], row["started"]) == ("under_way", run_id, False)
    assert ReleaseRuns(api).start(run_id, {}, "") is False
    assert ReleaseRuns(api).state("another") == ""


def test_a_refusal_of_airflow_is_passed_on(world: RefreshWorld) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400, json={"detail": "model: 'adder' is not one of []"})

    api = AirflowApi("http://airflow", token="t", transport=httpx.MockTransport(answer))
    with pytest.raises(BadInput, match="is not one of"):
        ReleaseRuns(api).start("run", {}, "note")
