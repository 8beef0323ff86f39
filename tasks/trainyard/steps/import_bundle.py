"""Takes what a team compiled before as the bundle of a target.

The folder is judged exactly as a compile's own caches are. The compile key is that of a plan, which
is stored: it says what the bundle was taken for. That a server can start from the bundle is proven
where it always is, by the measurement.
"""

from __future__ import annotations

import getpass
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainyard.documents.artifacts import BundleManifest, files_digest
from trainyard.documents.base import FileEntry, Provenance
from trainyard.documents.plan import Plan, PlannedTarget, ReleaseRequest
from trainyard.errors import BadInput, Conflict, CorruptFile, NotFound, Refused
from trainyard.lanes.bundle_facts import contradictions, neff_records, recorded_versions
from trainyard.lanes.protocol import Lane
from trainyard.lanes.registry import get_lane
from trainyard.names import check_relative_path
from trainyard.steps.compile import planned_target, store_files, stored_bundle
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.plan import plan as make_plan
from trainyard.store.disk import explained
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import MANIFEST_NAME, bundle_manifest_key, plan_key
from trainyard.store.locks import HeldElsewhere, acquire_lock
from trainyard.store.transfer import hash_file

_NAMED_DIFFERENCES = 5


def import_bundle(
    folder: Path, *, model: str, target: str, revision: str | None, context: StepContext
) -> StepResult:
    """Store the compiled code in `folder` as the bundle of a target.

    Args:
        folder: what the lane's server had as its cache; it is only read.
        model: the model it was compiled for.
        target: the target of that model's spec.
        revision: of the source; its architecture counts, not its weights. None: the spec's.
        context: the surroundings.

    Returns:
        The key of the bundle's manifest. Importing the same files again finds it.

    Raises:
        NotFound: there is no such folder, model, revision or target.
        BadInput: the request is wrong, or the code was compiled by another toolchain than the
            target's.
        Refused: nothing in the folder is complete and made for the target.
        Conflict: the store has another bundle for this compile key.
        CorruptFile: a file changed while it was read, or the stored bundle is damaged.
        Busy: another process compiles or imports this bundle.
        StorageFull, Transient: later may help.
    """
    if not folder.is_dir():
        raise NotFound(
            f"There is no folder {folder}.",
            hint="Name the folder that the server had as its cache.",
        )
    plan = _plan(model, target, revision, context)
    planned = planned_target(plan, target)
    lane = get_lane(planned.target.lane)
    with explained("read", folder):
        files, dropped = _captured(lane, folder, planned)
        for sentence in dropped:
            context.progress.say(f"Dropped {sentence}.")
        versions = recorded_versions(folder, files)
        _refuse_other_toolchain(folder, contradictions(versions, planned.toolchain))
        neffs = neff_records(folder, files)
        entries = _entries(folder, files, context)
    manifest = BundleManifest(
        provenance=Provenance.of(context.settings, plan_key(plan.plan_id)),
        compile_key=planned.compile_key,
        lane=lane.name,
        key_inputs=planned.key_inputs,
        files=entries,
        digest=files_digest(entries),
        toolchain=planned.toolchain,
        compile_s=None,
        dropped=tuple(dropped),
        neffs=neffs,
        recorded_versions=versions,
        imported_from=_origin(folder, context),
    )
    return _commit(manifest, folder, planned, context)


def _plan(model: str, target: str, revision: str | None, context: StepContext) -> Plan:
    """Plan a release for the one target, as `trainyard plan` does, and return the stored plan."""
    request = ReleaseRequest(model=model, revision=revision, targets=(target,))
    made = make_plan(request, context)
    return read_document(context.store, made.key, Plan)


def _captured(
    lane: Lane, folder: Path, planned: PlannedTarget
) -> tuple[Sequence[Path], Sequence[str]]:
    """Return what the lane takes, without a file that would lie in the manifest's own place."""
    try:
        files, dropped = lane.capture(folder, planned.target)
    except Refused as error:
        raise Refused(
            error.message,
            hint=f"Name the folder that the server of lane {lane.name} had as its cache, and the "
            "target that it was compiled for.",
        ) from error
    own = Path(MANIFEST_NAME)
    if own not in files:
        return files, dropped
    rest = [path for path in files if path != own]
    return rest, [*dropped, f"{own}: the name of a bundle's own manifest"]


