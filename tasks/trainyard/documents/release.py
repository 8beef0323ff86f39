"""The release manifest, its signature, and the attestations beside it."""

from __future__ import annotations

from typing import Any, Literal

from trainyard.documents.base import Document, Frozen
from trainyard.spec.model import ModelSpec, Target


class Signature(Frozen):
    """An Ed25519 signature over the canonical JSON of a release without its signature."""

    key_id: str
    """First 16 hex digits of the sha256 of the public key."""
    public_key: str
    """Base64, 32 bytes."""
    value: str
    """Base64, 64 bytes."""


class Release(Document):
    """`releases/<model>/<release id>.json`: write-once, signed; nothing else is served."""

    release_id: str
    model: str
    target: Target
    lane: str
    checkpoint_key: str
    checkpoint_digest: str
    revision: str
    compile_key: str
    bundle_digest: str
    serving: dict[str, Any]
    serving_digest: str
    served_model_name: str
    image: str = ""
    toolchain: dict[str, str]
    measurement_id: str
    spec: ModelSpec
    """Frozen with the release, so that a rollout needs no catalogue."""
    signature: Signature | None = None


class Attestation(Document):
    """`attestations/<model>/<release id>/<kind>-<12 hex>.json`: what became known of a release."""

    release_id: str
    kind: Literal["verdict", "promotion", "rejection", "approval"]
    subject: dict[str, Any]
    """For verdicts: gate, outcome, key and digest of the verdict document; for the others: why."""
