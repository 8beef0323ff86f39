"""Finds what is missing, wrong or too much in a store. Every byte of every file is read again.

Files of checkpoints, bundles and frozen evaluation sets are hashed and compared with their
manifests; every document is parsed and compared with its checksum; releases must be signed by a
trusted key; and what a document names must be there and be what was named. Several files are read
at the same time, each a chunk at a time, so memory stays small whatever their size.

What is made or removed while this runs is no problem: a finding counts only if the manifest or
document that it follows from is still there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Literal

from trainyard.canonical import digest, short
from trainyard.care.decide import Policy, kept_tracks
from trainyard.care.facts import channel_facts
from trainyard.documents.artifacts import BundleManifest, CheckpointManifest, files_digest
from trainyard.documents.base import Document, FileEntry
from trainyard.documents.channel import Channel
from trainyard.documents.harness import HarnessReport
from trainyard.documents.logits import LogitReport, logits_digest
from trainyard.documents.look import History, Look
from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.parity import Reference, Samples, reference_digest
from trainyard.documents.plan import Plan
from trainyard.documents.refresh import RefreshRecord
from trainyard.documents.release import Release
from trainyard.documents.status import StepStatus
from trainyard.documents.toolchain import ToolchainRecord
from trainyard.documents.watch import WatchState
from trainyard.errors import BadInput, NotFound, TrainyardError, Transient
from trainyard.names import check_relative_path
from trainyard.proofs import read_proof
from trainyard.releases import list_attestations, list_verdicts, load_release, pins_not_held
from trainyard.rollout.outbox import RolloutEvent
from trainyard.serving.guard_events import GuardEvent
from trainyard.settings import Settings
from trainyard.signing.keys import trusted_keys
from trainyard.store.documents import parse_document, read_document, substance
from trainyard.store.layout import (
    MANIFEST_NAME,
    attestation_key,
    bundle_manifest_key,
    logits_key,
    measurement_key,
    reference_key,
    samples_key,
    tasks_key,
)
from trainyard.store.locks import StepLock
from trainyard.store.objects import Kind, StoredObject, group
from trainyard.store.protocol import Store
from trainyard.store.transfer import CHUNK_BYTES

_NAMES_NOTHING: Mapping[str, type[Document]] = {
    "status": StepStatus,
    "lock": StepLock,
    "toolchain": ToolchainRecord,
    "refresh": RefreshRecord,
}
"""Kinds of documents that need only be whole."""

THREADS = 4
"""Files or documents that are read at the same time."""

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    key: str
    kind: Literal["missing", "wrong", "extra", "note"]
    """`note`: worth knowing, and nothing is wrong."""
    message: str
    """One sentence."""

    @property
    def is_wrong(self) -> bool:
        """Does it count as damage?"""
        return self.kind != "note"


@dataclass(frozen=True)
class Verified:
    """What a verification found."""

    problems: tuple[Problem, ...]
    """Sorted by key."""
    files: int
    """Keys that were read."""
    size: int
    """Bytes that were read."""

    @property
    def is_whole(self) -> bool:
        """Is nothing wrong?"""
        return not any(problem.is_wrong for problem in self.problems)


@dataclass(frozen=True)
class _Task:
    """One key to be read and checked."""

    key: str
    check: Callable[[], Iterable[Problem]]


class Verifier:
    """Checks a store, or a part of it."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        policy: Policy,
        *,
        on_bytes: OnBytes = lambda size: None,
        on_total: OnBytes = lambda size: None,
    ) -> None:
        """Prepare.

        Args:
            store: what is checked.
            settings: say which keys are trusted.
            policy: says which earlier releases of a channel must be there.
            on_bytes: told the bytes that were read, from several threads.
            on_total: told once how many bytes there are to read.
        """
        self._store = store
        self._settings = settings
        self._policy = policy
        self._on_bytes = on_bytes
        self._on_total = on_total

    def run(self, prefixes: Sequence[str] = ()) -> Verified:
        """Check everything, or what lies below `prefixes` (keys or beginnings of keys).

        Raises:
            NotFound: nothing lies there.
            Transient: the store fails now.
        """
        chosen = {
            name: stored
            for name, stored in group(self._store.list("")).items()
            if not prefixes or any(_is_meant(stored, prefix) for prefix in prefixes)
        }
        if prefixes and not chosen:
            raise NotFound(
                f"Nothing in {self._store.url} lies below {', '.join(prefixes)}.",
                hint="`trainyard store ls` shows what is there.",
            )
        size = sum(stored.size for stored in chosen.values())
        self._on_total(size)
        tasks = (task for stored in chosen.values() for task in self._tasks(stored))
        problems = sorted(
            _in_parallel(tasks), key=lambda problem: (problem.key, problem.kind, problem.message)
        )
        files = sum(len(stored.entries) for stored in chosen.values())
        return Verified(tuple(problems), files, size)

    def _tasks(self, stored: StoredObject) -> Iterator[_Task]:
        match stored.kind:
            case "checkpoint" | "bundle":
                yield from self._artifact_tasks(stored)
            case "evals":
                yield _Task(stored.prefix, lambda: self._check_evals(stored))
            case "attestations":
                yield _Task(stored.prefix, lambda: self._check_attestations(stored))
            case "unknown":
                yield _Task(stored.prefix, lambda: [_unknown(stored.prefix)])
            case _:
                for entry in stored.entries:
                    yield self._document_task(entry.key, stored)

    # --- files ------------------------------------------------------------------------------------

    def _artifact_tasks(self, stored: StoredObject) -> Iterator[_Task]:
        """Yield a task for each file: those of one large checkpoint are read in parallel."""
        if not stored.manifest:
            message = (
                "There is no manifest: a step is under way or was cut. Garbage collection removes "
                "it in time."
            )
            yield _Task(stored.prefix, lambda: [Problem(stored.prefix, "note", message)])
            return
        manifest, problems = self._manifest(stored)
        yield _Task(stored.manifest, lambda: problems)
        if manifest is None:
            return
        sizes = {entry.key: entry.size for entry in stored.entries}
        named = {f"{stored.prefix}/{entry.path}": entry for entry in manifest.files}
        for key, entry in named.items():
            yield self._file_task(stored, key, entry, sizes.get(key))
        for key in sorted(sizes.keys() - named.keys() - {stored.manifest}):
            yield _Task(key, lambda key=key: self._still(stored, _extra(key)))  # type: ignore[misc]

    def _manifest(
        self, stored: StoredObject
    ) -> tuple[CheckpointManifest | BundleManifest | None, list[Problem]]:
        """Return the manifest, unless it cannot be used, and what is wrong with it."""
        key = stored.manifest
        try:
            data = self._store.read(key).data
        except NotFound:
            return None, []
        self._on_bytes(len(data))
        manifest: CheckpointManifest | BundleManifest
        try:
            if stored.kind == "checkpoint":
                manifest = parse_document(data, key, CheckpointManifest)
            else:
                manifest = parse_document(data, key, BundleManifest)
            for entry in manifest.files:
                check_relative_path(entry.path)
        except BadInput as error:
            return None, [Problem(key, "wrong", error.message)]
        problems = []
        if isinstance(manifest, CheckpointManifest):
            called = f"checkpoints/{manifest.model}/{manifest.revision}"
        else:
            called = f"bundles/{manifest.compile_key}"
        if called != stored.prefix:
            problems.append(Problem(key, "wrong", f"It is the manifest of {called}."))
        if files_digest(manifest.files) != manifest.digest:
            problems.append(Problem(key, "wrong", "Its digest is not that of the files it lists."))
        if len({entry.path for entry in manifest.files}) != len(manifest.files):
            problems.append(Problem(key, "wrong", "It lists a file twice."))
        return manifest, problems

    def _file_task(
        self, stored: StoredObject, key: str, entry: FileEntry, size: int | None
    ) -> _Task:
        def check() -> list[Problem]:
            if size is None:
                return self._still(stored, Problem(key, "missing", "The manifest lists it."))
            try:
                found, read = self._hash(key)
            except NotFound:
                return self._still(stored, Problem(key, "missing", "The manifest lists it."))
            if read != entry.size:
                message = f"It has {read} bytes; the manifest says {entry.size}."
            elif found != entry.sha256:
                message = f"Its sha256 is {found}; the manifest says {entry.sha256}."
            else:
                return []
            return self._still(stored, Problem(key, "wrong", message))

        return _Task(key, check)

    def _still(self, stored: StoredObject, problem: Problem) -> list[Problem]:
        """Return the problem, unless its object was removed meanwhile."""
        return [problem] if self._store.exists(stored.manifest) else []

    def _hash(self, key: str) -> tuple[str, int]:
        """Return sha256 and size of a file."""
        sha256 = hashlib.sha256()
        size = 0
        with self._store.open(key) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                sha256.update(chunk)
                size += len(chunk)
                self._on_bytes(len(chunk))
        return sha256.hexdigest(), size

    def _check_evals(self, stored: StoredObject) -> list[Problem]:
        listing: list[tuple[str, int, str]] = []
        try:
            for entry in stored.entries:
                sha256, size = self._hash(entry.key)
                listing.append((entry.key.removeprefix(f"{stored.prefix}/"), size, sha256))
        except NotFound:
            return []
        if digest(listing) == stored.prefix.removeprefix("evals/"):
            return []
        names = ", ".join(name for name, _, _ in listing)
        message = f"These files are not the ones of its digest: {names}."
        return [Problem(stored.prefix, "wrong", message)]

    # --- documents --------------------------------------------------------------------------------

    def _document_task(self, key: str, stored: StoredObject) -> _Task:
        def check() -> Iterable[Problem]:
            try:
                data = self._store.read(key).data
            except NotFound:
                return []
            self._on_bytes(len(data))
            try:
                problems = list(self._document(key, data, stored))
            except Transient:
                raise
            except TrainyardError as error:
                problems = [Problem(key, "wrong", error.message)]
            return problems if problems and self._store.exists(key) else []

        return _Task(key, check)

    def _document(self, key: str, data: bytes, stored: StoredObject) -> Iterable[Problem]:
        """Parse a document and follow what it names."""
        match stored.kind:
            case "release":
                return self._release(key)
            case "channel" | "archive":
                channel = parse_document(data, key, Channel)
                return self._channel(key, channel) if stored.kind == "channel" else []
            case "measurement":
                measurement = parse_document(data, key, Measurement)
                return self._measurement(key, measurement)
            case "samples" | "references":
                return _called(key, _own_key(stored.kind, key, data))
            case "plan":
                return _called(key, f"plans/{parse_document(data, key, Plan).plan_id}.json")
            case "verdicts":
                return _verdict(key, data)
            case "proof":
                read_proof(data, key, trusted_keys(self._settings))
            case "rollout":
                parse_document(data, key, _kind_in_rollout(key))
            case kind if kind in _NAMES_NOTHING:
                parse_document(data, key, _NAMES_NOTHING[kind])
        return []

    def _measurement(self, key: str, measurement: Measurement) -> Iterator[Problem]:
        yield from _called(key, measurement_key(measurement.measurement_id))
        if measurement.samples and not self._store.exists(measurement.samples):
            yield Problem(measurement.samples, "missing", f"{key} is made of it.")

    def _release(self, key: str) -> Iterator[Problem]:
        _, model, name = key.split("/")
        release = load_release(self._store, model, name.removesuffix(".json"), self._settings)
        yield from self._pinned(
            key, release.checkpoint_key, CheckpointManifest, {"digest": release.checkpoint_digest}
        )
        yield from self._pinned(
            key,
            bundle_manifest_key(release.compile_key),
            BundleManifest,
            {"digest": release.bundle_digest, "compile_key": release.compile_key},
        )
        yield from self._pinned(
            key,
            measurement_key(release.measurement_id),
            Measurement,
            {
                "compile_key": release.compile_key,
                "checkpoint_digest": release.checkpoint_digest,
                "serving_digest": release.serving_digest,
            },
        )
        yield from self._verdicts(key, release)
        for changed in pins_not_held(self._store, release.pins):
            if self._store.exists(changed):
                yield Problem(changed, "wrong", f"It is not the document that {key} signed.")
        pinned = {
            release.checkpoint_key,
            bundle_manifest_key(release.compile_key),
            measurement_key(release.measurement_id),
        }
        for named in sorted(set(release.provenance.inputs) - pinned):
            if not self._store.exists(named):
                yield Problem(named, "missing", f"{key} was made from it.")

    def _pinned(
        self, key: str, named: str, kind: type[Document], wanted: Mapping[str, str]
    ) -> Iterator[Problem]:
        """Yield why the document `named` by `key` is not the one that was meant."""
        try:
            found = read_document(self._store, named, kind)
        except NotFound:
            yield Problem(named, "missing", f"{key} names it.")
            return
        except BadInput:
            # It is told where the document itself is checked, or here if that is not asked for.
            yield Problem(named, "wrong", f"{key} names it, and it cannot be read.")
            return
        for name, value in wanted.items():
            if getattr(found, name) != value:
                yield Problem(named, "wrong", f"Its {name} is not the one that {key} names.")

    def _verdicts(self, key: str, release: Release) -> Iterator[Problem]:
        """Yield which attested verdicts are not there as they were attested."""
        attested = list_verdicts(self._store, release.model, release.release_id, self._settings)
        for subject in (each.subject for each in attested):
            named = str(subject["key"])
            try:
                verdict = read_document(self._store, named, GateVerdict)
            except NotFound:
                yield Problem(named, "missing", f"It is attested for {key}.")
                continue
            if hashlib.sha256(substance(verdict)).hexdigest() != subject["digest"]:
                yield Problem(named, "wrong", f"It is not the verdict that is attested for {key}.")
        if not attested:
            yield Problem(key, "wrong", "No verdict is attested for this release.")

    def _check_attestations(self, stored: StoredObject) -> list[Problem]:
        """Check that every attestation of a release can be read and has the name of its content."""
        self._on_bytes(stored.size)
        _, model, release_id = stored.prefix.split("/")
        try:
            # Those of verdicts are signed, and only this checks it.
            list_verdicts(self._store, model, release_id, self._settings)
            found = list_attestations(self._store, model, release_id)
        except NotFound:
            return []
        except BadInput as error:
            return [Problem(stored.prefix, "wrong", error.message)]
        right = {
            attestation_key(model, release_id, each.kind, short(digest(each.subject)))
            for each in found
            if each.release_id == release_id
        }
        return [
            Problem(
                entry.key, "wrong", f"It is not the attestation of {release_id} it is named as."
            )
            for entry in stored.entries
            if entry.key not in right
        ]

    def _channel(self, key: str, channel: Channel) -> Iterator[Problem]:
        facts = channel_facts(channel)
        yield from _called(key, facts.key)
        for track in kept_tracks(facts, datetime.now(UTC), self._policy):
            if track.release in facts.verified and not self._store.exists(track.release):
                yield Problem(track.release, "missing", f"It is {track.role} in {facts.title}.")


