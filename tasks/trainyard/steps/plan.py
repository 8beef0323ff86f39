"""The step `plan`: say what a release would do, and refuse bad input before any work starts.

It reads the spec, the source's listing and headers, the lane's toolchain and the store. It writes
the spec's task and prompt files (by their digest) and then the plan, each once; before that it has
found everything that can be found wrong without doing the work.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from trainyard.canonical import digest
from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.base import FileEntry, Provenance
from trainyard.documents.channel import Channel
from trainyard.documents.measurement import machine_kind
from trainyard.documents.plan import EvalAssets, Plan, Price, ReleaseRequest
from trainyard.documents.proof import Proof
from trainyard.errors import BadInput, Conflict, NotFound
from trainyard.kubernetes.step_pod import StepWork, place_warnings
from trainyard.kubernetes.step_size import host_gib
from trainyard.lanes.neuron_common import UNPROVEN_PAIR
from trainyard.lanes.neuron_memory import memory_problems, memory_warnings
from trainyard.lanes.registry import get_lane
from trainyard.measure.machine import describe_machine
from trainyard.prices import price_of
from trainyard.proofs import Proofs, read_proofs
from trainyard.references import GIB, memory_problem, planned_reference, reference_gib
from trainyard.releases import load_release
from trainyard.settings import Settings
from trainyard.sources.architecture import loaded_bytes
from trainyard.sources.factory import open_source
from trainyard.sources.files import Architecture, read_architecture
from trainyard.sources.protocol import ResolvedRevision
from trainyard.spec.assets import asset_files
from trainyard.spec.check import Problem, check_files, task_findings
from trainyard.spec.environments import Environment, Environments
from trainyard.spec.kubernetes import KubernetesSteps
from trainyard.spec.loader import Catalogue, load_environments, load_spec
from trainyard.spec.metrics import DEVICES_UNSEEN
from trainyard.spec.model import LOGIT_LANE, ModelSpec, Target
from trainyard.steps import forecasting
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.device_forecast import devices_forecast
from trainyard.steps.harness import harness_problems
from trainyard.steps.place import pod_problems
from trainyard.steps.planning import (
    Facts,
    StepLine,
    TargetFacts,
    architecture_problems,
    choose_targets,
    destination_problems,
    explain,
    make_plan,
    price_problems,
    refuse,
    unproven_problems,
)
from trainyard.steps.toolchains import KnownToolchain, toolchain_for
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import (
    channel_key,
    checkpoint_manifest_key,
    evals_prefix,
    measurement_key,
    plan_key,
)
from trainyard.store.protocol import Store

__all__ = [
    "StepLine",
    "check_files_with_lanes",
    "explain",
    "lane_rules",
    "plan",
    "warnings_of_files",
]


def plan(
    request: ReleaseRequest, context: StepContext, *, plan_id: str | None = None
) -> StepResult:
    """Make and store the plan of a release.

    Args:
        request: what somebody asks for.
        context: the surroundings; nothing is written to the scratch folder.
        plan_id: the plan's id. None: an id that follows from the plan's substance. A plan of that
            id that exists and answers the same request is kept as it is, so that trying again
            changes nothing.

    Raises:
        NotFound: model, revision, target or environment does not exist.
        BadInput: spec, request or source is wrong, or the plan's id stands for another request; the
            message names everything that was found.
        Transient: the source or the store cannot be read now.
    """
    if plan_id is not None:
        stored = _stored_plan(context.store, plan_id, request)
        if stored is not None:
            return _result(stored, stored, context, reused=True)
    settings, store = context.settings, context.store
    path = Catalogue(settings.catalogue).path(request.model)
    spec = load_spec(path)
    targets = choose_targets(request, spec, lane_rules=lane_rules)
    found = _environments(settings, needed=bool(request.environments))
    place = found.steps if found is not None else None
    environments = found if request.environments else None
    if environments is not None:
        # Where the release has been can be told only when its id is known.
        refuse(
            "The request",
            destination_problems(request, spec, environments, targets, promoted=lambda _: True),
        )
    context.progress.say(f"Looking at the source of {request.model}.")
    source = open_source(spec.source, base=path.parent, settings=settings)
    resolved = source.resolve(request.revision or spec.source.revision)
    architecture = read_architecture(source, resolved)
    problems = list(architecture_problems(targets, architecture.config))
    problems += [
        f"{finding.message} {finding.remedy}"
        for finding in task_findings(
            spec.model_copy(update={"targets": targets}), path.parent, prompt_logprobs
        )
    ]
    refuse("The request", problems + _lane_problems(targets, architecture))
    checkpoint_digest = _stored_checkpoint(store, spec.model, resolved, architecture.digest)
    refuse(
        "The request",
        list(
            _parity_problems(
                spec, targets, architecture, checkpoint_digest, path.parent, place, store
            )
        ),
    )
    golden_gib = _golden_gib(spec, targets, architecture)
    refuse("The request", list(_golden_problems(targets, golden_gib, place)))
    toolchains = _toolchains(spec.model, targets, place, context)
    if place is None:
        silent = [target.name for target in targets if not prompt_logprobs(target)]
        python = context.settings.serving_interpreter
        found_wrong = list(harness_problems(spec.gates.accuracy.own_tasks, python, silent))
        refuse("The request", found_wrong)
    proofs = _check_proven(request, targets, environments, context)
    assets, files = _assets(spec, path.parent)
    facts = Facts(
        request=request,
        spec=spec,
        resolved=resolved,
        architecture_digest=architecture.digest,
        assets=assets,
        targets=tuple(
            _target_facts(
                target,
                spec,
                architecture=architecture,
                toolchain=toolchains[target.name],
                stable=_stable_releases(request, spec.model, target, environments, context),
                place=place,
                proof=proofs.of(target),
                price=price_of(target.instance, settings),
            )
            for target in targets
        ),
        checkpoint_digest=checkpoint_digest,
        reference_gib=_reference_gib(spec, architecture),
        golden_gib=golden_gib,
        asks_image=place is not None,
    )
    refuse("The request", price_problems(spec, facts.targets))
    if environments is not None:
        _refuse_skipped_environments(facts, environments, context)
    made = make_plan(
        facts, exists=store.exists, plan_id=plan_id, provenance=Provenance.of(settings)
    )
    if place is not None:
        refuse("The request", list(pod_problems(made, place, settings, now=datetime.now(UTC))))
    made = _with_forecasts(made, environments, context)
    _store_assets(store, assets, files)
    return _store_plan(made, context)


def lane_rules(target: Target) -> Sequence[str]:
    """Return every rule of its lane that a target breaks, each as a sentence with the remedy."""
    try:
        return get_lane(target.lane).problems(target)
    except BadInput as error:
        return [str(error)]


def prompt_logprobs(target: Target) -> bool:
    """Tell whether a target's server returns log-probs of prompts; yes if the lane is unknown."""
    try:
        return get_lane(target.lane).returned(target).prompt_logprobs
    except BadInput:
        return True


