"""Compiles for one target, or finds the bundle that has the same compile key.

The lane's own server is started once with empty caches, answers one request, and leaves the
compiled code in its caches. What is whole there becomes the bundle. The files are stored first,
the manifest that makes them count last. That a server can start from the bundle is proven by the
measurement, which does just that.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry, Provenance
from trainyard.documents.plan import Plan, PlannedTarget
from trainyard.errors import BadInput, Conflict, NotFound, TrainyardError
from trainyard.failures.recognise import recognise_log
from trainyard.failures.tuning import Tuning
from trainyard.lanes.bundle_facts import neff_records, recorded_versions
from trainyard.lanes.cache_files import COMPILER_LOGS, empty, text_of
from trainyard.lanes.protocol import Lane
from trainyard.lanes.registry import get_lane
from trainyard.materialize import materialize_checkpoint
from trainyard.measure.machine import describe_machine
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.lane_server import ask, check_toolchain, lane_server
from trainyard.steps.restoring import told_to
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import (
    bundle_manifest_key,
    bundle_prefix,
    checkpoint_manifest_key,
    plan_key,
)
from trainyard.store.protocol import Store


def compile_bundle(plan: Plan, target_name: str, context: StepContext) -> StepResult:
    """Make the bundle of a target, or find it stored.

    Returns:
        The key of the bundle's manifest.

    Raises:
        BadInput: the plan has no such target, the serving environment is not the planned one, or
            the stored bundle is damaged.
        NotFound: the checkpoint is not stored.
        Refused: model or compiler failed.
        OutOfCapacity, StorageFull, Transient: later may help.
        Busy: another process took over.
    """
    planned = planned_target(plan, target_name)
    key = bundle_manifest_key(planned.compile_key)
    stored = stored_bundle(context.store, key, planned.compile_key)
    if stored is not None:
        return _result(key, stored, reused=True)
    lane = get_lane(planned.target.lane)
    toolchain = check_toolchain(lane, planned, context)
    manifest = _compile(plan, planned, lane, context, toolchain)
    context.ensure_held()
    create_document(context.store, key, manifest)
    return _result(key, manifest, reused=False)


def planned_target(plan: Plan, name: str) -> PlannedTarget:
    """Return the planned target of that name. Raises BadInput if there is none."""
    try:
        return plan.target(name)
    except KeyError as error:
        known = ", ".join(planned.target.name for planned in plan.targets)
        raise BadInput(
            f"Plan {plan.plan_id} has no target {name!r}.", hint=f"Its targets: {known}."
        ) from error


def stored_bundle(store: Store, key: str, compile_key: str) -> BundleManifest | None:
    """Return the manifest of a complete stored bundle, None if there is no manifest.

    Sizes are compared here; contents are checked whenever the bundle is restored.
    """
    try:
        manifest = read_document(store, key, BundleManifest)
    except NotFound:
        return None
    prefix = f"{bundle_prefix(compile_key)}/"
    sizes = {entry.key.removeprefix(prefix): entry.size for entry in store.list(prefix)}
    damaged = [file.path for file in manifest.files if sizes.get(file.path) != file.size]
    if damaged:
        raise BadInput(
            f"{len(damaged)} files of bundle {compile_key} in {store.url} are missing or have "
            f"another size, such as {damaged[0]}.",
            hint="Bring them back from a backup, or remove the bundle's manifest.json if no "
            "release needs it any more, and compile again.",
        )
    return manifest


def _compile(
    plan: Plan,
    planned: PlannedTarget,
    lane: Lane,
    context: StepContext,
    toolchain: dict[str, str],
) -> BundleManifest:
    """Run the compiler and store the files that it made; return the manifest to be stored."""
    checkpoint_key = checkpoint_manifest_key(plan.spec.model, plan.revision)
    checkpoint = read_document(context.store, checkpoint_key, CheckpointManifest)
    context.progress.say(f"Restoring checkpoint {plan.spec.model} {plan.revision}.")
    means = told_to(context.progress, checkpoint.files)
    model_dir = materialize_checkpoint(context.store, checkpoint, context.work_dir / "model", means)
    cache_dir = context.work_dir / "cache"
    found = _left_over(lane, planned, context, cache_dir)
    name = plan.spec.client_model_name
    context.progress.say(
        f"Starting the server of lane {lane.name} with "
        + (f"{found} graphs of an attempt that was cut." if found else "empty caches.")
    )
    workers = context.tuning.parallel_compile_workers
    if workers is not None:
        context.progress.say(f"An earlier try failed: {workers} compiler processes at a time now.")
    try:
        with lane_server(
            lane,
            tuned(planned, context.tuning),
            context,
            model_dir=model_dir,
            cache_dir=cache_dir,
            served_model_name=name,
            cache_only=False,
        ) as server:
            ask(server, name)
            log, peak_memory = server.process.log_text(), server.peak_memory_bytes
    except TrainyardError as error:
        raise explained(error, cache_dir) from error
    files, dropped = lane.capture(cache_dir, planned.target)
    context.progress.say(f"Storing {len(files)} files; {len(dropped)} were dropped.")
    entries = store_files(context, planned.compile_key, cache_dir, files)
    neffs, versions = neff_records(cache_dir, files), recorded_versions(cache_dir, files)
    shutil.rmtree(cache_dir, ignore_errors=True)
    start = lane.prove_start(log=log, before=frozenset(), after=frozenset(), bundle=None)
    return BundleManifest(
        provenance=Provenance.of(context.settings, plan_key(plan.plan_id), checkpoint_key),
        compile_key=planned.compile_key,
        lane=lane.name,
        key_inputs=planned.key_inputs,
        files=entries,
        digest=files_digest(entries),
        toolchain=toolchain,
        compile_s=round(server.ready_s, 2),
        engine_init_s=start.engine_init_s,
        peak_memory_bytes=peak_memory,
        dropped=tuple(dropped),
        neffs=neffs,
        recorded_versions=versions,
        compiled_on=describe_machine(),
    )


def explained(error: TrainyardError, cache_dir: Path) -> TrainyardError:
    """Return the error that says why a compile failed, as far as the compiler's own logs know."""
    if error.code:
        return error
    # Some frameworks print the compiler's code, others leave it in the cache's entry.
    logs = sorted(log for name in COMPILER_LOGS for log in cache_dir.rglob(name))
    known = recognise_log("\n".join(text_of(log) for log in logs))
    return known.error() if known is not None else error


