"""Trusted keys: which public keys may have signed what is used here, from when, until when.

They are one JSON file, `keys/trusted-keys.json` below the home or what `TRAINYARD_TRUSTED_KEYS`
names, which `trainyard keys` keeps and which can be mounted read-only where things are only
verified. A key that was replaced stays in it, so that what it signed stays valid; a revoked one
stays as well, so that what it signed is refused by name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from filelock import FileLock
from pydantic import Field, ValidationError

from trainyard.documents.base import SCHEMA, Frozen
from trainyard.documents.release import Signature
from trainyard.errors import BadInput, CorruptFile, NotFound, RevokedKey, UnusableKey
from trainyard.settings import Settings

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

_SHORT = 12


class PublicKey(Frozen):
    """A public key and the name by which signatures refer to it."""

    key_id: str
    """64 hex digits: sha256 over the canonical JSON of key and scheme, as securesystemslib does."""
    scheme: str
    """`ed25519`, `ecdsa-sha2-nistp256`, `rsassa-pss-sha256`, …"""
    public_key: str
    """PEM (SubjectPublicKeyInfo), as `openssl` and the AWS console give it."""

    @property
    def short_id(self) -> str:
        """The digits by which people know the key."""
        return self.key_id[:_SHORT]

    def sslib_key(self) -> SSlibKey:
        """Return the key as securesystemslib wants it, under this key id."""
        from securesystemslib.signer import SSlibKey

        key = load_pem_public_key(self.public_key.encode())
        return SSlibKey.from_crypto(key, keyid=self.key_id, scheme=self.scheme)


class TrustedKey(PublicKey):
    """A public key with what is known about it."""

    comment: str = ""
    """Whose it is."""
    kms_key: str = ""
    """The AWS KMS key or alias that signs with it, if one does."""
    added_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    not_before: datetime | None = None
    """What is dated earlier is refused."""
    not_after: datetime | None = None
    """What is dated later is refused: the key was replaced then."""
    revoked_at: datetime | None = None
    """Nothing that it ever signed is used: dates can be forged by who has the key."""
    reason: str = ""
    """Why it was revoked."""

    @property
    def state(self) -> Literal["valid", "revoked", "not yet valid", "retired"]:
        """How it stands now."""
        now = datetime.now(UTC)
        if self.revoked_at:
            return "revoked"
        if self.not_before and now < self.not_before:
            return "not yet valid"
        return "retired" if self.not_after and self.not_after < now else "valid"

    def signature(self) -> Signature:
        """Return what a document says about its checked signature."""
        return Signature(key_id=self.key_id, scheme=self.scheme, signer=self.comment)


class TrustedKeys(Frozen):
    """`keys/trusted-keys.json`."""

    schema_: Literal["trainyard/v1"] = Field(default=SCHEMA, alias="schema")
    keys: tuple[TrustedKey, ...] = ()

    def get(self, key_id: str) -> TrustedKey | None:
        """Return the key of that id, trusted or revoked."""
        return next((key for key in self.keys if key.key_id == key_id), None)

    def find(self, text: str) -> TrustedKey:
        """Return the one key whose id begins with `text`. Raises NotFound, BadInput."""
        found = [key for key in self.keys if text and key.key_id.startswith(text)]
        if not found:
            raise NotFound(
                f"No key {text!r} is known here.", hint="`trainyard keys list` shows them."
            )
        if len(found) > 1:
            raise BadInput(f"{text!r} could mean several keys.", hint="Give more digits.")
        return found[0]

    def with_key(self, key: TrustedKey, *, last: bool = False) -> TrustedKeys:
        """Return these keys with `key` in the place of the one of its id, or at the end.

        With `last` always at the end: of several keys in AWS KMS of one name, the last one signs.
        """
        if last:
            others = tuple(each for each in self.keys if each.key_id != key.key_id)
            return self.model_copy(update={"keys": (*others, key)})
        if self.get(key.key_id) is None:
            return self.model_copy(update={"keys": (*self.keys, key)})
        changed = tuple(key if each.key_id == key.key_id else each for each in self.keys)
        return self.model_copy(update={"keys": changed})

    def demand(self, key_id: str, what: str) -> TrustedKey:
        """Return the key that signed `what`.

        Raises:
            BadInput: it is not trusted here.
            RevokedKey: it was revoked.
        """
        key = self.get(key_id)
        if key is None:
            known = ", ".join(each.short_id for each in self.keys) or "none"
            raise BadInput(
                f"{what} is signed by the key {key_id[:_SHORT]}, which is not trusted here "
                f"(known: {known}).",
                hint="If that key is yours, add its public key: `trainyard keys add FILE`.",
            )
        if key.revoked_at:
            why = f": {key.reason}" if key.reason else ""
            raise RevokedKey(
                f"{what} is signed by the key {key.short_id}, which was revoked on "
                f"{key.revoked_at:%Y-%m-%d}{why}.",
                hint="Publish it again from its plan, which proves it anew and signs it with "
                "today's key: `trainyard publish --plan … --target …`.",
            )
        return key


def check_date(key: TrustedKey, at: datetime, what: str) -> None:
    """Refuse what is dated outside the time in which `key` was valid. Raises UnusableKey."""
    if key.not_before and at < key.not_before:
        raise UnusableKey(
            f"{what} is dated {at:%Y-%m-%d %H:%M} UTC, before its key {key.short_id} was valid "
            f"({key.not_before:%Y-%m-%d %H:%M} UTC).",
            hint="Publish it again, or correct the key's dates: `trainyard keys add --not-before`.",
        )
    if key.not_after and at > key.not_after:
        raise UnusableKey(
            f"{what} is dated {at:%Y-%m-%d %H:%M} UTC, after its key {key.short_id} was replaced "
            f"({key.not_after:%Y-%m-%d %H:%M} UTC).",
            hint="Find out who still signs with that key; publish it again with the new one.",
        )


def public_key_of(pem: str, where: str, *, scheme: str | None = None) -> PublicKey:
    """Return the public key of a PEM text under the id that securesystemslib gives it.

    Args:
        pem: SubjectPublicKeyInfo, Ed25519, ECDSA (P-256, P-384) or RSA.
        where: what people call the text.
        scheme: how it signs; None: the usual way for that kind of key.

    Raises:
        BadInput: it is no such key.
    """
    from securesystemslib.signer import SSlibKey

    try:
        key = load_pem_public_key(pem.encode())
        made = SSlibKey.from_crypto(key, scheme=scheme)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(
            f"{where} holds no valid public key.",
            hint="It must be PEM that begins with `-----BEGIN PUBLIC KEY-----`, for Ed25519, ECDSA "
            "or RSA.",
        ) from error
    return PublicKey(key_id=made.keyid, scheme=made.scheme, public_key=_canonical_pem(pem))


def read_trusted(path: Path) -> TrustedKeys:
    """Return the keys of the file at `path`; none if there is no file.

    Raises:
        BadInput: it cannot be read.
        CorruptFile: it is not such a file, or a key and its id do not belong together.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return TrustedKeys()
    except OSError as error:
        raise BadInput(
            f"The trusted keys {path} cannot be read: {error.strerror}.",
            hint="Give this user the right to read that file.",
        ) from error
    try:
        found = TrustedKeys.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CorruptFile(
            f"{path} holds no trusted keys: {where}: {first['msg']}.",
            hint="Bring it back from a backup, or add the keys again: `trainyard keys add FILE`.",
        ) from error
    for number, key in enumerate(found.keys):
        named = f"Key {number + 1} of {path}"
        if public_key_of(key.public_key, named, scheme=key.scheme).key_id != key.key_id:
            raise CorruptFile(
                f"{named} does not have the id {key.short_id} that it claims.",
                hint="The file was changed by hand; add the key again: `trainyard keys add FILE`.",
            )
    return found


def change_trusted(settings: Settings, change: Callable[[TrustedKeys], TrustedKeys]) -> TrustedKeys:
    """Change the trusted keys under a lock and return them; the file is whole at any moment.

    Raises as `read_trusted`; BadInput if the file cannot be written.
    """
    path = settings.trusted_keys_file
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(path.with_name(f".{path.name}.lock")):
            changed = change(read_trusted(path))
            text = changed.model_dump_json(by_alias=True, indent=2) + "\n"
            replace_file(path, text.encode(), 0o644)
    except OSError as error:
        raise BadInput(
            f"The trusted keys {path} cannot be written: {error.strerror or error}.",
            hint="Change them where the file is kept, and copy it here.",
        ) from error
    return changed


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Put a file in place that is never seen half-written, over one that may be there."""
    with written_beside(path, data, mode) as temporary:
        temporary.replace(path)


@contextlib.contextmanager
def written_beside(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """Give a complete temporary file beside `path`, to move or to link; what is left is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _canonical_pem(pem: str) -> str:
    return pem.strip() + "\n"
