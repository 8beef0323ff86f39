"""Lane `cpu` with real vLLM: compile, restore elsewhere, prove, measure; and what breaks the proof.

Four starts of vLLM and two short trainings: three minutes on two free cores.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import httpx
import psutil
import pytest
from tests.behaviour_world import CAUGHT_BY, check, give_random_head
from tests.fake_answers import serving
from tests.gate_runs import broken_cases, verdicts
from tests.lane_world import LANE, PYTHON, LaneYard, compile_model, train
from tests.parity_runs import Run, Runs, broken, figures_of, sums
from tests.tampered_models import tamper
from tests.tampering_proxy import Fault, TamperingProxy

from trainyard.documents.artifacts import files_digest
from trainyard.documents.look import PodCounters
from trainyard.documents.measurement import Measurement
from trainyard.documents.parity import ParityFigures
from trainyard.errors import CacheMiss
from trainyard.lanes.protocol import StartProof
from trainyard.materialize import materialize_bundle
from trainyard.measure.parity import collect
from trainyard.rollout.probes.answers import Answer, are_same
from trainyard.rollout.probes.asking import ask
from trainyard.rollout.readers.scrape import HttpMetricReader
from trainyard.serving.process import ServerProcess
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.model import BehaviourName, LatencyMetric, Probes
from trainyard.steps.measure import measure
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import bundle_manifest_key

AT_THE_LIMIT: tuple[BehaviourName, ...] = ("longest_prompt", "cancellation")
"""Behaviour checks that are about the server's own `max_model_len`, or need long answers."""
BRIEF = tuple(name for name in get_args(BehaviourName) if name not in AT_THE_LIMIT)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the serving environment: `make setup`"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home in which the demonstration model was trained for a few steps, twice."""
    folder = tmp_path_factory.mktemp("lane")
    train(folder, {"r1": 3, "r2": 2})
    return folder


@pytest.fixture(scope="module")
def made(home: Path) -> LaneYard:
    """Return the yard after plan, download and compile."""
    return compile_model(home)


@contextmanager
def server(
    made: LaneYard, cache_dir: Path, *, model: Path, **changes: object
) -> Iterator[tuple[ServerProcess, StartProof]]:
    """Start a server of the planned target with some settings changed; prove the start."""
    before = LANE.snapshot(cache_dir)
    process = made.start(cache_dir, model=model, **changes)
    try:
        process.wait_healthy(300)
        yield process, made.proof(process, cache_dir, before)
    finally:
        process.stop(0)


def test_a_compile_makes_a_bundle_of_code_without_weights(made: LaneYard) -> None:
    assert not made.compiled.reused
    bundle = made.bundle
    suffixes = [Path(file.path).suffix for file in bundle.files]
    assert suffixes.count(".so") == suffixes.count(".cpp") > 5
    assert bundle.engine_init_s is not None
    assert 0 < bundle.engine_init_s < bundle.compile_s
    assert bundle.dropped == ()
    weights = (made.weights() / "model.safetensors").stat().st_size
    assert all(file.size < weights for file in bundle.files)
    assert not any("safetensors" in file.path for file in bundle.files)


def test_a_measurement_starts_from_the_bundle_and_has_every_figure(made: LaneYard) -> None:
    result = measure(made.plan, "cpu", made.surroundings("measure"))
    found = read_document(made.store, result.key, Measurement)
    # That nothing new was compiled shows that the bundle was used; how much sooner a server is then
    # ready is for tests/benchmarks/bundle_start.py.
    assert found.start.new_cache_files == ()
    assert found.start.engine_init_s is not None
    (score,) = found.accuracy
    assert (score.name, score.metric, score.samples) == ("addition", "exact_match", 200)
    assert 0 <= score.score <= 1
    levels = made.plan.spec.gates.latency.levels
    assert [level.name for level in found.latency] == [level.name for level in levels]
    for level, wanted in zip(found.latency, levels, strict=True):
        assert level.completed == wanted.num_prompts
        assert set(level.figures) == set(get_args(LatencyMetric))
        assert level.figures["failed_requests"] == 0
        assert level.figures["ttft_p50_ms"] > 0
    assert found.behaviour is not None
    assert [record.name for record in found.behaviour.records] == list(get_args(BehaviourName))
    # Weights that were hardly trained find many tokens about as likely.
    assert [case for record in found.behaviour.records for case in record.cases if
            case.outcome == "broken"] == []  # fmt: skip
    assert measure(made.plan, "cpu", made.surroundings("again")).reused
    folder = made.surroundings("measure").work_dir.resolve()
    assert not [p for p in psutil.process_iter() if str(folder) in _working_folder(p)]


