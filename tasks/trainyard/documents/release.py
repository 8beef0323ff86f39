"""The release manifest, who signed it, and the attestations beside it.

How a release is written down and signed is in `trainyard.documents.statement`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from trainyard.documents.base import Document, Frozen
from trainyard.documents.plan import ReleaseRequest
from trainyard.spec.model import ModelSpec, Target

DEFAULT_BUILDER = "urn:trainyard:builder"
"""Stands for any installation of Trainyard; `TRAINYARD_BUILDER_ID` tells them apart."""


class Signature(Frozen):
    """Who signed what was read, after the signature was checked."""

    key_id: str
    """sha256 of the canonical JSON of the public key, as securesystemslib makes it."""
    scheme: str
    """Such as `ed25519` or `ecdsa-sha2-nistp256`."""
    signer: str = ""
    """What the trusted keys say about the key, for people."""


class Pin(Frozen):
    """A stored document that a release names, byte for byte."""

    name: str
    """`checkpoint-manifest`, `bundle-manifest`, `measurement` or `verdict/<gate>`."""
    key: str
    sha256: str
    """Of the bytes of the document; 64 lower-case hex digits."""


class Release(Document):
    """`releases/<model>/<release id>.json`: write-once, signed; nothing else is served.

    This is what the payload of the stored envelope says.
    """

    release_id: str
    model: str
    target: Target
    lane: str
    checkpoint_key: str
    checkpoint_digest: str
    revision: str
    source: str = ""
    """Where the checkpoint came from, without credentials."""
    compile_key: str
    bundle_digest: str
    serving: dict[str, Any]
    serving_digest: str
    served_model_name: str
    image: str = ""
    toolchain: dict[str, str]
    measurement_id: str
    request: ReleaseRequest | None = None
    """What was asked for when it was first published."""
    spec: ModelSpec
    """Frozen with the release, so that a rollout needs no catalogue."""
    pins: tuple[Pin, ...] = ()
    """The documents it rests on. One that is not the same byte for byte is refused."""
    builder: str = DEFAULT_BUILDER
    """URI of the installation that made it."""
    signature: Signature | None = Field(default=None, exclude=True)
    """Not part of what is signed or stored: None until the envelope was checked."""

    def pin(self, name: str) -> Pin | None:
        """Return the pinned document of that name, if there is one."""
        return next((each for each in self.pins if each.name == name), None)


class Attestation(Document):
    """`attestations/<model>/<release id>/<kind>-<12 hex>.json`: what became known of a release.

    Verdicts are written by the step that signs, and signed; the others come from the rollout, which
    holds no key, and are stored as they are.
    """

    release_id: str
    kind: Literal["verdict", "promotion", "rejection", "approval"]
    subject: dict[str, Any]
    """For verdicts: gate, outcome, key and digest of the verdict document, and `warnings`, if it
    has any; for the others: why."""
    signature: Signature | None = Field(default=None, exclude=True)
    """As of a release; the others have none."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever serves the release should know; verdicts of earlier versions have none."""
        return tuple(str(words) for words in self.subject.get("warnings", ()))
