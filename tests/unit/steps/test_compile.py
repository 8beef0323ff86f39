from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
from tests.fake_neuron import NativeCache
from tests.unit import yard
from tests.unit.steps.lane_bench import Bench

from trainyard.documents.artifacts import BundleManifest, files_digest
from trainyard.errors import BadInput, Busy, NotFound, OutOfCapacity, Refused
from trainyard.failures.tuning import Tuning
from trainyard.lanes.neuron_native import NativeLane
from trainyard.spec.model import Target
from trainyard.steps.compile import compile_bundle, explained, tuned
from trainyard.store.documents import read_document
from trainyard.store.layout import bundle_manifest_key, bundle_prefix

KEY = bundle_manifest_key(yard.COMPILE_KEY)
PREFIX = bundle_prefix(yard.COMPILE_KEY)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_a_compile_stores_what_the_compiler_made(bench: Bench) -> None:
    result = compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    assert (result.key, result.reused) == (KEY, False)
    manifest = read_document(bench.store, KEY, BundleManifest)
    assert [file.path for file in manifest.files] == [
        "inductor/ab/cab.cpp",
        "inductor/ab/cab.so",
        "inductor/fxgraph/4e/f4e/p",
    ]
    assert manifest.digest == files_digest(manifest.files)
    assert manifest.engine_init_s == 1.5
    assert manifest.compile_s > 0
    assert manifest.provenance.inputs[0] == "plans/adder-plan.json"
    for file in manifest.files:
        stored = bench.store.read(f"{PREFIX}/{file.path}").data
        assert (len(stored), hashlib.sha256(stored).hexdigest()) == (file.size, file.sha256)


def test_a_bundle_that_exists_is_used_without_a_start(bench: Bench) -> None:
    compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    again = compile_bundle(bench.plan, "cpu", bench.surroundings("another"))
    assert again.reused
    assert again.key == KEY
    assert bench.lane.starts == 1


def test_what_a_cut_attempt_stored_makes_room(bench: Bench) -> None:
    for name in ("inductor/ab/cab.so", "inductor/old/cold.so"):
        bench.store.upload(f"{PREFIX}/{name}", io.BytesIO(b"\x7fELF of another attempt"))
    compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    manifest = read_document(bench.store, KEY, BundleManifest)
    stored = {entry.key.removeprefix(f"{PREFIX}/") for entry in bench.store.list(PREFIX)}
    assert stored == {"manifest.json", *(file.path for file in manifest.files)}


@pytest.mark.parametrize("damage", [None, b"longer than it was"])
def test_a_damaged_bundle_is_refused_and_not_replaced(bench: Bench, damage: bytes | None) -> None:
    compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    key = f"{PREFIX}/inductor/ab/cab.so"
    bench.store.delete(key)
    if damage is not None:
        bench.store.put(key, damage)
    with pytest.raises(BadInput, match=r"inductor/ab/cab\.so"):
        compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    assert bench.lane.starts == 1


def test_another_toolchain_than_the_planned_one_is_refused(bench: Bench) -> None:
    bench.lane.found = {"vllm": "0.33.0", "torch": "2.14"}
    with pytest.raises(BadInput, match=r"torch absent -> 2.14; vllm 0.32.0 -> 0.33.0"):
        compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    assert bench.lane.starts == 0


def test_an_unknown_target_is_refused(bench: Bench) -> None:
    with pytest.raises(BadInput, match="no target 'gpu'") as caught:
        compile_bundle(bench.plan, "gpu", bench.surroundings("compile"))
    assert "cpu" in caught.value.hint


def test_a_missing_checkpoint_is_named(bench: Bench) -> None:
    plan = bench.plan.model_copy(update={"revision": "v2"})
    with pytest.raises(NotFound, match="v2"):
        compile_bundle(plan, "cpu", bench.surroundings("compile"))


@pytest.mark.parametrize(
    ("behaviour", "word"),
    [
        ("broken", "lm_head.weight"),
        ("mute", "first request"),
        ("compiles nothing", "no complete result"),
    ],
)
def test_a_failure_is_explained_and_stores_nothing(bench: Bench, behaviour: str, word: str) -> None:
    bench.lane.behaviour = behaviour
    with pytest.raises(Refused, match=word):
        compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    assert list(bench.store.list(PREFIX)) == []


def test_the_end_of_a_dead_servers_log_is_told(bench: Bench) -> None:
    bench.lane.behaviour = "broken"
    with pytest.raises(Refused):
        compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    assert any(line.startswith("server: KeyError") for line in bench.said)


