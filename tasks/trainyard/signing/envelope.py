"""DSSE envelopes: a payload with its signature, as they lie in the store.

An envelope has exactly one signature and exactly one form in bytes: another order, other white
space or another writing of its base64 is no envelope of ours, so that not one bit of a stored one
can change unseen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainyard.documents.statement import PAYLOAD_TYPE
from trainyard.errors import BadInput, CorruptFile
from trainyard.signing.keys import SigningKey
from trainyard.signing.trust import TrustedKey, TrustedKeys

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope


@dataclass(frozen=True)
class Opened:
    """What a trusted key signed."""

    payload: bytes
    key: TrustedKey


@dataclass(frozen=True)
class Unverified:
    """What an envelope holds, whoever may have signed it."""

    payload: bytes
    key_id: str


def seal(payload: bytes, key: SigningKey) -> bytes:
    """Return the envelope of `payload`, an in-toto statement, signed by `key`.

    Raises:
        BadInput: AWS KMS signs with another key than the one that was fetched.
        BadInput, Transient: as `trainyard.signing.kms`.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(key.signer)
    try:
        envelope.verify([key.public.sslib_key()], 1)
    except VerificationError as error:
        raise BadInput(
            f"What the signing key made does not verify with its public key {key.public.short_id}.",
            hint="If the alias in AWS KMS names another key now, fetch its public key: "
            "`trainyard keys add --kms …`.",
        ) from error
    return _to_bytes(envelope)


def open_envelope(data: bytes, what: str, trusted: TrustedKeys) -> Opened:
    """Return the payload of an envelope after checking that a trusted key signed it.

    Args:
        data: the envelope as stored.
        what: what people call it.
        trusted: whose signatures count.

    Raises:
        CorruptFile: it is no envelope, or not byte for byte as it was written.
        BadInput: it is signed by an unknown key, or was changed after it was signed.
        RevokedKey: the key was revoked.
    """
    from securesystemslib.exceptions import VerificationError

    envelope = _parse(data, what)
    key = trusted.demand(_key_id(envelope), what)
    try:
        envelope.verify([key.sslib_key()], 1)
    except VerificationError as error:
        raise BadInput(
            f"{what} does not match its signature: it was changed after it was signed.",
            hint="Do not serve it; find out who can write to the store.",
        ) from error
    return Opened(envelope.payload, key)


def look_into(data: bytes, what: str) -> Unverified:
    """Return what an envelope holds without checking its signature: for lists only.

    Raises CorruptFile as `open_envelope`.
    """
    envelope = _parse(data, what)
    return Unverified(envelope.payload, _key_id(envelope))


def _parse(data: bytes, what: str) -> Envelope:
    from securesystemslib.dsse import Envelope

    try:
        value = json.loads(data)
    except ValueError as error:
        raise _damaged(what) from error
    _refuse_older(value, what)
    try:
        envelope = Envelope.from_dict(value)
        same = _to_bytes(envelope) == data
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(what) from error
    if not same or len(envelope.signatures) != 1 or envelope.payload_type != PAYLOAD_TYPE:
        raise _damaged(what)
    return envelope


def _refuse_older(value: object, what: str) -> None:
    if isinstance(value, dict) and "release_id" in value and "payload" not in value:
        raise BadInput(
            f"{what} is not signed as an in-toto statement: it has the format of an older "
            "Trainyard.",
            hint="It cannot be used any more: remove that document from the store, then publish it "
            "again from its plan: `trainyard publish --plan … --target …`.",
        )


def _damaged(what: str) -> CorruptFile:
    return CorruptFile(
        f"{what} is not a signed envelope as Trainyard writes them.",
        hint="It was damaged or changed by hand: bring it back from a backup, or remove it and "
        "publish it again from its plan.",
    )


def _key_id(envelope: Envelope) -> str:
    (key_id,) = envelope.signatures
    return str(key_id)


def _to_bytes(envelope: Envelope) -> bytes:
    return (json.dumps(envelope.to_dict(), indent=2) + "\n").encode()
