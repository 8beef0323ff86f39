"""The whole release on this machine: real Airflow, real vLLM, real clients, and every way it ends.

It runs with the variables and files of `docker-compose.yaml`, without containers: Airflow's
metadata in PostgreSQL, documents in S3 (moto), figures in Prometheus. One platform is started for
all tests of this file, and one story is played on it, chapter after chapter; the tests of a chapter
look at what it left:

1. A first release becomes stable. Worse weights fail at the accuracy gate. A release that serves
   one request at a time is published only.
2. Clients come. Somebody who has never been here asks for a better release, its twin in all but
   that, with Airflow's form, watches it, approves its promotion, pauses the canary and lets it go
   on, all in a browser.
3. The slow twin is promoted by hand: real requests queue up behind it, and the judge takes it back.
4. What may not happen is tried: forbidden, unknown and repeated requests.
5. The person from chapter 2 rolls back with a button.
6. Airflow's database is lost, and an old copy of it comes back. Then the store is lost as well, and
   a copy of another moment comes back.
7. Everything is stopped.

With RELEASE_PICTURES in the environment, pictures of what the person sees are written into that
folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.browser import CHROMIUM, Browser
from tests.compose_world import (
    Parts,
    copy_store,
    dump_database,
    lose_and_restore_database,
    lose_and_restore_store,
    running_like_compose,
    verify,
)
from tests.notice_servers import Webhook
from tests.person import CanarySeen, Person
from tests.platform_world import (
    ENVIRONMENT,
    MODEL,
    PROMOTE,
    RELEASE,
    ROLLBACK,
    Platform,
    Watch,
    needs_everything,
    note,
    wait_for,
)
from tests.prometheus import Prometheus

from trainyard.documents.channel import Channel
from trainyard.documents.look import Look
from trainyard.documents.measurement import GateVerdict
from trainyard.errors import BadInput, NotFound
from trainyard.releases import list_attestations, list_releases, load_release, was_rejected
from trainyard.store.documents import read_document
from trainyard.store.layout import release_key, rollout_prefix, verdict_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400), needs_everything]

REQUESTS_PER_S = 5.0
UNKNOWN = f"{MODEL}-000000000000"

FIRST, WORSE, TWIN, AGAIN = "e2e-first", "e2e-worse", "e2e-twin", "e2e-again"
WHY_BACK = "Ada wants the old one."


# --- the story ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> Iterator[Parts]:
    with running_like_compose() as made:
        yield made


@pytest.fixture(scope="module")
def platform(parts: Parts) -> Platform:
    return parts.platform


@pytest.fixture(scope="module")
def figures(parts: Parts) -> Prometheus:
    """The Prometheus that looks on."""
    return parts.figures


@pytest.fixture(scope="module")
def hook(parts: Parts) -> Webhook:
    """Where notices arrive."""
    return parts.hook


@pytest.fixture(scope="module")
def watch(platform: Platform) -> Iterator[Watch]:
    """Looks on from the first chapter to the last."""
    with Watch(platform) as made:
        yield made


@pytest.fixture(scope="module")
def first(platform: Platform, watch: Watch) -> str:
    """Chapter 1: the release that became the first stable one."""
    platform.need("r1")
    assert platform.release(FIRST, "r1", ENVIRONMENT)
    # They take turns at compiling and measuring, before clients come and need the processors.
    platform.need("r2", "r3")
    assert platform.release(WORSE, "r3", ENVIRONMENT)
    assert platform.release(TWIN, "r2", overrides={"max_num_seqs": 1})
    platform.approve(PROMOTE)
    assert platform.ended(RELEASE, FIRST) == "success", platform.describe(RELEASE, FIRST)
    return platform.release_of(FIRST)


@pytest.fixture(scope="module")
def worse(platform: Platform, first: str) -> str:
    """Chapter 1: the state in which the run with the worse weights ended."""
    return platform.ended(RELEASE, WORSE)


@pytest.fixture(scope="module")
def slow(platform: Platform, first: str) -> str:
    """Chapter 1: the release that serves one request at a time."""
    assert platform.ended(RELEASE, TWIN) == "success", platform.describe(RELEASE, TWIN)
    return platform.release_of(TWIN)


@pytest.fixture(scope="module")
def person(platform: Platform) -> Iterator[Person]:
    """Somebody with a browser, who has never been here."""
    if not CHROMIUM:
        pytest.fail("Chromium is missing: see .ci/system-packages")
    assert platform.address is not None
    folder = os.environ.get("RELEASE_PICTURES")
    with Browser(width=1280, height=860) as tab:
        yield Person(tab, platform.address, Path(folder) if folder else None)


@pytest.fixture(scope="module")
def asked(person: Person, first: str, worse: str, slow: str) -> str:
    """Chapter 2: the run of the better release, asked for with Airflow's form."""
    person.log_in()
    return person.ask_for_release(MODEL, "r2", ENVIRONMENT)