def _is_meant(stored: StoredObject, prefix: str) -> bool:
    """Tell whether an object lies below `prefix`, or `prefix` lies in it."""
    wanted = prefix.rstrip("/")
    return stored.prefix.startswith(wanted) or f"{wanted}/".startswith(f"{stored.prefix}/")


def _unknown(key: str) -> Problem:
    return Problem(key, "note", "Nobody knows what this is; it is left alone.")


def _extra(key: str) -> Problem:
    return Problem(key, "extra", f"The {MANIFEST_NAME} beside it does not list it.")


def _called(key: str, called: str) -> list[Problem]:
    return [] if key == called else [Problem(key, "wrong", f"It is the document of {called}.")]


def _kind_in_rollout(key: str) -> type[Document]:
    if key.endswith("/history.json"):
        return History
    folder, name = key.split("/")[4:6] if key.count("/") == 5 else ("", "")
    if folder == "looks":
        return Look
    if folder == "watch":
        return WatchState
    return GuardEvent if name.startswith("guard-") else RolloutEvent


def _own_key(kind: Kind, key: str, data: bytes) -> str:
    """Return the key under which samples, a report beside them or a reference belong."""
    if kind == "samples" and key.endswith("/tasks.json"):
        return tasks_key(parse_document(data, key, HarnessReport).measurement_id)
    if kind == "samples" and key.rpartition("/")[2].startswith("logits-"):
        report = parse_document(data, key, LogitReport)
        return logits_key(report.measurement_id, logits_digest(report.settings))
    if kind == "samples":
        samples = parse_document(data, key, Samples)
        content = hashlib.sha256(substance(samples)).hexdigest()
        return samples_key(samples.measurement_id, short(content))
    reference = parse_document(data, key, Reference)
    return reference_key(reference.checkpoint_digest, reference_digest(reference.settings))


def _verdict(key: str, data: bytes) -> list[Problem]:
    """Check a verdict, or the result of Great Expectations beside it."""
    if key.endswith(".expectations.json"):
        try:
            json.loads(data)
        except ValueError as error:
            return [Problem(key, "wrong", f"It is no JSON: {error}.")]
        return []
    verdict = parse_document(data, key, GateVerdict)
    return _called(key, f"verdicts/{verdict.plan_id}/{verdict.target}/{verdict.gate}.json")


def _in_parallel(tasks: Iterator[_Task]) -> Iterator[Problem]:
    """Do all tasks, few at a time; one that fails ends them all."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="verify")
    pending: set[Future[Iterable[Problem]]] = set()
    try:
        while True:
            # Tasks are made as they are needed: a store may have more files than memory has room.
            pending |= {
                pool.submit(task.check) for task in islice(tasks, 2 * THREADS - len(pending))
            }
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()
    finally:
        pool.shutdown(cancel_futures=True)