def check_files_with_lanes(paths: Iterable[Path]) -> list[Problem]:
    """Return every mistake in specs and environments files, those of the lanes included."""
    return check_files(paths, lane_rules=lane_rules, prompt_logprobs=prompt_logprobs)


def warnings_of_files(paths: Iterable[Path]) -> list[str]:
    """Return what people should know of files without mistakes.

    That is what the lanes say of the targets in specs, and what an environment does not see of the
    devices that one of these specs has for it.
    """
    found = []
    environments: dict[str, Environment] = {}
    on_neuron: set[str] = set()
    for path in paths:
        try:
            spec = load_spec(path)
        except BadInput:  # environments, or a spec whose mistakes are named elsewhere
            with contextlib.suppress(BadInput):
                loaded = load_environments(path).environments
                environments |= {f"{path}: environment {name}": one for name, one in loaded.items()}
            continue
        for target in spec.targets:
            warnings = get_lane(target.lane).warnings(target)
            found += [f"{path}: target {target.name}: {warning}" for warning in warnings]
            if target.neuron is not None:
                on_neuron.add(target.name)
    return found + [
        f"{name}: {DEVICES_UNSEEN}"
        for name, one in environments.items()
        if one.target in on_neuron and one.metrics.source == "scrape"
    ]


def _stored_plan(store: Store, plan_id: str, request: ReleaseRequest) -> Plan | None:
    """Return the plan of that id, if there is one; raise BadInput if its request is another."""
    try:
        stored = read_document(store, plan_key(plan_id), Plan)
    except NotFound:
        return None
    if stored.request != request:
        raise BadInput(
            f"Plan {plan_id} exists and answers another request "
            f"({stored.request.model_dump_json(exclude_defaults=True)}).",
            hint="Plans never change; choose another id, or start a new run.",
        )
    return stored