@pytest.fixture(scope="module")
def seen(platform: Platform, person: Person, asked: str) -> CanarySeen:
    """Chapter 2: what the person saw of the canary, from their approval to its end."""
    platform.published(asked)
    platform.start_traffic(REQUESTS_PER_S)
    person.look_at_release(asked)
    person.open_channel(ENVIRONMENT, MODEL)
    person.approve()
    return person.watch_canary()


@pytest.fixture(scope="module")
def better(platform: Platform, asked: str, seen: CanarySeen) -> str:
    """Chapter 2: the release that was promoted through a canary."""
    assert platform.ended(RELEASE, asked) == "success", platform.describe(RELEASE, asked)
    return platform.release_of(asked)


@pytest.fixture(scope="module")
def after_promotion(platform: Platform, better: str) -> Channel:
    """Chapter 2: the channel when the better release had been promoted."""
    return platform.channel


@pytest.fixture(scope="module")
def dump(platform: Platform, after_promotion: Channel) -> Path:
    """Chapter 2: a copy of Airflow's database, made while no run was under way."""
    return dump_database(platform)


@pytest.fixture(scope="module")
def twin(platform: Platform, slow: str, after_promotion: Channel, dump: Path) -> str:
    """Chapter 3: the release that the judge took back."""
    assert platform.trigger(PROMOTE, "e2e-twin", model=MODEL, release=slow)
    assert platform.approve(PROMOTE) == "e2e-twin"
    assert platform.ended(PROMOTE, "e2e-twin") == "failed", platform.describe(PROMOTE, "e2e-twin")
    return slow


@pytest.fixture(scope="module")
def after_rollback(platform: Platform, twin: str) -> Channel:
    """Chapter 3: the channel when the twin had been taken back."""
    return platform.channel


@pytest.fixture(scope="module")
def copy(platform: Platform, after_rollback: Channel) -> dict[str, bytes]:
    """Chapter 3: a copy of the store, one rollout younger than that of the database."""
    return copy_store(platform)


@pytest.fixture(scope="module")
def refused(platform: Platform, after_rollback: Channel, twin: str) -> dict[str, str]:
    """Chapter 4: promotions that are refused, by their run, with what `verify` logged."""
    wanted = {
        "rejected": {"release": twin},
        "forced-without-reason": {"release": twin, "force": True},
        "unknown": {"release": UNKNOWN},
        "misspelt": {"release": twin, "forced": True},
    }
    for name, conf in wanted.items():
        assert platform.trigger(PROMOTE, f"e2e-{name}", model=MODEL, **conf)
    # At the same time, to save time: everything of it exists already.
    assert platform.release(AGAIN, "r2")
    logs = {}
    for name in wanted:
        assert platform.ended(PROMOTE, f"e2e-{name}") == "failed"
        logs[name] = platform.log(PROMOTE, f"e2e-{name}", "verify")
    return logs


@pytest.fixture(scope="module")
def fifty(platform: Platform, refused: dict[str, str], twin: str) -> list[bool]:
    """Chapter 4: which of fifty equal requests at once started the run."""
    api, conf = platform.api, {"model": MODEL, "release": twin}
    api.run_state(PROMOTE, "e2e-rejected")  # logs in, once for all threads
    with ThreadPoolExecutor(50) as pool:
        started = list(pool.map(lambda _: api.trigger(PROMOTE, "e2e-fifty", conf), range(50)))
    assert platform.ended(PROMOTE, "e2e-fifty") == "failed"
    return started


@pytest.fixture(scope="module")
def back(person: Person, copy: dict[str, bytes], refused: dict[str, str], fifty: list[bool]) -> str:
    """Chapter 5: the run of the rollback, asked for by button."""
    person.open_channel(ENVIRONMENT, MODEL)
    return person.roll_back(WHY_BACK)


