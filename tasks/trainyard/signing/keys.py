"""The key that signs here: an Ed25519 key of this installation, or a key in AWS KMS.

A local key is `TRAINYARD_SIGNING_KEY`, else the file `keys/release-signing.key` below the home,
made at first use. With `TRAINYARD_SIGNING_KMS_KEY` the private key never leaves AWS KMS; its public
key is fetched once and kept among the trusted keys.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from trainyard.errors import BadInput
from trainyard.settings import Settings
from trainyard.signing.kms import fetch_public_key, kms_signer
from trainyard.signing.trust import (
    PublicKey,
    TrustedKey,
    TrustedKeys,
    change_trusted,
    public_key_of,
    read_trusted,
    replace_file,
    written_beside,
)

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

_KEY_BYTES = 32
_OWN = "this installation"


@dataclass(frozen=True)
class SigningKey:
    """A key that signs releases; nothing private appears in `repr` or a document."""

    public: PublicKey
    signer: Signer = field(repr=False)


def signing_key(settings: Settings) -> SigningKey:
    """Return the key that signs here; a key file is made if there is no key yet.

    Two processes that need the first key at the same moment get the same one.

    Raises:
        BadInput: the key is not the base64 of 32 bytes, others could read its file, it was revoked
            or replaced, or AWS KMS has no such key or does not let us use it.
        Transient: AWS KMS cannot be reached.
    """
    key = _kms_key(settings) if settings.signing_kms_key else _local_key(settings)
    _demand_usable(key.public, read_trusted(settings.trusted_keys_file))
    return key


def trusted_keys(settings: Settings) -> TrustedKeys:
    """Return the trusted keys: the listed ones, and this installation's own local key.

    Makes no key: an installation that never signed trusts the listed keys only.

    Raises:
        BadInput, CorruptFile: a key cannot be read.
    """
    listed = read_trusted(settings.trusted_keys_file)
    own = _own_public_key(settings)
    if own is None or listed.get(own.key_id):
        return listed
    return listed.with_key(_trusted(own, _OWN))


def new_local_key(settings: Settings) -> tuple[PublicKey, PublicKey | None]:
    """Replace the key file by a new key and return its public key and the old one's.

    What the old key signed stays valid; it signs no more. Whoever verifies elsewhere needs the new
    public key: see `keys/release-signing.pub`.

    Raises:
        BadInput: the key that signs here is not in that file.
    """
    if settings.signing_kms_key or settings.signing_key.get_secret_value():
        name = "KMS_KEY" if settings.signing_kms_key else "KEY"
        raise BadInput(
            f"The key that signs here is given by TRAINYARD_SIGNING_{name}, not by a file.",
            hint="Add the new public key with `trainyard keys add`, then change that variable.",
        )
    path = _key_file(settings)
    old = _from_file(path).public if path.exists() else None
    private = Ed25519PrivateKey.generate()
    new = _signing_key(private).public
    if old is not None:
        # Listed before it is replaced, so that at no moment what it signed is refused.
        change_trusted(settings, lambda keys: _keep(keys, old, "replaced key"))
    change_trusted(settings, lambda keys: _keep(keys, new, _OWN))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_file(path, _seed_text(private), 0o600)
    replace_file(path.with_suffix(".pub"), new.public_key.encode(), 0o644)
    if old is not None:
        retire(settings, old.key_id)
    return new, old


def add_key(
    settings: Settings,
    public: PublicKey,
    *,
    comment: str = "",
    default_comment: str = "",
    kms_key: str = "",
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> TrustedKey:
    """Trust a public key and return its entry; of one that is listed only what is given changes.

    Args:
        settings: hold where the trusted keys are.
        public: the key.
        comment: whose it is.
        default_comment: the comment of a key that was not listed, if none is given.
        kms_key: what signs with it in AWS KMS.
        not_before: what is dated earlier is refused.
        not_after: what is dated later is refused.

    Raises:
        BadInput: it was revoked, it was retired and no new end is given, or the dates make no
            sense.
    """
    given = {
        "comment": comment,
        "kms_key": kms_key,
        "not_before": not_before,
        "not_after": not_after,
    }
    changes = {name: value for name, value in given.items() if value}

    def add(keys: TrustedKeys) -> TrustedKeys:
        known = keys.get(public.key_id)
        if known is not None:
            _demand_not_ended(known, not_after)
        entry = (known or _trusted(public, default_comment)).model_copy(update=changes)
        if entry.not_before and entry.not_after and entry.not_before >= entry.not_after:
            raise BadInput("The key would end before it begins.", hint="Exchange the two dates.")
        return keys.with_key(entry, last=bool(kms_key))

    return change_trusted(settings, add).find(public.key_id)


def _demand_not_ended(known: TrustedKey, not_after: datetime | None) -> None:
    """Refuse to trust again what was ended, unless a retired key is given another end."""
    if known.revoked_at:
        raise BadInput(
            f"The key {known.short_id} was revoked.",
            hint="A revoked key never comes back: make a new one.",
        )
    if known.state == "retired" and not_after is None:
        raise BadInput(
            f"The key {known.short_id} was retired: it ended on {known.not_after:%Y-%m-%d}.",
            hint="Make a new one, or give this one another end with --not-after.",
        )


def add_kms_key(
    settings: Settings,
    kms_key: str,
    *,
    comment: str = "",
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> TrustedKey:
    """Fetch the public key of a key in AWS KMS and trust it.

    From now on it is the one that signs by that name. Raises as `signing_key` and `add_key`.
    """
    return add_key(
        settings,
        fetch_public_key(kms_key),
        comment=comment,
        default_comment=f"AWS KMS {kms_key}",
        kms_key=kms_key,
        not_before=not_before,
        not_after=not_after,
    )


def revoke(settings: Settings, text: str, reason: str) -> TrustedKey:
    """Refuse from now on whatever a key ever signed; return its entry. Raises NotFound."""
    # The own key is trusted without being listed.
    key = trusted_keys(settings).find(text)
    revoked = key.model_copy(
        update={"revoked_at": key.revoked_at or datetime.now(UTC), "reason": reason or key.reason}
    )
    change_trusted(settings, lambda keys: keys.with_key(revoked))
    return revoked


def retire(settings: Settings, text: str) -> TrustedKey:
    """Refuse what a key signs from now on; what it signed stays valid. Raises NotFound."""
    key = trusted_keys(settings).find(text)
    retired = key.model_copy(update={"not_after": key.not_after or datetime.now(UTC)})
    change_trusted(settings, lambda keys: keys.with_key(retired))
    return retired


def _demand_usable(public: PublicKey, trusted: TrustedKeys) -> None:
    """Refuse to sign with a key that verifies nowhere."""
    entry = trusted.get(public.key_id)
    if entry is not None and entry.state != "valid":
        raise BadInput(
            f"The key {entry.short_id} that signs here is {entry.state}.",
            hint="Make a new one (`trainyard keys new`), or name another one by "
            "TRAINYARD_SIGNING_KEY or TRAINYARD_SIGNING_KMS_KEY.",
        )


def _kms_key(settings: Settings) -> SigningKey:
    name = settings.signing_kms_key
    if settings.signing_key.get_secret_value():
        raise BadInput(
            "Both TRAINYARD_SIGNING_KEY and TRAINYARD_SIGNING_KMS_KEY are set.",
            hint="Unset one of them.",
        )
    trusted = read_trusted(settings.trusted_keys_file)
    named = [key for key in trusted.keys if key.kms_key == name]
    public = named[-1] if named else _fetched(settings, name, trusted)
    return SigningKey(public, kms_signer(name, public))


def _fetched(settings: Settings, name: str, trusted: TrustedKeys) -> PublicKey:
    """Return the public key of a key in AWS KMS; one that was unknown is trusted from now on."""
    public = fetch_public_key(name)
    if known := trusted.get(public.key_id):
        # What people said of it, such as its end, stays as it is.
        return known
    return add_key(settings, public, default_comment=f"AWS KMS {name}", kms_key=name)


def _local_key(settings: Settings) -> SigningKey:
    if settings.signing_key.get_secret_value():
        return _from_settings(settings)
    path = _key_file(settings)
    if not path.exists():
        _make_key_file(path)
    key = _from_file(path)
    # For people to copy to where it is needed.
    _place(path.with_suffix(".pub"), key.public.public_key.encode(), 0o644)
    return key


def _own_public_key(settings: Settings) -> PublicKey | None:
    if settings.signing_key.get_secret_value():
        return _from_settings(settings).public
    if _key_file(settings).exists():
        return _from_file(_key_file(settings)).public
    return None


def _trusted(public: PublicKey, comment: str) -> TrustedKey:
    return TrustedKey(**PublicKey.model_dump(public), comment=comment)


def _keep(keys: TrustedKeys, public: PublicKey, comment: str) -> TrustedKeys:
    return keys if keys.get(public.key_id) else keys.with_key(_trusted(public, comment))


def _key_file(settings: Settings) -> Path:
    return settings.home / "keys" / "release-signing.key"


def _seed_text(private: Ed25519PrivateKey) -> bytes:
    return base64.b64encode(private.private_bytes_raw()) + b"\n"


def _make_key_file(path: Path) -> None:
    """Make a key at `path` unless somebody else was first; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _place(path, _seed_text(Ed25519PrivateKey.generate()), 0o600)


