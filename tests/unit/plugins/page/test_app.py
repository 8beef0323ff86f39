"""The pages: what each shows, who may see it, and that nothing in it can run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tests.page_world import PROMOTE, FakeAccess, PageWorld
from tests.rollout_world import ENVIRONMENT, MODEL, Behaviour
from tests.unit.plugins.page.conftest import mounted

from trainyard.canonical import digest
from trainyard.documents.channel import Channel, HistoryEntry, Rejection
from trainyard.store.layout import channel_key
from trainyard_airflow.page import app
from trainyard_airflow.page.access import Act, AirflowAccess
from trainyard_airflow.page.app import create_page

NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)>\"' onmouseover=alert(2) {{7*7}}"
VOID = {"meta", "input", "img", "br", "link"}
CHANNEL = f"/trainyard/channels/{ENVIRONMENT}/{MODEL}"


class Page(HTMLParser):
    """A page's text, tags and attributes; fails where a tag is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += f" {data} "

    def values(self, name: str) -> list[str]:
        return [value for _, each, value in self.attributes if each == name]


def all_paths(world: PageWorld) -> dict[str, str]:
    first, slow = world.ids["first"], world.ids["slow"]
    rollout = world.channel.rollout
    assert rollout is not None
    return {
        "overview": "/trainyard/",
        "channel": CHANNEL,
        "earlier rollout": f"{CHANNEL}/rollouts/3",
        "model": f"/trainyard/models/{MODEL}",
        "release": f"/trainyard/releases/{MODEL}/{slow}",
        "difference": f"/trainyard/releases/{MODEL}/{slow}/diff?against={first}",
        "release report": f"/trainyard/releases/{MODEL}/{slow}/report",
        "run": f"/trainyard/runs/{rollout.driver.run_id}",
        "report": f"/trainyard/reports/{MODEL}-{digest('slow')[:12]}/cpu/latency",
    }


def pages(client: TestClient, world: PageWorld) -> Iterator[tuple[str, str]]:
    for name, path in all_paths(world).items():
        answer = client.get(path)
        assert answer.status_code == 200, (name, answer.text[-500:])
        yield name, answer.text


# --- every page -----------------------------------------------------------------------------------


def test_every_page_is_well_formed(client: TestClient, world: PageWorld) -> None:
    for name, html in pages(client, world):
        page = Page(html)
        assert page.open == [], name
        assert page.tags.count("h1") == 1, name


def test_no_page_needs_anything_from_outside(client: TestClient, world: PageWorld) -> None:
    for name, html in pages(client, world):
        page = Page(html)
        assert re.findall(r"(?:https?:)?//[a-z]+\.|url\(|@import|javascript:", html) == [], name
        places = page.values("href") + page.values("src") + page.values("action")
        assert [p for p in places if not p.startswith(("/trainyard/", "/dags/", "#"))] == [], name
        assert [n for _, n, _ in page.attributes if n.startswith("on") or n == "style"] == [], name


