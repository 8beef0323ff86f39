"""Plans with the real lanes: what is compiled again, what is found again, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.lanes.neuron_targets import BASES, CPU, NATIVE, NXDI, TOOLCHAINS
from tests.unit.sources.model_files import CONFIG, safetensors, write_model
from tests.unit.yard import SPEC, Silent

import trainyard.steps.plan as plan_module
from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.plan import Plan, ReleaseRequest
from trainyard.errors import BadInput
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.neuron_native import NativeLane
from trainyard.lanes.neuron_nxdi import NxdiLane
from trainyard.settings import Settings
from trainyard.spec.model import ModelSpec
from trainyard.steps.context import StepContext
from trainyard.steps.plan import plan
from trainyard.store.documents import create_document, read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import bundle_manifest_key

LLAMA = {**CONFIG, "num_attention_heads": 8, "max_position_embeddings": 8192}


class World:
    """A catalogue of one model, its source, an empty store, and toolchains without packages."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, lane: str) -> None:
        self.source = home / "models"
        self.plans = 0
        self.toolchain = dict(TOOLCHAINS[lane])
        settings = Settings(home=home, catalogue=home, environments=home / "environments.yaml")
        self.context = StepContext(settings, FolderStore(settings.store_root), Silent(), home)
        self.target: dict[str, Any] = {**BASES[lane]}
        if "neuron" in self.target:
            self.target["neuron"] = {**self.target["neuron"], "speculation": None}
        for each in (CpuLane, NativeLane, NxdiLane):
            monkeypatch.setattr(each, "toolchain", lambda _lane, _python: dict(self.toolchain))
        # This interpreter has no harness to ask about the spec's task.
        monkeypatch.setattr(plan_module, "harness_problems", lambda *_: ())
        self.weights("r1", fill=1)

    def weights(self, revision: str, *, fill: int) -> None:
        write_model(self.source / revision, fill=fill, config=LLAMA)

    def plan(self, revision: str = "r1", **overrides: Any) -> Plan:
        """Return the plan of a release, as it is stored."""
        data = {**SPEC, "source": {"kind": "local", "path": str(self.source)}}
        data["targets"] = [self.target]
        home = self.context.settings.home
        (home / "adder.yaml").write_text(yaml.safe_dump(data))
        request = ReleaseRequest(model="adder", revision=revision, overrides=overrides)
        self.plans += 1
        result = plan(request, self.context, plan_id=f"run-{self.plans}")
        return read_document(self.context.store, result.key, Plan)

    def compile(self, made: Plan) -> None:
        """Store the bundle that the plan asks for."""
        (planned,) = made.targets
        manifest = BundleManifest(
            compile_key=planned.compile_key,
            lane=planned.target.lane,
            key_inputs=planned.key_inputs,
            files=(),
            digest="d",
            toolchain=planned.toolchain,
            compile_s=3600.0,
        )
        create_document(self.context.store, bundle_manifest_key(planned.compile_key), manifest)


@pytest.fixture(params=list(BASES))
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch, request.param)


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch, "neuron-native")


def step(made: Plan, name: str) -> tuple[bool, str]:
    (found,) = [each for each in made.steps if each.step == name]
    return found.exists, found.reason


def test_new_weights_of_the_same_architecture_are_not_compiled_again(world: World) -> None:
    first = world.plan("r1")
    assert step(first, "compile")[0] is False
    world.compile(first)
    world.weights("r2", fill=2)

    second = world.plan("r2")

    assert second.targets[0].compile_key == first.targets[0].compile_key
    exists, reason = step(second, "compile")
    assert exists
    assert reason.startswith("A bundle for this architecture, these shapes and this toolchain")
    assert "weights are not compiled in" in reason
    assert step(second, "measure")[0] is False
    assert second.targets[0].measurement_id != first.targets[0].measurement_id


def test_another_toolchain_is_another_key(world: World) -> None:
    before = world.plan().targets[0].compile_key
    for name in world.toolchain:
        if name in ("neuronx-cc", "nki", "neuronx-distributed-inference"):
            continue  # of another SDK: refused, see below
        world.toolchain[name] += ".post1"
        assert world.plan().targets[0].compile_key != before, name
        world.toolchain[name] = world.toolchain[name].removesuffix(".post1")
    assert world.plan().targets[0].compile_key == before


def test_another_tensor_dtype_or_architecture_is_another_key(world: World) -> None:
    before = world.plan().targets[0].compile_key
    folder = world.source / "r1"
    content = safetensors({"embed": [2, 4], "norm": [4]}).replace(b'"F32"', b'"I32"')
    (folder / "model.safetensors").write_bytes(content)
    other_dtype = world.plan().targets[0].compile_key
    write_model(folder, config={**LLAMA, "hidden_size": 8})
    other_config = world.plan().targets[0].compile_key
    assert len({before, other_dtype, other_config}) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        {"native": {"neuron_config": {"num_seqs_buckets": [1, 4, 8]}}},
        {"tensor_parallel_size": 4},
        {"neuron": {"lnc": 1}},
        {"neuron": {"num_gpu_blocks": 512}},
        {"block_size": 64},
        {"native": {"gpu_memory_utilization": 0.8}},
        {"native": {"kv_cache_dtype": "fp8"}},
        {"dtype": "float16"},
        {"max_model_len": 2048},
        {"instance": "trn3.48xlarge"},
        {"native": {"extra_neuron_config": {"brand_new": True}}},
    ],
)
def test_whatever_is_compiled_in_is_another_key(native: World, overrides: dict[str, Any]) -> None:
    before = native.plan()
    native.compile(before)
    assert step(native.plan(), "compile")[0] is True

    after = native.plan(**overrides)

    assert after.targets[0].compile_key != before.targets[0].compile_key
    assert step(after, "compile")[0] is False