def _place(path: Path, data: bytes, mode: int) -> None:
    """Write a new file that is never seen half-written; one that exists already stays."""
    if path.exists():
        return
    # Another process may be first meanwhile: then both use its file.
    with written_beside(path, data, mode) as temporary, contextlib.suppress(FileExistsError):
        os.link(temporary, path)


def _from_settings(settings: Settings) -> SigningKey:
    return _from_text(settings.signing_key.get_secret_value(), "TRAINYARD_SIGNING_KEY")


def _from_file(path: Path) -> SigningKey:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise BadInput(
            f"Other users can read the signing key {path} (mode {mode:o}).",
            hint=f"Run `chmod 600 {path}`, and make a new key (`trainyard keys new`) if somebody "
            "else may have read it.",
        )
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise BadInput(
            f"The key file {path} cannot be read: {error.strerror}.",
            hint="Give this user the right to read it.",
        ) from error
    return _from_text(text, str(path))


def _from_text(text: str, where: str) -> SigningKey:
    """Return the key of a base64 seed; the message never holds the text itself."""
    try:
        raw = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != _KEY_BYTES:
        raise BadInput(
            f"{where} holds no valid signing key.",
            hint=f"It must be the base64 of {_KEY_BYTES} bytes.",
        )
    return _signing_key(Ed25519PrivateKey.from_private_bytes(raw))


def _signing_key(private: Ed25519PrivateKey) -> SigningKey:
    from securesystemslib.signer import CryptoSigner

    pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return SigningKey(public_key_of(pem.decode(), "the key"), CryptoSigner(private))
