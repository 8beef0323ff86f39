"""What S3 says, as errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainyard.errors import BadInput, Conflict, NotFound, StorageFull, TrainyardError, Transient

_MISSING = {"NoSuchKey", "404", "NotFound", "NoSuchUpload"}
_FORBIDDEN = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"}
_UNKNOWN_CALLER = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "InvalidSecurity",
    "NotSignedUp",
}
_ELSEWHERE = {
    "301",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_FOR_NOW = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_FULL = {"507", "XMinioStorageFull", "QuotaExceeded"}

PERMISSIONS_HINT = (
    "Give the role or user the S3 actions that docs/store.md lists (and those of the KMS key), and "
    "check TRAINYARD_S3_EXPECTED_BUCKET_OWNER."
)


def code_of(error: Exception) -> str:
    """Return S3's own code of an error (`PreconditionFailed`); empty if it came from elsewhere."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error; 0 if there was no answer."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def retries_of(error: Exception) -> int:
    """Return how often botocore had tried again before it got this answer."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def is_missing(error: Exception) -> bool:
    """Does the key (not the bucket) not exist?"""
    return code_of(error) in _MISSING


def is_precondition(error: Exception) -> bool:
    """Did the condition of a write not hold?"""
    return code_of(error) == "PreconditionFailed" or status_of(error) == 412


def is_race(error: Exception) -> bool:
    """Did another write of the same key come in between, so that S3 decided nothing?"""
    return code_of(error) in {"ConditionalRequestConflict", "OperationAborted"}


@contextmanager
def explained(action: str, place: str) -> Iterator[None]:
    """Turn errors of boto3 inside the block into ours.

    Args:
        action: what was tried, as in `read`.
        place: the URL of the key or store.
    """
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (BotoCoreError, ClientError, HTTPClientError, HTTPError) as error:
        raise s3_error(error, action, place) from error


def s3_error(error: Exception, action: str, place: str) -> TrainyardError:
    """Return the error of ours that says what `error` means; see `explained`."""
    if code_of(error) or status_of(error):
        return _answer(error, action, place)
    return _no_answer(error, action, place)


def _answer(error: Exception, action: str, place: str) -> TrainyardError:
    """Explain what S3 answered."""
    code, status = code_of(error), status_of(error)
    response: dict[str, Any] = getattr(error, "response", None) or {}
    said = str(response.get("Error", {}).get("Message", "")).strip().rstrip(".")
    text = f"Cannot {action} {place}: S3 says {code or status}{f' ({said})' if said else ''}."
    if code in _FULL:
        return StorageFull(text, hint="Make room in that store or lift its quota, then try again.")
    if code == "NoSuchBucket":
        return BadInput(text, hint="Correct TRAINYARD_STORE, or make the bucket.")
    if is_missing(error):
        return NotFound(f"{place} does not exist.", hint="Check the name and the store.")
    if is_precondition(error):
        return Conflict(f"{place} was changed by somebody else.", hint="Read it again.")
    if code in {"ExpiredToken", "ExpiredTokenException"}:
        return Transient(
            text, hint="The credentials ran out on the way; the next try gets new ones."
        )
    if code in _FOR_NOW or status == 429 or status >= 500:
        return Transient(text, hint="The store is busy or ill; what was stored is kept, try again.")
    return BadInput(text, hint=_hint(code, status))


def _hint(code: str, status: int) -> str:
    if code in _FORBIDDEN or (status == 403 and code not in _UNKNOWN_CALLER):
        if code == "RequestTimeTooSkewed":
            return "Set the clock of this machine."
        return PERMISSIONS_HINT
    if code in _UNKNOWN_CALLER:
        return "Check the credentials (TRAINYARD_S3_PROFILE, AWS_*, or the Airflow connection)."
    if code in _ELSEWHERE or status in {301, 307}:
        return "The bucket is in another region: set TRAINYARD_S3_REGION."
    if code.startswith("KMS"):
        return "Check TRAINYARD_S3_KMS_KEY_ID and the rights on that key."
    return "Look up that code in the documentation of the store; its settings are in docs/store.md."


def _no_answer(error: Exception, action: str, place: str) -> TrainyardError:
    """Explain why there was no (whole) answer."""
    from botocore import exceptions

    text = f"Cannot {action} {place}: {str(error).strip().rstrip('.')}."
    if isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.ProfileNotFound
        | exceptions.TokenRetrievalError,
    ):
        return BadInput(
            text,
            hint="Give credentials: TRAINYARD_AWS_CONNECTION, TRAINYARD_S3_PROFILE, AWS_* "
            "variables, or a role of the pod or instance.",
        )
    if isinstance(error, exceptions.CredentialRetrievalError):
        return Transient(
            text,
            hint="Whoever hands out credentials is busy or ill; what was stored is kept, "
            "try again.",
        )
    if isinstance(error, exceptions.SSLError):
        return BadInput(text, hint="Check the certificates, or the scheme of the endpoint.")
    if isinstance(
        error,
        exceptions.NoRegionError
        | exceptions.ParamValidationError
        | exceptions.InvalidRegionError
        | exceptions.EndpointProviderError
        | exceptions.InvalidConfigError,
    ):
        return BadInput(text, hint="Correct the TRAINYARD_S3_* settings; see docs/store.md.")
    return Transient(text, hint="Check the network and the endpoint, then try again.")
