from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.unit import yard
from tests.unit.steps.lane_bench import Bench

from trainyard.canonical import digest
from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry
from trainyard.documents.measurement import (
    Envelope,
    LevelFigures,
    Measurement,
    RateFound,
    RateProbe,
    TaskScore,
)
from trainyard.documents.parity import (
    AnswerFigures,
    ParityFigures,
    PositionCounts,
    Reference,
    ReferenceAnswer,
    ReferencePosition,
    Samples,
    TaskSamples,
)
from trainyard.documents.plan import EvalAssets, Plan
from trainyard.errors import BadInput, Busy, CacheMiss, CorruptFile, NotFound, Refused
from trainyard.lanes.capabilities import of_cpu
from trainyard.measure.job import Failure, Job, Made, Outcome, Progress
from trainyard.references import planned_reference
from trainyard.spec.model import BehaviourName
from trainyard.steps.compile import compile_bundle
from trainyard.steps.context import StepContext
from trainyard.steps.measure import envelope_of, measure
from trainyard.store.documents import read_document
from trainyard.store.layout import (
    bundle_manifest_key,
    checkpoint_manifest_key,
    evals_prefix,
    measurement_key,
    samples_prefix,
)

KEY = measurement_key("candidate")
OUTCOME = Outcome(
    accuracy=(TaskScore(name="sums", metric="exact_match", score=0.97, samples=200),),
    latency=(LevelFigures(name="busy", figures=yard.FIGURES, duration_s=9.0, completed=64),),
    behaviour=yard.behaviour(),
)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a bench with a bundle in its store."""
    made = Bench(tmp_path, monkeypatch)
    compile_bundle(made.plan, "cpu", made.surroundings("compile"))
    return made


def context(bench: Bench, *events: Outcome | Failure | Progress | Made) -> StepContext:
    """Return surroundings whose serving interpreter notes its job and tells `events`."""
    python = bench.home / "python"
    lines = "\n".join(event.model_dump_json() for event in events)
    python.write_text(f"#!/bin/sh\nread job\necho \"$job\" > job.json\ncat <<'END'\n{lines}\nEND\n")
    python.chmod(0o755)
    return bench.surroundings("measure", serve_python=python)


def test_a_measurement_holds_the_figures_and_what_they_were_made_of(bench: Bench) -> None:
    progress = Progress(fraction=0.5, message="latency: level busy")
    result = measure(bench.plan, "cpu", context(bench, progress, OUTCOME))
    assert (result.key, result.reused) == (KEY, False)
    assert result.detail["sums/exact_match"] == 0.97
    assert "latency: level busy" in bench.said
    found = read_document(bench.store, KEY, Measurement)
    checkpoint = read_document(
        bench.store, checkpoint_manifest_key("adder", "v1"), CheckpointManifest
    )
    assert found.accuracy == OUTCOME.accuracy
    assert found.latency == OUTCOME.latency
    assert found.behaviour == OUTCOME.behaviour
    assert "8 of 8 behaviour checks held" in result.message
    assert found.checkpoint_digest == checkpoint.digest
    assert found.compile_key == yard.COMPILE_KEY
    assert found.serving_digest == digest(yard.SERVING)
    assert found.start.engine_init_s == 1.5
    assert found.start.new_cache_files == ()
    assert found.machine["memory_gib"] > 0
    assert bundle_manifest_key(yard.COMPILE_KEY) in found.provenance.inputs


def test_the_job_names_what_the_spec_asks_for(bench: Bench) -> None:
    surroundings = context(bench, OUTCOME)
    measure(bench.plan, "cpu", surroundings)
    job = Job.model_validate_json((surroundings.work_dir / "job.json").read_text())
    assert job.tasks == bench.plan.spec.gates.accuracy.tasks
    assert job.levels == bench.plan.spec.gates.latency.levels
    assert job.served_model_name == "adder"
    assert Path(job.model_dir, "model.safetensors").read_bytes() == b"weights"
    assert job.behaviour is not None
    assert tuple(job.behaviour.capabilities) == get_args(BehaviourName)
    assert job.behaviour.capabilities["batching"] == of_cpu("batching")
    assert (job.behaviour.dtype, job.behaviour.max_num_seqs) == ("bfloat16", 16)


@pytest.mark.parametrize("made", [set(get_args(BehaviourName)) - {"penalties"}, set()])
def test_checks_that_the_spec_skips_are_not_made(bench: Bench, made: set[BehaviourName]) -> None:
    skipped = {"severity": "skip", "reason": "None is sent."}
    waivers = {name: skipped for name in get_args(BehaviourName) if name not in made}
    gates = {**yard.SPEC["gates"], "behaviour": {"waivers": waivers}}
    surroundings = context(bench, OUTCOME)
    measure(yard.plan(model_spec=yard.spec(gates=gates)), "cpu", surroundings)
    job = Job.model_validate_json((surroundings.work_dir / "job.json").read_text())
    assert set(job.behaviour.capabilities if job.behaviour else ()) == made


def test_a_measurement_that_exists_is_used_without_a_start(bench: Bench) -> None:
    measure(bench.plan, "cpu", context(bench, OUTCOME))
    starts = bench.lane.starts
    again = measure(bench.plan, "cpu", context(bench))
    assert again.reused
    assert "0.97" in again.message
    assert bench.lane.starts == starts


def planned_for(bench: Bench, **machine: Any) -> Plan:
    """Return the bench's plan for a kind of machine."""
    (target,) = bench.plan.targets
    targets = (target.model_copy(update={"machine": machine}),)
    return bench.plan.model_copy(update={"targets": targets})


