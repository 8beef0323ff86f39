"""Published releases: find them, load them with their signature checked, and what was found out
about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from trainyard.canonical import digest, short
from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.base import Provenance
from trainyard.documents.plan import GateName, Plan, PlannedTarget
from trainyard.documents.release import Attestation, Release
from trainyard.errors import BadInput, CorruptFile, NotFound
from trainyard.names import check_release_id
from trainyard.settings import Settings
from trainyard.signing import trusted_keys, verify_release
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import (
    attestation_key,
    attestation_prefix,
    plan_key,
    release_key,
    release_prefix,
)
from trainyard.store.protocol import Store

AttestationKind = Literal["verdict", "promotion", "rejection", "approval"]

_LATEST = "latest"


def release_id_of(
    model: str, *, checkpoint_digest: str, compile_key: str, serving_digest: str
) -> str:
    """Return the id of the release that these three make up: `<model>-<12 hex digits>`."""
    return f"{model}-{short(digest([checkpoint_digest, compile_key, serving_digest]))}"


def load_release(store: Store, model: str, release_id: str, settings: Settings) -> Release:
    """Return a release after checking that it is signed by a trusted key and is what it claims.

    Raises:
        NotFound: there is no such release.
        BadInput: its signature is missing, unknown or wrong.
        CorruptFile: it cannot be read, or is another release than its name says.
    """
    key = release_key(model, release_id)
    try:
        release = read_document(store, key, Release)
    except NotFound as error:
        raise NotFound(
            f"There is no release {release_id} of model {model}.",
            hint=f"`trainyard releases {model}` lists them.",
        ) from error
    verify_release(release, trusted_keys(settings))
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


def release_ids(store: Store, model: str) -> tuple[str, ...]:
    """Return the ids of all releases of `model`, sorted."""
    prefix = f"{release_prefix(model)}/"
    names = (entry.key.removeprefix(prefix) for entry in store.list(prefix))
    return tuple(name.removesuffix(".json") for name in names if name.endswith(".json"))


def list_releases(store: Store, model: str) -> tuple[Release, ...]:
    """Return all releases of `model`, newest first.

    For lists only: signatures are not checked. Raises CorruptFile.
    """
    releases = (
        read_document(store, release_key(model, release_id), Release)
        for release_id in release_ids(store, model)
    )
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
    kind: AttestationKind,
    subject: Mapping[str, Any],
    *,
    provenance: Provenance | None = None,
) -> str:
    """Store what was found out about a release and return its key; the same twice is one.

    `subject` must say what makes this finding its own, such as the plan or the rollout.
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


def list_attestations(
    store: Store, model: str, release_id: str, kind: AttestationKind | None = None
) -> tuple[Attestation, ...]:
    """Return what was found out about a release (of one kind, or all), oldest first."""
    prefix = f"{attestation_prefix(model, check_release_id(release_id))}/"
    wanted = f"{prefix}{kind}-" if kind else prefix
    found = (
        read_document(store, entry.key, Attestation)
        for entry in store.list(prefix)
        if entry.key.startswith(wanted)
    )
    return tuple(sorted(found, key=lambda each: each.created_at))


def was_rejected(store: Store, model: str, release_id: str) -> bool:
    """Tell whether a rollout ever rejected the release, in whatever environment."""
    return bool(list_attestations(store, model, release_id, "rejection"))


def published_by_plan(store: Store, plan: Plan, settings: Settings) -> dict[str, str]:
    """Return the release ids that `plan` published, by target; the other targets are left out.

    A release of the same content that an earlier plan published does not count: the gates of
    `plan` must have let it pass. Raises as `load_release`.
    """
    found = {each.target.name: _published(store, plan, each) for each in plan.targets}
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
        release_id = _published(store, plan, planned) if planned.target.name == target else ""
        if release_id:
            return load_release(store, plan.spec.model, release_id, settings)
    raise NotFound(
        f"Plan {plan_id} published no release for target {target}.",
        hint=f"See its steps: `trainyard status {plan_id}`.",
    )


def _published(store: Store, plan: Plan, planned: PlannedTarget) -> str:
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
    verdicts = [each.subject for each in list_attestations(store, model, release_id, "verdict")]
    passed = {
        each["gate"]
        for each in verdicts
        if (each["plan_id"], each["target"]) == (plan.plan_id, target) and each["outcome"] != "fail"
    }
    return release_id if passed >= set(get_args(GateName)) else ""
