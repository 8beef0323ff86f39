"""The step `publish`: sign a release and store it, if the measurement itself says that it may."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from trainyard.documents.artifacts import BundleManifest, CheckpointManifest
from trainyard.documents.base import Provenance
from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import GateName, Plan
from trainyard.documents.release import Pin, Release
from trainyard.errors import Conflict, CorruptFile, NotFound, Refused, Transient, UnusableKey
from trainyard.gates.verdict import warnings_of
from trainyard.lanes.neuron_common import compiled_off_device
from trainyard.releases import (
    load_release,
    pins_not_held,
    record_verdict,
    release_id_of,
    store_release,
)
from trainyard.signing.keys import SigningKey, signing_key, trusted_keys
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.gate import GateInputs, derive, read_inputs
from trainyard.store.collection import taken_keys
from trainyard.store.documents import DocumentT, parse_document, substance
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


@dataclass(frozen=True)
class _Proven:
    """A stored verdict that follows from the measurement."""

    verdict: GateVerdict
    pin: Pin


@dataclass(frozen=True)
class _Stored:
    """A release as it is in the store after this publication."""

    release: Release
    version: str = ""
    """What the store calls it, if it was stored now."""
    instead: str = ""
    """Why it took the place of an earlier signing of the same release, if it did."""


def publish(plan: Plan, target_name: str, context: StepContext) -> StepResult:
    """Publish the release of one target: derive its verdicts again, sign, store once.

    No stored verdict is trusted alone: each must be the one that follows from the measurement. A
    release of the same content that was published before is kept as it is, with the spec it was
    signed with, and gets the new verdicts beside it. Only one that nobody can use any more is
    signed again: its key was revoked or did not count at its date, or a document it rests on is
    gone or was made again.

    Raises:
        Refused: a gate says no, a stored verdict is not the one that follows from the measurement,
            or the release of that id serves something else.
        NotFound: a step before this one has not run.
        CorruptFile: a document is not of this plan.
        BadInput: the signing key cannot be used.
        Transient: what the release rests on was removed or the key was replaced meanwhile, or AWS
            KMS cannot be reached.
    """
    store = context.store
    inputs = read_inputs(plan, target_name, store)
    _refuse_unaccepted(inputs)
    context.progress.say(f"Deriving the verdicts of target {target_name} again.")
    proven = [_proven_verdict(plan, name, inputs, store) for name in get_args(GateName)]
    wanted = _release(plan, inputs, [each.pin for each in proven], context)
    key = signing_key(context.settings)
    _find(wanted, context)
    context.ensure_held()
    # Verdicts first, so that a release that can be seen has them.
    for each in proven:
        _attest(each.verdict, wanted, key, context)
    stored = _store_once(wanted, key, context)
    pins = [each.pin for each in proven]
    ensure_still_there(store, stored.release, stored.version, pins, _plan_keys(plan))
    return _result(stored, wanted, [each.verdict for each in proven])


def _refuse_unaccepted(inputs: GateInputs) -> None:
    """Raise Refused for a bundle from a CPU that no server on a device has started from."""
    target, measurement = inputs.planned.target, inputs.measurement
    if compiled_off_device(target) and not measurement.machine.get("neuron_driver"):
        raise Refused(
            f"The bundle of target {target.name} was compiled on a CPU, and its measurement "
            f"{measurement.measurement_id} was not made on a machine with a Neuron driver.",
            hint="Measure on a node of the target's instance type: its start accepts the bundle.",
        )


def _proven_verdict(plan: Plan, gate_name: GateName, inputs: GateInputs, store: Store) -> _Proven:
    """Return the stored verdict of a gate if it lets the release pass and is the right one."""
    derived = derive(plan, gate_name, inputs).verdict
    if derived.outcome == "fail":
        raise Refused(derived.summary, hint="A release that fails a gate is not published.")
    key = _key_of(derived)
    try:
        stored, pin = _read(store, f"verdict/{gate_name}", key, GateVerdict)
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
    return _Proven(stored, pin)


def _read(store: Store, name: str, key: str, kind: type[DocumentT]) -> tuple[DocumentT, Pin]:
    """Return a document and the pin that holds a release to it."""
    data = store.read(key).data
    pin = Pin(name=name, key=key, sha256=hashlib.sha256(data).hexdigest())
    return parse_document(data, key, kind), pin


def _release(
    plan: Plan, inputs: GateInputs, verdicts: Sequence[Pin], context: StepContext
) -> Release:
    """Return the unsigned release, pinned to the documents that are in the store."""
    planned, store = inputs.planned, context.store
    bundle_key = bundle_manifest_key(planned.compile_key)
    measured_key = measurement_key(inputs.measurement.measurement_id)
    checkpoint, checkpoint_pin = _read(
        store, "checkpoint-manifest", plan.checkpoint_key, CheckpointManifest
    )
    bundle, bundle_pin = _read(store, "bundle-manifest", bundle_key, BundleManifest)
    measurement, measurement_pin = _read(store, "measurement", measured_key, Measurement)
    for key, right in (
        (plan.checkpoint_key, checkpoint.architecture_digest == plan.architecture_digest),
        (bundle_key, bundle.compile_key == planned.compile_key),
        (
            measured_key,
            measurement == inputs.measurement
            and measurement.checkpoint_digest == checkpoint.digest,
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
        source=checkpoint.source,
        compile_key=planned.compile_key,
        bundle_digest=bundle.digest,
        serving=planned.serving,
        serving_digest=planned.serving_digest,
        served_model_name=plan.spec.client_model_name,
        image=str(planned.serving.get("image", "")),
        toolchain=planned.toolchain,
        measurement_id=measurement.measurement_id,
        request=plan.request,
        spec=plan.spec,
        pins=(checkpoint_pin, bundle_pin, measurement_pin, *verdicts),
        builder=context.settings.builder_id,
    )


@dataclass(frozen=True)
class _Found:
    """A release of the same id that was published before."""

    release: Release | None
    """None if nobody can use it any more."""
    version: str
    why: str = ""
    """Why nobody can use it."""


def _find(wanted: Release, context: StepContext) -> _Found | None:
    """Return the release of that id if there is one, its signature checked.

    Raises Refused if it serves something else.
    """
    store, key = context.store, release_key(wanted.model, wanted.release_id)
    try:
        version = store.read(key).version
    except NotFound:
        return None
    try:
        existing = load_release(store, wanted.model, wanted.release_id, context.settings)
    except UnusableKey as error:
        return _Found(None, version, error.message)
    differing = [name for name in _CONTENT if getattr(existing, name) != getattr(wanted, name)]
    if differing:
        raise Refused(
            f"Release {wanted.release_id} exists already and serves something else: it differs in "
            f"{', '.join(differing)}.",
            hint="Releases never change. If the bundle was removed and compiled again, remove the "
            "release too, or release another revision.",
        )
    lost = pins_not_held(store, existing.pins)
    if lost:
        return _Found(None, version, f"{', '.join(lost)} is gone or was made again.")
    return _Found(existing, version)


def _attest(
    verdict: GateVerdict, release: Release, signing: SigningKey, context: StepContext
) -> None:
    """Put a signed verdict on record beside the release."""
    key, warnings = _key_of(verdict), warnings_of(verdict)
    subject = {
        "gate": verdict.gate,
        "outcome": verdict.outcome,
        "plan_id": verdict.plan_id,
        "target": verdict.target,
        "measurement_id": verdict.measurement_id,
        "summary": verdict.summary,
        "key": key,
        **({"warnings": list(warnings)} if warnings else {}),
        "digest": hashlib.sha256(substance(verdict)).hexdigest(),
    }
    try:
        record_verdict(
            context.store,
            release,
            subject,
            key=signing,
            trusted=trusted_keys(context.settings),
            provenance=Provenance.of(context.settings, key),
        )
    except UnusableKey as error:
        raise Transient(
            f"The key that signs here was replaced while this was published: {error.message}",
            hint="Try again: today's key signs then.",
        ) from error


def _store_once(wanted: Release, key: SigningKey, context: StepContext) -> _Stored:
    """Sign and store the release unless a good one is there."""
    found = _find(wanted, context)
    if found and found.release:
        return _Stored(found.release)
    version, instead = (found.version, found.why) if found else ("", "")
    try:
        return _Stored(*store_release(context.store, wanted, key, version=version), instead)
    except Conflict:
        # Somebody else published it since we looked.
        found = _find(wanted, context)
        if found is None or found.release is None:
            raise
        return _Stored(found.release)


def _plan_keys(plan: Plan) -> list[str]:
    """Return the keys of the plan and of its task and prompt files."""
    assets = plan.assets
    files = [f"{evals_prefix(assets.digest)}/{name}" for name in assets.files] if assets else []
    return [plan_key(plan.plan_id), *files]


def ensure_still_there(
    store: Store,
    release: Release,
    version: str,
    verdicts: Sequence[Pin] = (),
    other_keys: Sequence[str] = (),
) -> None:
    """Check that garbage collection took nothing that the release names while it was written.

    From now on the release protects what it names. One that was stored just now (it has a
    `version`) and names something that is gone is withdrawn: it could never be served.

    Raises Transient: the steps that make what is gone must run again.
    """
    pins = dict.fromkeys((*release.pins, *verdicts))
    own = release_key(release.model, release.release_id)
    named = (own, *(pin.key for pin in pins), *other_keys)
    gone = list(dict.fromkeys((*taken_keys(store, named), *pins_not_held(store, pins))))
    if not gone:
        return
    if version:
        store.delete(release_key(release.model, release.release_id), version=version)
    raise Transient(
        f"{', '.join(gone)} was removed or changed while {release.release_id} was being published"
        f"{', so the release was withdrawn' if version else ''}.",
        hint="Start a new release of this revision; what is missing is made again.",
    )


def _key_of(verdict: GateVerdict) -> str:
    return verdict_key(verdict.plan_id, verdict.target, verdict.gate)


def _result(stored: _Stored, wanted: Release, verdicts: Sequence[GateVerdict]) -> StepResult:
    release = stored.release
    kept = [name for name in _MAY_DIFFER if getattr(release, name) != getattr(wanted, name)]
    message = f"Published {release.release_id}."
    if not stored.version:
        message = f"Release {release.release_id} was published before."
    if stored.instead:
        message = f"Published {release.release_id} again: {stored.instead}"
    if kept:
        message += f" It keeps what it was signed with then: its {', '.join(kept)} differ from now."
    warnings = [words for verdict in verdicts for words in warnings_of(verdict)]
    if warnings:
        message += f" Warnings that it carries ({len(warnings)}): {' '.join(warnings)}"
    return StepResult(
        key=release_key(release.model, release.release_id),
        reused=not stored.version,
        message=message,
        detail={
            "release_id": release.release_id,
            "target": wanted.target.name,
            "verdicts": {verdict.gate: verdict.outcome for verdict in verdicts},
            "warnings": warnings,
            "kept": kept,
        },
    )
