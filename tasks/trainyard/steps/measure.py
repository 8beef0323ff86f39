"""Measures one target: restores checkpoint and bundle, starts the server, and puts load on it.

First comes the proof that the server started from its bundle, without compiling; then accuracy
through lm-evaluation-harness, parity with a reference of the checkpoint, and latency through vLLM's
serving benchmark, all in one go. The measuring process imports its libraries while the server
starts.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainyard.canonical import short
from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry, Provenance
from trainyard.documents.measurement import (
    Envelope,
    LevelFigures,
    Measurement,
    RateFound,
    RateProbe,
    StartFigures,
    machine_kind,
)
from trainyard.documents.parity import Reference, Samples
from trainyard.documents.plan import Plan, PlannedTarget
from trainyard.errors import BadInput, CacheMiss, Conflict, CorruptFile, NotFound
from trainyard.lanes.neuron_common import compiled_off_device
from trainyard.lanes.neuron_device import driver_version
from trainyard.lanes.protocol import Lane, StartProof
from trainyard.lanes.registry import get_lane
from trainyard.materialize import materialize_bundle, materialize_checkpoint
from trainyard.measure.behaviour.run import BehaviourJob
from trainyard.measure.handle import MeasuringProcess
from trainyard.measure.job import Job, Outcome, ParityJob
from trainyard.measure.machine import describe_machine
from trainyard.names import check_relative_path
from trainyard.references import planned_reference
from trainyard.steps.compile import planned_target
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.lane_server import RunningServer, ask, check_toolchain, lane_server
from trainyard.steps.restoring import told_to
from trainyard.store.documents import create_document, read_document, substance
from trainyard.store.layout import (
    bundle_manifest_key,
    checkpoint_manifest_key,
    evals_prefix,
    measurement_key,
    plan_key,
    samples_key,
)
from trainyard.store.transfer import pump

_NAMED_FILES = 3
"""New files that a refusal names."""


def measure(plan: Plan, target_name: str, context: StepContext) -> StepResult:
    """Measure a target, or find its measurement stored.

    Returns:
        The key of the measurement.

    Raises:
        BadInput: the spec names a task or metric that does not exist, or the serving environment is
            not the planned one.
        NotFound: checkpoint or bundle are not stored.
        CacheMiss: the server had to compile although it had its bundle.
        Refused: server, harness or benchmark failed.
        OutOfCapacity, StorageFull, Transient: later may help.
        Busy: another process took over.
    """
    planned = planned_target(plan, target_name)
    key = measurement_key(planned.measurement_id)
    try:
        stored = read_document(context.store, key, Measurement)
    except NotFound:
        pass
    else:
        _refuse_other_machine(planned, stored.kind, f"The stored measurement {key} was made")
        _refuse_other_driver(stored, driver_version())
        return _result(key, stored, reused=True)
    seen = machine_kind(describe_machine(), planned.target.instance)
    _refuse_other_machine(planned, seen, "This step would measure")
    lane = get_lane(planned.target.lane)
    toolchain = check_toolchain(lane, planned, context)
    if compiled_off_device(planned.target) and not driver_version():
        raise BadInput(
            f"The bundle of target {target_name} is compiled on a CPU. It counts only once a "
            "server on a Neuron device has started from it, and this machine has no Neuron driver.",
            hint="Measure on a node of the target's instance type.",
        )
    measurement = _measure(plan, planned, lane, context, toolchain)
    context.ensure_held()
    create_document(context.store, key, measurement)
    return _result(key, measurement, reused=False)


def _measure(
    plan: Plan,
    planned: PlannedTarget,
    lane: Lane,
    context: StepContext,
    toolchain: dict[str, str],
) -> Measurement:
    checkpoint_key = checkpoint_manifest_key(plan.spec.model, plan.revision)
    bundle_key = bundle_manifest_key(planned.compile_key)
    checkpoint = read_document(context.store, checkpoint_key, CheckpointManifest)
    bundle = read_document(context.store, bundle_key, BundleManifest)
    name = plan.spec.client_model_name
    with MeasuringProcess(
        context.settings.serving_interpreter, work_dir=_folder(context)
    ) as measuring:
        context.progress.say(f"Restoring checkpoint {plan.spec.model} {plan.revision} and bundle.")
        means = told_to(context.progress, (*checkpoint.files, *bundle.files))
        work_dir = context.work_dir
        model_dir = materialize_checkpoint(context.store, checkpoint, work_dir / "model", means)
        cache_dir = materialize_bundle(context.store, bundle, work_dir / "cache", means)
        assets_dir = restore_assets(plan, context)
        parity = _parity_job(plan, planned, lane, checkpoint.digest, assets_dir, context)
        before = lane.snapshot(cache_dir)
        context.progress.say(f"Starting the server of lane {lane.name} from its bundle.")
        with lane_server(
            lane,
            planned,
            context,
            model_dir=model_dir,
            cache_dir=cache_dir,
            served_model_name=name,
            cache_only=True,
        ) as server:
            ask(server, name)
            proof = _prove(lane, server, cache_dir, before, bundle)
            context.progress.say(proof.reason)
            machine = describe_machine()
            outcome = measuring.run(
                Job(
                    base_url=server.process.url,
                    served_model_name=name,
                    model_dir=str(model_dir.absolute()),
                    max_model_len=planned.target.max_model_len,
                    assets_dir=str(assets_dir.absolute()),
                    tasks=plan.spec.gates.accuracy.tasks,
                    levels=plan.spec.gates.latency.levels,
                    prompt_logprobs=lane.returned(planned.target).prompt_logprobs,
                    parity=parity,
                    slo=plan.spec.gates.latency.slo,
                    search=plan.spec.gates.latency.search,
                    behaviour=_behaviour_job(plan, planned, lane),
                ),
                on_progress=context.progress.fraction,
                check_server=server.check,
                on_reference=_keep_reference(parity, context),
            )
            # Load may bring shapes that the start did not.
            proof = _prove(lane, server, cache_dir, before, bundle)
    made_from = [plan_key(plan.plan_id), checkpoint_key, bundle_key]
    made_from += [parity.key] if parity is not None else []
    context.ensure_held()
    return Measurement(
        provenance=Provenance.of(context.settings, *made_from),
        measurement_id=planned.measurement_id,
        model=plan.spec.model,
        revision=plan.revision,
        checkpoint_digest=checkpoint.digest,
        compile_key=planned.compile_key,
        serving_digest=planned.serving_digest,
        target=planned.target.name,
        lane=lane.name,
        start=StartFigures(
            ready_s=round(server.ready_s, 2),
            engine_init_s=proof.engine_init_s,
            new_cache_files=proof.new_files,
            cold_s=bundle.compile_s,
        ),
        accuracy=outcome.accuracy,
        latency=outcome.latency,
        behaviour=outcome.behaviour,
        machine=machine,
        toolchain=toolchain,
        instance=planned.target.instance,
        search=outcome.search,
        envelope=envelope_of(outcome.latency, outcome.search),
        parity=outcome.parity,
        samples=_keep_samples(planned.measurement_id, outcome, context),
    )


def _parity_job(
    plan: Plan,
    planned: PlannedTarget,
    lane: Lane,
    checkpoint_digest: str,
    assets_dir: Path,
    context: StepContext,
) -> ParityJob | None:
    """Return the parity check that the spec asks for, with its reference if the store has it.

    Raises:
        NotFound: the reference is to be imported, and nobody has done it.
    """
    check = plan.spec.gates.accuracy.parity
    if check is None:
        return None
    wanted = planned_reference(plan.spec, planned.target, checkpoint_digest, assets_dir)
    reference: Reference | None = None
    try:
        reference = read_document(context.store, wanted.key, Reference)
        context.progress.say(f"The parity reference of this checkpoint exists: {wanted.key}.")
    except NotFound as error:
        if check.reference == "imported":
            raise NotFound(
                f"There is no parity reference {wanted.key} of this checkpoint, and the spec says "
                "that it is imported.",
                hint=f"Run `trainyard import-reference --plan {plan.plan_id} --target "
                f"{planned.target.name}` on a "
                "machine with enough memory.",
            ) from error
        context.progress.say("The parity reference of this checkpoint will be made.")
    most = lane.returned(planned.target).top_logprobs
    return ParityJob(
        prompts=wanted.prompts,
        settings=wanted.settings,
        checkpoint_digest=checkpoint_digest,
        near_tie=check.near_tie,
        top_logprobs=min(most, check.top_logprobs),
        key=wanted.key,
        reference=reference,
        imported=check.reference == "imported",
    )


def _keep_reference(parity: ParityJob | None, context: StepContext) -> Callable[[Reference], None]:
    """Return what stores the reference of a job once it is made."""

    def keep(made: Reference) -> None:
        if parity is None:
            return
        context.ensure_held()
        provenance = Provenance.of(context.settings)
        try:
            create_document(
                context.store, parity.key, made.model_copy(update={"provenance": provenance})
            )
        except Conflict:
            # Another measurement of the checkpoint was faster; its figures differ by rounding.
            context.progress.say(f"Somebody else has made {parity.key} meanwhile.")
        else:
            context.progress.say(f"Stored the parity reference as {parity.key}.")

    return keep


def _keep_samples(measurement_id: str, outcome: Outcome, context: StepContext) -> str:
    """Store what the figures are made of and return the key; empty if there is nothing."""
    if not (outcome.samples or outcome.answers):
        return ""
    samples = Samples(
        provenance=Provenance.of(context.settings),
        measurement_id=measurement_id,
        tasks=outcome.samples,
        answers=outcome.answers,
    )
    key = samples_key(measurement_id, short(hashlib.sha256(substance(samples)).hexdigest()))
    create_document(context.store, key, samples)
    return key


def envelope_of(levels: Sequence[LevelFigures], search: RateFound | None = None) -> Envelope | None:
    """Return the loads that were measured together; None if no level was served.

    Args:
        levels: as measured.
        search: the search for the highest rate; what met the SLO there was served as well.
    """
    served = [each for each in levels if each.input_tokens and each.output_tokens]
    if not served:
        return None

    def both(ranges: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
        known = [each for each in ranges if each]
        return min(low for low, _ in known), max(high for _, high in known)

    met = [search.best] if search is not None and search.best is not None else []
    loads: list[LevelFigures | RateProbe] = [*served, *met]
    return Envelope(
        input_tokens=both(each.input_tokens for each in served),
        output_tokens=both(each.output_tokens for each in served),
        max_concurrency=max(each.peak_concurrency or 1 for each in loads),
        max_requests_per_s=max(each.figures.get("requests_per_s", 0.0) for each in loads),
    )


def _refuse_other_machine(planned: PlannedTarget, kind: Mapping[str, Any], what: str) -> None:
    """Refuse figures of another kind of machine or driver than the plan's id stands for."""
    differing = [name for name, value in planned.machine.items() if kind.get(name) != value]
    if differing:
        there = ", ".join(f"{name} {kind.get(name) or 'unknown'}" for name in differing)
        wanted = ", ".join(f"{name} {planned.machine[name]}" for name in differing)
        raise BadInput(
            f"{what} on {there}, and the plan of target {planned.target.name} is for {wanted}.",
            hint="Figures of two kinds of machines are two measurements: plan again where it is "
            "measured, or correct steps.neuron_driver of the environments file.",
        )