def _stored_checkpoint(
    store: Store, model: str, resolved: ResolvedRevision, architecture_digest: str
) -> str:
    """Return the digest of the revision's checkpoint, or nothing if it is not in the store.

    Raises BadInput if the checkpoint was made of other files: a revision never changes.
    """
    key = checkpoint_manifest_key(model, resolved.revision)
    try:
        manifest = read_document(store, key, CheckpointManifest)
    except NotFound:
        return ""
    now = sorted((file.path, file.size) for file in resolved.files)
    then = sorted((file.path, file.size) for file in manifest.files)
    if now != then or manifest.architecture_digest != architecture_digest:
        raise BadInput(
            f"Revision {resolved.revision!r} of {model} is in the store with other files than "
            f"{resolved.uri} has now.",
            hint="A revision never changes: give the changed files a new revision, such as a "
            "folder of another name.",
        )
    return manifest.digest


def _target_facts(
    target: Target,
    spec: ModelSpec,
    *,
    architecture: Architecture,
    toolchain: KnownToolchain,
    stable: _Stable,
    place: KubernetesSteps | None,
    proof: Proof | None,
    price: Price | None,
) -> TargetFacts:
    lane, config = get_lane(target.lane), architecture.config
    size = loaded_bytes(architecture.tensors, target.dtype)
    warnings = [each for each in lane.warnings(target, config) if not _is_outdated(each, proof)]
    warnings += [*filter(None, [toolchain.warning]), *memory_warnings(target, config, size)]
    if place is not None:
        warnings += place_warnings(StepWork("measure", "", spec.model, target), place)
    return TargetFacts(
        target=target,
        key_inputs=lane.key_inputs(
            target,
            architecture_digest=architecture.digest,
            toolchain=toolchain.versions,
        ),
        toolchain=toolchain.versions,
        serving=lane.serving_settings(target, served_model_name=spec.client_model_name),
        machine=_machine(target, place),
        price=price,
        baselines=stable.baselines,
        incomparable=stable.incomparable,
        warnings=tuple(warnings),
    )


def _machine(target: Target, place: KubernetesSteps | None) -> dict[str, Any]:
    """Return what is known of the machine that will measure: this one, unless pods do."""
    seen = describe_machine() if place is None else {"neuron_driver": place.neuron_driver}
    return machine_kind(seen, target.instance)


def _environments(settings: Settings, *, needed: bool) -> Environments | None:
    """Return the environments file; None if there is none and it is not needed."""
    if not needed and not settings.environments.exists():
        return None
    return load_environments(settings.environments)


