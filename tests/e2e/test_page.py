"""The page in a real Airflow, seen with a real browser; and the client, asking that Airflow.

With PAGE_PICTURES in the environment, pictures of the pages are written into that folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.api_examples import run_examples
from tests.browser import CHROMIUM, Browser
from tests.page_world import PROMOTE, PageWorld, looked_several_times
from tests.platform_world import Platform, note
from tests.rollout_world import ENVIRONMENT, MODEL, Behaviour

from trainyard.documents.channel import Channel
from trainyard.errors import Refused
from trainyard.platform.control import up
from trainyard.platform.request import ask, promote_request, wait
from trainyard.rollout.channel_store import read_channel
from trainyard.store.layout import channel_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

FRAME = "document.querySelector('iframe').contentDocument"
TEXT = "(document.querySelector('iframe')?.contentDocument?.body?.innerText ?? '')"
IN_STAGING = f"/plugin/trainyard/trainyard/channels/staging/{MODEL}"
IN_PRODUCTION = f"/plugin/trainyard/trainyard/channels/{ENVIRONMENT}/{MODEL}"


def fill(platform: Platform) -> dict[str, str]:
    """Production serves one release and has rejected another; in staging a rollout is under way."""
    made = PageWorld(platform.settings.home)
    for name, behaviour in (("first", None), ("slow", Behaviour(ttft_s=0.09)), ("third", None)):
        made.publish(name, behaviour=behaviour)
    made.promote("first")
    made.promote("slow")
    production = made.channel
    made.promote("third", until=looked_several_times)
    rollout = made.channel.rollout
    assert rollout is not None
    run_id = rollout.driver.run_id.replace(ENVIRONMENT, "staging")
    driver = rollout.driver.model_copy(update={"run_id": run_id})
    moving = made.channel.model_copy(
        update={
            "environment": "staging",
            "rollout": rollout.model_copy(update={"driver": driver}),
        }
    )
    memory = made.world.store
    for entry in list(memory.list("rollouts")):
        copied = entry.key.replace(f"/{ENVIRONMENT}/", "/staging/")
        memory.put(copied, memory.read(entry.key).data)
    for channel in (production, moving):
        memory.put(channel_key(MODEL, channel.environment), channel.to_bytes())
    for key, stored in memory.keys.items():
        path = platform.settings.store_root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored.data)
    return made.ids


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    made = Platform.make(Path(tempfile.mkdtemp(prefix="trainyard-page-")))
    try:
        made.ids = fill(made)  # type: ignore[attr-defined]
        made.address = up(made.settings, note)
        made.api.wait_for_dag(PROMOTE)
        yield made
    finally:
        assert made.stop() == 0
        made.remove()


@pytest.fixture(scope="module")
def ids(platform: Platform) -> dict[str, str]:
    found: dict[str, str] = platform.ids  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def url(platform: Platform) -> str:
    assert platform.address is not None
    return platform.address.airflow_url


@pytest.fixture(scope="module")
def token(platform: Platform, url: str) -> str:
    assert platform.address is not None
    login = {"username": platform.address.username, "password": platform.address.password}
    answer = httpx.post(f"{url}/auth/token", json=login, timeout=60)
    found: str = answer.json()["access_token"]
    return found


@pytest.fixture
def tab(url: str, token: str) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.fail("Chromium is missing: see .ci/system-packages")
    with Browser() as made:
        made.set_cookie(url, "_token", token)
        yield made


def picture(tab: Browser, name: str) -> None:
    folder = os.environ.get("PAGE_PICTURES")
    if folder:
        tab.screenshot(Path(folder, f"{name}.png"))


def test_the_plugin_is_loaded_and_nothing_of_it_failed(platform: Platform) -> None:
    plugins = platform.api.request("GET", "/api/v2/plugins").json()["plugins"]
    (ours,) = [each for each in plugins if each["name"] == "trainyard"]
    assert [view["destination"] for view in ours["external_views"]] == ["nav", "dag_run"]
    errors = platform.api.request("GET", "/api/v2/plugins/importErrors").json()
    assert errors["import_errors"] == []


def test_without_a_login_there_is_nothing(url: str, ids: dict[str, str]) -> None:
    for path in ("", f"channels/staging/{MODEL}", f"releases/{MODEL}/{ids['first']}"):
        answer = httpx.get(f"{url}/trainyard/{path}", timeout=60)
        assert answer.status_code == 401
        assert ids["first"] not in answer.text


def test_a_token_opens_it_as_well(url: str, token: str, ids: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.get(f"{url}/trainyard/", headers=headers, timeout=60)
    assert answer.status_code == 200
    assert ids["first"] in answer.text


def test_a_person_finds_it_in_the_navigation(url: str, tab: Browser, ids: dict[str, str]) -> None:
    tab.open(url)
    link = "[...document.querySelectorAll('nav a, nav button, a')]"
    tab.until(f"{link}.some(each => each.innerText.trim() === 'Trainyard')", timeout_s=120)
    tab.run(f"{link}.find(each => each.innerText.trim() === 'Trainyard').click()")
    tab.until(f"{TEXT}.includes('Channels') && {TEXT}.includes('{ids['first']}')")
    assert "/plugin/trainyard" in tab.run("location.pathname")
    picture(tab, "page-overview")

    # A link inside the page is a new address outside, to be kept or sent to somebody.
    tab.run(f"[...{FRAME}.querySelectorAll('a')].find(a => a.innerText === 'staging').click()")
    tab.until(f"{TEXT}.includes('{MODEL} in staging')")
    tab.until(f"location.pathname.endsWith('/channels/staging/{MODEL}')")


def test_it_is_as_light_or_dark_as_what_is_around_it(url: str, tab: Browser) -> None:
    tab.open(url + IN_STAGING)
    tab.until(f"{TEXT}.includes('{MODEL} in staging')", timeout_s=120)
    for theme in ("dark", "light"):
        tab.run(f"document.documentElement.className = '{theme}'")
        tab.until(f"{FRAME}.documentElement.classList.contains('{theme}')")
        picture(tab, f"page-channel-{theme}")


def test_what_happens_shows_without_reloading(url: str, tab: Browser, platform: Platform) -> None:
    tab.open(url + IN_STAGING)
    tab.until(f"{TEXT}.includes('holding, step 2 of 2')", timeout_s=120)
    before: Channel = read_channel(platform.store, MODEL, "staging")
    assert before.rollout is not None
    rollout = before.rollout.model_copy(update={"held_since": before.rollout.phase_since})
    after = before.model_copy(update={"rollout": rollout, "generation": before.generation + 1})
    platform.store.put(channel_key(MODEL, "staging"), after.to_bytes())
    tab.until(f"{TEXT}.includes('holding, undecided')")
    assert tab.run(f"{FRAME}.getElementById('live').dataset.generation") == str(after.generation)


def test_a_run_is_asked_for_as_the_signed_in_user(
    url: str, tab: Browser, platform: Platform, ids: dict[str, str]
) -> None:
    tab.open(url + IN_PRODUCTION)
    tab.until(f"{TEXT}.includes('{MODEL} in {ENVIRONMENT}')", timeout_s=120)
    generation = platform.channel.generation
    # With the keyboard alone: the button has the focus, Enter opens the dialog.
    tab.run(f"{FRAME}.querySelector('[data-opens=promote]').focus()")
    tab.press("Enter", 13)
    tab.until(f"!!{FRAME}.querySelector('dialog#promote[open]')")
    tab.run(f"{FRAME}.getElementById('promote-release').value = '{ids['slow']}'")
    tab.run(f"{FRAME}.getElementById('promote-reason').value = 'asked by a test'")
    picture(tab, "page-promote")
    tab.run(f"{FRAME}.querySelector('#promote button[type=submit]').click()")
    tab.until(f"{FRAME}.querySelector('#promote .answer').className === 'answer pass'")

    run_id = f"promote__{ids['slow']}__g{generation}"
    run = platform.api.run(PROMOTE, run_id)
    assert run["triggering_user_name"] == "admin"
    assert run["conf"] == {"model": MODEL, "release": ids["slow"], "reason": "asked by a test"}
    assert platform.ended(PROMOTE, run_id) == "failed"
    assert platform.channel.generation == generation

    tab.run(f"{FRAME}.querySelector('#promote .answer a').click()")
    tab.until(f"location.pathname.startsWith('/dags/{PROMOTE}/runs/')")
    assert tab.complaints == []


def test_a_refusal_is_shown_in_airflows_words(url: str, tab: Browser) -> None:
    tab.open(url + IN_STAGING)
    tab.until(f"{TEXT}.includes('{MODEL} in staging')", timeout_s=120)
    tab.run(f"{FRAME}.querySelector('[data-opens=abort]').click()")
    tab.run(f"{FRAME}.querySelector('#abort button[type=submit]').click()")
    tab.until(f"{FRAME}.querySelector('#abort .answer').className === 'answer fail'")
    assert "404" in tab.run(f"{FRAME}.querySelector('#abort .answer').innerText")


def test_a_stored_report_shows_and_may_nothing(url: str, tab: Browser, ids: dict[str, str]) -> None:
    tab.open(f"{url}/trainyard/releases/{MODEL}/{ids['first']}")
    tab.run("document.querySelector('details').open = true")
    tab.run("document.querySelector('iframe').scrollIntoView()")
    tab.until("document.querySelector('iframe').contentDocument === null")
    assert tab.complaints == []


def test_a_phone_needs_no_sideways_scrolling(url: str, tab: Browser, ids: dict[str, str]) -> None:
    tab.resize(360, 740, phone=True)
    for path in (
        "",
        f"channels/staging/{MODEL}",
        f"channels/{ENVIRONMENT}/{MODEL}/rollouts/2",
        f"models/{MODEL}",
        f"releases/{MODEL}/{ids['slow']}",
        f"releases/{MODEL}/{ids['slow']}/diff?against={ids['first']}",
    ):
        tab.open(f"{url}/trainyard/{path}")
        assert tab.run("document.documentElement.scrollWidth") == 360, path


def test_the_client_learns_why_a_promotion_was_refused(
    platform: Platform, ids: dict[str, str]
) -> None:
    wanted = promote_request(MODEL, ids["slow"], ENVIRONMENT, key="a CI job")
    first, second = ask(platform.api, wanted), ask(platform.api, wanted)
    assert (first.started, second.started) == (True, False)
    assert first.run_id == second.run_id
    said: list[str] = []
    with pytest.raises(Refused, match="was rejected"):
        wait(platform.api, wanted.dag_id, first.run_id, said.append, timeout_s=300)
    assert "verify: failed" in said


def test_the_examples_of_the_documentation_work_here(
    platform: Platform, url: str, ids: dict[str, str], tmp_path: Path
) -> None:
    assert platform.address is not None
    run_examples(
        tmp_path,
        url=url,
        username=platform.address.username,
        password=platform.address.password,
        release=ids["slow"],
        environment=ENVIRONMENT,
    )