@pytest.fixture(scope="module")
def returned(platform: Platform, person: Person, back: str) -> Channel:
    """Chapter 5: the channel after a person rolled back."""
    assert platform.ended(ROLLBACK, back) == "success", platform.describe(ROLLBACK, back)
    person.see_rolled_back()
    return platform.channel


@pytest.fixture(scope="module")
def agreed(platform: Platform, returned: Channel) -> tuple[int, list[dict[str, str]]]:
    """Chapter 6: what `trainyard verify` said while nothing was lost."""
    return verify(platform)


@pytest.fixture(scope="module")
def restored(
    platform: Platform, agreed: tuple[int, list[dict[str, str]]], dump: Path
) -> list[dict[str, str]]:
    """Chapter 6: what it said after the database of chapter 2 had come back."""
    lose_and_restore_database(platform, dump)
    return verify(platform, "--quick")[1]


@pytest.fixture(scope="module")
def both_restored(
    platform: Platform, restored: list[dict[str, str]], copy: dict[str, bytes]
) -> tuple[int, list[dict[str, str]]]:
    """Chapter 6: what it said of database, store and servers of three different moments."""
    lose_and_restore_store(platform, copy)
    return verify(platform)


# --- chapter 1 ------------------------------------------------------------------------------------


def test_a_first_release_becomes_stable(platform: Platform, first: str) -> None:
    channel = platform.channel
    assert channel.stable is not None
    assert channel.stable.release_id == first
    assert channel.rollout is not None
    assert (channel.rollout.plan.kind, channel.rollout.outcome) == ("bootstrap", "promoted")
    release = load_release(platform.store, MODEL, first, platform.settings)
    assert (release.revision, release.target.name) == ("r1", "cpu")


def test_its_steps_tell_what_they_did_and_who_asked(platform: Platform, first: str) -> None:
    statuses = platform.statuses(FIRST)
    assert list(statuses)[:4] == ["plan", "download", "compile", "measure"]
    assert {s.state for s in statuses.values()} == {"done"}
    assert not any(s.reused for s in statuses.values())
    release = load_release(platform.store, MODEL, first, platform.settings)
    assert release.provenance is not None
    assert release.provenance.dag_run == f"{RELEASE}/{FIRST}"
    assert release.provenance.requested_by == "admin"


def test_every_task_of_the_run_succeeded_or_was_not_asked_for(
    platform: Platform, first: str
) -> None:
    tasks = platform.tasks(RELEASE, FIRST)
    assert tasks.pop("promote.staging") == "skipped"
    assert tasks.pop("target.logit_validation") == "skipped"
    assert set(tasks.values()) == {"success"}


def test_worse_weights_are_stopped_by_the_accuracy_gate(platform: Platform, worse: str) -> None:
    assert worse == "failed"
    tasks = platform.tasks(RELEASE, WORSE)
    assert tasks["target.accuracy_gate"] == "failed"
    assert tasks["target.publish"] == "upstream_failed"
    verdict = read_document(
        platform.store, verdict_key(platform.plan_id(WORSE), "cpu", "accuracy"), GateVerdict
    )
    assert verdict.outcome == "fail"
    assert "fail" in {check.outcome for check in verdict.checks}
    assert re.search(r"addition exact_match is 0\.\d+", verdict.summary)
    status = platform.statuses(WORSE)["accuracy-gate"]
    assert (status.state, status.exit_code) == ("failed", 20)


def test_nothing_of_the_worse_weights_is_published_or_promoted(
    platform: Platform, worse: str
) -> None:
    assert "publish" not in platform.statuses(WORSE)
    revisions = {release.revision for release in list_releases(platform.store, MODEL)}
    assert "r3" not in revisions
    assert platform.tasks(RELEASE, WORSE)["promote.production"] in {"upstream_failed", "skipped"}


def test_a_callers_result_says_why_nothing_was_released(platform: Platform, worse: str) -> None:
    (result,) = platform.api.results(RELEASE, WORSE)["target.accuracy_gate"]
    assert (result["outcome"], result["step"], result["target"]) == ("failed", "gate", "cpu")
    assert re.search(r"addition exact_match is 0\.\d+", result["reason"])


