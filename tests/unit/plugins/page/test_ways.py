"""What the page offers to whom, where the environments file names people; and approvals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from fastapi.testclient import TestClient
from tests.page_world import PROMOTE, PageWorld
from tests.rollout_world import ENVIRONMENT, MODEL
from tests.unit.plugins.page.conftest import mounted
from tests.unit.plugins.page.test_app import CHANNEL, Page

POLICY = {
    "allowed": {
        "promote": {"users": ["ada"]},
        "rollback": {"users": ["bob"]},
        "approve": {"users": ["bob", "cho"]},
    },
    "approval": {"needs": 2},
}


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> PageWorld:
    """One release serves, and another waits for approval."""
    made = PageWorld(tmp_path_factory.mktemp("ways") / "home", policy=POLICY)
    for name in ("first", "second"):
        made.publish(name)
    run_id = made.ask_for_approval("first")
    for number, who in enumerate(("bob", "cho"), start=1):
        at = datetime.now(UTC) + timedelta(seconds=number)
        made.say("first", "approved", at=at, run_id=run_id, who=who)
    made.promote("first")
    return made


@pytest.fixture
def page(ways: PageWorld) -> TestClient:
    ways.access.name, ways.access.allowed = "ada", None
    return mounted(ways)


def buttons(client: TestClient) -> list[str]:
    return sorted(Page(client.get(CHANNEL).text).values("data-opens"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ada", ["pause", "promote", "promote-now", "resume"]),
        ("bob", ["abort", "rollback"]),
        ("eve", []),
    ],
)
def test_only_who_the_file_names_gets_a_button(
    page: TestClient, ways: PageWorld, name: str, expected: list[str]
) -> None:
    ways.access.name = name
    assert buttons(page) == expected


def test_an_approval_is_asked_on_the_page_of_whoever_may_give_it(
    page: TestClient, ways: PageWorld
) -> None:
    run_id = ways.ask_for_approval("second", needs=2)
    ways.access.name = "cho"
    shown = Page(page.get(CHANNEL).text)
    assert "waits 0 of 2, until" in shown.text
    (path,) = [path for path in shown.values("data-path") if path.endswith("hitlDetails")]
    assert path == (
        f"/api/v2/dags/{PROMOTE}/dagRuns/{run_id.partition('/')[2]}"
        "/taskInstances/approve/-1/hitlDetails"
    )
    assert "answer" in buttons(page)
    ways.access.name = "ada"
    assert "You are not among those who may approve." in Page(page.get(CHANNEL).text).text
    assert "answer" not in buttons(page)

    at = datetime.now(UTC) + timedelta(seconds=1)
    ways.say("second", "approved", at=at, run_id=run_id, who="cho", note="<b>fine</b>")
    app = mounted(ways)
    ways.access.name = "cho"
    shown = Page(app.get(CHANNEL).text)
    assert "waits 1 of 2" in shown.text
    assert "cho approved (<b>fine</b>)" in shown.text
    assert "You have approved it; somebody else has to as well." in shown.text
    assert "answer" not in buttons(app)
    ways.access.name = "bob"
    assert "answer" in buttons(app)
    ways.say("second", "rejected", at=at + timedelta(seconds=1), run_id=run_id, who="bob")
    app = mounted(ways)
    assert "✗ rejected" in Page(app.get(CHANNEL).text).text
    assert "answer" not in buttons(app)


def test_who_may_not_answer_in_airflow_is_not_asked(page: TestClient, ways: PageWorld) -> None:
    ways.ask_for_approval("first", needs=2)
    ways.access.name, ways.access.allowed = "bob", {("read", PROMOTE)}
    shown = Page(page.get(CHANNEL).text)
    assert "waits 0 of 2" in shown.text
    assert shown.tags.count("dialog") == 0
    assert ENVIRONMENT in shown.text


def test_the_first_promotion_of_all_can_be_approved(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = PageWorld(tmp_path_factory.mktemp("first") / "home", policy=POLICY)
    made.publish("first")
    assert mounted(made).get(CHANNEL).status_code == 404
    made.ask_for_approval("first")
    made.access.name = "bob"
    answer = mounted(made).get(CHANNEL)
    assert answer.status_code == 200
    assert "answer" in Page(answer.text).values("data-opens")


def test_a_release_keeps_who_approved_it(page: TestClient, ways: PageWorld) -> None:
    shown = Page(page.get(f"/trainyard/releases/{MODEL}/{ways.ids['first']}").text).text
    assert f"approved for {ENVIRONMENT} by bob" in shown
    assert f"approved for {ENVIRONMENT} by cho" in shown
