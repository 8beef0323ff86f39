"""Where each kind of document lives: the only module that knows the shape of keys.

Every part of a key is checked here, so that no name from outside can leave its folder.
"""

from __future__ import annotations

import re

from trainyard.canonical import digest, short
from trainyard.errors import BadInput
from trainyard.names import check_name, check_relative_path, check_release_id, check_revision

_PART_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$"

PROOFS = "proofs"
"""Folder of the transcripts of `trainyard doctor neuron`."""

ATTESTATIONS = "attestations"
"""Folder of what was found out about releases."""

MANIFEST_NAME = "manifest.json"
"""The file that is written last and makes a checkpoint or bundle complete."""


def _part(value: str, what: str) -> str:
    """Return `value` if it can be one component of a key (identifiers that Trainyard makes)."""
    if not re.fullmatch(_PART_PATTERN, value) or ".." in value:
        raise BadInput(
            f"{what} {value!r} is not valid.",
            hint="Use 1 to 128 letters, digits, dots, hyphens and underscores (no '/', no '..').",
        )
    return value


def plan_key(plan_id: str) -> str:
    """Return `plans/<plan id>.json`."""
    return f"plans/{_part(plan_id, 'Plan id')}.json"


def checkpoint_prefix(model: str, revision: str) -> str:
    """Return `checkpoints/<model>/<revision>`: the model's own files are below it."""
    return f"checkpoints/{check_name(model, 'Model')}/{check_revision(revision)}"


def checkpoint_manifest_key(model: str, revision: str) -> str:
    """Return the key of a checkpoint's manifest."""
    return f"{checkpoint_prefix(model, revision)}/{MANIFEST_NAME}"


def bundle_prefix(compile_key: str) -> str:
    """Return `bundles/<compile key>`: the cache's own files are below it."""
    return f"bundles/{_part(compile_key, 'Compile key')}"


def bundle_manifest_key(compile_key: str) -> str:
    """Return the key of a bundle's manifest."""
    return f"{bundle_prefix(compile_key)}/{MANIFEST_NAME}"


def toolchain_key(image: str, lane: str) -> str:
    """Return the key of what is recorded of the toolchain of an image."""
    return f"toolchains/{short(digest([image, lane]))}.json"


def measurement_key(measurement_id: str) -> str:
    """Return `measurements/<measurement id>.json`."""
    return f"measurements/{_part(measurement_id, 'Measurement id')}.json"


def samples_prefix(measurement_id: str) -> str:
    """Return `samples/<measurement id>`: what the figures of that measurement are made of."""
    return f"samples/{_part(measurement_id, 'Measurement id')}"


def samples_key(measurement_id: str, samples_digest: str) -> str:
    """Return `samples/<measurement id>/<digest>.json`.

    The digest is in the key because an attempt that was cut may have left samples of its own.
    """
    return f"{samples_prefix(measurement_id)}/{_part(samples_digest, 'Digest')}.json"


def logits_key(measurement_id: str, settings_digest: str) -> str:
    """Return `samples/<measurement id>/logits-<digest of the settings>.json`."""
    name = f"logits-{_part(settings_digest, 'Digest')}"
    return f"{samples_prefix(measurement_id)}/{name}.json"


def tasks_key(measurement_id: str) -> str:
    """Return `samples/<measurement id>/tasks.json`."""
    return f"{samples_prefix(measurement_id)}/tasks.json"


def reference_prefix(checkpoint_digest: str) -> str:
    """Return `references/<checkpoint digest>`: every reference of that checkpoint is below it."""
    return f"references/{_part(checkpoint_digest, 'Checkpoint digest')}"


def reference_key(checkpoint_digest: str, settings_digest: str) -> str:
    """Return `references/<checkpoint digest>/<digest of the settings>.json`."""
    return f"{reference_prefix(checkpoint_digest)}/{_part(settings_digest, 'Digest')}.json"


def verdict_key(plan_id: str, target: str, gate: str) -> str:
    """Return `verdicts/<plan id>/<target>/<gate>.json`."""
    return (
        f"verdicts/{_part(plan_id, 'Plan id')}/{check_name(target, 'Target')}"
        f"/{check_name(gate, 'Gate')}.json"
    )


def expectations_key(plan_id: str, target: str, gate: str) -> str:
    """Return `verdicts/<plan id>/<target>/<gate>.expectations.json`, beside the verdict."""
    return f"{verdict_key(plan_id, target, gate).removesuffix('.json')}.expectations.json"


def gate_report_key(plan_id: str, target: str, gate: str) -> str:
    """Return `reports/<plan id>/<target>/<gate>.html`."""
    return (
        f"reports/{verdict_key(plan_id, target, gate).split('/', 1)[1].removesuffix('.json')}.html"
    )


def release_prefix(model: str) -> str:
    """Return `releases/<model>`: all releases of the model are below it."""
    return f"releases/{check_name(model, 'Model')}"


def release_key(model: str, release_id: str) -> str:
    """Return `releases/<model>/<release id>.json`."""
    return f"{release_prefix(model)}/{check_release_id(release_id)}.json"


def attestation_prefix(model: str, release_id: str) -> str:
    """Return `attestations/<model>/<release id>`: everything found out about a release."""
    return f"{ATTESTATIONS}/{check_name(model, 'Model')}/{check_release_id(release_id)}"


def attestation_key(model: str, release_id: str, kind: str, identifier: str) -> str:
    """Return `attestations/<model>/<release id>/<kind>-<identifier>.json`."""
    name = f"{check_name(kind, 'Kind')}-{_part(identifier, 'Attestation id')}"
    return f"{attestation_prefix(model, release_id)}/{name}.json"


def channel_prefix(model: str) -> str:
    """Return `channels/<model>`: the model's channels in all environments are below it."""
    return f"channels/{check_name(model, 'Model')}"


def channel_key(model: str, environment: str) -> str:
    """Return `channels/<model>/<environment>.json`."""
    return f"{channel_prefix(model)}/{check_name(environment, 'Environment')}.json"


def refresh_key(model: str) -> str:
    """Return `refreshes/<model>.json`."""
    return f"refreshes/{check_name(model, 'Model')}.json"


def rollout_prefix(model: str, environment: str, number: int) -> str:
    """Return `rollouts/<model>/<environment>/<n>`: looks and events of one rollout."""
    return (
        f"rollouts/{check_name(model, 'Model')}/{check_name(environment, 'Environment')}/{number:d}"
    )


def status_key(plan_id: str, step: str, target: str = "") -> str:
    """Return `status/<plan id>/<step>.json`, or `status/<plan id>/<step>/<target>.json`."""
    base = f"status/{_part(plan_id, 'Plan id')}/{check_name(step, 'Step')}"
    return f"{base}/{check_name(target, 'Target')}.json" if target else f"{base}.json"


def status_prefix(plan_id: str) -> str:
    """Return the folder of a plan's status documents."""
    return f"status/{_part(plan_id, 'Plan id')}"


def lock_key(step_key: str) -> str:
    """Return `locks/<step key>.json`; a step key may have several components."""
    return f"locks/{check_relative_path(step_key)}.json"


def proof_key(lane: str, instance: str, proof_id: str) -> str:
    """Return `proofs/<lane>/<instance>/<proof id>.json`."""
    return (
        f"{PROOFS}/{check_name(lane, 'Lane')}/{_part(instance, 'Instance')}"
        f"/{_part(proof_id, 'Proof id')}.json"
    )


def evals_prefix(assets_digest: str) -> str:
    """Return `evals/<digest>`: task and prompt files of a spec, frozen with a plan."""
    return f"evals/{_part(assets_digest, 'Digest')}"