def test_only_scripts_and_styles_of_the_page_itself_may_run(client: TestClient) -> None:
    policies = set()
    for _ in range(2):
        answer = client.get(CHANNEL)
        policy = answer.headers["content-security-policy"]
        (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
        page = Page(answer.text)
        assert page.values("nonce") == [nonce] * 2
        assert page.tags.count("script") == page.tags.count("style") == 1
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'self'" in policy
        assert "unsafe" not in policy
        policies.add(policy)
    assert len(policies) == 2


def test_pages_are_not_kept_by_anybody(client: TestClient) -> None:
    answer = client.get(CHANNEL)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_nobody_sees_anything_without_a_login(
    client: TestClient, world: PageWorld, access: FakeAccess
) -> None:
    access.name = ""
    for path in all_paths(world).values():
        answer = client.get(path)
        assert answer.status_code == 401
        assert MODEL not in answer.text
        assert "log in" in Page(answer.text).text


@pytest.mark.parametrize("path", ["", "nowhere", "docs", "openapi.json", "channels/", "a/b/c/d/"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_without_a_login_an_unknown_address_is_like_any_other(
    client: TestClient, access: FakeAccess, method: str, path: str
) -> None:
    access.name = ""
    answer = client.request(method, f"/trainyard/{path}", follow_redirects=False)
    assert answer.status_code == 401


def test_the_login_is_airflows_own(world: PageWorld) -> None:
    page = create_page(access=AirflowAccess(), settings=world.settings, store=world.store)
    for path in ("/", "/nowhere"):
        assert TestClient(page).get(path).status_code == 401


@pytest.mark.parametrize("path", ["docs", "redoc", "openapi.json"])
def test_there_are_no_routes_beside_the_pages(client: TestClient, path: str) -> None:
    assert client.get(f"/trainyard/{path}").status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_the_page_itself_changes_nothing(client: TestClient, method: str) -> None:
    assert client.request(method, CHANNEL).status_code == 405


# --- the overview ---------------------------------------------------------------------------------


def test_the_overview_has_a_line_for_each_channel(client: TestClient, world: PageWorld) -> None:
    page = Page(client.get("/trainyard/").text)
    line = f"{MODEL} {ENVIRONMENT} holding, step 2 of 2 {world.ids['second']} {world.ids['third']}"
    assert line in page.text
    assert "50 / 50 %" in page.text
    assert "ada" in page.text
    assert "stable 50 %, candidate 50 %" in page.values("aria-label")
    assert f"{MODEL} (4)" in page.text


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("?q=ADD", True),
        ("?q=ada", True),
        ("?q=nobody", False),
        ("?show=moving", True),
        ("?show=trouble", False),
    ],
)
def test_the_overview_can_be_narrowed(client: TestClient, query: str, shown: bool) -> None:
    text = Page(client.get(f"/trainyard/{query}").text).text
    assert (f"{MODEL} {ENVIRONMENT} holding" in text) is shown
    assert ("None of the 1 channels is like that." in text) is not shown


def test_a_channel_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    world = PageWorld(tmp_path)
    world.publish("first")
    world.promote("first")
    world.store.put("channels/broken/staging.json", b"{}")
    text = Page(mounted(world).get("/trainyard/").text).text
    assert "broken in staging cannot be read" in text
    assert f"{MODEL} {ENVIRONMENT} serving" in text


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    text = Page(mounted(PageWorld(tmp_path)).get("/trainyard/").text).text
    assert "Nothing is served yet." in text


# --- a channel ------------------------------------------------------------------------------------


def test_a_channel_shows_its_rollout(client: TestClient, world: PageWorld) -> None:
    page = Page(client.get(CHANNEL).text)
    assert "✓ deploy ✓ warm up ✓ 10 % ▶ 50 % bake" in page.text
    assert world.channel.rollout is not None
    assert world.channel.rollout.verdict is not None
    assert f"{world.channel.rollout.verdict.exposed_requests} requests in" in page.text
    awaited, harm_only = ("ttft", "tpot", "errors", "ttft_tail"), ("aborted", "truncated")
    for metric in (*awaited, *harm_only):
        assert f"Evidence about {metric} over the time of exposure" in page.values("aria-label")
        assert f"{metric} of both releases over the time of exposure" in page.values("aria-label")
    # Both releases, harm, and promotion where it waits for the metric.
    assert page.tags.count("polyline") == 4 * len(awaited) + 3 * len(harm_only)
    assert f"{world.ids['third']} gets 50 % of the traffic" in page.text
    assert f"Rejected {world.ids['slow']} in rollout 3" in page.text


def test_a_finished_rollout_can_be_seen_later(client: TestClient, world: PageWorld) -> None:
    page = Page(client.get(f"{CHANNEL}/rollouts/3").text)
    assert f"Rollout 3 of {world.ids['slow']} ✗ rolled back" in page.text
    assert "Evidence about ttft_tail over the time of exposure" in page.values("aria-label")
    assert "rolled back and rejected: Harm" in page.text
    assert "dialog" not in page.tags
    assert "live" not in page.values("id")


def test_a_long_rollout_is_drawn_with_fewer_points(
    client: TestClient, world: PageWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = client.get(CHANNEL).text
    monkeypatch.setattr(app, "MOST_POINTS", 3)
    html = client.get(CHANNEL).text
    assert html.count("<circle") <= whole.count("<polyline") * 3 < whole.count("<circle")
    assert world.channel.rollout is not None
    assert world.channel.rollout.verdict is not None
    newest = f"good enough, {world.channel.rollout.verdict.at:.0f} s"
    assert Page(whole).text.count(newest) == Page(html).text.count(newest) == 4


def test_only_what_changes_is_shown_live(client: TestClient, world: PageWorld) -> None:
    page = Page(client.get(CHANNEL).text)
    assert {"live", "live-sign"} <= set(page.values("id"))
    assert page.values("data-state") == ["moving"]
    assert page.values("data-generation") == [str(world.channel.generation)]


def test_actions_ask_airflows_public_interface(client: TestClient, world: PageWorld) -> None:
    page = Page(client.get(CHANNEL).text)
    assert world.channel.rollout is not None
    run_id = world.channel.rollout.driver.run_id.partition("/")[2]
    assert page.values("data-path") == [
        f"/api/v2/dags/{PROMOTE}/dagRuns",
        f"/api/v2/dags/neuron_rollback__{ENVIRONMENT}/dagRuns",
        *[f"/api/v2/dags/neuron_control__{ENVIRONMENT}/dagRuns"] * 3,
        f"/api/v2/dags/{PROMOTE}/dagRuns/{run_id}/taskInstances/rollout",
    ]
    assert page.values("data-verb") == [
        "promote", "rollback", "pause", "resume", "promote-now", "abort",
    ]  # fmt: skip
    offered = re.findall(r"<option>([^<]*)</option>", client.get(CHANNEL).text)
    assert world.ids["third"] in offered
    assert offered.count(world.ids["second"]) == 0


@pytest.mark.parametrize(
    ("allowed", "dialogs"),
    [
        (set(), []),
        ({("start", PROMOTE)}, ["promote"]),
        ({("start", f"neuron_rollback__{ENVIRONMENT}")}, ["rollback"]),
        ({("mark", PROMOTE)}, ["abort"]),
        ({("start", f"neuron_control__{ENVIRONMENT}")}, ["pause", "resume", "promote-now"]),
    ],
)
def test_everybody_sees_only_the_actions_they_may_take(
    client: TestClient, access: FakeAccess, allowed: set[tuple[Act, str]], dialogs: list[str]
) -> None:
    access.allowed = {("read", PROMOTE), *allowed}
    page = Page(client.get(CHANNEL).text)
    assert page.values("data-opens") == dialogs
    assert page.tags.count("dialog") == len(dialogs)


def test_an_environment_that_one_may_not_read_is_not_there(
    client: TestClient, access: FakeAccess
) -> None:
    access.allowed = {("read", "neuron_promote__staging"), ("read", "neuron_release")}
    assert client.get(CHANNEL).status_code == 403
    assert ENVIRONMENT not in Page(client.get("/trainyard/").text).text
    assert ENVIRONMENT not in Page(client.get(f"/trainyard/models/{MODEL}").text).text


def test_who_may_not_read_releases_sees_none(
    client: TestClient, world: PageWorld, access: FakeAccess
) -> None:
    access.allowed = {("read", PROMOTE)}
    assert "Releases" not in Page(client.get("/trainyard/").text).text
    paths = all_paths(world)
    for name in ("model", "release", "difference", "report"):
        assert client.get(paths[name]).status_code == 403


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("channels/staging/adder", 404),
        ("channels/production/adder/rollouts/99", 404),
        ("channels/production/..%2f..%2fetc", 404),
        ("channels/production/UPPER", 400),
        ("models/nothing", 404),
        ("releases/adder/latest", 400),
        ("releases/adder/adder-000000000000", 404),
        ("reports/adder-plan/cpu/unknown", 404),
        ("nowhere", 404),
    ],
)
def test_what_is_not_there_is_said_plainly(client: TestClient, path: str, status: int) -> None:
    answer = client.get(f"/trainyard/{path}")
    assert answer.status_code == status
    assert Page(answer.text).tags.count("h1") == 1


