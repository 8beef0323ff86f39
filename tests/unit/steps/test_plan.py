"""Planning with a real store and source: everything is refused first, then written once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.unit.sources.model_files import CONFIG, write_model

import trainyard.steps.plan as plan_module
from trainyard.canonical import digest
from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.base import FileEntry
from trainyard.documents.channel import Channel, Track
from trainyard.documents.measurement import Measurement, StartFigures
from trainyard.documents.parity import Reference
from trainyard.documents.plan import Plan, ReleaseRequest
from trainyard.documents.release import Release
from trainyard.documents.toolchain import ToolchainRecord
from trainyard.errors import BadInput, CorruptFile, NotFound, Transient
from trainyard.lanes.cpu import CpuLane
from trainyard.lanes.protocol import Returned
from trainyard.references import planned_reference
from trainyard.releases import release_id_of, store_release
from trainyard.settings import Settings
from trainyard.signing.keys import signing_key
from trainyard.sources.factory import open_source
from trainyard.sources.files import read_architecture
from trainyard.spec.loader import load_spec
from trainyard.spec.model import Target
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.plan import check_files_with_lanes, plan
from trainyard.store.documents import create_document, read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import (
    channel_key,
    measurement_key,
    plan_key,
    release_key,
    toolchain_key,
)

FILES = Path(__file__).parents[1] / "spec" / "files"


class KeptProgress:
    """Keeps what a step says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        """Take a line."""
        self.said.append(message)

    def fraction(self, done: float, message: str = "") -> None:
        """Take a share."""


class SomeLane:
    """A lane with one rule, whose toolchain is known without asking an interpreter."""

    name = "cpu"

    def problems(self, target: Target) -> Sequence[str]:
        return ["dtype float16 is not possible here. Use bfloat16."] * (target.dtype == "float16")

    def warnings(self, target: Target, config: Mapping[str, Any] | None = None) -> Sequence[str]:
        return ()

    def returned(self, target: Target) -> Returned:
        return CpuLane().returned(target)

    def model_problems(self, target: Target, config: Mapping[str, Any]) -> Sequence[str]:
        return ()

    def toolchain(self, python: Path) -> dict[str, str]:
        return {"vllm": "0.32.0"}

    def toolchain_problems(self, target: Target, toolchain: Mapping[str, str]) -> Sequence[str]:
        return ()

    def key_inputs(
        self,
        target: Target,
        *,
        architecture_digest: str,
        toolchain: Mapping[str, str],
        draft_architecture_digest: str = "",
    ) -> dict[str, Any]:
        return {
            "architecture": architecture_digest,
            "toolchain": dict(toolchain),
            "max_model_len": target.max_model_len,
        }

    def serving_settings(self, target: Target, *, served_model_name: str) -> dict[str, Any]:
        return {"max_num_seqs": target.max_num_seqs}


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepContext:
    """Return a context with a catalogue, a source of two revisions and an empty store."""

    def get_lane(name: str) -> SomeLane:
        if name != "cpu":
            raise BadInput(f"Lane {name} is not available in this version.", hint="Use cpu.")
        return SomeLane()

    monkeypatch.setattr(plan_module, "get_lane", get_lane)
    shutil.copytree(FILES, tmp_path / "dags")
    settings = Settings(
        home=tmp_path / "home",
        catalogue=tmp_path / "dags" / "models",
        environments=tmp_path / "dags" / "environments.yaml",
        requested_by="somebody",
    )
    for revision in ("r1", "r2"):
        write_model(settings.home / "demo" / "models" / "adder" / revision, fill=len(revision))
    store = FolderStore(settings.store_root)
    return StepContext(settings, store, KeptProgress(), tmp_path / "work")


ADDER = ReleaseRequest(model="adder")


def keys(context: StepContext) -> list[str]:
    return [entry.key for entry in context.store.list("")]


def stored(context: StepContext, result: StepResult) -> Plan:
    return read_document(context.store, result.key, Plan)