def test_another_kind_of_machine_than_the_planned_one_measures_nothing(bench: Bench) -> None:
    other = planned_for(bench, processor="Another CPU", threads=1000)
    starts = bench.lane.starts

    with pytest.raises(BadInput, match="processor Another CPU, threads 1000") as caught:
        measure(other, "cpu", context(bench, OUTCOME))

    assert "plan again" in caught.value.hint
    assert bench.lane.starts == starts
    assert not bench.store.exists(KEY)


def test_figures_of_another_machine_are_not_reused(bench: Bench) -> None:
    measure(bench.plan, "cpu", context(bench, OUTCOME))

    with pytest.raises(BadInput, match="was made on processor"):
        measure(planned_for(bench, processor="Another CPU"), "cpu", context(bench))

    seen = read_document(bench.store, KEY, Measurement).kind
    assert measure(planned_for(bench, **seen), "cpu", context(bench)).reused


def test_figures_of_another_driver_are_not_reused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(bench.plan, "cpu", context(bench, OUTCOME))
    monkeypatch.setattr("trainyard.steps.measure.driver_version", lambda: "2.31.7.0")

    with pytest.raises(BadInput, match="with Neuron driver unknown, and this node"):
        measure(bench.plan, "cpu", context(bench))


def test_the_loads_that_were_measured_are_recorded(bench: Bench) -> None:
    levels = (
        LevelFigures(
            name="busy",
            figures={"requests_per_s": 4.0},
            duration_s=9.0,
            completed=64,
            input_tokens=(12, 20),
            output_tokens=(8, 8),
            peak_concurrency=7,
        ),
        LevelFigures(
            name="long",
            figures={"requests_per_s": 1.5},
            duration_s=9.0,
            completed=64,
            input_tokens=(100, 120),
            output_tokens=(1, 4),
            peak_concurrency=2,
        ),
        # Nothing of this one was answered.
        LevelFigures(name="flood", figures={}, duration_s=9.0, completed=0),
    )

    measure(bench.plan, "cpu", context(bench, OUTCOME.model_copy(update={"latency": levels})))

    found = read_document(bench.store, KEY, Measurement)
    assert found.envelope == Envelope(
        input_tokens=(12, 120), output_tokens=(1, 8), max_concurrency=7, max_requests_per_s=4.0
    )
    assert found.instance == "local"
    assert found.start.cold_s is not None
    assert found.start.cold_s > 0