def test_who_wants_to_know_is_told_of_a_gate_and_of_a_release_that_takes_long(
    platform: Platform, hook: Webhook, worse: str
) -> None:
    def told(kind: str, run: str) -> dict[str, str] | None:
        return next((e for e in hook.bodies if (e["kind"], e["run"]) == (kind, run)), None)

    stopped = told("gate_failed", f"{RELEASE}/{WORSE}")
    assert stopped is not None
    assert stopped["headline"] == f"{MODEL} did not pass its accuracy gate"
    assert (stopped["model"], stopped["who"]) == (MODEL, "admin")
    late = wait_for(
        lambda: told("stuck", f"{RELEASE}/{FIRST}"), "the alarm about a deadline", timeout_s=120
    )
    assert "has not ended in time" in late["text"]
    assert platform.address is not None
    assert late["link"].startswith(platform.address.airflow_url)


# --- chapter 2 ------------------------------------------------------------------------------------


def test_the_person_saw_the_evidence_of_the_canary_move(seen: CanarySeen) -> None:
    note(f"{seen}")
    assert 20 in seen.weights
    for figures in (seen.exposed, seen.points):
        assert len(figures) > 2
        assert figures[0] < figures[-1]
    assert "✓ promoted" in seen.ended


def test_a_paused_rollout_is_looked_at_and_goes_on_when_told(
    after_promotion: Channel, seen: CanarySeen
) -> None:
    assert len(seen.points_while_paused) > 1
    (paused,) = [each for each in after_promotion.history if each.event == "paused"]
    (resumed,) = [each for each in after_promotion.history if each.event == "resumed"]
    assert paused.detail["why"] == "Let me look at it first."
    assert (paused.who, resumed.who) == ("admin", "admin")


def test_the_approval_is_on_record_and_was_asked_for(
    platform: Platform, hook: Webhook, better: str
) -> None:
    kept = list_attestations(platform.store, MODEL, better, "approval")
    assert [each.subject["answer"] for each in kept] == ["asked", "approved"]
    assert (kept[1].subject["who"], kept[1].subject["note"]) == ("admin", "Its gates look good.")
    kinds = [each["kind"] for each in hook.bodies if each["release_id"] == better]
    assert kinds[0] == "waiting_approval"
    assert "promoted" in kinds


def test_a_better_release_is_promoted_through_its_canary(
    after_promotion: Channel, first: str, better: str
) -> None:
    assert after_promotion.stable is not None
    assert after_promotion.stable.release_id == better != first
    assert [track.release_id for track in after_promotion.previous] == [first]
    assert after_promotion.candidate is None
    assert after_promotion.weights.stable == 100
    rollout = after_promotion.rollout
    assert rollout is not None
    assert (rollout.plan.kind, rollout.outcome) == ("canary", "promoted")
    assert rollout.verdict is not None
    assert rollout.verdict.outcome == "NON_INFERIOR"
    assert rollout.verdict.exposed_requests > 0
    weights = [
        entry.detail["weight"]
        for entry in after_promotion.history
        if entry.event == "weights" and entry.rollout == rollout.number
    ]
    assert weights == [20, 50]


def test_the_judge_read_prometheus(platform: Platform, after_promotion: Channel) -> None:
    rollout = after_promotion.rollout
    assert rollout is not None
    folder = rollout_prefix(MODEL, ENVIRONMENT, rollout.number)
    looks = [
        read_document(platform.store, entry.key, Look)
        for entry in platform.store.list(f"{folder}/looks")
    ]
    pods = [pod for look in looks for pod in look.snapshot.pods]
    assert pods
    # Only figures that somebody else read off the server have a moment of their own.
    assert all(pod.read_at is not None for pod in pods)


def test_both_releases_served_the_clients(platform: Platform, first: str, better: str) -> None:
    answers = platform.clients.by_release
    assert answers[first] > 0
    assert answers[better] > 0


def test_a_release_of_the_same_architecture_reuses_the_bundle(
    platform: Platform, asked: str, better: str
) -> None:
    statuses = platform.statuses(asked)
    reused = {step: status.reused for step, status in statuses.items()}
    assert reused["compile"]
    assert not reused["measure"]


# --- chapter 3 ------------------------------------------------------------------------------------


def test_the_judge_takes_back_a_release_that_is_too_slow_for_real_traffic(
    after_rollback: Channel, better: str, twin: str
) -> None:
    assert after_rollback.stable is not None
    assert after_rollback.stable.release_id == better
    assert after_rollback.candidate is None
    rollout = after_rollback.rollout
    assert rollout is not None
    assert (rollout.release_id, rollout.outcome) == (twin, "rolled_back")
    assert rollout.verdict is not None
    assert rollout.verdict.outcome == "HARM"
    assert {metric.metric for metric in rollout.verdict.metrics if metric.outcome == "HARM"} <= {
        "ttft",
        "ttft_tail",
    }