@pytest.mark.parametrize(
    "overrides",
    [
        {"instance": "trn2u.48xlarge"},
        {"native": {"async_scheduling": True}},
        {
            "neuron": {
                "image": "registry.example/vllm:0.24.0.1.1.0-neuronx-py313-sdk2.32.0-ubuntu24"
            }
        },
    ],
)
def test_what_is_only_served_keeps_the_key(native: World, overrides: dict[str, Any]) -> None:
    before, after = native.plan(), native.plan(**overrides)

    assert after.targets[0].compile_key == before.targets[0].compile_key
    assert after.targets[0].serving_digest != before.targets[0].serving_digest


def test_the_plan_holds_all_inputs_of_the_key(world: World) -> None:
    (planned,) = world.plan().targets
    assert planned.key_inputs["toolchain"] == world.toolchain
    assert planned.key_inputs["lane"] == planned.target.lane
    assert planned.serving["served_model_name"] == "adder"


def test_warnings_are_in_the_plan_and_are_said(native: World) -> None:
    made = native.plan(neuron={"num_gpu_blocks": None})

    assert any("num_gpu_blocks is empty" in warning for warning in made.targets[0].warnings)
    progress = native.context.progress
    assert isinstance(progress, Silent)
    assert any(line.startswith("Warning for trn2: ") for line in progress.said)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"neuron": {"sdk": "2.31.1"}}, "SDK 2.31.1 has neuronx-cc 2.26.6360, the serving environ"),
        ({"neuron": {"speculation": {"num_speculative_tokens": 4}}}, "cannot fetch the draft"),
        ({"native": {"neuron_config": {"num_seqs_buckets": [1, 4]}}}, "must be max_num_seqs (8)"),
        ({"neuron": {"sdk": "2.32"}}, "all three numbers"),
        ({"native": {"neuron_config": {"num_seq_buckets": [8]}}}, "Did you mean num_seqs_buckets?"),
        ({"nxdi": {}}, "nxdi is for lane neuron-nxdi"),
    ],
)
def test_bad_targets_are_refused(native: World, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        native.plan(**overrides)
    assert words in str(caught.value)
    assert list(native.context.store.list("")) == []


def test_weights_that_the_lane_cannot_use_are_refused(native: World) -> None:
    quantized = {**LLAMA, "quantization_config": {"quant_method": "awq"}}
    write_model(native.source / "r1", config=quantized)
    with pytest.raises(BadInput, match="Target trn2: The checkpoint is quantized with AWQ"):
        native.plan()


def test_a_release_can_be_planned_for_an_environment_on_kubernetes(native: World) -> None:
    native.plan()

    def planned_with(place: str) -> Plan:
        native.context.settings.environments.write_text(
            "schema: trainyard/v1\nenvironments:\n"
            f"  eks: {{platform: kubernetes, target: trn2, kubernetes: {place}}}\n"
        )
        result = plan(ReleaseRequest(model="adder", environments=("eks",)), native.context)
        return read_document(native.context.store, result.key, Plan)

    with pytest.raises(BadInput, match="No image is named for the servers of target trn2"):
        planned_with("{namespace: serving}")
    assert planned_with("{namespace: serving, image: vllm}").request.environments == ("eks",)


def test_a_machine_without_neuron_packages_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        world = World(tmp_path, patch, "neuron-native")
        world.plan()  # writes the spec
    with pytest.raises(BadInput, match="Lane neuron-native cannot run here") as caught:
        plan(ReleaseRequest(model="adder", targets=("trn2",)), world.context)
    assert "neuron.image" in caught.value.hint


def test_the_plan_knows_the_machine_that_measures(
    native: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def machine(driver: str) -> dict[str, Any]:
        monkeypatch.setattr(
            "trainyard.steps.plan.describe_machine",
            lambda: {"processor": "Some CPU", "neuron_driver": driver, "load_1min": 0.5},
        )
        (planned,) = native.plan().targets
        return {**planned.machine, "id": planned.measurement_id}

    first, again, other = machine("2.31.7.0"), machine("2.31.7.0"), machine("2.32.0.0")

    assert first == again
    assert other["id"] != first["id"]
    assert first["processor"] == "Some CPU"
    assert first["neuron_driver"] == "2.31.7.0"
    assert first["instance"] == native.target["instance"]


def test_bounds_on_cost_need_a_price(native: World, tmp_path: Path) -> None:
    native.plan()
    path = native.context.settings.home / "adder.yaml"
    data = yaml.safe_load(path.read_text())
    data["gates"]["latency"]["slo"] = {"ttft_ms": 400}
    data["gates"]["cost"] = {"bounds": {"usd_per_million_output_tokens": {"max": 5}}}
    path.write_text(yaml.safe_dump(data))
    request = ReleaseRequest(model="adder")
    with pytest.raises(BadInput, match=r"what an hour of instance trn2\.48xlarge costs"):
        plan(request, native.context)

    prices = tmp_path / "prices.yaml"
    prices.write_text("as_of: today\nusd_per_hour: {trn2.48xlarge: 40}\n")
    settings = native.context.settings.model_copy(update={"prices": prices})
    result = plan(request, replace(native.context, settings=settings))

    (planned,) = read_document(native.context.store, result.key, Plan).targets
    assert planned.price is not None
    assert planned.price.usd_per_hour == 40


def test_all_three_lanes_fit_into_one_spec() -> None:
    spec = ModelSpec.model_validate({**SPEC, "targets": [CPU, NATIVE, NXDI]})
    again = ModelSpec.model_validate_json(spec.model_dump_json(by_alias=True), strict=True)
    assert again == spec