def test_the_highest_rate_within_the_slo_was_served_as_well() -> None:
    level = LevelFigures(
        name="busy",
        figures={"requests_per_s": 4.0},
        duration_s=9.0,
        completed=64,
        input_tokens=(100, 120),
        output_tokens=(1, 4),
        peak_concurrency=2,
    )
    probes = tuple(
        RateProbe(
            rate_per_s=rate,
            requests=40,
            completed=40,
            attainment=1.0,
            meets=meets,
            figures={"requests_per_s": rate},
            duration_s=9.0,
            peak_concurrency=int(2 * rate),
        )
        for rate, meets in ((5.0, True), (10.0, False))
    )
    search = RateFound(
        level="busy",
        rate_per_s=5.0,
        failing_rate_per_s=10.0,
        complete=True,
        reason="",
        probes=probes,
    )

    envelope = envelope_of((level,), search)

    assert envelope is not None
    assert (envelope.max_concurrency, envelope.max_requests_per_s) == (10, 5.0)
    assert envelope_of((), search) is None


def test_without_answered_requests_there_is_no_envelope(bench: Bench) -> None:
    measure(bench.plan, "cpu", context(bench, OUTCOME))

    assert read_document(bench.store, KEY, Measurement).envelope is None


def test_a_server_that_compiles_is_refused_with_the_new_files(bench: Bench) -> None:
    bench.lane.behaviour = "misses"
    with pytest.raises(CacheMiss, match=r"inductor/xy/cxy\.cpp") as caught:
        measure(bench.plan, "cpu", context(bench, OUTCOME))
    assert caught.value.exit_code == 20
    assert not bench.store.exists(KEY)


def test_a_cache_that_changes_under_load_is_refused(bench: Bench) -> None:
    surroundings = context(bench, OUTCOME)
    python = surroundings.settings.serving_interpreter
    late = surroundings.work_dir / "cache" / "inductor" / "late.so"
    python.write_text(python.read_text().replace("cat <<", f"echo > {late}\ncat <<"))
    with pytest.raises(CacheMiss, match=r"inductor/late\.so"):
        measure(bench.plan, "cpu", surroundings)
    assert not bench.store.exists(KEY)


def test_a_missing_bundle_is_named(bench: Bench) -> None:
    bench.store.delete(bundle_manifest_key(yard.COMPILE_KEY))
    with pytest.raises(NotFound, match="bundles/"):
        measure(bench.plan, "cpu", context(bench, OUTCOME))


def test_a_damaged_bundle_is_refused_before_a_start(bench: Bench) -> None:
    manifest = read_document(bench.store, bundle_manifest_key(yard.COMPILE_KEY), BundleManifest)
    key = f"bundles/{yard.COMPILE_KEY}/{manifest.files[1].path}"
    bench.store.delete(key)
    bench.store.put(key, b"x" * manifest.files[1].size)
    starts = bench.lane.starts
    with pytest.raises(CorruptFile):
        measure(bench.plan, "cpu", context(bench, OUTCOME))
    assert bench.lane.starts == starts


def test_a_metric_that_does_not_exist_is_bad_input(bench: Bench) -> None:
    failure = Failure(bad_input=True, message="No metric bleu.", hint="It gives: acc.")
    with pytest.raises(BadInput, match="No metric bleu"):
        measure(bench.plan, "cpu", context(bench, failure))
    assert not bench.store.exists(KEY)


def test_another_toolchain_than_the_planned_one_is_refused(bench: Bench) -> None:
    bench.lane.found = {"vllm": "0.33.0"}
    with pytest.raises(BadInput, match="not the one of the plan"):
        measure(bench.plan, "cpu", context(bench, OUTCOME))