def revision_folder(context: StepContext, revision: str = "r1") -> Path:
    return context.settings.home / "demo" / "models" / "adder" / revision


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def store_checkpoint(context: StepContext, *, shorter_by: int = 0) -> CheckpointManifest:
    """Store the manifest of revision r1 as a download would."""
    spec = load_spec(context.settings.catalogue / "adder.yaml")
    source = open_source(spec.source, base=context.settings.catalogue, settings=context.settings)
    resolved = source.resolve("r1")
    manifest = CheckpointManifest(
        model="adder",
        revision="r1",
        source=resolved.uri,
        files=tuple(
            FileEntry(path=file.path, size=file.size - shorter_by, sha256="0" * 64)
            for file in resolved.files
        ),
        digest=digest("checkpoint"),
        architecture_digest=read_architecture(source, resolved).digest,
        parameters=12,
    )
    create_document(context.store, "checkpoints/adder/r1/manifest.json", manifest)
    return manifest


def store_stable_release(context: StepContext, plan_made: Plan, environment: str) -> Release:
    """Publish the plan's release, measured, and make it the stable one of an environment."""
    planned = plan_made.targets[0]
    release = Release(
        release_id=release_id_of(
            "adder",
            checkpoint_digest=digest("checkpoint"),
            compile_key=planned.compile_key,
            serving_digest=planned.serving_digest,
        ),
        model="adder",
        target=planned.target,
        lane="cpu",
        checkpoint_key=plan_made.checkpoint_key,
        checkpoint_digest=digest("checkpoint"),
        revision=plan_made.revision,
        compile_key=planned.compile_key,
        bundle_digest=digest("bundle"),
        serving=planned.serving,
        serving_digest=planned.serving_digest,
        served_model_name="adder",
        toolchain=planned.toolchain,
        measurement_id=planned.measurement_id,
        spec=plan_made.spec,
    )
    signed, _ = store_release(context.store, release, signing_key(context.settings))
    track = Track(release_id=release.release_id, since=datetime.now(UTC))
    channel = Channel(model="adder", environment=environment, stable=track)
    create_document(context.store, channel_key("adder", environment), channel)
    return signed


def store_measurement(context: StepContext, measurement_id: str) -> None:
    measurement = Measurement(
        measurement_id=measurement_id,
        model="adder",
        revision="r1",
        checkpoint_digest=digest("checkpoint"),
        compile_key="k",
        serving_digest="s",
        target="cpu",
        lane="cpu",
        start=StartFigures(ready_s=1, engine_init_s=None, new_cache_files=()),
        accuracy=(),
        latency=(),
        machine={},
        toolchain={},
    )
    create_document(context.store, measurement_key(measurement_id), measurement)


def test_a_plan_and_its_evaluation_files_are_stored(context: StepContext) -> None:
    result = plan(ADDER, context)

    made = stored(context, result)
    assert not result.reused
    assert result.detail["plan_id"] == made.plan_id
    assert result.key == plan_key(made.plan_id)
    assert made.revision == "r1"  # the spec's, though r2 is newer
    assert made.spec == load_spec(FILES / "models" / "adder.yaml")
    assert made.provenance.requested_by == "somebody"
    assert made.targets[0].serving == {"max_num_seqs": 16, "served_model_name": "adder"}
    assert made.targets[0].baselines == {}
    assert made.assets is not None
    assert made.assets.files == (
        "adder/addition.jsonl",
        "adder/addition.yaml",
        "adder/prompts.jsonl",
    )
    for name in made.assets.files:
        content = context.store.read(f"evals/{made.assets.digest}/{name}").data
        assert content == (FILES / "models" / name).read_bytes()
    assert len(keys(context)) == 4


def test_every_step_is_explained(context: StepContext) -> None:
    plan(ADDER, context)

    assert isinstance(context.progress, KeptProgress)
    said = context.progress.said[-6:]
    assert [line.split(":")[0] for line in said] == [
        "download",
        "compile cpu",
        "measure cpu",
        "accuracy gate cpu",
        "latency gate cpu",
        "publish cpu",
    ]
    assert all(": will run. " in line for line in said)


def test_planning_again_changes_nothing(context: StepContext) -> None:
    first = plan(ADDER, context)
    before = {key: context.store.read(key).data for key in keys(context)}

    again = plan(ADDER, context)

    assert again.reused
    assert again.key == first.key
    assert {key: context.store.read(key).data for key in keys(context)} == before


def test_a_plan_of_the_same_substance_stands_when_more_exists(context: StepContext) -> None:
    first = plan(ADDER, context)
    store_checkpoint(context)

    again = plan(ADDER, context)

    assert (again.key, again.reused) == (first.key, True)
    assert stored(context, again).steps[0].exists is False
    steps: Any = again.detail["steps"]
    assert steps[0]["will_run"] is False
    assert "Will run: compile cpu, measure cpu" in again.message