# --- releases -------------------------------------------------------------------------------------


def test_a_model_lists_its_releases(client: TestClient, world: PageWorld) -> None:
    text = Page(client.get(f"/trainyard/models/{MODEL}").text).text
    assert all(release_id in text for release_id in world.ids.values())
    assert f"stable in {ENVIRONMENT}" in text
    assert f"candidate in {ENVIRONMENT}" in text


def test_a_release_shows_verdicts_places_and_provenance(
    client: TestClient, world: PageWorld
) -> None:
    page = Page(client.get(f"/trainyard/releases/{MODEL}/{world.ids['slow']}").text)
    assert f"{world.ids['slow']} ✓ signed" in page.text
    assert f"{ENVIRONMENT} rejected on" in page.text
    assert "Latency gate ✓ pass" in page.text
    assert "level busy: ttft_p99_ms 210 <= 400" in page.text
    assert "neuron_release/manual-1" in page.text
    assert "/dags/neuron_release/runs/manual-1" in page.values("href")
    assert "rejection" in page.text
    assert page.tags.count("iframe") == 2
    assert [v for t, n, v in page.attributes if t == "iframe" and n == "sandbox"] == ["", ""]


def test_a_release_shows_first_what_its_verdicts_warn_of(tmp_path: Path) -> None:
    words = "behaviour penalties: not supported by the lane."
    world = PageWorld(tmp_path, warnings=(words,))
    world.publish("first")
    page = Page(mounted(world).get(f"/trainyard/releases/{MODEL}/{world.ids['first']}").text)
    assert f"Warnings {words} Where it serves" in page.text
    assert page.text.count(words) == 1, "each once, and not among the attestations again"