def test_a_taken_port_is_tried_again_with_another_one(bench: Bench) -> None:
    bench.lane.behaviour = "port"
    assert not compile_bundle(bench.plan, "cpu", bench.surroundings("compile")).reused
    assert bench.lane.starts == 2


def test_a_try_with_fewer_compilers_makes_the_same_bundle() -> None:
    neuron = {"sdk": "2.32.0", "parallel_compile_workers": 8}
    target = Target.model_validate(
        {"name": "t", "lane": "neuron-native", "instance": "trn2.48xlarge", "neuron": neuron}
    )
    planned = yard.plan().targets[0].model_copy(update={"target": target})
    changed = tuned(planned, Tuning(2, 1))
    environment = (
        NativeLane()
        .command(
            changed.target,
            python=Path("python"),
            model_dir=Path("model"),
            cache_dir=Path("cache"),
            served_model_name="m",
            port=1,
            cache_only=False,
        )
        .env
    )
    assert environment["NEURON_LIBTORCH_PARALLEL_COMPILE_WORKERS"] == "2"
    inputs = [
        NativeLane().key_inputs(each.target, architecture_digest="a", toolchain={})
        for each in (planned, changed)
    ]
    assert inputs[0] == inputs[1]
    assert changed.compile_key == planned.compile_key


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(None, 3)])
def test_a_try_that_changes_nothing_is_the_planned_one(tuning: Tuning) -> None:
    planned = yard.plan().targets[0]
    assert tuned(planned, tuning) is planned


def test_the_compilers_own_log_explains_a_server_that_does_not(tmp_path: Path) -> None:
    NativeCache(tmp_path).fail(code="NCC_EVRF007")
    plain = Refused("The server ended with exit code 1.")
    told = explained(plain, tmp_path)
    assert told.code == "NCC_EVRF007"
    assert "more instructions than the compiler takes" in told.message


def test_what_is_explained_or_unknown_stays_as_it_is(tmp_path: Path) -> None:
    known, plain = OutOfCapacity("It was killed.", code="F137"), Refused("The server ended.")
    assert explained(plain, tmp_path) is plain
    NativeCache(tmp_path).fail(code="NCC_EVRF007")
    assert explained(known, tmp_path) is known


def test_an_image_that_nobody_asked_is_compared_as_far_as_the_table_knows(bench: Bench) -> None:
    planned = bench.plan.targets[0].model_copy(
        update={"toolchain": {"image": "registry.example/x:1", "neuronx-cc": "2.27.5334"}}
    )
    plan = bench.plan.model_copy(update={"targets": (planned,)})
    context = bench.surroundings("compile")
    context = replace(
        context, settings=context.settings.model_copy(update={"image": "registry.example/x:1"})
    )
    bench.lane.found = {"neuronx-cc": "2.28.1.0+ab", "torch": "2.11.0"}
    with pytest.raises(BadInput, match=r"neuronx-cc 2\.27\.5334 -> 2\.28\.1\.0\+ab\.") as caught:
        compile_bundle(plan, "cpu", context)
    assert "trainyard toolchain" in caught.value.hint
    bench.lane.found = {"neuronx-cc": "2.27.5334.0+ab", "torch": "2.11.0"}
    result = compile_bundle(plan, "cpu", context)
    # What really compiled, not what the table said.
    assert read_document(bench.store, result.key, BundleManifest).toolchain == bench.lane.found


def test_nothing_is_stored_after_the_lock_was_lost(bench: Bench) -> None:
    def lost() -> None:
        raise Busy("Another process took over.")

    context = replace(bench.surroundings("compile"), ensure_held=lost)
    with pytest.raises(Busy):
        compile_bundle(bench.plan, "cpu", context)
    assert list(bench.store.list(PREFIX)) == []


def test_the_caches_of_an_earlier_attempt_are_not_captured(bench: Bench) -> None:
    context = bench.surroundings("compile")
    left = context.work_dir / "cache" / "inductor" / "zz" / "old.so"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"\x7fELF")
    compile_bundle(bench.plan, "cpu", context)
    manifest = read_document(bench.store, KEY, BundleManifest)
    assert "inductor/zz/old.so" not in [file.path for file in manifest.files]


def test_progress_says_what_the_server_does(bench: Bench) -> None:
    compile_bundle(bench.plan, "cpu", bench.surroundings("compile"))
    assert any("empty caches" in line for line in bench.said)
    assert any(line.startswith("Server: ") for line in bench.said)
    assert "3 of 3 files stored" in bench.said