def _refuse_other_driver(stored: Measurement, driver: str) -> None:
    """Refuse figures of another driver than this node's, where the plan knew of none."""
    then = stored.kind.get("neuron_driver", "")
    if driver and driver != then:
        raise BadInput(
            f"Measurement {stored.measurement_id} was made with Neuron driver {then or 'unknown'}, "
            f"and this node has {driver}.",
            hint=f"Write `neuron_driver: {driver}` below `steps` in the environments file, so that "
            "plans tell the two apart, and start a new release.",
        )


def _behaviour_job(plan: Plan, planned: PlannedTarget, lane: Lane) -> BehaviourJob | None:
    """Return the checks that the spec does not skip, None if there are none."""
    target, gate = planned.target, plan.spec.gates.behaviour
    checks = gate.checks
    if not checks:
        return None
    copies = target.neuron.data_parallel_size if target.neuron else 1
    return BehaviourJob(
        capabilities={name: lane.capability(target, name) for name in checks},
        dtype=target.dtype,
        max_num_seqs=target.max_num_seqs * copies,
        block_size=target.block_size,
        prefix_caching=target.enable_prefix_caching,
        ranks=lane.returned(target).top_logprobs > 0,
        prompts=plan.spec.prompts if plan.assets else None,
    )


def _prove(
    lane: Lane,
    server: RunningServer,
    cache_dir: Path,
    before: frozenset[str],
    bundle: BundleManifest,
) -> StartProof:
    proof = lane.prove_start(
        log=server.process.log_text(),
        before=before,
        after=lane.snapshot(cache_dir),
        bundle=bundle,
    )
    if not proof.used_bundle:
        named = ", ".join(proof.new_files[:_NAMED_FILES])
        raise CacheMiss(
            f"The server did not run from its bundle. {proof.reason}"
            + (f" First of them: {named}." if named else ""),
            hint="The compile key leaves out something that changes the code here; figures of "
            "such a server would be those of a compiler at work.",
        )
    return proof