def test_the_rejection_has_the_judges_figures(
    platform: Platform, after_rollback: Channel, twin: str
) -> None:
    (rejection,) = after_rollback.rejected
    assert rejection.release_id == twin
    # Candidate against stable in seconds, their ratio, what was allowed, and how many requests.
    assert re.search(r"ttft\S* [\d.e-]+%?( s)? against [\d.e-]+%?", rejection.reason), (
        rejection.reason
    )
    assert platform.store.exists(rejection.evidence_key)
    assert was_rejected(platform.store, MODEL, twin)
    (attestation,) = list_attestations(platform.store, MODEL, twin, "rejection")
    assert attestation.subject["reason"] == rejection.reason
    assert attestation.subject["environment"] == ENVIRONMENT


def test_the_run_of_the_promotion_says_so(platform: Platform, twin: str) -> None:
    tasks = platform.tasks(PROMOTE, "e2e-twin")
    assert tasks == {
        "verify": "success",
        "approve": "success",
        "rollout": "failed",
        "settle": "failed",
    }
    log = platform.log(PROMOTE, "e2e-twin", "settle")
    assert "rolled back" in log
    assert "against" in log
    (settle,) = [
        task
        for task in platform.api.task_states(PROMOTE, "e2e-twin")
        if task["task_id"] == "settle"
    ]
    assert settle["try_number"] == 1


def test_the_twin_differs_in_its_serving_alone(platform: Platform, better: str, twin: str) -> None:
    one, other = (
        load_release(platform.store, MODEL, each, platform.settings) for each in (better, twin)
    )
    assert one.checkpoint_digest == other.checkpoint_digest
    assert one.compile_key == other.compile_key
    assert one.serving_digest != other.serving_digest
    assert other.target.max_num_seqs == 1


# --- chapter 4 ------------------------------------------------------------------------------------


def test_refused_promotions_change_nothing(
    platform: Platform, after_rollback: Channel, refused: dict[str, str]
) -> None:
    assert platform.channel == after_rollback
    for name in refused:
        tasks = platform.tasks(PROMOTE, f"e2e-{name}")
        assert tasks["verify"] == "failed"
        assert tasks["rollout"] == "upstream_failed"


def test_a_rejected_release_comes_back_only_by_force(refused: dict[str, str], twin: str) -> None:
    assert f"{twin} was rejected in {ENVIRONMENT}" in refused["rejected"]
    assert "force this one and say why" in refused["rejected"]


def test_force_needs_a_reason(refused: dict[str, str]) -> None:
    assert "forcing it needs a reason" in refused["forced-without-reason"]


def test_an_unknown_release_is_named(refused: dict[str, str]) -> None:
    assert f"no release {UNKNOWN} of model {MODEL}" in refused["unknown"]


def test_a_misspelt_key_is_not_ignored(refused: dict[str, str]) -> None:
    assert "unknown keys: forced" in refused["misspelt"]


def test_a_second_request_of_one_id_starts_nothing(platform: Platform, first: str) -> None:
    assert platform.release(FIRST, "r1", ENVIRONMENT) is False


def test_the_same_promotion_fifty_times_at_once_is_one_run(
    platform: Platform, fifty: list[bool]
) -> None:
    assert fifty.count(True) == 1
    found = platform.api.request("GET", f"/api/v2/dags/{PROMOTE}/dagRuns?limit=100").json()
    ids = [run["dag_run_id"] for run in found["dag_runs"]]
    assert [each for each in ids if "fifty" in each] == ["e2e-fifty"]


def test_a_callers_result_says_why_nothing_was_promoted(
    platform: Platform, refused: dict[str, str], twin: str
) -> None:
    words = {
        "rejected": f"{twin} was rejected in {ENVIRONMENT}",
        "forced-without-reason": "forcing it needs a reason",
        "unknown": f"no release {UNKNOWN} of model {MODEL}",
        "misspelt": "unknown keys: forced",
    }
    for name, said in words.items():
        result = platform.api.results(PROMOTE, f"e2e-{name}")["settle"]
        assert result["outcome"] == "refused"
        assert said in result["reason"]
        assert (result["model"], result["environment"]) == (MODEL, ENVIRONMENT)


