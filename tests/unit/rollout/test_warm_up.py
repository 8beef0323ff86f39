"""Warm-up requests against real sockets, and where their prompts come from."""

from __future__ import annotations

import itertools
import json
import socket
from pathlib import Path

import pytest
from tests.rollout_world import make_release
from tests.unit.rollout.loopback import Answer, serving
from tests.unit.rollout.test_metrics import server
from tests.unit.yard import plan, spec

from trainyard.documents.base import Provenance
from trainyard.documents.plan import EvalAssets
from trainyard.documents.release import Release
from trainyard.rollout.warm_up import DEFAULT_PROMPTS, HttpWarmer, WarmUpReport, load_prompts
from trainyard.store.documents import create_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import plan_key


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def release() -> Release:
    return make_release("a")


def completion(text: object) -> bytes:
    return json.dumps({"choices": [{"text": text}]}).encode()


def warm(
    store: FolderStore, release: Release, answers: list[Answer], *, requests: int = 4
) -> WarmUpReport:
    given = itertools.cycle(answers)
    with serving(lambda path, body: next(given)) as url:
        warmer = HttpWarmer(store, timeout_s=5.0)
        return warmer.warm_up(server(url), release, requests=requests, budget_s=30.0)


def test_every_request_is_a_completion_of_the_served_model(
    store: FolderStore, release: Release
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def respond(path: str, body: bytes) -> Answer:
        asked.append((path, json.loads(body)))
        return 200, completion("46")

    with serving(respond) as url:
        report = HttpWarmer(store).warm_up(server(url), release, requests=5, budget_s=30.0)
    assert report == WarmUpReport(asked=5, answered=5, refused=0, message="")
    assert {path for path, _ in asked} == {"/v1/completions"}
    assert {body["model"] for _, body in asked} == {"adder"}
    assert {body["prompt"] for _, body in asked} == set(DEFAULT_PROMPTS)


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"broken"),
        (400, b'{"error": "no such model"}'),
        (200, b"not JSON"),
        (200, b'{"choices": []}'),
        (200, completion(None)),
    ],
)
def test_errors_are_refusals(store: FolderStore, release: Release, answer: Answer) -> None:
    report = warm(store, release, [answer])
    assert (report.answered, report.refused) == (0, 4)
    assert report.message


def test_a_single_failure_is_counted_and_quoted(store: FolderStore, release: Release) -> None:
    good = (200, completion("46"))
    report = warm(store, release, [good, (503, b"overloaded"), good, good])
    assert (report.asked, report.answered, report.refused) == (4, 3, 1)
    assert report.message == "status 503: overloaded"


def test_no_answer_is_no_refusal(store: FolderStore, release: Release) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        report = HttpWarmer(store).warm_up(server(url), release, requests=3, budget_s=30.0)
    assert (report.answered, report.refused) == (0, 0)
    assert "Connect" in report.message


def test_requests_that_do_not_fit_into_the_budget_are_lost(
    store: FolderStore, release: Release
) -> None:
    clock = itertools.chain([0.0], itertools.repeat(31.0))
    with serving(lambda path, body: (200, completion("46"))) as url:
        warmer = HttpWarmer(store, monotonic=lambda: next(clock))
        report = warmer.warm_up(server(url), release, requests=3, budget_s=30.0)
    assert (report.answered, report.refused) == (0, 0)
    assert "no time" in report.message


def test_prompts_come_from_the_files_of_the_plan(store: FolderStore) -> None:
    with_prompts = spec(prompts="adder/prompts.jsonl")
    made = plan(model_spec=with_prompts).model_copy(
        update={"assets": EvalAssets(digest="d1", files=("adder/prompts.jsonl",))}
    )
    create_document(store, plan_key(made.plan_id), made)
    store.put("evals/d1/adder/prompts.jsonl", b'{"prompt": "1+1="}\n\n{"prompt": "2+2="}\n')
    release = make_release("a").model_copy(
        update={
            "spec": with_prompts,
            "provenance": Provenance(inputs=(plan_key(made.plan_id), "checkpoints/x")),
        }
    )
    assert load_prompts(store, release) == ("1+1=", "2+2=")


@pytest.mark.parametrize("inputs", [(), ("plans/gone.json",)])
def test_prompts_that_are_not_there_are_replaced(
    store: FolderStore, inputs: tuple[str, ...]
) -> None:
    release = make_release("a").model_copy(
        update={"spec": spec(prompts="p.jsonl"), "provenance": Provenance(inputs=inputs)}
    )
    assert load_prompts(store, release) == DEFAULT_PROMPTS


def test_a_spec_without_prompts_takes_the_default(store: FolderStore, release: Release) -> None:
    assert load_prompts(store, release) == DEFAULT_PROMPTS