def test_nothing_is_stored_after_the_lock_was_lost(bench: Bench) -> None:
    def lost() -> None:
        raise Busy("Another process took over.")

    with pytest.raises(Busy):
        measure(bench.plan, "cpu", replace(context(bench, OUTCOME), ensure_held=lost))
    assert not bench.store.exists(KEY)


def with_assets(bench: Bench, content: bytes) -> Plan:
    """Return the plan with one task file, whose stored content is `content`."""
    path = "adder/sums.yaml"
    planned = FileEntry(path=path, size=6, sha256=hashlib.sha256(b"task: ").hexdigest())
    assets = EvalAssets(digest=files_digest([planned]), files=(path,))
    bench.store.put(f"{evals_prefix(assets.digest)}/{path}", content)
    return bench.plan.model_copy(update={"assets": assets})


def test_task_files_are_restored_in_their_folders(bench: Bench) -> None:
    plan = with_assets(bench, b"task: ")
    surroundings = context(bench, OUTCOME)
    measure(plan, "cpu", surroundings)
    job = Job.model_validate_json((surroundings.work_dir / "job.json").read_text())
    assert Path(job.assets_dir, "adder", "sums.yaml").read_bytes() == b"task: "


def test_other_task_files_than_the_planned_ones_are_refused(bench: Bench) -> None:
    plan = with_assets(bench, b"task! ")
    with pytest.raises(CorruptFile, match="evals/"):
        measure(plan, "cpu", context(bench, OUTCOME))


def test_bundles_of_other_weights_are_shared(bench: Bench) -> None:
    """The compile key has no weights in it, so another checkpoint finds the same bundle."""
    bench.store.delete(checkpoint_manifest_key("adder", "v1"))
    bench.store.delete("checkpoints/adder/v1/model.safetensors")
    bench.keep_checkpoint(b"other weights")
    assert compile_bundle(bench.plan, "cpu", bench.surroundings("compile")).reused
    assert not measure(bench.plan, "cpu", context(bench, OUTCOME)).reused


PARITY = ParityFigures(
    reference="references/c/s.json",
    prompts=1,
    prompt_agreement=1.0,
    compared=2,
    agreed=2,
    excused=0,
    first_divergence=2,
    exact_answers=1.0,
    by_position=(PositionCounts(compared=1, agreed=1, excused=0),) * 2,
)
DETAILED = OUTCOME.model_copy(
    update={
        "samples": (TaskSamples(name="sums", metric="exact_match", scores={"0-a-b": 1.0}),),
        "parity": PARITY,
        "answers": (AnswerFigures(tokens=(1, 2), agreed=2, excused=0, diverged=0),),
    }
)


def with_parity(bench: Bench, **changes: object) -> Plan:
    """Return the plan with a parity check of two prompts."""
    content = b'{"prompt": "1+1="}\n{"prompt": "2+2="}\n'
    sha256 = hashlib.sha256(content).hexdigest()
    planned = FileEntry(path="prompts.jsonl", size=len(content), sha256=sha256)
    assets = EvalAssets(digest=files_digest([planned]), files=("prompts.jsonl",))
    if not bench.store.exists(f"{evals_prefix(assets.digest)}/prompts.jsonl"):
        bench.store.put(f"{evals_prefix(assets.digest)}/prompts.jsonl", content)
    parity = {"num_prompts": 1, "max_tokens": 8, "bounds": {"agreement": {"min": 0.9}}, **changes}
    accuracy = {**yard.SPEC["gates"]["accuracy"], "parity": parity}
    spec = yard.spec(prompts="prompts.jsonl", gates={**yard.SPEC["gates"], "accuracy": accuracy})
    return bench.plan.model_copy(update={"assets": assets, "spec": spec})


