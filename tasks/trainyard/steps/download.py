"""Stores the checkpoint of a plan: the files first, the manifest that makes them count last.

A cut download resumes: files that are in the store and equal to the source's are kept, and so is
what arrived of large ones. A source that fails for a moment is asked again. A revision is
immutable: once its manifest exists, nothing but these very contents is accepted for it, and files
of it that were lost are stored again from the source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TypeVar

from rich.filesize import decimal

from trainyard.documents.artifacts import CheckpointManifest, files_digest
from trainyard.documents.base import FileEntry, Provenance
from trainyard.documents.plan import Plan
from trainyard.errors import BadInput, Conflict, NotFound, TrainyardError
from trainyard.sources.content_check import ContentCheck
from trainyard.sources.factory import open_source
from trainyard.sources.files import read_architecture
from trainyard.sources.protocol import ResolvedRevision, Source, SourceFile
from trainyard.steps.context import Progress, StepContext, StepResult
from trainyard.steps.fetching import Surroundings, ranges_of
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import checkpoint_manifest_key, checkpoint_prefix, plan_key
from trainyard.store.parts import Ranges, hash_ranges
from trainyard.store.protocol import Store
from trainyard.store.transfer import pump

T = TypeVar("T")

THREADS = 8
"""Files in transfer at the same time: small ones are mostly waiting."""


def download(plan: Plan, context: StepContext) -> StepResult:
    """Store the checkpoint of `plan`, or find it stored.

    Returns:
        The key of the checkpoint's manifest.

    Raises:
        BadInput: the source changed since the plan was made, or the revision is stored already with
            other content.
        NotFound: the source is gone and the checkpoint is not stored.
        Transient, StorageFull: try again; what arrived is kept.
        Busy: another process took over.
    """
    step = _Download(plan, context)
    stored = step.stored_manifest()
    return step.store_all() if stored is None else step.check(stored)


class _Cancelled(Exception):
    """Another file failed, or the step was stopped."""


class _Meter:
    """Counts the bytes of all transfers and reports them; ends them all if one fails."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = max(total, 1)
        self._done = 0
        self._mutex = threading.Lock()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def sleep(self, seconds: float) -> None:
        if self._cancelled.wait(seconds):
            raise _Cancelled

    def add(self, size: int) -> None:
        if self._cancelled.is_set():
            raise _Cancelled
        if not size:
            return
        with self._mutex:
            self._done += size
            done = self._done
        self._progress.fraction(
            min(1.0, done / self._total), f"{decimal(done)} of {decimal(self._total)} done"
        )