def tuned(planned: PlannedTarget, tuning: Tuning) -> PlannedTarget:
    """Return the target with the settings that this try changes; its compile key stays."""
    neuron = planned.target.neuron
    if neuron is None or tuning.parallel_compile_workers is None:
        return planned
    changed = {"parallel_compile_workers": tuning.parallel_compile_workers}
    target = planned.target.model_copy(update={"neuron": neuron.model_copy(update=changed)})
    return planned.model_copy(update={"target": target})


def _left_over(lane: Lane, planned: PlannedTarget, context: StepContext, cache_dir: Path) -> int:
    """Clear the caches but for what an attempt at this very bundle finished; return how much."""
    mark = context.work_dir / "cache-of"
    if mark.is_file() and mark.read_text(encoding="ascii") == planned.compile_key:
        cache_dir.mkdir(exist_ok=True)
        return lane.keep_whole(cache_dir, planned.target)
    empty(cache_dir)
    mark.write_text(planned.compile_key, encoding="ascii")
    return 0


def store_files(
    context: StepContext, compile_key: str, cache_dir: Path, files: Sequence[Path]
) -> tuple[FileEntry, ...]:
    """Store the bundle's files and return their entries, sorted by path.

    Compilers do not give the same bytes twice. What an attempt that was cut left below the prefix
    is named by no manifest, and makes room.

    Raises:
        Conflict: another process stored its bundle meanwhile.
    """
    prefix = bundle_prefix(compile_key)
    # Listed first: whatever is stored after that, a successor's bundle too, is never deleted here.
    left = [entry.key for entry in context.store.list(prefix)]
    if bundle_manifest_key(compile_key) in left:
        raise Conflict(
            f"Another process stored bundle {compile_key} meanwhile.",
            hint="Try again; it will be found and used.",
        )
    context.ensure_held()
    for key in left:
        context.store.delete(key)
        context.ensure_held()
    entries = []
    for number, path in enumerate(files, start=1):
        with (cache_dir / path).open("rb") as stream:
            stored = context.store.upload(f"{prefix}/{path.as_posix()}", stream)
        entries.append(FileEntry(path=path.as_posix(), size=stored.size, sha256=stored.sha256))
        context.progress.fraction(number / len(files), f"{number} of {len(files)} files stored")
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _result(key: str, manifest: BundleManifest, *, reused: bool) -> StepResult:
    size = sum(file.size for file in manifest.files)
    what = f"{len(manifest.files)} files, {size / 1e6:.1f} MB"
    return StepResult(
        key=key,
        reused=reused,
        message=f"A bundle with this compile key is stored already: {what}."
        if reused
        else f"Compiled in {manifest.compile_s or 0:.0f} s: {what}.",
        detail={
            "compile_key": manifest.compile_key,
            "digest": manifest.digest,
            "files": len(manifest.files),
            "bytes": size,
            "compile_s": manifest.compile_s,
            "peak_memory_bytes": manifest.peak_memory_bytes,
            "dropped": len(manifest.dropped),
        },
    )
