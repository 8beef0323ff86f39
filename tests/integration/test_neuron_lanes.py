"""Both Neuron lanes through the real steps, with a fake compiler and a fake server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.fake_neuron import put
from tests.neuron_world import TARGETS, NeuronWorld, said

from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.measurement import Measurement
from trainyard.errors import BadInput, CacheMiss, OutOfCapacity, Refused
from trainyard.lanes import neuron_device
from trainyard.lanes.registry import get_lane
from trainyard.lanes.start_check import refuse_misfit
from trainyard.materialize import materialize_bundle
from trainyard.steps.gate import gate
from trainyard.steps.publish import publish
from trainyard.store.documents import read_document
from trainyard.store.layout import bundle_manifest_key, bundle_prefix

pytestmark = pytest.mark.integration
LANES = ["neuron-native", "neuron-nxdi"]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the kernel says the driver's version; newer than every SDK needs."""
    path = tmp_path / "driver-version"
    path.write_text("2.31.7.0\n")
    monkeypatch.setattr(neuron_device, "VERSION_FILE", path)
    return path


@pytest.fixture
def native(tmp_path: Path, driver: Path) -> NeuronWorld:
    return NeuronWorld(tmp_path)


@pytest.fixture
def nxdi(tmp_path: Path, driver: Path) -> NeuronWorld:
    return NeuronWorld(tmp_path, "neuron-nxdi")


def bundle_of(world: NeuronWorld, key: str) -> BundleManifest:
    return read_document(world.store, key, BundleManifest)


@pytest.mark.parametrize("lane", LANES)
def test_a_release_is_compiled_restored_started_from_its_bundle_and_published(
    lane: str, tmp_path: Path, driver: Path
) -> None:
    world = NeuronWorld(tmp_path, lane)
    plan = world.stored()
    compiled = world.compile(plan)
    bundle = bundle_of(world, compiled.key)
    names = {file.path.rsplit("/", 1)[-1] for file in bundle.files}
    if lane == "neuron-native":
        assert len([name for name in names if name.endswith(".neff")]) == 4, "one a bucket"
        assert {record.lnc_size for record in bundle.neffs} == {2}
        assert bundle.recorded_versions["neuronx-cc"] == ("2.27.5334.0+b7b01d0a",)
    else:
        assert names == {"model.pt", "neuron_config.json"}
    measured = world.measure(plan)
    measurement = read_document(world.store, measured.key, Measurement)
    assert measurement.start.new_cache_files == ()
    assert measurement.machine["neuron_driver"] == "2.31.7.0"
    assert measurement.accuracy[0].score == 0.95
    for name in ("accuracy", "latency"):
        gate(plan, world.target, name, world.context("gate"))
    assert publish(plan, world.target, world.context("publish")).detail["release_id"]


def test_a_shape_that_was_not_compiled_ends_a_native_start_and_is_named(
    native: NeuronWorld,
) -> None:
    plan = native.stored()
    native.compile(plan)
    native.serving.behave(extra_graphs=1)
    with pytest.raises(CacheMiss, match=r"cache miss for key [0-9a-f]{32}") as caught:
        native.measure(plan)
    assert caught.value.exit_code == 20


def test_a_plugin_that_was_patched_misses_every_graph(native: NeuronWorld) -> None:
    plan = native.stored()
    native.compile(plan)
    native.serving.behave(salt="another build of the same version")
    context = native.context("measure")
    with pytest.raises(CacheMiss, match="may not compile"):
        native.measure(plan, context)
    assert "VLLM_NEURON_DISABLE_WARMUP_COMPILE" in said(context)


def test_a_folder_that_cannot_be_loaded_ends_an_nxdi_start_for_lack_of_a_compiler(
    nxdi: NeuronWorld,
) -> None:
    plan = nxdi.stored()
    nxdi.compile(plan)
    nxdi.serving.behave(unreadable=True)
    context = nxdi.context("measure")
    with pytest.raises(CacheMiss, match="called the compiler"):
        nxdi.measure(plan, context)
    assert "this start may not compile" in said(context)


def test_what_nxdi_compiled_otherwise_than_asked_is_no_bundle(nxdi: NeuronWorld) -> None:
    plan = nxdi.stored()
    nxdi.serving.behave(config={"seq_len": 2048, "tp_degree": 4})
    with pytest.raises(Refused, match=r"(?s)seq_len was asked to be 4096.*tp_degree was asked"):
        nxdi.compile(plan)
    assert not list(nxdi.store.list("bundles"))


def test_a_folder_for_other_shapes_is_refused_before_a_server_starts(
    nxdi: NeuronWorld, tmp_path: Path
) -> None:
    plan = nxdi.stored()
    bundle = bundle_of(nxdi, nxdi.compile(plan).key)
    folder = materialize_bundle(nxdi.store, bundle, tmp_path / "node")
    target, lane = nxdi.planned(plan).target, get_lane("neuron-nxdi")
    refuse_misfit(lane, target, folder)
    longer = target.model_copy(update={"max_model_len": 8192})
    with pytest.raises(Refused, match=r"asked to be 8192, neuron_config\.json says 4096"):
        refuse_misfit(lane, longer, folder)
    (folder / "model.pt").unlink()
    with pytest.raises(Refused, match=r"model\.pt is missing"):
        refuse_misfit(lane, target, folder)