def test_a_release_of_a_key_that_is_not_trusted_says_so(tmp_path: Path) -> None:
    world = PageWorld(tmp_path / "here")
    world.publish("first")
    stranger = PageWorld(tmp_path / "elsewhere", store=world.store)
    page = Page(mounted(stranger).get(f"/trainyard/releases/{MODEL}/{world.ids['first']}").text)
    assert "✗ signature" in page.text
    assert "✓ signed" not in page.text


def test_two_releases_are_compared_field_by_field(client: TestClient, world: PageWorld) -> None:
    first, slow = world.ids["first"], world.ids["slow"]
    text = Page(client.get(f"/trainyard/releases/{MODEL}/{slow}/diff?against={first}").text).text
    assert "serving.max_num_seqs 16 1" in text
    assert "serving.dtype float32 \N{EN DASH} absent" in text
    assert "toolchain" not in text


def test_a_stored_report_can_do_nothing(client: TestClient, world: PageWorld) -> None:
    key = f"reports/{MODEL}-{digest('slow')[:12]}/cpu/latency.html"
    kept = world.store.read(key).data
    world.store.put(key, b"<script>alert(1)</script>")
    try:
        answer = client.get(f"/trainyard/{key.removesuffix('.html')}")
    finally:
        world.store.put(key, kept)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none';")
    assert "allow-" not in policy
    assert "script-src" not in policy


def test_the_report_of_a_release_is_one_page_that_can_do_nothing(
    client: TestClient, world: PageWorld, access: FakeAccess
) -> None:
    path = f"/trainyard/releases/{MODEL}/{world.ids['slow']}"
    answer = client.get(f"{path}/report")
    page = Page(answer.text)
    assert f"{world.ids['slow']} ✓ pass" in page.text
    assert "level busy: ttft_p99_ms 210 <= 400" in page.text
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none';")
    assert {"script", "a", "link", "img"}.isdisjoint(page.tags)
    assert f"{path}/report" in Page(client.get(path).text).values("href")

    access.allowed = {("read", PROMOTE)}
    assert client.get(f"{path}/report").status_code == 403


# --- runs -----------------------------------------------------------------------------------------


def test_the_run_of_a_promotion_shows_its_rollout(client: TestClient, world: PageWorld) -> None:
    started = [e.detail["run_id"] for e in world.channel.history if e.event == "rollout_started"]
    shown = [Page(client.get(f"/trainyard/runs/{run_id}").text).text for run_id in started]
    assert [f"Rollout {n} of" in text for n, text in enumerate(shown, start=1)] == [True] * 4