def made_reference(bench: Bench, plan: Plan, folder: Path) -> tuple[str, Reference]:
    """Return key and content of the reference that a plan needs."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    key = checkpoint_manifest_key("adder", "v1")
    checkpoint = read_document(bench.store, key, CheckpointManifest).digest
    wanted = planned_reference(plan.spec, plan.spec.targets[0], checkpoint, folder)
    position = ReferencePosition(tokens=(1, 2), logprobs=(-0.1, -3.0))
    answer = ReferenceAnswer(prompt_tokens=(7,), tokens=(1,), positions=(position,))
    return wanted.key, Reference(
        checkpoint_digest=checkpoint, settings=wanted.settings, answers=(answer,)
    )


def test_samples_are_stored_before_the_measurement_that_names_them(bench: Bench) -> None:
    measure(bench.plan, "cpu", context(bench, DETAILED))
    found = read_document(bench.store, KEY, Measurement)
    assert found.samples.startswith(f"{samples_prefix('candidate')}/")
    assert found.parity == PARITY
    samples = read_document(bench.store, found.samples, Samples)
    assert (samples.measurement_id, samples.tasks) == ("candidate", DETAILED.samples)
    assert samples.answers == DETAILED.answers


def test_a_measurement_without_samples_names_none(bench: Bench) -> None:
    measure(bench.plan, "cpu", context(bench, OUTCOME))
    assert read_document(bench.store, KEY, Measurement).samples == ""
    assert not list(bench.store.list("samples"))


def test_a_reference_is_made_once_for_a_checkpoint_and_then_reused(
    bench: Bench, tmp_path: Path
) -> None:
    plan = with_parity(bench)
    key, reference = made_reference(bench, plan, tmp_path / "assets")
    surroundings = context(bench, Made(reference=reference), DETAILED)
    measure(plan, "cpu", surroundings)
    job = Job.model_validate_json((surroundings.work_dir / "job.json").read_text())
    assert job.parity is not None
    assert (job.parity.key, job.parity.reference, job.parity.prompts) == (key, None, ("1+1=",))
    assert job.parity.top_logprobs == 5
    assert read_document(bench.store, key, Reference).answers == reference.answers
    assert any("will be made" in line for line in bench.said)

    bench.store.delete(KEY)
    surroundings = context(bench, DETAILED)
    measure(plan, "cpu", surroundings)
    job = Job.model_validate_json((surroundings.work_dir / "job.json").read_text())
    assert job.parity is not None
    assert job.parity.reference is not None
    assert f"The parity reference of this checkpoint exists: {key}." in bench.said
    assert key in read_document(bench.store, KEY, Measurement).provenance.inputs


def test_a_reference_outlives_a_measurement_that_fails(bench: Bench, tmp_path: Path) -> None:
    plan = with_parity(bench)
    key, reference = made_reference(bench, plan, tmp_path / "assets")
    failure = Failure(bad_input=False, message="The benchmark crashed.", hint="Look.")
    with pytest.raises(Refused, match="crashed"):
        measure(plan, "cpu", context(bench, Made(reference=reference), failure))
    assert bench.store.exists(key)
    assert not bench.store.exists(KEY)


def test_a_reference_that_nobody_imported_is_named_before_a_start(bench: Bench) -> None:
    starts = bench.lane.starts
    with pytest.raises(NotFound, match="no parity reference references/") as missing:
        measure(with_parity(bench, reference="imported"), "cpu", context(bench, OUTCOME))
    assert "trainyard import-reference --plan adder-plan --target cpu" in missing.value.hint
    assert bench.lane.starts == starts


def test_the_job_says_what_the_lane_returns(bench: Bench) -> None:
    surroundings = context(bench, DETAILED)
    measure(bench.plan, "cpu", surroundings)
    job = Job.model_validate_json((surroundings.work_dir / "job.json").read_text())
    assert (job.prompt_logprobs, job.parity) == (True, None)