def test_a_cache_for_other_cores_is_refused_before_a_server_starts(
    native: NeuronWorld, tmp_path: Path
) -> None:
    plan = native.stored()
    bundle = bundle_of(native, native.compile(plan).key)
    folder = materialize_bundle(native.store, bundle, tmp_path / "node")
    target, lane = native.planned(plan).target, get_lane("neuron-native")
    refuse_misfit(lane, target, folder)
    assert target.neuron is not None
    other = target.model_copy(update={"neuron": target.neuron.model_copy(update={"lnc": 1})})
    with pytest.raises(Refused, match="lnc_size"):
        refuse_misfit(lane, other, folder)
    shutil.rmtree(folder / "neuron")
    with pytest.raises(Refused, match="no complete entry"):
        refuse_misfit(lane, target, folder)


@pytest.mark.parametrize("lane", LANES)
def test_a_driver_that_is_too_old_for_the_image_is_refused(
    lane: str, tmp_path: Path, driver: Path
) -> None:
    world = NeuronWorld(tmp_path, lane, {} if lane == "neuron-native" else newer_nxdi())
    if lane == "neuron-nxdi":
        world.serving.install("neuronx-cc", "2.25.3371")
        world.serving.install("neuronx-distributed-inference", "0.10.17970")
        world.serving.install("vllm", "0.16.0")
        world.serving.install("nki", "0.4.0")
    plan = world.stored()
    world.compile(plan)
    driver.write_text("2.26.10\n")
    with pytest.raises(BadInput, match=r"on neuron_driver 2\.26\.10, and the plan"):
        world.measure(plan)
    with pytest.raises(Refused, match=r"do not run on driver 2\.26\.10"):
        world.measure(world.stored())


def newer_nxdi() -> dict[str, Any]:
    """Return the changes that make the target one of SDK 2.30."""
    return {"neuron": {**TARGETS["neuron-nxdi"]["neuron"], "sdk": "2.30.0"}}


def test_a_compile_that_was_killed_goes_on_where_it_was(native: NeuronWorld) -> None:
    plan = native.stored()
    native.serving.behave(kill_at=2)
    with pytest.raises(OutOfCapacity, match="killed"):
        native.compile(plan)
    assert not list(native.store.list(bundle_prefix(native.planned(plan).compile_key)))
    native.serving.behave()
    context = native.context("compile")
    bundle = bundle_of(native, native.compile(plan, context).key)
    assert "with 2 graphs of an attempt that was cut" in said(context)
    assert len(bundle.neffs) == 4
    assert bundle.dropped == ()
    assert native.measure(plan).key


def test_what_another_plan_left_in_the_scratch_folder_is_not_used(native: NeuronWorld) -> None:
    plan = native.stored()
    context = native.context("compile")
    put(context.work_dir / "cache-of", b"another compile key")
    put(context.work_dir / "cache" / "neuron" / "old", b"old")
    bundle = bundle_of(native, native.compile(plan, context).key)
    assert "with empty caches" in said(context)
    assert not [file.path for file in bundle.files if file.path.endswith("old")]


def test_what_the_compiler_rejects_is_told_with_its_code_and_stores_nothing(
    native: NeuronWorld,
) -> None:
    plan = native.stored()
    native.serving.behave(fail_at=1, code="NCC_ITEN404")
    context = native.context("compile")
    with pytest.raises(Refused):
        native.compile(plan, context)
    assert "NCC_ITEN404" in said(context)
    assert not list(native.store.list("bundles"))


def test_the_compiler_of_nxdi_is_a_program_that_may_fail(nxdi: NeuronWorld) -> None:
    plan = nxdi.stored()
    nxdi.serving.behave(code="NCC_EVRF009")
    context = nxdi.context("compile")
    with pytest.raises(Refused):
        nxdi.compile(plan, context)
    assert "NCC_EVRF009" in said(context)


def test_a_server_that_came_up_without_a_device_is_not_measured(native: NeuronWorld) -> None:
    plan = native.stored()
    native.compile(plan)
    native.serving.behave(device=False)
    with pytest.raises(CacheMiss, match="may not run on a Neuron device"):
        native.measure(plan)


ON_CPU = {"neuron": {**TARGETS["neuron-native"]["neuron"], "compile_on": "cpu"}}


@pytest.mark.parametrize("stays", [False, True])
def test_a_bundle_from_a_cpu_counts_once_a_device_has_started_from_it(
    tmp_path: Path, driver: Path, stays: bool
) -> None:
    world = NeuronWorld(tmp_path, changes=ON_CPU)
    world.serving.behave(device=False, cpu_stays=stays)
    driver.unlink()
    plan = world.stored()
    bundle = bundle_of(world, world.compile(plan).key)
    assert bundle.key_inputs["compile_on"] == "cpu"
    with pytest.raises(BadInput, match="compiled on a CPU"):
        world.measure(plan)
    driver.write_text("2.31.7.0\n")
    world.serving.behave(device=True)
    assert world.measure(plan).key


def test_a_bundle_from_a_cpu_without_a_start_on_a_device_is_not_published(
    tmp_path: Path, driver: Path
) -> None:
    world = NeuronWorld(tmp_path, changes=ON_CPU)
    plan = world.stored()
    world.compile(plan)
    measured = read_document(world.store, world.measure(plan).key, Measurement)
    for name in ("accuracy", "latency"):
        gate(plan, world.target, name, world.context("gate"))
    elsewhere = measured.model_copy(update={"machine": {**measured.machine, "neuron_driver": ""}})
    key = f"measurements/{measured.measurement_id}.json"
    world.store.delete(key)
    world.store.create(key, elsewhere.to_bytes())
    with pytest.raises(Refused, match="compiled on a CPU"):
        publish(plan, world.target, world.context("publish"))
    assert world.store.exists(bundle_manifest_key(world.planned(plan).compile_key))