def _folder(context: StepContext) -> Path:
    context.work_dir.mkdir(parents=True, exist_ok=True)
    return context.work_dir


def restore_assets(plan: Plan, context: StepContext) -> Path:
    """Copy the plan's task files into the scratch folder and return their folder.

    Raises:
        CorruptFile: they are not those that the plan was made with.
    """
    folder = context.work_dir / "assets"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if plan.assets is None:
        return folder
    prefix = evals_prefix(plan.assets.digest)
    entries = []
    for path in plan.assets.files:
        copy = folder / check_relative_path(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with context.store.open(f"{prefix}/{path}") as stream, copy.open("wb") as target:
            content = pump(stream, target.write)
        entries.append(FileEntry(path=path, size=content.size, sha256=content.sha256))
    if files_digest(entries) != plan.assets.digest:
        raise CorruptFile(
            f"The task files in {context.store.url}/{prefix} are not those of the plan.",
            hint="Plan again from the spec's files.",
        )
    return folder


def _result(key: str, measurement: Measurement, *, reused: bool) -> StepResult:
    return StepResult(
        key=key,
        reused=reused,
        message=("Measured already: " if reused else "Measured: ") + _summary(measurement),
        detail={
            "measurement_id": measurement.measurement_id,
            "ready_s": measurement.start.ready_s,
            "engine_init_s": measurement.start.engine_init_s,
            **{f"{score.name}/{score.metric}": score.score for score in measurement.accuracy},
            **{
                f"{level.name}/{figure}": value
                for level in measurement.latency
                for figure, value in level.figures.items()
            },
            **({"search/rate_per_s": measurement.search.rate_per_s} if measurement.search else {}),
        },
    )


def _summary(measurement: Measurement) -> str:
    """Return the figures that people look for first, in one sentence."""
    scores = [f"{score.name} {score.metric} {score.score:.3g}" for score in measurement.accuracy]
    levels = [
        f"level {level.name} TTFT p50 {level.figures.get('ttft_p50_ms', math.nan):.0f} ms, "
        f"{level.figures.get('output_tokens_per_s', math.nan):.0f} tokens/s"
        for level in measurement.latency
    ]
    behaviour = []
    if measurement.behaviour is not None:
        records = measurement.behaviour.records
        good = sum(not record.count("broken") for record in records)
        behaviour = [f"{good} of {len(records)} behaviour checks held"]
    rates = []
    if measurement.search is not None:
        rates = [f"{measurement.search.rate_per_s or 0:.4g} requests a second within the SLO"]
    return "; ".join([*scores, *behaviour, *levels, *rates]) + "."