def _toolchains(
    model: str, targets: Sequence[Target], place: KubernetesSteps | None, context: StepContext
) -> dict[str, KnownToolchain]:
    """Return the toolchain that will compile each target, by the target's name."""
    where = "the images of the pods" if place is not None else context.settings.serving_interpreter
    context.progress.say(f"Asking {where} for the toolchain.")
    by_lane: dict[str, KnownToolchain] = {}
    found: dict[str, KnownToolchain] = {}
    for target in targets:
        if place is not None or target.lane not in by_lane:
            by_lane[target.lane] = toolchain_for(
                target,
                get_lane(target.lane),
                model=model,
                place=place,
                settings=context.settings,
                store=context.store,
            )
        found[target.name] = by_lane[target.lane]
    refuse(
        "The request",
        [
            f"Target {target.name}: {problem}"
            for target in targets
            for problem in get_lane(target.lane).toolchain_problems(
                target, found[target.name].versions
            )
        ],
    )
    return found


def _is_outdated(warning: str, proof: Proof | None) -> bool:
    """Tell whether a warning says that something is unproven that was proven meanwhile."""
    return proof is not None and warning.startswith(UNPROVEN_PAIR)


def _lane_problems(targets: Sequence[Target], architecture: Architecture) -> list[str]:
    """Return what the lanes cannot do with the model, each as sentences."""
    problems, config = [], architecture.config
    for target in targets:
        size = loaded_bytes(architecture.tensors, target.dtype)
        found = [*get_lane(target.lane).model_problems(target, config)]
        found += memory_problems(target, config, size)
        problems += [f"Target {target.name}: {problem}" for problem in found]
        if target.neuron is not None and target.neuron.speculation is not None:
            problems.append(
                f"Target {target.name}: this version cannot fetch the draft model that speculative "
                "decoding needs. Remove neuron.speculation."
            )
    return problems


def _parity_problems(
    spec: ModelSpec,
    targets: Sequence[Target],
    architecture: Architecture,
    checkpoint_digest: str,
    folder: Path,
    place: KubernetesSteps | None,
    store: Store,
) -> Iterator[str]:
    """Yield why the reference of the parity check cannot be had, each as sentences."""
    check = spec.gates.accuracy.parity
    if check is None:
        return
    for target in targets:
        if checkpoint_digest:
            wanted = planned_reference(spec, target, checkpoint_digest, folder)
            if store.exists(wanted.key):
                continue
            if check.reference == "imported":
                yield (
                    f"Target {target.name}: nobody has imported the reference {wanted.key} that "
                    "gates.accuracy.parity needs. Make it with `trainyard import-reference`."
                )
        if check.reference == "made":
            needed = reference_gib(architecture.tensors, check.dtype)
            if place is None:
                needed += _server_gib(target, architecture)
            has, where = _host_memory(target, place)
            if problem := memory_problem(needed, has, where):
                yield f"Target {target.name}: {problem}"


def _reference_gib(spec: ModelSpec, architecture: Architecture) -> float:
    """Return what the parity reference takes where it is measured, in GiB; 0: it is not made there.

    Also a reference that is stored already is asked about other answers than its own.
    """
    check = spec.gates.accuracy.parity
    if check is None or check.reference == "imported":
        return 0.0
    return round(reference_gib(architecture.tensors, check.dtype), 1)


def _golden_gib(spec: ModelSpec, targets: Sequence[Target], architecture: Architecture) -> float:
    """Return what the goldens of AWS's logit validation take, in GiB; 0: it is not made."""
    made = any(target.lane == LOGIT_LANE for target in targets)
    if spec.gates.accuracy.logit_validation is None or not made:
        return 0.0
    return round(reference_gib(architecture.tensors, "float32"), 1)


def _golden_problems(
    targets: Sequence[Target], golden_gib: float, place: KubernetesSteps | None
) -> Iterator[str]:
    """Yield where those goldens do not fit, each as sentences."""
    for target in targets if golden_gib else ():
        if target.lane != LOGIT_LANE:
            continue
        has, where = _host_memory(target, place)
        if has is not None and golden_gib > has:
            yield (
                f"Target {target.name}: the goldens of gates.accuracy.logit_validation take "
                f"{golden_gib:.1f} GiB of memory and {where} has {has:.1f}: leave it out, or use a "
                "larger instance."
            )