class _Download:
    """One download: where from, where to."""

    def __init__(self, plan: Plan, context: StepContext) -> None:
        self.plan = plan
        self.context = context
        self.store: Store = context.store
        self.model = plan.spec.model
        self.key = checkpoint_manifest_key(self.model, plan.revision)
        self.prefix = checkpoint_prefix(self.model, plan.revision)
        self.found: set[str] = set()
        """Keys that were in the store at the beginning."""

    def stored_manifest(self) -> CheckpointManifest | None:
        try:
            return read_document(self.store, self.key, CheckpointManifest)
        except NotFound:
            return None

    def store_all(self) -> StepResult:
        """Store every file, then the manifest."""
        source, resolved = self.resolve()
        if resolved.fingerprint != self.plan.source_fingerprint:
            raise self.changed("since the plan was made")
        architecture = read_architecture(source, resolved)
        self.remove_strangers(resolved)
        entries = sorted(
            self.in_parallel(
                resolved.files,
                lambda file, meter: self.transfer(source, resolved, file, meter),
            ),
            key=lambda entry: entry.path,
        )
        if source.peek(self.plan.revision)[1] != resolved.fingerprint:
            raise self.changed("while it was read")
        manifest = CheckpointManifest(
            provenance=Provenance.of(self.context.settings, plan_key(self.plan.plan_id)),
            model=self.model,
            revision=self.plan.revision,
            source=resolved.uri,
            files=tuple(entries),
            digest=files_digest(entries),
            architecture_digest=architecture.digest,
            parameters=architecture.parameters,
            source_fingerprint=resolved.fingerprint,
            allowed_files=resolved.allowed,
        )
        self.context.ensure_held()
        try:
            made = create_document(self.store, self.key, manifest)
        except Conflict as conflict:
            raise self.immutable("another process stored it first") from conflict
        size = sum(entry.size for entry in entries)
        return self.result(
            manifest,
            reused=not made,
            message=f"{self.model} {self.plan.revision} is stored: {len(entries)} files, "
            f"{decimal(size)}.",
        )

    def check(self, manifest: CheckpointManifest) -> StepResult:
        """Check a stored checkpoint against plan and source, and store again what it lost."""
        if manifest.architecture_digest != self.plan.architecture_digest:
            raise self.immutable("its architecture differs")
        lost = self.lost_files(manifest)
        if not lost and manifest.source_fingerprint == self.plan.source_fingerprint:
            return self.result(
                manifest,
                reused=True,
                message=f"{self.model} {self.plan.revision} is stored already.",
            )
        self.context.progress.say(
            f"{len(lost)} files of the stored checkpoint are missing or damaged; they are restored."
            if lost
            else "The source was touched since the checkpoint was stored; comparing contents."
        )
        source, resolved = self.resolve()
        if [(f.path, f.size) for f in resolved.files] != [(f.path, f.size) for f in manifest.files]:
            raise self.immutable("the source now has other files or sizes")
        entries = {entry.path: entry for entry in manifest.files}

        def compare(file: SourceFile, meter: _Meter) -> None:
            ranges = self.ranges(source, resolved, file, meter)
            if hash_ranges(ranges).sha256 != entries[file.path].sha256:
                raise self.immutable(f"{file.path} in the source differs")

        self.in_parallel(resolved.files, compare)
        if lost:
            self.context.ensure_held()
            for path in lost:
                self.store.delete(f"{self.prefix}/{path}")
            # Releases name the manifest: nothing but its own content may come back.
            self.in_parallel(
                [
                    replace(file, sha256=entries[file.path].sha256)
                    for file in resolved.files
                    if file.path in lost
                ],
                lambda file, meter: self.transfer(source, resolved, file, meter),
            )
        return self.result(
            manifest,
            reused=not lost,
            message=f"{self.model} {self.plan.revision} is stored already, and the source still "
            f"has the same content{f'; {len(lost)} files were restored' if lost else ''}.",
        )

    def resolve(self) -> tuple[Source, ResolvedRevision]:
        settings = self.context.settings
        source = open_source(self.plan.spec.source, base=settings.catalogue, settings=settings)
        return source, source.resolve(self.plan.revision)

    def lost_files(self, manifest: CheckpointManifest) -> list[str]:
        """Return the files of a manifest that are missing in the store or have another size.

        With `force`, also those whose content does not match its hash.
        """
        prefix = f"{self.prefix}/"
        sizes = {entry.key.removeprefix(prefix): entry.size for entry in self.store.list(prefix)}
        lost = [entry.path for entry in manifest.files if sizes.get(entry.path) != entry.size]
        for entry in manifest.files if self.context.force else ():
            if entry.path not in lost:
                with self.store.open(prefix + entry.path) as stream:
                    if pump(stream).sha256 != entry.sha256:
                        lost.append(entry.path)
        return lost

    def remove_strangers(self, resolved: ResolvedRevision) -> None:
        """Remove what an earlier attempt with another content left: nothing names it."""
        wanted = {f"{self.prefix}/{file.path}" for file in resolved.files}
        self.found = {entry.key for entry in self.store.list(self.prefix)}
        for key in sorted(self.found - wanted):
            self.context.ensure_held()
            self.store.delete(key)

    def in_parallel(
        self, files: Sequence[SourceFile], work: Callable[[SourceFile, _Meter], T]
    ) -> list[T]:
        """Do `work` for all files, the largest first; the first error ends them all."""
        meter = _Meter(self.context.progress, sum(file.size for file in files))
        futures: list[Future[T]] = []
        with ThreadPoolExecutor(THREADS, thread_name_prefix="download") as pool:
            try:
                for file in sorted(files, key=lambda file: file.size, reverse=True):
                    futures.append(pool.submit(work, file, meter))
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # After an error, or a wish to stop this step, no thread goes on.
                if any(not f.done() or f.cancelled() or f.exception() for f in futures):
                    meter.cancel()
                    pool.shutdown(cancel_futures=True)
        errors = [e for f in futures if not f.cancelled() and (e := f.exception()) is not None]
        for error in errors:
            if not isinstance(error, _Cancelled):
                raise error
        return [future.result() for future in futures]

    def ranges(
        self, source: Source, resolved: ResolvedRevision, file: SourceFile, meter: _Meter
    ) -> Ranges:
        around = Surroundings(
            on_read=meter.add,
            sleep=meter.sleep,
            say=self.context.progress.say,
            too_short=lambda: self.changed("while it was read"),
        )
        return ranges_of(source, resolved, file, around)

    def transfer(
        self, source: Source, resolved: ResolvedRevision, file: SourceFile, meter: _Meter
    ) -> FileEntry:
        """Store one file, or find it stored with the same content."""
        try:
            entry = self.upload(source, resolved, file, meter)
        except Conflict:
            # An earlier attempt found other content; no manifest names it.
            self.context.ensure_held()
            self.store.delete(f"{self.prefix}/{file.path}")
            entry = self.upload(source, resolved, file, meter)
        return FileEntry(path=file.path, size=entry.size, sha256=entry.sha256)

    def upload(
        self, source: Source, resolved: ResolvedRevision, file: SourceFile, meter: _Meter
    ) -> FileEntry:
        """Store one file under its key; what the source announced must be what arrives."""
        key = f"{self.prefix}/{file.path}"
        if file.git_blob_id is None or file.sha256 is not None:
            ranges = self.ranges(source, resolved, file, meter)
            new = key not in self.found
            return self.store.upload_ranged(key, ranges, sha256=file.sha256, new=new)
        # Known by git's hash alone, which the store does not make: the Hub's small files.
        with source.open(resolved, file.path) as stream:
            watched = ContentCheck(file).watch(stream, on_read=meter.add)
            return self.store.upload(key, watched)

    def changed(self, when: str) -> TrainyardError:
        return BadInput(
            f"The source of {self.model} {self.plan.revision} changed {when}.",
            hint="Plan again; write a new revision into a folder of its own.",
        )

    def immutable(self, why: str) -> TrainyardError:
        return BadInput(
            f"{self.model} {self.plan.revision} is stored with other content: {why}.",
            hint="Revisions are immutable: give the new content a new revision name, plan again.",
        )

    def result(self, manifest: CheckpointManifest, *, reused: bool, message: str) -> StepResult:
        return StepResult(
            key=self.key,
            reused=reused,
            message=message,
            detail={
                "digest": manifest.digest,
                "files": len(manifest.files),
                "bytes": sum(entry.size for entry in manifest.files),
                "parameters": manifest.parameters,
            },
        )
