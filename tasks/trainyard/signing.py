"""Signatures of releases: Ed25519 over the canonical JSON of a release without its signature.

The private key is `TRAINYARD_SIGNING_KEY`, else the file `keys/release-signing.key` below the home,
made at first use. Trusted are the installation's own key and every `keys/trusted/*.pub`. Such a
file holds one public key a line in base64, as `keys/release-signing.pub` does, and `#` comments.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from trainyard.canonical import canonical_json
from trainyard.documents.release import Release, Signature
from trainyard.errors import BadInput
from trainyard.settings import Settings

_KEY_BYTES = 32


@dataclass(frozen=True)
class SigningKey:
    """A private key that signs releases; its text never appears in `repr` or a document."""

    _private: Ed25519PrivateKey

    @property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return self._private.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """Return the 64 bytes of the signature of `data`."""
        return self._private.sign(data)


def key_id(public: bytes) -> str:
    """Return the name of a public key: the first 16 hex digits of its sha256."""
    return hashlib.sha256(public).hexdigest()[:16]


def signing_key(settings: Settings) -> SigningKey:
    """Return the key that signs here; a key file is made if there is no key yet.

    Two processes that need the first key at the same moment get the same one.

    Raises:
        BadInput: the key is not the base64 of 32 bytes, or others could read its file.
    """
    if settings.signing_key.get_secret_value():
        return _from_settings(settings)
    path = _key_file(settings)
    if not path.exists():
        _make_key_file(path)
    key = _from_file(path)
    _publish_public_key(path.with_suffix(".pub"), key.public)
    return key


def trusted_keys(settings: Settings) -> Mapping[str, bytes]:
    """Return the trusted public keys by their key id: this installation's own and the listed ones.

    Makes no key: an installation that never signed trusts the listed keys only.

    Raises:
        BadInput: a key cannot be read.
    """
    keys: list[bytes] = []
    if settings.signing_key.get_secret_value():
        keys.append(_from_settings(settings).public)
    elif _key_file(settings).exists():
        keys.append(_from_file(_key_file(settings)).public)
    for path in sorted(_trusted_folder(settings).glob("*.pub")):
        for number, line in enumerate(_read(path).splitlines(), start=1):
            entry = line.partition("#")[0].strip()
            if entry:
                keys.append(_decode(entry, f"Line {number} of {path}", "public key"))
    return {key_id(public): public for public in keys}


def sign_release(release: Release, key: SigningKey) -> Release:
    """Return `release` with a signature by `key`, as it reads back from the store."""
    # What is read back knows which fields were written, and only those are signed: a field that a
    # later version adds, with its default, leaves the signatures of older releases valid.
    written = Release.model_validate_json(release.model_copy(update={"signature": None}).to_bytes())
    value = key.sign(_signed_bytes(written))
    signature = Signature(
        key_id=key_id(key.public),
        public_key=base64.b64encode(key.public).decode(),
        value=base64.b64encode(value).decode(),
    )
    return written.model_copy(update={"signature": signature})


def verify_release(release: Release, trusted: Mapping[str, bytes]) -> None:
    """Check that a trusted key signed `release`, as read from the store, and nobody changed it.

    Args:
        release: as parsed from its JSON.
        trusted: public keys by key id, as `trusted_keys` returns them.

    Raises:
        BadInput: it is not signed, by an unknown key, or was changed after it was signed.
    """
    signature = release.signature
    if signature is None:
        raise BadInput(
            f"Release {release.release_id} is not signed.",
            hint="Only releases that `trainyard publish` made can be served.",
        )
    public = trusted.get(signature.key_id)
    if public is None:
        known = ", ".join(sorted(trusted)) or "none"
        raise BadInput(
            f"Release {release.release_id} is signed by the key {signature.key_id}, which is not "
            f"trusted here (trusted: {known}).",
            hint="If that key is yours, put its public key into a file in keys/trusted below "
            "TRAINYARD_HOME, named <anything>.pub.",
        )
    what = f"The signature of release {release.release_id}"
    if _decode(signature.public_key, what, "public key") != public:
        raise BadInput(
            f"{what} names the key {signature.key_id} and holds another one.",
            hint="Somebody tampered with the release; publish it again from its plan.",
        )
    value = _decode(signature.value, what, "signature", length=64)
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(value, _signed_bytes(release))
    except InvalidSignature as error:
        raise BadInput(
            f"Release {release.release_id} does not match its signature: it was changed after it "
            "was signed.",
            hint="Do not serve it; find out who can write to the store.",
        ) from error


def _signed_bytes(release: Release) -> bytes:
    return canonical_json(
        release.model_dump(mode="json", by_alias=True, exclude={"signature"}, exclude_unset=True)
    )


def _key_file(settings: Settings) -> Path:
    return settings.home / "keys" / "release-signing.key"


def _trusted_folder(settings: Settings) -> Path:
    return settings.home / "keys" / "trusted"


def _make_key_file(path: Path) -> None:
    """Make a key at `path` unless somebody else was first; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    seed = base64.b64encode(Ed25519PrivateKey.generate().private_bytes_raw()) + b"\n"
    _place(path, seed, 0o600)


def _publish_public_key(path: Path, public: bytes) -> None:
    """Put the public key beside the private one, for people to copy to where it is needed."""
    if not path.exists():
        text = f"{base64.b64encode(public).decode()}  # {key_id(public)}\n"
        _place(path, text.encode(), 0o644)


def _place(path: Path, data: bytes, mode: int) -> None:
    """Write a new file that is never seen half-written; one that exists already stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # Another process may have been first: then both use its file.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise BadInput(
            f"The key file {path} cannot be read: {error.strerror}.",
            hint="Give this user the right to read it.",
        ) from error


def _from_settings(settings: Settings) -> SigningKey:
    return _from_text(settings.signing_key.get_secret_value(), "TRAINYARD_SIGNING_KEY")


def _from_file(path: Path) -> SigningKey:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise BadInput(
            f"Other users can read the signing key {path} (mode {mode:o}).",
            hint=f"Run `chmod 600 {path}`, and make a new key if somebody else may have read it.",
        )
    return _from_text(_read(path), str(path))


def _from_text(text: str, where: str) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(_decode(text, where, "signing key")))


def _decode(text: str, where: str, what: str, *, length: int = _KEY_BYTES) -> bytes:
    """Return the bytes of a key or signature; the message never holds the text itself."""
    try:
        raw = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != length:
        raise BadInput(
            f"{where} holds no valid {what}.",
            hint=f"It must be the base64 of {length} bytes.",
        )
    return raw