def test_an_unknown_model_is_refused_at_the_door(platform: Platform) -> None:
    with pytest.raises(BadInput, match="400"):
        platform.trigger(RELEASE, "e2e-bad-model", model="ader")
    with pytest.raises(BadInput, match="400"):
        platform.trigger(RELEASE, "e2e-bad-place", model=MODEL, environments=["moon"])


def test_an_unknown_environment_has_no_dag(platform: Platform) -> None:
    with pytest.raises(NotFound, match="404"):
        platform.trigger("neuron_promote__moon", "e2e-moon", model=MODEL, release=UNKNOWN)


def test_a_release_of_what_exists_does_no_work(
    platform: Platform, better: str, refused: dict[str, str]
) -> None:
    assert platform.ended(RELEASE, AGAIN) == "success", platform.describe(RELEASE, AGAIN)
    reused = {step: status.reused for step, status in platform.statuses(AGAIN).items()}
    assert reused["download"]
    assert reused["compile"]
    assert reused["measure"]
    assert reused["publish"]
    assert platform.release_of(AGAIN) == better
    assert platform.stable == better
    assert platform.tasks(RELEASE, AGAIN)["promote.production"] == "skipped"


# --- chapter 5 ------------------------------------------------------------------------------------


def test_a_rollback_returns_the_traffic_to_the_release_before(
    platform: Platform, returned: Channel, first: str, better: str
) -> None:
    assert returned.stable is not None
    assert returned.stable.release_id == first
    assert returned.rollout is not None
    assert (returned.rollout.plan.kind, returned.rollout.outcome) == ("rollback", "promoted")
    started = [e for e in returned.history if e.event == "rollout_started"][-1]
    assert started.detail["reason"] == WHY_BACK
    assert returned.rollout.requested_by == "admin"
    assert [e.who for e in returned.history if e.event == "requester"][-1] == "admin"
    assert platform.ask() == ("640", first)


def test_results_of_what_succeeded_are_typed(
    platform: Platform, asked: str, better: str, back: str, returned: Channel
) -> None:
    assert platform.api.results(RELEASE, asked)["collect_releases"] == {"cpu": better}
    assert platform.api.results(ROLLBACK, back)["rollback"]["outcome"] == "rolled_back"


def test_events_of_assets_tell_what_was_published_and_what_serves(
    platform: Platform, first: str, better: str, slow: str, returned: Channel
) -> None:
    published = asset_events(platform, f"trainyard/{MODEL}")
    assert {each["release"] for each in published} == {first, better, slow}
    promoted = asset_events(platform, f"trainyard/{MODEL}/{ENVIRONMENT}")
    assert [each["release"] for each in promoted] == [first, better, first]
    release = load_release(platform.store, MODEL, better, platform.settings)
    key = release_key(MODEL, better)
    assert promoted[1] == {
        "model": MODEL,
        "release": better,
        "environment": ENVIRONMENT,
        "target": "cpu",
        "revision": "r2",
        "key": key,
        "digest": f"sha256:{hashlib.sha256(platform.store.read(key).data).hexdigest()}",
        "checkpoint_digest": release.checkpoint_digest,
    }


def asset_events(platform: Platform, name: str) -> list[dict[str, str]]:
    """Return the extras of an asset's events, oldest first, as Airflow's REST API has them."""
    api = platform.api
    assets = api.request("GET", f"/api/v2/assets?name_pattern={name}").json()["assets"]
    (asset,) = [each for each in assets if each["name"] == name]
    found = api.request("GET", f"/api/v2/assets/events?asset_id={asset['id']}").json()
    events = sorted(found["asset_events"], key=lambda each: str(each["timestamp"]))
    return [each["extra"] for each in events]


def test_a_rollback_by_button_is_told_too(hook: Webhook, back: str, returned: Channel) -> None:
    told = [each for each in hook.bodies if each["run"] == f"{ROLLBACK}/{back}"]
    assert [each["kind"] for each in told] == ["rolled_back"]


def test_its_servers_are_those_of_the_stable_release(platform: Platform, returned: Channel) -> None:
    from trainyard.serving.records import ServingPaths, desired_servers

    assert returned.stable is not None
    wishes = desired_servers(ServingPaths.of(platform.settings))
    assert [(wish.release_id, wish.replicas) for wish in wishes] == [
        (returned.stable.release_id, 1)
    ]