def _refuse_other_toolchain(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        raise BadInput(
            f"What is in {folder} does not fit the target: {' '.join(problems)}",
            hint="Import it with the toolchain that compiled it, or compile again.",
        )


def _entries(folder: Path, files: Sequence[Path], context: StepContext) -> tuple[FileEntry, ...]:
    """Return the entries of the files, hashed, sorted by path."""
    entries = []
    for number, path in enumerate(files, start=1):
        content = hash_file(folder / path)
        name = check_relative_path(path.as_posix())
        entries.append(FileEntry(path=name, size=content.size, sha256=content.sha256))
        context.progress.fraction(number / len(files), f"{number} of {len(files)} files hashed")
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _origin(folder: Path, context: StepContext) -> str:
    who = context.settings.requested_by or _login()
    return f"{folder.absolute()} on {platform.node()}, by {who}"


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container whose user has no name.
        return f"user {os.getuid()}"


def _commit(
    manifest: BundleManifest, folder: Path, planned: PlannedTarget, context: StepContext
) -> StepResult:
    """Store files and manifest under the lock that a compile of this key takes."""
    key = bundle_manifest_key(manifest.compile_key)

    def say_who(waiting: HeldElsewhere) -> None:
        context.progress.say(f"Waiting. {waiting.message}")

    lock = acquire_lock(
        context.store,
        key,
        work=f"import-bundle {planned.target.name} from {folder.name}",
        duration_s=context.settings.step_lock_s,
        wait_s=context.settings.step_lock_wait_s,
        on_wait=say_who,
    )

    def ensure_held() -> None:
        context.ensure_held()
        lock.ensure_held()

    with lock:
        stored = stored_bundle(context.store, key, manifest.compile_key)
        if stored is not None:
            _refuse_other_bundle(stored, manifest, key)
            return _result(key, stored, reused=True)
        paths = [Path(entry.path) for entry in manifest.files]
        held = replace(context, ensure_held=ensure_held)
        if store_files(held, manifest.compile_key, folder, paths) != manifest.files:
            raise CorruptFile(
                f"Files in {folder} changed while they were imported.",
                hint="Stop the server that writes there, then import again.",
            )
        ensure_held()
        create_document(context.store, key, manifest)
    return _result(key, manifest, reused=False)


def _refuse_other_bundle(stored: BundleManifest, found: BundleManifest, key: str) -> None:
    if stored.digest == found.digest:
        return
    here = {entry.path: entry.sha256 for entry in found.files}
    there = {entry.path: entry.sha256 for entry in stored.files}
    paths = sorted(path for path in here.keys() | there.keys() if here.get(path) != there.get(path))
    named = ", ".join(paths[:_NAMED_DIFFERENCES])
    more = ", …" if len(paths) > _NAMED_DIFFERENCES else ""
    raise Conflict(
        f"{key} is another bundle than the one in the folder: {len(paths)} files differ "
        f"({named}{more}).",
        hint="The first bundle of a compile key counts, and releases may name it; there is no "
        "need to import a second one.",
    )


def _result(key: str, manifest: BundleManifest, *, reused: bool) -> StepResult:
    size = sum(file.size for file in manifest.files)
    what = f"{len(manifest.files)} files, {size / 1e6:.1f} MB"
    dropped = len(manifest.dropped)
    return StepResult(
        key=key,
        reused=reused,
        message=f"These files are stored already: {what}."
        if reused
        else f"Imported {what}; {dropped} {'entry was' if dropped == 1 else 'entries were'} "
        "dropped.",
        detail={
            "compile_key": manifest.compile_key,
            "digest": manifest.digest,
            "files": len(manifest.files),
            "bytes": size,
            "neffs": len(manifest.neffs),
            "dropped": dropped,
        },
    )