def test_a_retry_with_its_id_does_not_plan_again(context: StepContext) -> None:
    first = plan(ADDER, context, plan_id="run-1")
    (revision_folder(context) / "model.safetensors").unlink()

    again = plan(ADDER, context, plan_id="run-1")

    assert (again.key, again.reused) == (first.key, True)
    assert first.key == "plans/run-1.json"


def test_an_id_stands_for_one_request(context: StepContext) -> None:
    plan(ADDER, context, plan_id="run-1")

    with pytest.raises(BadInput, match="answers another request"):
        plan(ReleaseRequest(model="adder", revision="r2"), context, plan_id="run-1")


def test_whoever_comes_second_gets_the_plan_of_the_first(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plan_module._store_plan
    other = ReleaseRequest(model="adder", revision="r2")

    def race(made: Plan, context: StepContext) -> StepResult:
        """Let somebody else plan under the same id just before."""
        monkeypatch.setattr(plan_module, "_store_plan", real)
        store_checkpoint(context)
        plan(made.request if made.plan_id == "run-1" else ADDER, context, plan_id=made.plan_id)
        return real(made, context)

    monkeypatch.setattr(plan_module, "_store_plan", race)
    result = plan(ADDER, context, plan_id="run-1")
    assert result.reused
    assert stored(context, result).steps[0].exists

    monkeypatch.setattr(plan_module, "_store_plan", race)
    with pytest.raises(BadInput, match="answers another request"):
        plan(other, context, plan_id="run-2")


def test_a_plan_that_was_cut_short_is_made_by_the_next_try(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: Any) -> bool:
        raise Transient("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "create_document", full)
        with pytest.raises(Transient):
            plan(ADDER, context)
    assert not any(key.startswith("plans/") for key in keys(context))

    assert not plan(ADDER, context).reused


def test_overrides_and_revision_are_in_the_plan(context: StepContext) -> None:
    request = ReleaseRequest(model="adder", revision="r2", overrides={"max_num_seqs": 1})

    made = stored(context, plan(request, context))

    default = stored(context, plan(ADDER, context))
    assert made.revision == "r2"
    assert made.targets[0].target.max_num_seqs == 1
    assert made.targets[0].serving["max_num_seqs"] == 1
    assert made.targets[0].compile_key == default.targets[0].compile_key
    assert made.targets[0].serving_digest != default.targets[0].serving_digest


def test_the_newest_revision_is_taken_when_nobody_names_one(context: StepContext) -> None:
    edit(context.settings.catalogue / "adder.yaml", "  revision: r1\n", "")

    assert stored(context, plan(ADDER, context)).revision == "r2"


def spec_edit(old: str, new: str) -> Callable[[StepContext], None]:
    return lambda context: edit(context.settings.catalogue / "adder.yaml", old, new)


def environments_edit(old: str, new: str) -> Callable[[StepContext], None]:
    return lambda context: edit(context.settings.environments, old, new)


def add_pickle(context: StepContext) -> None:
    (revision_folder(context) / "pytorch_model.bin").write_bytes(b"x")


def lose_config(context: StepContext) -> None:
    (revision_folder(context) / "config.json").unlink()


def cut_weights(context: StepContext) -> None:
    path = revision_folder(context) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def few_positions(context: StepContext) -> None:
    write_model(revision_folder(context), config={**CONFIG, "max_position_embeddings": 64})


def nothing(_context: StepContext) -> None:
    pass


REQUIRES = ("requires: []", "requires: [staging]")


@pytest.mark.parametrize(
    ("spoil", "request_", "kind", "words"),
    [
        (nothing, {"model": "addr"}, NotFound, "Did you mean adder?"),
        (nothing, {"model": "../adder"}, BadInput, "not a valid name"),
        (nothing, {"revision": "r9"}, NotFound, "r9"),
        (nothing, {"revision": "../r1"}, BadInput, "not valid"),
        (nothing, {"targets": ("gpu",)}, BadInput, "no target 'gpu'"),
        (nothing, {"environments": ("prod",)}, BadInput, "no environment 'prod'"),
        (nothing, {"overrides": {"speed": 1}}, BadInput, "no such setting"),
        (nothing, {"overrides": {"max_num_seqs": 0}}, BadInput, "at least 1"),
        (nothing, {"overrides": {"dtype": "float16"}}, BadInput, "float16 is not possible"),
        (spec_edit("lane: cpu", "lane: neuron-native"), {}, BadInput, "not available in this"),
        (spec_edit("dtype: bfloat16", "dtype: bf16"), {}, BadInput, "targets[0].dtype"),
        (environments_edit("devices: 2", "devices: two"), {"environments": ("staging",)},
         BadInput, "environments.staging.devices"),
        (environments_edit(*REQUIRES), {"environments": ("production",)},
         BadInput, "requires staging, where the release has not been"),
        (spec_edit("replicas: 1", "replicas: 2"), {"environments": ("staging",)},
         BadInput, "need 4 servers"),
        (spec_edit("- name: cpu", "- name: other"), {"environments": ("staging",)},
         BadInput, "serves target 'cpu', and the release has other"),
        (add_pickle, {}, BadInput, "pickle files are never loaded"),
        (lose_config, {}, BadInput, "config.json is missing"),
        (cut_weights, {}, BadInput, "truncated"),
        (few_positions, {}, BadInput, "more than the model's 64 positions"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    context: StepContext,
    spoil: Callable[[StepContext], None],
    request_: dict[str, Any],
    kind: type[BadInput],
    words: str,
) -> None:
    spoil(context)

    with pytest.raises(kind) as caught:
        plan(ReleaseRequest(**{"model": "adder", **request_}), context)

    assert words in str(caught.value)
    assert keys(context) == []


def test_a_revision_never_changes(context: StepContext) -> None:
    store_checkpoint(context, shorter_by=1)

    with pytest.raises(BadInput, match="with other files than"):
        plan(ADDER, context)


def test_the_stable_release_is_the_baseline(context: StepContext) -> None:
    request = ReleaseRequest(model="adder", environments=("staging", "production"))
    first = stored(context, plan(request, context))
    assert first.targets[0].baselines == {}
    release = store_stable_release(context, first, "production")
    assert stored(context, plan(request, context)).targets[0].baselines == {}  # not measured

    store_measurement(context, release.measurement_id)
    later = stored(context, plan(request, context))

    assert later.targets[0].baselines == {"production": release.measurement_id}
    assert later.plan_id != first.plan_id


def test_a_stable_release_that_was_adopted_is_no_baseline(context: StepContext) -> None:
    track = Track(release_id="adder-0123456789ab", since=datetime.now(UTC), verified=False)
    channel = Channel(model="adder", environment="production", stable=track)
    create_document(context.store, channel_key("adder", "production"), channel)

    request = ReleaseRequest(model="adder", environments=("production",))
    (target,) = stored(context, plan(request, context)).targets

    assert target.baselines == {}
    assert "(adder-0123456789ab) was adopted" in target.incomparable["production"]


def test_a_forged_stable_release_is_no_baseline(context: StepContext) -> None:
    first = stored(context, plan(ADDER, context))
    release = store_stable_release(context, first, "production")
    key = release_key("adder", release.release_id)
    forged = release.model_copy(update={"measurement_id": "0123456789ab"})
    context.store.put(key, forged.to_bytes())

    with pytest.raises(BadInput):
        plan(ReleaseRequest(model="adder", environments=("production",)), context)


def test_a_release_that_was_in_the_required_environment_may_go_on(context: StepContext) -> None:
    edit(context.settings.environments, *REQUIRES)
    store_checkpoint(context)
    request = ReleaseRequest(model="adder", environments=("production",))
    with pytest.raises(BadInput, match="requires staging"):
        plan(request, context)
    # Another release of the same checkpoint counts: here one with other serving settings.
    other = ReleaseRequest(model="adder", overrides={"max_num_seqs": 4})
    store_stable_release(context, stored(context, plan(other, context)), "staging")

    assert not plan(request, context).reused


def test_a_release_of_another_checkpoint_says_nothing_about_this_one(context: StepContext) -> None:
    edit(context.settings.environments, *REQUIRES)
    store_checkpoint(context)
    store_stable_release(context, stored(context, plan(ADDER, context)), "staging")

    with pytest.raises(BadInput, match="requires staging"):
        plan(ReleaseRequest(model="adder", revision="r2", environments=("production",)), context)


def test_an_adopted_release_proves_nothing(context: StepContext) -> None:
    edit(context.settings.environments, *REQUIRES)
    store_checkpoint(context)
    track = Track(release_id="adder-0123456789ab", since=datetime.now(UTC), verified=False)
    channel = Channel(model="adder", environment="staging", stable=track)
    create_document(context.store, channel_key("adder", "staging"), channel)

    with pytest.raises(BadInput, match="requires staging"):
        plan(ReleaseRequest(model="adder", environments=("production",)), context)


def test_a_corrupt_plan_is_reported(context: StepContext) -> None:
    context.store.create("plans/run-1.json", b"{}")

    with pytest.raises(CorruptFile):
        plan(ADDER, context, plan_id="run-1")


def test_checking_files_asks_the_lanes(context: StepContext) -> None:
    path = context.settings.catalogue / "adder.yaml"
    assert check_files_with_lanes([path]) == []
    edit(path, "lane: cpu", "lane: neuron-nxdi")

    (problem,) = check_files_with_lanes([path])

    assert problem.key == "targets[0]"
    assert problem.message == "Lane neuron-nxdi is not available in this version. Use cpu."


class TestStepsAsPods:
    """The environments file has a place for pods; Airflow's own interpreter is not asked."""

    IMAGE = "registry.example/trainyard:1"

    @pytest.fixture
    def pods(self, context: StepContext) -> StepContext:
        settings = context.settings
        mount = {"host_path": "/data", "mount_path": str(settings.home), "read_only": False}
        steps = {"namespace": "steps", "image": self.IMAGE, "host_mounts": [mount]}
        with settings.environments.open("a") as file:
            file.write(f"\nsteps: {json.dumps(steps)}\n")
        return context

    def record(self, context: StepContext) -> None:
        record = ToolchainRecord(image=self.IMAGE, lane="cpu", toolchain={"vllm": "0.40.0"})
        context.store.put(toolchain_key(self.IMAGE, "cpu"), record.to_bytes())

    def test_the_plan_names_what_was_recorded_in_the_image(self, pods: StepContext) -> None:
        self.record(pods)
        made = stored(pods, plan(ADDER, pods))
        assert made.targets[0].toolchain == {"vllm": "0.40.0"}
        assert made.targets[0].key_inputs["toolchain"] == {"vllm": "0.40.0"}

    def test_the_image_will_be_asked_about_the_harness_s_own_tasks(self, pods: StepContext) -> None:
        self.record(pods)
        edit(pods.settings.catalogue / "adder.yaml", "        path: adder/addition.yaml\n", "")
        made = stored(pods, plan(ADDER, pods))
        assert [step.step for step in made.steps][:3] == ["download", "tasks", "compile"]

    def test_an_image_that_nobody_asked_is_refused(self, pods: StepContext) -> None:
        with pytest.raises(BadInput, match=r"of image registry\.example") as refused:
            plan(ADDER, pods)
        assert "trainyard toolchain --lane cpu" in refused.value.hint
        assert not any(key.startswith("plans/") for key in keys(pods))

    def test_a_place_where_the_pods_could_not_run_is_refused(self, pods: StepContext) -> None:
        self.record(pods)
        edit(pods.settings.environments, '"read_only": false', '"read_only": true')
        with pytest.raises(BadInput, match="is a folder that no pod sees"):
            plan(ADDER, pods)
        assert not any(key.startswith("plans/") for key in keys(pods))


def test_the_plan_says_how_large_the_checkpoint_is(context: StepContext) -> None:
    made = stored(context, plan(ADDER, context))
    folder = revision_folder(context)
    loaded = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")]
    assert made.checkpoint_bytes == sum(path.stat().st_size for path in loaded)


PARITY = """
    parity:
      num_prompts: 4
      max_tokens: 16
      bounds:
        agreement: {min: 0.99}
"""


def ask_for_parity(context: StepContext, *more: str) -> None:
    """Give the spec a parity check."""
    lines = "".join(f"      {each}\n" for each in more)
    path = context.settings.catalogue / "adder.yaml"
    edit(path, "        max_drop: 0.05\n", f"        max_drop: 0.05\n{PARITY}{lines}")


def have_memory(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    class Memory:
        total = int(gib * 2**30)

    monkeypatch.setattr(plan_module.psutil, "virtual_memory", Memory)


def test_a_parity_check_makes_another_measurement_and_its_bounds_do_not(
    context: StepContext,
) -> None:
    def measurement_id() -> str:
        return stored(context, plan(ADDER, context)).targets[0].measurement_id

    without = measurement_id()
    ask_for_parity(context)
    with_parity = measurement_id()
    edit(context.settings.catalogue / "adder.yaml", "min: 0.99", "min: 0.95")
    assert without != with_parity == measurement_id()


def test_a_reference_that_does_not_fit_into_memory_is_refused(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for_parity(context)
    have_memory(monkeypatch, 1.5)
    with pytest.raises(BadInput, match=r"gates\.accuracy\.parity takes 2\.0 GiB") as found:
        plan(ADDER, context)
    assert "this machine has 1.5" in str(found.value)
    assert keys(context) == []
    have_memory(monkeypatch, 4.0)
    plan(ADDER, context)


def test_the_plan_says_what_memory_the_reference_takes(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_memory(monkeypatch, 4.0)
    assert stored(context, plan(ADDER, context)).reference_gib == 0.0
    ask_for_parity(context)
    assert stored(context, plan(ADDER, context)).reference_gib == 1.0
    edit(context.settings.catalogue / "adder.yaml", "num_prompts: 4", "reference: imported")
    # Nobody can ask for it before there is a checkpoint.
    assert stored(context, plan(ADDER, context)).reference_gib == 0.0


def test_a_reference_that_exists_takes_no_memory(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for_parity(context)
    have_memory(monkeypatch, 1.5)
    spec = load_spec(context.settings.catalogue / "adder.yaml")
    checkpoint = store_checkpoint(context)
    wanted = planned_reference(spec, spec.targets[0], checkpoint.digest, context.settings.catalogue)
    reference = Reference(checkpoint_digest=checkpoint.digest, settings=wanted.settings, answers=())
    create_document(context.store, wanted.key, reference)
    plan(ADDER, context)


def test_a_reference_to_be_imported_must_be_there_once_the_checkpoint_is(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for_parity(context, "reference: imported")
    have_memory(monkeypatch, 1.5)
    plan(ADDER, context)
    store_checkpoint(context)
    with pytest.raises(BadInput, match="nobody has imported the reference references/"):
        plan(ADDER, context)


def harness(context: StepContext, *answers: dict[str, object]) -> StepContext:
    """Return surroundings whose serving interpreter says what it knows about tasks."""
    edit(context.settings.catalogue / "adder.yaml", "        path: adder/addition.yaml\n", "")
    python = context.settings.home / "python"
    lines = "\n".join(json.dumps(answer) for answer in answers)
    python.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    python.chmod(0o755)
    settings = context.settings.model_copy(update={"serve_python": python})
    return replace(context, settings=settings)


def known(**changes: object) -> dict[str, object]:
    return {"name": "addition", "output_types": ["generate_until"], "problem": "", **changes}


def test_the_harness_s_own_tasks_are_asked_for(context: StepContext) -> None:
    plan(ADDER, harness(context, known()))


def test_an_unknown_task_is_refused_before_anything_is_stored(context: StepContext) -> None:
    asked = harness(context, known(problem="lm-evaluation-harness knows no such task."))
    with pytest.raises(BadInput, match="Accuracy task addition: lm-evaluation-harness knows no"):
        plan(ADDER, asked)
    assert keys(context) == []


def test_a_task_that_the_lane_cannot_answer_is_refused(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SomeLane, "returned", lambda self, target: Returned(0, False, "never"))
    asked = harness(context, known(output_types=["multiple_choice"]))
    with pytest.raises(BadInput, match=r"compares given answers \(multiple_choice\)"):
        plan(ADDER, asked)


def test_a_task_file_that_the_lane_cannot_answer_is_refused(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SomeLane, "returned", lambda self, target: Returned(0, False, "never"))
    task = context.settings.catalogue / "adder" / "addition.yaml"
    edit(task, "output_type: generate_until", "output_type: multiple_choice")
    with pytest.raises(BadInput, match=r"compares given answers \(multiple_choice\)"):
        plan(ADDER, context)


def test_a_serving_environment_without_the_harness_is_named(context: StepContext) -> None:
    asked = harness(context)
    python = asked.settings.serving_interpreter
    python.write_text("#!/bin/sh\necho 'No module named lm_eval' >&2\nexit 1\n")
    with pytest.raises(BadInput, match="cannot be asked about accuracy tasks: No module"):
        plan(ADDER, asked)
