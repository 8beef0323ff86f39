"""Keys in AWS KMS: what they sign, and their public keys, through securesystemslib's AWSSigner.

Region, endpoint and credentials come from the usual chain of boto3 (environment, profile, IRSA).
The role that publishes needs `kms:Sign`, and `kms:GetPublicKey` once; to verify needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainyard.errors import BadInput, Transient
from trainyard.signing.trust import PublicKey, public_key_of

if TYPE_CHECKING:
    from securesystemslib.signer import Signature, Signer, SSlibKey

_RIGHTS = "Give this role kms:Sign and kms:GetPublicKey on that key, in the key's policy or by IAM."
_REFUSED = {
    "AccessDeniedException": _RIGHTS,
    "NotFoundException": "Name a key id, a key ARN, `alias/…` or an alias ARN of this account and "
    "region (AWS_DEFAULT_REGION).",
    "InvalidKeyUsageException": "The key must be asymmetric, with the usage SIGN_VERIFY.",
    "UnsupportedOperationException": "The key must be asymmetric, with the usage SIGN_VERIFY.",
    "DisabledException": "Enable the key, or name another one.",
    "KMSInvalidStateException": "Look at the state of the key: it may be about to be deleted.",
    "UnrecognizedClientException": "The credentials are not valid here; renew them.",
    "ExpiredTokenException": "The credentials have expired; renew them.",
    "InvalidClientTokenId": "The credentials are not valid here; renew them.",
}


def fetch_public_key(kms_key: str) -> PublicKey:
    """Return the public key of a key in AWS KMS.

    Args:
        kms_key: key id, key ARN, alias or alias ARN; asymmetric, ECDSA (P-256, P-384) or RSA.

    Raises:
        BadInput: there is no such key, it cannot sign, or we may not use it.
        Transient: AWS KMS cannot be reached.
    """
    from securesystemslib.exceptions import UnsupportedAlgorithmError
    from securesystemslib.signer import AWSSigner

    with _explained(kms_key):
        try:
            _, key = AWSSigner.import_(kms_key)
            return public_key_of(key.keyval["public"], "It", scheme=key.scheme)
        except (UnsupportedAlgorithmError, KeyError, ValueError, BadInput) as error:
            raise BadInput(
                f"The AWS KMS key {kms_key} does not sign in a way that is known here.",
                hint="Make an asymmetric key for SIGN_VERIFY, best with ECC_NIST_P256.",
            ) from error


def kms_signer(kms_key: str, public: PublicKey) -> Signer:
    """Return what signs by a key in AWS KMS, whose public key is `public`. Raises BadInput."""
    from securesystemslib.signer import AWSSigner

    class KmsSigner(AWSSigner):
        """Says what went wrong in words of ours."""

        def sign(self, payload: bytes) -> Signature:
            with _explained(kms_key):
                return super().sign(payload)

    key: SSlibKey = public.sslib_key()
    with _explained(kms_key):
        return KmsSigner(kms_key, key)


@contextmanager
def _explained(kms_key: str) -> Iterator[None]:
    """Turn what boto3 raises inside the block into errors of ours."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        NoRegionError,
        PartialCredentialsError,
    )

    what = f"The AWS KMS key {kms_key} cannot be used"
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, NoRegionError) as error:
        raise BadInput(
            f"{what}: {error}.".replace("..", "."),
            hint="Give credentials and AWS_DEFAULT_REGION as for any AWS tool.",
        ) from error
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in _REFUSED:
            raise BadInput(f"{what}: {code}.", hint=_REFUSED[code]) from error
        raise Transient(f"{what} now: {code or error}.", hint="Try again.") from error
    except BotoCoreError as error:
        raise Transient(f"{what} now: {error}", hint="Is AWS KMS reachable from here?") from error