def test_the_run_of_a_release_shows_its_plan(tmp_path: Path) -> None:
    from tests.unit.yard import plan

    from trainyard.documents.plan import plan_id_of_run
    from trainyard.store.documents import create_document
    from trainyard.store.layout import plan_key

    world = PageWorld(tmp_path)
    wanted = plan(plan_id_of_run(MODEL, "neuron_release", "manual__2026-11-22T12:00:00+00:00"))
    create_document(world.store, plan_key(wanted.plan_id), wanted)
    path = "/trainyard/runs/neuron_release/manual__2026-11-22T12%3A00%3A00%2B00%3A00"
    text = Page(mounted(world).get(path).text).text
    assert f"{MODEL} v1" in text
    assert "No step has begun." in text


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (f"{PROMOTE}/another", "No rollout"),
        ("neuron_release/another", "has made no plan yet"),
        ("somebody_elses_dag/run", "Nothing to show"),
    ],
)
def test_other_runs_have_nothing_to_show(client: TestClient, run: str, words: str) -> None:
    assert words in Page(client.get(f"/trainyard/runs/{run}").text).text


def test_a_run_that_has_just_begun_is_looked_at_again(client: TestClient) -> None:
    assert 'id="live"' in client.get("/trainyard/runs/neuron_release/another").text
    assert 'id="live"' not in client.get("/trainyard/runs/somebody_elses_dag/run").text


# --- hostile text ---------------------------------------------------------------------------------


def test_text_of_others_is_shown_and_never_run(tmp_path: Path) -> None:
    world = PageWorld(tmp_path, summary=NASTY)
    world.access.name = NASTY
    hostile = {
        "revision": NASTY,
        "served_model_name": NASTY,
        "image": NASTY,
        "serving": {NASTY: NASTY},
        "toolchain": {NASTY: NASTY},
    }
    world.publish("first", **hostile)
    world.publish("second", **{**hostile, "serving": {NASTY: f"{NASTY} 2"}})
    world.promote("first")
    poison(world)
    client = mounted(world)
    first, second = world.ids["first"], world.ids["second"]
    for path in (
        "/trainyard/",
        f"/trainyard/?q={NASTY}",
        CHANNEL,
        f"/trainyard/models/{MODEL}",
        f"/trainyard/releases/{MODEL}/{first}",
        f"/trainyard/releases/{MODEL}/{first}/diff?against={second}",
        f"/trainyard/releases/{MODEL}/{NASTY}",
        f"/trainyard/runs/{NASTY}/{NASTY}",
    ):
        page = Page(client.get(path).text)
        assert page.tags.count("script") == 1, path
        assert "img" not in page.tags, path
        assert not [n for _, n, _ in page.attributes if n.startswith("on")], path
    shown = Page(client.get(CHANNEL).text).text
    assert " ".join(NASTY.split()) in shown


def poison(world: PageWorld) -> None:
    """Put hostile text wherever a channel can hold text of others."""
    channel = world.channel
    assert channel.rollout is not None
    rollout = channel.rollout.model_copy(
        update={"reason": NASTY, "requested_by": NASTY, "evidence_key": NASTY}
    )
    entry = HistoryEntry(
        at=world.world.now,
        generation=channel.generation,
        event="promoted",
        release_id=NASTY,
        rollout=channel.rollout.number,
        who=NASTY,
        detail={"why": NASTY, NASTY: NASTY},
    )
    rejection = Rejection(release_id=NASTY, at=world.world.now, rollout=1, reason=NASTY)
    changed: Channel = channel.model_copy(
        update={
            "rollout": rollout,
            "history": (*channel.history, entry),
            "rejected": (rejection,),
        }
    )
    world.store.put(channel_key(MODEL, ENVIRONMENT), changed.to_bytes())


def test_undoing_the_last_promotion_is_offered_only_if_there_is_one(tmp_path: Path) -> None:
    world = PageWorld(tmp_path)
    for name in ("first", "second"):
        world.publish(name)
        world.promote(name)
    to_first = f"<option>{world.ids['first']}</option>"
    assert "undo the last promotion" in (page := mounted(world).get(CHANNEL).text)
    assert to_first in page
    world.publish("slow", behaviour=Behaviour(ttft_s=0.09))
    world.promote("slow")
    assert world.channel.rollout is not None
    assert world.channel.rollout.outcome == "rolled_back"
    assert "undo the last promotion" not in (page := mounted(world).get(CHANNEL).text)
    assert to_first in page
