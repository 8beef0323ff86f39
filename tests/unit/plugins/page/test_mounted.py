"""What Airflow's API server mounts, and what that does when the server starts."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tests.page_world import PageWorld
from tests.rollout_world import MODEL, MemoryStore

from trainyard_airflow.page import reader
from trainyard_airflow.page.mounted import MountedPage

WARMING = "trainyard-page-warm"


@pytest.fixture
def small(tmp_path: Path) -> PageWorld:
    """One release serves."""
    made = PageWorld(tmp_path)
    made.publish("first")
    made.promote("first")
    return made


def store_of(world: PageWorld) -> MemoryStore:
    assert isinstance(world.store, MemoryStore)
    return world.store


def start(page: MountedPage) -> None:
    """Do what Airflow does at its start with what it mounts, and wait for the warming."""

    async def enter() -> None:
        async with page.router.lifespan_context(page):
            for thread in threading.enumerate():
                if thread.name == WARMING:
                    await asyncio.to_thread(thread.join)

    asyncio.run(enter())


def ask(page: MountedPage) -> Any:
    outer = FastAPI()
    outer.mount("/trainyard", page)
    return TestClient(outer).get("/trainyard/")


def test_nothing_is_made_before_the_server_starts_or_somebody_asks(small: PageWorld) -> None:
    page = MountedPage(small.app)
    assert page._page is None
    answer = ask(page)
    assert answer.status_code == 200
    assert MODEL in answer.text
    assert page._page is not None


def test_after_the_start_the_first_request_reads_nothing_again(
    small: PageWorld, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FRESH_S", float("inf"))
    caplog.set_level(logging.INFO)
    page = MountedPage(small.app)
    start(page)
    assert "The Trainyard page is ready, with 1 channels." in caplog.text
    store_of(small).away = True
    assert small.ids["first"] in ask(page).text


def test_a_store_that_is_away_stops_no_server(
    small: PageWorld, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(small)
    store.away = True
    page = MountedPage(small.app)
    start(page)
    assert "not ready for its first request: The store is away." in caplog.text
    assert ask(page).status_code == 503
    store.away = False
    assert ask(page).status_code == 200


def test_settings_that_are_wrong_stop_no_server(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> FastAPI:
        raise ValueError("TRAINYARD_STORE is no store.")

    start(MountedPage(make))
    assert "TRAINYARD_STORE is no store." in caplog.text


def test_who_asks_while_it_is_made_waits_for_the_same_page(small: PageWorld) -> None:
    made = []
    begun, go_on = threading.Event(), threading.Event()

    def make() -> FastAPI:
        made.append(small.app())
        begun.set()
        assert go_on.wait(60)
        return made[0]

    page = MountedPage(make)
    warming = threading.Thread(target=page.warm)
    warming.start()
    assert begun.wait(60)
    asking = threading.Thread(target=ask, args=(page,))
    asking.start()
    go_on.set()
    warming.join()
    asking.join()
    assert len(made) == 1


def test_other_components_of_airflow_do_not_load_it() -> None:
    program = (
        "import sys; from trainyard_airflow.page.plugin import TrainyardPlugin; TrainyardPlugin();"
        "print(sorted({'fastapi', 'trainyard_airflow.page.app'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.splitlines()[-1] == "[]"
