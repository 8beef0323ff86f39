"""The step `publish`: sign a release and store it, if the measurement itself says that it may."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import get_args

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest
from trainyard.documents.base import Provenance
from trainyard.documents.measurement import GateVerdict
from trainyard.documents.plan import GateName, Plan
from trainyard.documents.release import Release
from trainyard.errors import Conflict, CorruptFile, NotFound, Refused
from trainyard.releases import load_release, record_attestation, release_id_of
from trainyard.signing import sign_release, signing_key
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.gate import GateInputs, derive, read_inputs
from trainyard.store.collection import taken_keys
from trainyard.store.documents import read_document, substance
from trainyard.store.layout import (
    bundle_manifest_key,
    evals_prefix,
    measurement_key,
    plan_key,
    release_key,
    verdict_key,
)
from trainyard.store.protocol import Store

_CONTENT = (
    "model",
    "lane",
    "checkpoint_digest",
    "compile_key",
    "bundle_digest",
    "serving",
    "serving_digest",
    "served_model_name",
)
"""Fields that make up what a release serves; two of one id agree in them."""

_MAY_DIFFER = ("revision", "target", "measurement_id", "spec")
"""Fields that a release keeps from its first publication."""


def publish(plan: Plan, target_name: str, context: StepContext) -> StepResult:
    """Publish the release of one target: derive its verdicts again, sign, store once.

    No stored verdict is trusted alone: each must be the one that follows from the measurement. A
    release of the same content that was published before is kept as it is, with the spec it was
    signed with, and gets the new verdicts beside it.

    Raises:
        Refused: a gate says no, a stored verdict is not the one that follows from the measurement,
            or the release of that id serves something else.
        NotFound: a step before this one has not run, or what it made was removed meanwhile.
        CorruptFile: a document is not of this plan.
    """
    store = context.store
    inputs = read_inputs(plan, target_name, store)
    context.progress.say(f"Deriving the verdicts of target {target_name} again.")
    verdicts = [_proven_verdict(plan, name, inputs, store) for name in get_args(GateName)]
    wanted = _release(plan, inputs, context)
    _existing(wanted, context)
    context.ensure_held()
    # Verdicts first, so that a release that can be seen has them.
    for verdict in verdicts:
        _attest(verdict, wanted, context)
    release, version = _store_once(wanted, context)
    _check_still_there(release, version, [*map(_key_of, verdicts), *_plan_keys(plan)], store)
    return _result(release, wanted, verdicts, reused=not version)


def _proven_verdict(
    plan: Plan, gate_name: GateName, inputs: GateInputs, store: Store
) -> GateVerdict:
    """Return the stored verdict of a gate if it lets the release pass and is the right one."""
    derived = derive(plan, gate_name, inputs).verdict
    if derived.outcome == "fail":
        raise Refused(derived.summary, hint="A release that fails a gate is not published.")
    key = _key_of(derived)
    try:
        stored = read_document(store, key, GateVerdict)
    except NotFound as error:
        raise NotFound(
            f"The {gate_name} gate has not judged target {derived.target} of plan {plan.plan_id}.",
            hint="Run the step `gate` first.",
        ) from error
    if substance(stored) != substance(derived):
        raise Refused(
            f"The stored verdict {key} ({stored.outcome}) is not the one that follows from the "
            f"measurement ({derived.outcome}).",
            hint="It was changed by hand or made by another version of Trainyard; start a new "
            "release of this revision.",
        )
    return stored


def _release(plan: Plan, inputs: GateInputs, context: StepContext) -> Release:
    """Return the unsigned release, pinned to the checkpoint and bundle that are in the store."""
    planned, measurement = inputs.planned, inputs.measurement
    checkpoint = read_document(context.store, plan.checkpoint_key, CheckpointManifest)
    bundle_key = bundle_manifest_key(planned.compile_key)
    bundle = read_document(context.store, bundle_key, BundleManifest)
    for key, right in (
        (plan.checkpoint_key, checkpoint.architecture_digest == plan.architecture_digest),
        (bundle_key, bundle.compile_key == planned.compile_key),
        (
            measurement_key(measurement.measurement_id),
            measurement.checkpoint_digest == checkpoint.digest,
        ),
    ):
        if not right:
            raise CorruptFile(
                f"{key} does not belong to plan {plan.plan_id}.",
                hint="The store was changed by hand; start a new release of this revision.",
            )
    return Release(
        provenance=Provenance.of(
            context.settings, plan_key(plan.plan_id), plan.checkpoint_key, bundle_key, *inputs.keys
        ),
        release_id=release_id_of(
            plan.spec.model,
            checkpoint_digest=checkpoint.digest,
            compile_key=planned.compile_key,
            serving_digest=planned.serving_digest,
        ),
        model=plan.spec.model,
        target=planned.target,
        lane=planned.target.lane,
        checkpoint_key=plan.checkpoint_key,
        checkpoint_digest=checkpoint.digest,
        revision=plan.revision,
        compile_key=planned.compile_key,
        bundle_digest=bundle.digest,
        serving=planned.serving,
        serving_digest=planned.serving_digest,
        served_model_name=plan.spec.client_model_name,
        toolchain=planned.toolchain,
        measurement_id=measurement.measurement_id,
        spec=plan.spec,
    )


def _existing(wanted: Release, context: StepContext) -> Release | None:
    """Return the release of that id if there is one, its signature checked.

    Raises Refused if it serves something else.
    """
    if not context.store.exists(release_key(wanted.model, wanted.release_id)):
        return None
    existing = load_release(context.store, wanted.model, wanted.release_id, context.settings)
    differing = [name for name in _CONTENT if getattr(existing, name) != getattr(wanted, name)]
    if differing:
        raise Refused(
            f"Release {wanted.release_id} exists already and serves something else: it differs in "
            f"{', '.join(differing)}.",
            hint="Releases never change. If the bundle was removed and compiled again, remove the "
            "release too, or release another revision.",
        )
    return existing


def _attest(verdict: GateVerdict, release: Release, context: StepContext) -> None:
    """Put a verdict on record beside the release."""
    key = _key_of(verdict)
    subject = {
        "gate": verdict.gate,
        "outcome": verdict.outcome,
        "plan_id": verdict.plan_id,
        "target": verdict.target,
        "measurement_id": verdict.measurement_id,
        "summary": verdict.summary,
        "key": key,
        "digest": hashlib.sha256(substance(verdict)).hexdigest(),
    }
    record_attestation(
        context.store,
        release.model,
        release.release_id,
        "verdict",
        subject,
        provenance=Provenance.of(context.settings, key),
    )


def _store_once(wanted: Release, context: StepContext) -> tuple[Release, str]:
    """Return the release as stored, and its version if it was stored now."""
    if existing := _existing(wanted, context):
        return existing, ""
    signed = sign_release(wanted, signing_key(context.settings))
    key = release_key(wanted.model, wanted.release_id)
    try:
        return signed, context.store.create(key, signed.to_bytes())
    except Conflict:
        # Somebody else published it since we looked.
        existing = _existing(wanted, context)
        if existing is None:
            raise
        return existing, ""


def _plan_keys(plan: Plan) -> list[str]:
    """Return the keys of the plan and of its task and prompt files."""
    assets = plan.assets
    files = [f"{evals_prefix(assets.digest)}/{name}" for name in assets.files] if assets else []
    return [plan_key(plan.plan_id), *files]


def _check_still_there(
    release: Release, version: str, other_keys: Sequence[str], store: Store
) -> None:
    """Check that garbage collection took nothing that the release names while it was written.

    From now on the release protects what it names. One that was stored just now and names
    something that is gone is withdrawn: it could never be served.
    """
    named = (
        release_key(release.model, release.release_id),
        release.checkpoint_key,
        bundle_manifest_key(release.compile_key),
        measurement_key(release.measurement_id),
        *other_keys,
    )
    missing = taken_keys(store, named)
    if not missing:
        return
    if version:
        store.delete(release_key(release.model, release.release_id), version=version)
    raise NotFound(
        f"{', '.join(missing)} was removed while {release.release_id} was being published"
        f"{', so the release was withdrawn' if version else ''}.",
        hint="Start a new release of this revision; what is missing is made again.",
    )


def _key_of(verdict: GateVerdict) -> str:
    return verdict_key(verdict.plan_id, verdict.target, verdict.gate)


def _result(
    release: Release, wanted: Release, verdicts: Sequence[GateVerdict], *, reused: bool
) -> StepResult:
    kept = [name for name in _MAY_DIFFER if getattr(release, name) != getattr(wanted, name)]
    message = f"Published {release.release_id}."
    if reused:
        message = f"Release {release.release_id} was published before."
    if kept:
        message += f" It keeps what it was signed with then: its {', '.join(kept)} differ from now."
    return StepResult(
        key=release_key(release.model, release.release_id),
        reused=reused,
        message=message,
        detail={
            "release_id": release.release_id,
            "target": wanted.target.name,
            "verdicts": {verdict.gate: verdict.outcome for verdict in verdicts},
            "kept": kept,
        },
    )