def _working_folder(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except (psutil.Error, OSError):
        return ""


NEEDS_TRAINING: Fault = "prefix"
"""With random weights only the last token of a prompt matters, so what came before it may be lost;
the soak form tries this one with a model that was trained."""


def test_other_weights_settings_and_folders_use_the_same_code(
    made: LaneYard, tmp_path: Path
) -> None:
    """The compile key leaves all of this out; and running requests end before the server does.

    Faults of servers are tried here too, for a start of vLLM takes long: each is one of a proxy
    before this one, and found by the check that is for it. So is what parity sees, and that a
    faithful server is not stopped.
    """
    cache_dir = materialize_bundle(made.store, made.bundle, tmp_path / "elsewhere" / "cache")
    changes = {
        "max_model_len": 2048,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
        "block_size": 32,
        "kv_cache_gib": 0.25,
        "enable_prefix_caching": False,
    }
    model = tmp_path / "weights"
    shutil.copytree(made.weights("r2"), model)
    give_random_head(model / "model.safetensors")
    with server(made, cache_dir, model=model, **changes) as (process, proof):
        assert proof.used_bundle, proof.reason
        assert broken_by_faults(process.url, model) == {
            fault: names for fault, names in CAUGHT_BY.items() if fault != NEEDS_TRAINING
        }
        check_faithful(made, check_parity(made, process, model, tmp_path), process.url, model)
        check_probes(process.url)
        check_endings(process.url)
        finished = _answer_through_a_stop(process, tokens=1500)
        assert finished == ["length"]
        process.stop(drain_s=60)
    assert LANE.prove_start(
        log=process.log_text(),
        before=frozenset(),
        after=frozenset(),
        bundle=None,
    ).engine_init_s


def check_faithful(made: LaneYard, parity: Sequence[ParityFigures], url: str, model: Path) -> None:
    """A faithful server is not stopped in 20 runs, by its behaviour or by the whole gate."""
    behaviour = []
    for seed in range(len(parity)):
        # Short answers, but for the checks that are about the server's own limit.
        few = check(url, model, BRIEF, 32, seed=seed)
        rest = check(url, model, AT_THE_LIMIT, 2048, requests=1, seed=seed)
        behaviour.append(few.model_copy(update={"records": (*few.records, *rest.records)}))
    assert [broken_cases(each) for each in behaviour] == [[]] * 20
    bounds = made.plan.spec.gates.accuracy.parity
    assert bounds is not None
    found = list(verdicts(bounds, parity, behaviour))
    assert [each.summary for each in found if each.outcome == "fail"] == []


def check_parity(
    made: LaneYard, process: ServerProcess, model: Path, folder: Path
) -> Sequence[ParityFigures]:
    """A faithful server keeps the bounds of the demonstration 20 times; nothing else does once.

    Returns:
        The figures of the faithful server.
    """
    check = made.plan.spec.gates.accuracy.parity
    assert check is not None
    prompts = sums(20 * 5, seed=1)
    served = collect(
        prompts,
        base_url=process.url,
        served_model_name="adder",
        max_tokens=check.max_tokens,
        top_logprobs=check.top_logprobs,
    )
    tampered = {
        kind: tamper(model, folder, kind) for kind in ("noisy", "swapped_rows", "other_tokenizer")
    }
    runs = (
        Run(name="faithful", model=str(model), sets=20),
        *(Run(name=kind, model=str(other), sets=2) for kind, other in tampered.items()),
        Run(name="of a float16 target", model=str(model), served_dtype="float16", sets=2),
    )
    found = figures_of(
        Runs(check=check, set_size=5, prompts=tuple(prompts), served=tuple(served), runs=runs)
    )
    stops = {name: [broken(check, each) for each in sets] for name, sets in found.items()}
    assert stops.pop("faithful") == [[]] * 20
    for name, figure in {
        "noisy": "error_ratio",
        # Of a trained model, whose answers follow from more than the last token, agreement too.
        "swapped_rows": "error_ratio",
        "other_tokenizer": "prompt_agreement",
        "of a float16 target": "error_ratio",
    }.items():
        assert all(figure in each for each in stops[name]), (name, stops[name])
    return found["faithful"]


def check_probes(url: str) -> None:
    """The server takes a probe's salt, and tells the tokens of its answer, the same each time."""
    probes = Probes(prompts="sums.jsonl", max_tokens=8)

    async def answers() -> list[Answer | None]:
        async with httpx.AsyncClient(trust_env=False, timeout=None) as client:
            return [
                await ask(client, url, "adder", "12+34=", probes, salt=salt)
                for salt in ("one", "two")
            ]

    first, second = asyncio.run(answers())
    assert first is not None
    assert second is not None
    assert first.tokens
    assert are_same(first, second)
    assert first.ttft_s > 0


def check_endings(url: str) -> None:
    """The server's counters tell how answers ended; a client that goes away is in none of them."""

    def read() -> PodCounters:
        status = ServerStatus("adder-0", "adder", "ready", url, None, 0, "")
        (pod,) = HttpMetricReader().read("production", (status,))
        return pod

    async def complete(tokens: int, *, leave: bool = False) -> None:
        asked = {"model": "adder", "prompt": "12+34=", "max_tokens": tokens, "ignore_eos": True}
        async with (
            httpx.AsyncClient(trust_env=False, timeout=60) as client,
            client.stream(
                "POST", f"{url}/v1/completions", json={**asked, "stream": True}
            ) as response,
        ):
            async for _ in response.aiter_lines():
                if leave:
                    return

    before = read()
    assert before.ended is not None
    assert before.short is not None
    for tokens in (1, 2, 8):
        asyncio.run(complete(tokens))
    asyncio.run(complete(1500, leave=True))
    limit = time.monotonic() + 30
    while read().in_flight and time.monotonic() < limit:
        time.sleep(0.1)
    after = read()
    assert after.in_flight == 0
    assert after.ended == {**before.ended, "length": before.ended["length"] + 3}
    assert set(after.ended) >= {"stop", "length", "abort", "error"}
    assert after.short == before.short + 1


def broken_by_faults(url: str, model: Path) -> dict[Fault, set[BehaviourName]]:
    """Return for each fault which of the checks that are for it found it."""
    found: dict[Fault, set[BehaviourName]] = {}
    for fault, names in CAUGHT_BY.items():
        if fault == NEEDS_TRAINING:
            continue
        # Short answers, but where it is about the server's own limit, and where the server must
        # still be at work when a client, however slow, has gone away or asks for more.
        limit = {"too_long": 2048, "leak": 512, "busy": 512}.get(fault, 32)
        # A second request at once is turned away by the busy one: a slow client has few at once.
        with serving(TamperingProxy(url, fault, limit=1).app()) as spoilt:
            behaviour = check(
                spoilt, model, tuple(names), limit, requests=1 if fault == "leak" else 4
            )
        found[fault] = {each.name for each in behaviour.records if each.count("broken")}
    return found


def _answer_through_a_stop(process: ServerProcess, tokens: int) -> list[str]:
    """Tell the server to end while it answers; return how the answer ended."""
    body = {"model": "adder", "prompt": "12+34=", "max_tokens": tokens, "ignore_eos": True}
    finished: list[str] = []
    chunks = 0
    with (
        httpx.Client(trust_env=False, timeout=120) as client,
        client.stream(
            "POST", f"{process.url}/v1/completions", json={**body, "stream": True}
        ) as response,
    ):
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            if not chunks:
                psutil.Process(process.identity.pid).send_signal(signal.SIGTERM)
            chunks += 1
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            if choice["finish_reason"]:
                finished.append(choice["finish_reason"])
    assert chunks > 100, "the answer was not streamed while the server was told to end"
    return finished


@pytest.mark.soak
def test_another_number_format_needs_other_code(made: LaneYard, tmp_path: Path) -> None:
    """What is in the compile key is there for a reason."""
    cache_dir = materialize_bundle(made.store, made.bundle, tmp_path / "cache")
    model = made.weights()
    with server(made, cache_dir, model=model, dtype="float32") as (_, proof):
        assert not proof.used_bundle
        assert any(name.endswith(".so") for name in proof.new_files)


def test_a_bundle_without_its_graphs_is_a_cache_miss(made: LaneYard, tmp_path: Path) -> None:
    """A bundle that lacks what leads to the code: vLLM compiles in silence, and we refuse."""
    store = FolderStore(tmp_path / "store")
    shutil.copytree(made.settings.store_root, tmp_path / "store", dirs_exist_ok=True)
    bundle = made.bundle
    files = tuple(file for file in bundle.files if "/fxgraph/" not in file.path)
    assert len(files) < len(bundle.files)
    key = bundle_manifest_key(bundle.compile_key)
    tampered = bundle.model_copy(update={"files": files, "digest": files_digest(files)})
    store.replace(key, tampered.to_bytes(), version=store.read(key).version)
    for entry in list(store.list("measurements")):
        store.delete(entry.key)
    context = replace(made.surroundings("tampered"), store=store)
    with pytest.raises(CacheMiss, match="inductor/"):
        measure(made.plan, "cpu", context)
    assert list(store.list("measurements")) == []
