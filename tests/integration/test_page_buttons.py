"""The page's buttons in a real browser, asking an API that answers as Airflow's would."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException
from tests.browser import CHROMIUM, PATIENCE_S, Browser
from tests.page_world import PROMOTE, PageWorld
from tests.rollout_world import ENVIRONMENT, MODEL

pytestmark = pytest.mark.integration

ROLLBACK = f"neuron_rollback__{ENVIRONMENT}"
CONF = {"model": MODEL}


@dataclass
class FakeRuns:
    """The runs of an Airflow: each id once."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusal: int = 0
    """Answered to whoever asks for a run, if it is not 0."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """What people have answered, with where."""

    def add_to(self, app: FastAPI) -> None:
        path = "/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/{index}/hitlDetails"
        app.patch(path)(self.answer)
        app.post("/api/v2/dags/{dag_id}/dagRuns")(self.start)
        app.get("/api/v2/dags/{dag_id}/dagRuns/{run_id}")(self.find)

    def start(self, dag_id: str, body: dict[str, Any]) -> dict[str, Any]:
        if self.refusal:
            raise HTTPException(self.refusal, "because")
        if body["dag_run_id"] in self.runs:
            raise HTTPException(409, "exists")
        self.runs[body["dag_run_id"]] = {"dag": dag_id, "state": "queued", "conf": body["conf"]}
        return {}

    def answer(
        self, dag_id: str, run_id: str, task_id: str, index: int, body: dict[str, Any]
    ) -> dict[str, Any]:
        if self.refusal:
            raise HTTPException(self.refusal, "because")
        self.answers.append({"run": f"{dag_id}/{run_id}", "task": f"{task_id}/{index}", **body})
        return {}

    def find(self, dag_id: str, run_id: str) -> dict[str, Any]:
        return self.runs[run_id]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PageWorld:
    made = PageWorld(tmp_path_factory.mktemp("buttons"), policy={"approval": {}})
    for name in ("first", "second"):
        made.publish(name)
    run_id = made.ask_for_approval("first")
    made.say("first", "approved", at=made.later(1), run_id=run_id, who="bob")
    made.promote("first")
    return made


@pytest.fixture(scope="module")
def airflow() -> FakeRuns:
    return FakeRuns()


@pytest.fixture(scope="module")
def url(world: PageWorld, airflow: FakeRuns) -> Iterator[str]:
    app = FastAPI()
    airflow.add_to(app)
    app.mount("/trainyard", world.app())
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.fail("Chromium is missing: see .ci/system-packages")
    with Browser() as made:
        yield made


@pytest.fixture
def tab(browser: Browser, url: str, airflow: FakeRuns) -> Browser:
    """The page of the channel, with nothing asked for yet."""
    airflow.runs.clear()
    airflow.answers.clear()
    airflow.refusal = 0
    browser.complaints.clear()
    browser.open(f"{url}/trainyard/channels/{ENVIRONMENT}/{MODEL}")
    return browser


def press(tab: Browser, dialog: str, *, generation: int | None = None) -> str:
    """Fill nothing in, press the button, and return what the page says in the end.

    With a generation, the dialog was opened when the channel had that one.
    """
    tab.run("document.querySelector('dialog[open]')?.close()")
    tab.run(f"document.querySelector('[data-opens={dialog}]').click()")
    if generation is not None:
        tab.run(f"document.querySelector('#{dialog} form').dataset.generation = '{generation}'")
    tab.run(f"document.querySelector('#{dialog} button[type=submit]').click()")
    tab.until(f"/pass|fail/.test(document.querySelector('#{dialog} .answer').className)")
    said = tab.run(f"document.querySelector('#{dialog} .answer').innerText")
    assert isinstance(said, str)
    return said


def promotion(world: PageWorld) -> str:
    return f"promote__{world.ids['second']}__g{world.channel.generation}"


def rollback(world: PageWorld) -> str:
    return f"rollback__{MODEL}__g{world.channel.generation}"


def test_pressing_twice_is_one_run(tab: Browser, airflow: FakeRuns, world: PageWorld) -> None:
    assert "The promotion has been asked for." in press(tab, "promote")
    assert "This was asked for already." in press(tab, "promote")
    conf = {"model": MODEL, "release": world.ids["second"]}
    assert airflow.runs == {promotion(world): {"dag": PROMOTE, "state": "queued", "conf": conf}}


@pytest.mark.parametrize("state", ["failed", "success"])
def test_after_the_end_the_button_starts_the_next_run(
    tab: Browser, airflow: FakeRuns, world: PageWorld, state: str
) -> None:
    run_id = promotion(world)
    for number in (1, 2, 3):
        assert "The promotion has been asked for." in press(tab, "promote")
        assert len(airflow.runs) == number
        for run in airflow.runs.values():
            run["state"] = state
    assert list(airflow.runs) == [run_id, f"{run_id}__2", f"{run_id}__3"]
    link = tab.run("document.querySelector('#promote .answer a').href")
    assert link.endswith(f"/dags/{PROMOTE}/runs/{run_id}__3")


def test_the_run_of_another_request_is_not_taken_for_ours(
    tab: Browser, airflow: FakeRuns, world: PageWorld
) -> None:
    run_id = rollback(world)
    airflow.runs[run_id] = {"state": "running", "conf": {**CONF, "reason": "another"}}
    assert "The rollback has been asked for." in press(tab, "rollback")
    assert airflow.runs[f"{run_id}__2"]["conf"] == CONF


def test_nobody_goes_back_twice_by_pressing_late(
    tab: Browser, airflow: FakeRuns, world: PageWorld
) -> None:
    airflow.runs[rollback(world)] = {"state": "success", "conf": CONF}
    assert "This was done already." in press(tab, "rollback")
    assert len(airflow.runs) == 1


def test_a_rollback_that_failed_can_be_asked_for_again(
    tab: Browser, airflow: FakeRuns, world: PageWorld
) -> None:
    airflow.runs[rollback(world)] = {"state": "failed", "conf": CONF}
    assert "The rollback has been asked for." in press(tab, "rollback")
    assert airflow.runs[f"{rollback(world)}__2"]["dag"] == ROLLBACK


def test_a_rollback_that_failed_halfway_is_looked_at_first(tab: Browser, airflow: FakeRuns) -> None:
    airflow.runs[f"rollback__{MODEL}__g1"] = {"state": "failed", "conf": CONF}
    assert "The channel has changed since" in press(tab, "rollback", generation=1)
    assert len(airflow.runs) == 1


def test_a_refusal_is_shown_and_the_button_stays(tab: Browser, airflow: FakeRuns) -> None:
    airflow.refusal = 403
    assert press(tab, "promote") == "Airflow refused (403): because"
    button = "document.querySelector('#promote button[type=submit]')"
    assert tab.run(f"{button}.disabled") is False
    airflow.refusal = 0
    tab.run(f"{button}.click()")
    tab.until("document.querySelector('#promote .answer').className === 'answer pass'")
    assert len(airflow.runs) == 1


@pytest.mark.parametrize("choice", ["Approve", "Reject"])
def test_an_answer_goes_to_the_run_that_asks_with_the_note(
    tab: Browser, airflow: FakeRuns, world: PageWorld, choice: str
) -> None:
    """With the keyboard alone, and on a button that came while the page was open."""
    run_id = world.ask_for_approval("second", requester="cho")
    tab.until("!!document.querySelector('[data-opens=answer]')")
    tab.run("document.querySelector('[data-opens=answer]').focus()")
    tab.press("Enter", 13)
    tab.until("!!document.querySelector('#answer[open]')")
    assert world.ids["second"] in tab.run("document.querySelector('#answer').innerText")
    tab.run("document.getElementById('answer-note').value = 'read it'")
    tab.run("document.getElementById('answer-note').focus()")
    tab.press("Enter", 13)
    assert airflow.answers == []
    tab.run(f"document.querySelector('#answer button[value={choice}]').click()")
    tab.until("document.querySelector('#answer .answer').className === 'answer pass'")
    note = {"note": "read it"}
    assert airflow.answers == [
        {"run": run_id, "task": "approve/-1", "chosen_options": [choice], "params_input": note}
    ]
    assert tab.run("document.querySelector('#answer .answer a').href").endswith(
        f"/dags/{run_id.replace('/', '/runs/')}"
    )
    assert tab.complaints == []


def test_somebody_who_may_not_answer_is_told_so(
    tab: Browser, airflow: FakeRuns, world: PageWorld
) -> None:
    world.ask_for_approval("second", requester="cho")
    airflow.refusal = 403
    tab.until("!!document.querySelector('[data-opens=answer]')")
    tab.run("document.querySelector('[data-opens=answer]').click()")
    tab.run("document.querySelector('#answer button[value=Approve]').click()")
    tab.until("document.querySelector('#answer .answer').className === 'answer fail'")
    assert "403" in tab.run("document.querySelector('#answer .answer').innerText")
    airflow.refusal = 409
    tab.run("document.querySelector('#answer button[value=Approve]').click()")
    tab.until("document.querySelector('#answer .answer').className === 'answer pass'")
    assert "Somebody has just answered" in tab.run(
        "document.querySelector('#answer .answer').innerText"
    )


def test_pausing_is_a_run_with_the_reason(
    tab: Browser, airflow: FakeRuns, world: PageWorld, url: str
) -> None:
    world.promote_on("second")
    tab.open(f"{url}/trainyard/channels/{ENVIRONMENT}/{MODEL}")
    tab.until("document.getElementById('live').dataset.state === 'moving'")
    hidden = "[...document.querySelectorAll('[data-while]')].filter(each => each.hidden)"
    assert tab.run(f"{hidden}.map(each => each.dataset.opens)") == ["promote", "resume"]
    tab.run("document.querySelector('[data-opens=pause]').click()")
    tab.run("document.getElementById('pause-reason').value = 'lunch'")
    tab.run("document.querySelector('#pause button[type=submit]').click()")
    tab.until("document.querySelector('#pause .answer').className === 'answer pass'")
    ((run_id, run),) = airflow.runs.items()
    assert run_id == f"pause__{MODEL}__g{world.channel.generation}"
    assert run["dag"] == f"neuron_control__{ENVIRONMENT}"
    assert run["conf"] == {"model": MODEL, "action": "pause", "reason": "lunch"}
