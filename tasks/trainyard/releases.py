"""Published releases: find them, load them with their signature checked, and what was found out
about them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

from trainyard.canonical import digest, short
from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.base import Provenance
from trainyard.documents.plan import GateName, Plan, PlannedTarget
from trainyard.documents.release import Attestation, Pin, Release
from trainyard.documents.statement import (
    payload_of_release,
    payload_of_verdict,
    release_of_payload,
    verdict_of_payload,
)
from trainyard.errors import BadInput, Conflict, CorruptFile, NotFound, UnusableKey
from trainyard.names import check_release_id
from trainyard.settings import Settings
from trainyard.signing.envelope import look_into, open_envelope, seal
from trainyard.signing.keys import SigningKey, trusted_keys
from trainyard.signing.trust import TrustedKeys, check_date
from trainyard.store.documents import DocumentT, create_document, parse_document, read_document
from trainyard.store.layout import (
    attestation_key,
    attestation_prefix,
    plan_key,
    release_key,
    release_prefix,
)
from trainyard.store.protocol import Store

FindingKind = Literal["promotion", "rejection", "approval"]
AttestationKind = Literal["verdict"] | FindingKind

StatedT = TypeVar("StatedT", Release, Attestation)

_LATEST = "latest"
_VERDICT = "verdict"


def release_id_of(
    model: str, *, checkpoint_digest: str, compile_key: str, serving_digest: str
) -> str:
    """Return the id of the release that these three make up: `<model>-<12 hex digits>`."""
    return f"{model}-{short(digest([checkpoint_digest, compile_key, serving_digest]))}"


def load_release(
    store: Store,
    model: str,
    release_id: str,
    settings: Settings,
    *,
    trusted: TrustedKeys | None = None,
) -> Release:
    """Return a release after checking that it is signed by a trusted key and is what it claims.

    Args:
        store: where it lies.
        model: whose release it is.
        release_id: its id.
        settings: say which keys are trusted.
        trusted: those keys, for who loads many releases and has read them already.

    Raises:
        NotFound: there is no such release.
        BadInput: its signature is unknown or wrong, or it has an older format.
        UnusableKey: the key that signed it was revoked, or did not count at its date.
        CorruptFile: it cannot be read, or is another release than its name says.
    """
    key = release_key(model, release_id)
    try:
        data = store.read(key).data
    except NotFound as error:
        raise NotFound(
            f"There is no release {release_id} of model {model}.",
            hint=f"`trainyard releases {model}` lists them.",
        ) from error
    if trusted is None:
        trusted = trusted_keys(settings)
    release = _verified(data, key, release_of_payload, trusted)
    made_of = release_id_of(
        release.model,
        checkpoint_digest=release.checkpoint_digest,
        compile_key=release.compile_key,
        serving_digest=release.serving_digest,
    )
    if (release.model, release.release_id) != (model, release_id) or made_of != release_id:
        raise CorruptFile(
            f"{key} holds the release {release.release_id} of model {release.model}.",
            hint="Somebody copied or renamed it; remove it and publish the release again.",
        )
    return release


def store_release(
    store: Store, release: Release, key: SigningKey, *, version: str = ""
) -> tuple[Release, str]:
    """Sign and store a release; return it as it reads back, and its version in the store.

    Args:
        store: where to.
        release: not signed yet.
        key: what signs it.
        version: of the document that it takes the place of; empty: there must be none.

    Raises:
        Conflict: somebody else stored it, or changed it, first.
        BadInput, Transient: as `seal`.
    """
    payload = payload_of_release(release)
    data = seal(payload, key)
    where = release_key(release.model, release.release_id)
    written = store.replace(where, data, version=version) if version else store.create(where, data)
    return release_of_payload(payload), written


def read_pinned(
    store: Store, release: Release, name: str, key: str, kind: type[DocumentT]
) -> DocumentT:
    """Return a document that `release` rests on, if it is that document byte for byte.

    Args:
        store: where it lies.
        release: a verified release.
        name: of the pin, such as `checkpoint-manifest`.
        key: of the document.
        kind: what it must be.

    Raises:
        NotFound: it is gone.
        CorruptFile: it is not as it was when the release was signed, or cannot be read.
    """
    data = store.read(key).data
    pin = release.pin(name)
    if pin is not None and (pin.key, pin.sha256) != (key, hashlib.sha256(data).hexdigest()):
        raise CorruptFile(
            f"{key} is not the document that release {release.release_id} was signed with.",
            hint="It was damaged, changed or made again: bring it back from a backup, or publish "
            "the release again from its plan.",
        )
    return parse_document(data, key, kind)


def pins_not_held(store: Store, pins: Iterable[Pin]) -> list[str]:
    """Return the keys of those documents that are gone, or are not the same byte for byte."""
    return [pin.key for pin in pins if not _is_held(store, pin)]


def _is_held(store: Store, pin: Pin) -> bool:
    try:
        return hashlib.sha256(store.read(pin.key).data).hexdigest() == pin.sha256
    except NotFound:
        return False


def _verified(
    data: bytes, key: str, read: Callable[[bytes], StatedT], trusted: TrustedKeys
) -> StatedT:
    """Return what an envelope states, with its signature checked."""
    opened = open_envelope(data, key, trusted)
    stated = _stated(opened.payload, key, read)
    check_date(opened.key, stated.created_at, key)
    return stated.model_copy(update={"signature": opened.key.signature()})


def _unverified(data: bytes, key: str, read: Callable[[bytes], StatedT]) -> StatedT:
    return _stated(look_into(data, key).payload, key, read)


def _stated(payload: bytes, key: str, read: Callable[[bytes], StatedT]) -> StatedT:
    try:
        return read(payload)
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise CorruptFile(
            f"{key} does not state what it should: {first}.",
            hint="It was written by another version of Trainyard.",
        ) from error


def release_ids(store: Store, model: str) -> tuple[str, ...]:
    """Return the ids of all releases of `model`, sorted."""
    prefix = f"{release_prefix(model)}/"
    names = (entry.key.removeprefix(prefix) for entry in store.list(prefix))
    return tuple(name.removesuffix(".json") for name in names if name.endswith(".json"))


def peek_release(store: Store, model: str, release_id: str) -> Release:
    """Return a release whose signature is not checked: to look at, never to serve.

    Raises NotFound, CorruptFile; BadInput if it has an older format.
    """
    key = release_key(model, release_id)
    return peek_into(store.read(key).data, key)


def peek_into(data: bytes, key: str) -> Release:
    """Return the release in the content of `key`; for `peek_release`, and raises as it does."""
    return _unverified(data, key, release_of_payload)


def list_releases(store: Store, model: str) -> tuple[Release, ...]:
    """Return all releases of `model`, newest first.

    For lists only: signatures are not checked. Raises CorruptFile.
    """
    releases = (peek_release(store, model, each) for each in release_ids(store, model))
    return tuple(
        sorted(releases, key=lambda each: (each.created_at, each.release_id), reverse=True)
    )


def resolve_release(store: Store, model: str, text: str) -> str:
    """Return the id of the one release of `model` that `text` means.

    Args:
        text: a release id, the beginning of its hex digits, or `latest` (the newest by date).

    Raises:
        NotFound: no release matches.
        BadInput: several releases match.
    """
    if text == _LATEST:
        releases = list_releases(store, model)
        if releases:
            return releases[0].release_id
        raise NotFound(
            f"Model {model} has no release yet.",
            hint="Make one: trigger the DAG neuron_release with this model.",
        )
    ids = release_ids(store, model)
    if text in ids:
        return text
    start = text.removeprefix(f"{model}-")
    matches = [each for each in ids if start and each.removeprefix(f"{model}-").startswith(start)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise BadInput(
            f"{text!r} could mean several releases of {model}: {', '.join(matches)}.",
            hint="Give more digits.",
        )
    raise NotFound(
        f"Model {model} has no release {text!r}.",
        hint=f"`trainyard releases {model}` lists them.",
    )


def record_attestation(
    store: Store,
    model: str,
    release_id: str,
    kind: FindingKind,
    subject: Mapping[str, Any],
    *,
    provenance: Provenance | None = None,
) -> str:
    """Store what became known of a release and return its key; the same twice is one.

    It is not signed: rollouts hold no key, so that whoever breaks into one cannot publish.
    `subject` must say what makes this finding its own, such as the rollout.
    """
    attestation = Attestation(
        release_id=release_id,
        kind=kind,
        subject=dict(subject),
        provenance=provenance or Provenance(),
    )
    key = attestation_key(model, release_id, kind, short(digest(attestation.subject)))
    create_document(store, key, attestation)
    return key


def record_verdict(
    store: Store,
    release: Release,
    subject: Mapping[str, Any],
    *,
    key: SigningKey,
    trusted: TrustedKeys,
    provenance: Provenance | None = None,
) -> str:
    """Sign and store a verdict on a release and return its key; the same twice is one.

    One whose key was revoked, or did not count at its date, is signed anew. Raises as
    `load_release`, and as `seal`; UnusableKey also if `key` does not count now.
    """
    verdict = Attestation(
        release_id=release.release_id,
        kind=_VERDICT,
        subject=dict(subject),
        provenance=provenance or Provenance(),
    )
    where = attestation_key(release.model, release.release_id, _VERDICT, short(digest(subject)))

    def stored_version() -> str | None:
        """Return the version of one to replace, nothing for none; None: a good one is there."""
        try:
            stored = store.read(where)
        except NotFound:
            return ""
        try:
            found = _verified(stored.data, where, verdict_of_payload, trusted)
        except UnusableKey:
            return stored.version
        if (found.release_id, found.subject) != (verdict.release_id, verdict.subject):
            raise CorruptFile(
                f"{where} holds another verdict.", hint="Somebody copied it there; remove it."
            )
        return None

    version = stored_version()
    if version is None:
        return where
    data = seal(payload_of_verdict(verdict, release), key)
    # What nobody would accept is not stored: the key may have been replaced since it was fetched.
    _verified(data, where, verdict_of_payload, trusted)
    try:
        if version:
            store.replace(where, data, version=version)
        else:
            store.create(where, data)
    except Conflict:
        # Somebody else stored it since we looked; it must say the same.
        if stored_version() is not None:
            raise
    return where


def list_attestations(
    store: Store, model: str, release_id: str, kind: AttestationKind | None = None
) -> tuple[Attestation, ...]:
    """Return what became known of a release (of one kind, or all), oldest first.

    For lists: the signatures of verdicts are not checked. `list_verdicts` does.
    """
    found = (
        _unverified(store.read(key).data, key, verdict_of_payload)
        if found_kind == _VERDICT
        else read_document(store, key, Attestation)
        for key, found_kind in _attestation_keys(store, model, release_id)
        if kind in (None, found_kind)
    )
    return tuple(sorted(found, key=lambda each: each.created_at))


def list_verdicts(
    store: Store, model: str, release_id: str, settings: Settings
) -> tuple[Attestation, ...]:
    """Return the verdicts on a release, oldest first, each signed by a trusted key.

    A verdict whose key was revoked or did not count at its date counts as none: its plan must
    publish again. Raises otherwise as `load_release`.
    """
    trusted = trusted_keys(settings)
    found = []
    for key, kind in _attestation_keys(store, model, release_id):
        if kind == _VERDICT:
            with contextlib.suppress(UnusableKey):
                found.append(_verified(store.read(key).data, key, verdict_of_payload, trusted))
    ours = (each for each in found if each.release_id == release_id)
    return tuple(sorted(ours, key=lambda each: each.created_at))


def _attestation_keys(store: Store, model: str, release_id: str) -> Iterable[tuple[str, str]]:
    """Yield the keys of all attestations of a release, each with its kind."""
    prefix = f"{attestation_prefix(model, check_release_id(release_id))}/"
    for entry in store.list(prefix):
        yield entry.key, entry.key.removeprefix(prefix).partition("-")[0]


def was_rejected(store: Store, model: str, release_id: str) -> bool:
    """Tell whether a rollout ever rejected the release, in whatever environment."""
    return bool(list_attestations(store, model, release_id, "rejection"))


def published_by_plan(store: Store, plan: Plan, settings: Settings) -> dict[str, str]:
    """Return the release ids that `plan` published, by target; the other targets are left out.

    A release of the same content that an earlier plan published does not count: the gates of
    `plan` must have let it pass. Raises as `load_release`.
    """
    found = {each.target.name: _published(store, plan, each, settings) for each in plan.targets}
    published = {target: release_id for target, release_id in found.items() if release_id}
    for release_id in published.values():
        load_release(store, plan.spec.model, release_id, settings)
    return published


def release_of_plan(store: Store, plan_id: str, target: str, settings: Settings) -> Release:
    """Return the release that the plan published for `target`.

    Raises:
        NotFound: there is no such plan, or it published nothing for the target.
        BadInput, CorruptFile: as `load_release`.
    """
    plan = read_document(store, plan_key(plan_id), Plan)
    for planned in plan.targets:
        if planned.target.name != target:
            continue
        release_id = _published(store, plan, planned, settings)
        if release_id:
            return load_release(store, plan.spec.model, release_id, settings)
    raise NotFound(
        f"Plan {plan_id} published no release for target {target}.",
        hint=f"See its steps: `trainyard status {plan_id}`.",
    )


def _published(store: Store, plan: Plan, planned: PlannedTarget, settings: Settings) -> str:
    """Return the id of the release that `plan` published for a target, or nothing."""
    model, target = plan.spec.model, planned.target.name
    try:
        checkpoint = read_document(store, plan.checkpoint_key, CheckpointManifest)
    except NotFound:
        return ""
    release_id = release_id_of(
        model,
        checkpoint_digest=checkpoint.digest,
        compile_key=planned.compile_key,
        serving_digest=planned.serving_digest,
    )
    if not store.exists(release_key(model, release_id)):
        return ""
    verdicts = [each.subject for each in list_verdicts(store, model, release_id, settings)]
    passed = {
        each["gate"]
        for each in verdicts
        if (each["plan_id"], each["target"]) == (plan.plan_id, target) and each["outcome"] != "fail"
    }
    return release_id if passed >= set(get_args(GateName)) else ""