def _host_memory(target: Target, place: KubernetesSteps | None) -> tuple[float | None, str]:
    """Return the memory in GiB where a target is measured, None if nobody knows, and its name."""
    if place is None:
        return psutil.virtual_memory().total / GIB, "this machine"
    return host_gib(target), f"a pod with the devices of {target.instance}"


def _server_gib(target: Target, architecture: Architecture) -> float:
    """Return what a server takes of this machine's memory while the reference is made."""
    if target.neuron is not None:
        return 0.0
    return loaded_bytes(architecture.tensors, target.dtype) / GIB + target.kv_cache_gib


def _check_proven(
    request: ReleaseRequest,
    targets: Sequence[Target],
    environments: Environments | None,
    context: StepContext,
) -> Proofs:
    """Return what was proven on devices; raise BadInput if an environment asks for more."""
    if not any(target.neuron for target in targets):
        return Proofs(())
    proofs = read_proofs(context.store, context.settings)
    if environments is not None:
        problems = unproven_problems(
            request, environments, targets, lambda target: proofs.of(target) is not None
        )
        refuse("The request", [*problems, *(proofs.ignored if problems else ())])
    return proofs


def _read_channel(store: Store, model: str, environment: str) -> Channel | None:
    try:
        return read_document(store, channel_key(model, environment), Channel)
    except NotFound:
        return None


@dataclass(frozen=True)
class _Stable:
    """The stable releases to compare with, by environment."""

    baselines: dict[str, str]
    """Their measurement ids."""
    incomparable: dict[str, str]
    """Why one cannot be compared with."""


def _stable_releases(
    request: ReleaseRequest,
    model: str,
    target: Target,
    environments: Environments | None,
    context: StepContext,
) -> _Stable:
    """Return the stable release of each environment asked for that serves `target` and has one."""
    found = _Stable({}, {})
    for name in request.environments if environments else ():
        if environments is None or environments.environments[name].target != target.name:
            continue
        channel = _read_channel(context.store, model, name)
        if channel is None or channel.stable is None:
            continue
        try:
            release = load_release(
                context.store, model, channel.stable.release_id, context.settings
            )
        except NotFound:  # adopted: it serves, but nothing of it was published here
            found.incomparable[name] = (
                f"The stable release of {name} ({channel.stable.release_id}) was adopted: "
                "nobody has measured it here."
            )
            continue
        if context.store.exists(measurement_key(release.measurement_id)):
            found.baselines[name] = release.measurement_id
        else:
            found.incomparable[name] = (
                f"The measurement of the stable release of {name} "
                f"({channel.stable.release_id}) is not in the store any more."
            )
    return found


def _refuse_skipped_environments(
    facts: Facts, environments: Environments, context: StepContext
) -> None:
    """Raise BadInput if a required environment has neither been passed nor is asked for.

    It has been passed if a release of the same checkpoint is, or was, the stable one there.
    """
    model = facts.spec.model

    def same_checkpoint(release_id: str) -> bool:
        try:
            release = load_release(context.store, model, release_id, context.settings)
        except NotFound:  # adopted: nobody knows what it is made of
            return False
        return release.checkpoint_digest == facts.checkpoint_digest

    def promoted(name: str) -> bool:
        channel = _read_channel(context.store, model, name)
        if channel is None or not facts.checkpoint_digest:
            return False
        tracks = [track for track in (channel.stable, *channel.previous) if track is not None]
        return any(same_checkpoint(track.release_id) for track in tracks)

    targets = [each.target for each in facts.targets]
    problems = destination_problems(
        facts.request, facts.spec, environments, targets, promoted=promoted
    )
    refuse("The request", problems)


