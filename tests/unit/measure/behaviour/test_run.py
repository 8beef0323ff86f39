"""All checks on a server: a good one passes, and each fault is found by the check for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from tests.behaviour_world import CAUGHT_BY
from tests.fake_answers import CHARACTERS, AnsweringEngine, serving
from tests.tampering_proxy import Fault, TamperingProxy

from trainyard.documents.behaviour import Behaviour, Capability
from trainyard.lanes.capabilities import of_cpu
from trainyard.measure.behaviour.run import BehaviourJob, run_behaviour
from trainyard.spec.model import BehaviourName

NAMES: tuple[BehaviourName, ...] = get_args(BehaviourName)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(CHARACTERS)}))
    (folder / "prompts.jsonl").write_text('{"prompt": "12+34="}\n{"prompt": "7+8="}\n')
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(AnsweringEngine().app()) as url:
        yield url


def run(
    url: str,
    model_dir: Path,
    names: tuple[BehaviourName, ...] = NAMES,
    capability: Capability | None = None,
) -> Behaviour:
    job = BehaviourJob(
        capabilities={name: capability or of_cpu(name) for name in names},
        dtype="bfloat16",
        max_num_seqs=4,
        block_size=8,
        prefix_caching=True,
        prompts="prompts.jsonl",
    )
    return run_behaviour(
        job,
        base_url=url,
        served_model_name="adder",
        model_dir=model_dir,
        assets_dir=model_dir,
        max_model_len=64,
    )


def broken(found: Behaviour) -> set[BehaviourName]:
    return {record.name for record in found.records if record.count("broken")}


def test_a_good_server_passes_every_check(server: str, model_dir: Path) -> None:
    found = run(server, model_dir)
    assert [record.name for record in found.records] == list(NAMES)
    assert not broken(found)
    assert all(record.count("held") for record in found.records)
    assert found.near_tie == 0.5


@pytest.mark.parametrize("fault", list(CAUGHT_BY))
def test_a_fault_is_found_by_its_check(server: str, model_dir: Path, fault: Fault) -> None:
    names: tuple[BehaviourName, ...] = tuple(CAUGHT_BY[fault])
    with serving(TamperingProxy(server, fault, limit=4).app()) as url:
        assert broken(run(url, model_dir, names)) == CAUGHT_BY[fault]


@pytest.mark.soak
@pytest.mark.parametrize("fault", list(CAUGHT_BY))
def test_a_fault_breaks_no_other_check(server: str, model_dir: Path, fault: Fault) -> None:
    with serving(TamperingProxy(server, fault, limit=4).app()) as url:
        assert broken(run(url, model_dir)) == CAUGHT_BY[fault]


def test_a_lane_without_log_probabilities_is_asked_without(model_dir: Path) -> None:
    tolerance = Capability(ability="tolerance")
    with serving(AnsweringEngine(ranks=False).app()) as url:
        found = run(url, model_dir, ("batching", "streaming"), tolerance)
    assert not broken(found)
    assert all(record.count("held") for record in found.records)


def test_a_server_that_does_not_answer_breaks_every_check(model_dir: Path) -> None:
    found = run("http://127.0.0.1:9", model_dir)
    assert broken(found) == set(NAMES)
    (case,) = found.records[0].cases
    assert case.sent == "the prompt '12+34=', to a server that does nothing else"
    assert case.came.startswith("no answer: ConnectError")