def test_prometheus_saw_what_happened(
    figures: Prometheus, first: str, better: str, returned: Channel
) -> None:
    place = f'environment="{ENVIRONMENT}",model="{MODEL}"'

    def ended(outcome: str) -> float | None:
        return figures.value(f'trainyard_rollouts_ended{{{place},outcome="{outcome}"}}')

    wait_for(lambda: ended("returned") == 1, "the last rollout in Prometheus", timeout_s=60)
    assert (ended("promoted"), ended("rolled_back")) == (2, 1)
    for release in (first, better):
        served = f'sum(max_over_time(vllm:request_success_total{{release="{release}"}}[1h]))'
        assert (figures.value(served) or 0) > 0
    assert figures.value('trainyard_bundle_lookups{result="miss"}') == 1
    assert (figures.value("trainyard_compile_peak_memory_bytes") or 0) > 100e6
    assert (figures.value(f"trainyard_rollback_seconds{{{place}}}") or 0) > 0
    failed = f'trainyard_gate_verdicts{{model="{MODEL}",gate="accuracy",outcome="fail"}}'
    assert figures.value(failed) == 1
    assert figures.alerts()["TrainyardRolledBack"]


# --- chapter 6 ------------------------------------------------------------------------------------


def test_store_airflow_and_servers_agree(agreed: tuple[int, list[dict[str, str]]]) -> None:
    code, problems = agreed
    assert (code, [each for each in problems if each["kind"] != "note"]) == (0, [])


def test_a_database_of_before_is_told_apart_and_stops_nobody(
    platform: Platform, restored: list[dict[str, str]], back: str, first: str
) -> None:
    (lost,) = restored
    assert (lost["key"], lost["kind"]) == (f"channels/{MODEL}/{ENVIRONMENT}.json", "note")
    # The person's rollback was after the copy.
    assert f"the run of its last rollout, {ROLLBACK}/{back}" in lost["message"]
    assert platform.ask() == ("640", first)
    assert platform.api.run_state(RELEASE, FIRST) == "success"


def test_a_store_of_yet_another_moment_stops_nobody_and_everything_is_told(
    platform: Platform,
    both_restored: tuple[int, list[dict[str, str]]],
    after_rollback: Channel,
    first: str,
    better: str,
) -> None:
    code, problems = both_restored
    assert code == BadInput.exit_code
    channel = f"channels/{MODEL}/{ENVIRONMENT}.json"
    assert platform.route is not None
    followed = platform.route.channel_generation
    assert followed > after_rollback.generation
    told = {each["message"]: (each["key"], each["kind"]) for each in problems}
    wrong = {message for message, (_, kind) in told.items() if kind != "note"}
    # The store is older than what serves: the person's rollback came after the copy.
    assert wrong == {
        f"It is at generation {after_rollback.generation}, but the route follows generation "
        f"{followed}: the store is older than what serves.",
        f"{better} is stable and has no ready server.",
    }
    assert {told[message][0] for message in wrong} == {channel}
    # The database is older still: it never heard of the rollout that the copy ends with.
    (note,) = set(told) - wrong
    assert f"Airflow does not know the run of its last rollout, {PROMOTE}/e2e-twin" in note
    # Servers of what the old channel calls stable are long gone: the guard follows what it did.
    assert platform.stable == better
    assert platform.ask() == ("640", first)


# --- chapter 7 ------------------------------------------------------------------------------------


def test_no_client_saw_an_error(
    platform: Platform, both_restored: tuple[int, list[dict[str, str]]], watch: Watch
) -> None:
    clients = platform.stop_traffic()
    note(f"clients: {clients}")
    assert clients.errors == 0, clients.error_examples
    assert clients.sent == clients.answered > 500
    assert clients.right > 0.8 * clients.sums
    assert watch.exposed_samples > 0
    assert watch.violations == []


def test_nothing_is_left_after_it_was_stopped(
    platform: Platform, both_restored: tuple[int, list[dict[str, str]]]
) -> None:
    assert platform.address is not None
    ports = [urlsplit(url).port for url in (platform.address.airflow_url, platform.url)]
    killed = platform.stop()
    # The exporter is no part of the platform: the world around it runs it, as compose does.
    left = [each for each in platform.processes() if each.cmdline()[-1:] != ["metrics"]]
    assert left == []
    assert killed == 0
    for port in ports:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