def _with_forecasts(made: Plan, environments: Environments | None, context: StepContext) -> Plan:
    """Return the plan with what its rollouts will take; raise BadInput if one is in vain."""
    if environments is None:
        return made
    rollout = made.spec.rollout
    targets = [each.target for each in made.targets]
    on_neuron = {each.name for each in targets if each.neuron is not None}
    found = tuple(
        forecasting.forecast(
            context.store,
            made.spec.model,
            name,
            environments.environments[name],
            rollout,
            drain_timeout_s=context.settings.drain_timeout_s,
            on_neuron=environments.environments[name].target in on_neuron,
            devices=devices_forecast(
                context, made.spec.model, name, environments.environments[name], targets
            ),
        )
        for name in dict.fromkeys(made.request.environments)
    )
    refuse("The request", [each for one in found for each in forecasting.problems(one, rollout)])
    return made.model_copy(update={"rollouts": found})


def _assets(
    spec: ModelSpec, folder: Path
) -> tuple[EvalAssets | None, dict[str, tuple[Path, FileEntry]]]:
    """Return the task and prompt files of a spec: their digest, and each with size and sha256."""
    paths, _ = asset_files(spec, folder)  # its findings have been refused with the spec
    files = {name: (path, _entry(name, path)) for name, path in paths.items()}
    if not files:
        return None, {}
    listing = [[name, entry.size, entry.sha256] for name, (_, entry) in files.items()]
    return EvalAssets(digest=digest(listing), files=tuple(files)), files


def _entry(name: str, path: Path) -> FileEntry:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileEntry(path=name, size=stream.tell(), sha256=sha256)


def _store_assets(
    store: Store, assets: EvalAssets | None, files: Mapping[str, tuple[Path, FileEntry]]
) -> None:
    if assets is None:
        return
    for name, (path, entry) in files.items():
        with path.open("rb") as stream:
            store.upload(f"{evals_prefix(assets.digest)}/{name}", stream, sha256=entry.sha256)


def _store_plan(made: Plan, context: StepContext) -> StepResult:
    store = context.store
    try:
        reused = not create_document(store, plan_key(made.plan_id), made)
    except Conflict:
        # Somebody was first, or what exists has changed since. The stored plan stands.
        stored = _stored_plan(store, made.plan_id, made.request)
        if stored is None:
            raise
        return _result(stored, made, context, reused=True)
    return _result(made, made, context, reused=reused)


def _result(stored: Plan, newest: Plan, context: StepContext, *, reused: bool) -> StepResult:
    """Report and describe the stored plan; what exists already is told as of `newest`."""
    lines = explain(newest)
    warnings = [
        f"{planned.target.name}: {warning}"
        for planned in newest.targets
        for warning in planned.warnings
    ]
    warnings += [
        f"{one.environment}: {warning}"
        for one in newest.rollouts
        for warning in forecasting.warnings(one, newest.spec.rollout)
    ]
    rollouts = [line for one in newest.rollouts for line in forecasting.sentences(one)]
    for text in (
        *(f"Warning for {warning}" for warning in warnings),
        *map(str, lines),
        *(f"rollout {line}" for line in rollouts),
    ):
        context.progress.say(text)
    running = [f"{line.step} {line.target}".strip() for line in lines if line.will_run]
    what = f"Will run: {', '.join(running)}." if running else "Everything exists already."
    return StepResult(
        key=plan_key(stored.plan_id),
        reused=reused,
        message=f"Plan {stored.plan_id} for {stored.spec.model} {stored.revision}. {what}",
        detail={
            "plan_id": stored.plan_id,
            "revision": stored.revision,
            "warnings": warnings,
            "rollouts": rollouts,
            "steps": [
                {
                    "step": line.step,
                    "target": line.target,
                    "will_run": line.will_run,
                    "reason": line.reason,
                }
                for line in lines
            ],
        },
    )
