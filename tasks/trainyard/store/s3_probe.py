"""Finds out whether a store keeps S3's promises about conditional writes.

Everything else rests on them: a store that ignores `If-None-Match` or `If-Match` (as older
S3-compatible ones do) would let two writers replace each other's documents without a word.

The probe writes, replaces and deletes a key of its own, with conditions that must hold and such
that must fail, and lets some writers create one key at the same moment. That shows a store that
does not know conditions, or looks first and writes then; it cannot prove that another has no such
gap, only S3's own word can.

A good answer is kept in the store, so that not every process has to probe. That is safe because it
counts only for the same endpoint, bucket and version of the probe, and only for a week: a copy of
the store elsewhere, or a server that was replaced, is probed again. Bad answers are never kept.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from trainyard.documents.base import Document
from trainyard.errors import BadInput, CorruptFile
from trainyard.store.documents import parse_document
from trainyard.store.s3_bucket import Bucket
from trainyard.store.s3_errors import (
    code_of,
    explained,
    is_missing,
    is_precondition,
    is_race,
    status_of,
)
from trainyard.store.s3_multipart import KeyTaken, MultipartUpload, UploadGone

RECORD_KEY = ".trainyard/conditional-writes.json"
"""Where the good answer is kept."""

PROBE_FOLDER = ".trainyard/probe"
"""What is in it is of no use once the probe is over."""

_VERSION = 2
_TRUSTED_FOR = timedelta(days=7)
_WRITERS = 8


class ProbeRecord(Document):
    """A store whose conditional writes held."""

    endpoint: str
    bucket: str
    version: int
    """Of the probe."""
    probed_at: datetime


def ensure_conditional_writes(bucket: Bucket) -> None:
    """Return if the conditional writes of the store hold.

    Raises:
        BadInput: they do not; the message names the probe that showed it. Or the store refuses us.
        Transient: the store cannot be reached.
    """
    with explained("probe", bucket.place.url):
        if _is_known_good(bucket):
            return
        failed = _probe(bucket)
    if failed:
        raise BadInput(
            f"{bucket.place.url} does not keep S3's promises about conditional writes: {failed}.",
            hint="Two writers could overwrite each other there. Use AWS S3, or a newer version of "
            "that S3-compatible store.",
        )
    record = ProbeRecord(
        endpoint=str(bucket.client.meta.endpoint_url),
        bucket=bucket.place.bucket,
        version=_VERSION,
        probed_at=datetime.now(UTC),
    )
    with explained("write", bucket.url_of(RECORD_KEY)):
        bucket.put(RECORD_KEY, record.to_bytes())


def _is_known_good(bucket: Bucket) -> bool:
    from botocore.exceptions import ClientError

    try:
        data = bucket.call("get_object", RECORD_KEY)["Body"].read()
        record = parse_document(data, RECORD_KEY, ProbeRecord)
    except CorruptFile:
        return False
    except ClientError as error:
        if is_missing(error):
            return False
        raise
    age = datetime.now(UTC) - record.probed_at
    same = (record.endpoint, record.bucket, record.version) == (
        str(bucket.client.meta.endpoint_url),
        bucket.place.bucket,
        _VERSION,
    )
    return same and timedelta(0) <= age < _TRUSTED_FOR


def _probe(bucket: Bucket) -> str:
    """Return what the store did wrong; empty if nothing."""
    key = f"{PROBE_FOLDER}/{secrets.token_hex(8)}"
    try:
        return _probe_or_unknown(bucket, key)
    finally:
        for each in (key, f"{key}-race"):
            with suppress(Exception):
                bucket.call("delete_object", each)


def _probe_or_unknown(bucket: Bucket, key: str) -> str:
    """Probe; a store that answers "not implemented" has said all."""
    from botocore.exceptions import ClientError

    try:
        return _sequence(bucket, key) or _race(bucket, f"{key}-race")
    except ClientError as error:
        if status_of(error) == 501 or code_of(error) == "NotImplemented":
            return f"it answers {code_of(error) or status_of(error)} to a conditional write"
        raise


def _sequence(bucket: Bucket, key: str) -> str:
    """Try each condition, one after the other."""
    first = bucket.put(key, b"one", IfNoneMatch="*")
    if not _refused(lambda: bucket.put(key, b"two", IfNoneMatch="*")):
        return "a PUT with If-None-Match: * replaced a key that existed"
    if not _refused(lambda: _complete(bucket, key)):
        return "completing a multipart upload with If-None-Match: * replaced a key that existed"
    second = bucket.put(key, b"three", IfMatch=first)
    if not _refused(lambda: bucket.put(key, b"four", IfMatch=first)):
        return "a PUT with the If-Match of an older version replaced the newer one"
    if not _refused(lambda: bucket.call("delete_object", key, IfMatch=first)):
        return "a DELETE with the If-Match of an older version removed the newer one"
    if bucket.call("get_object", key)["Body"].read() != b"three":
        return "a write that was refused changed the key all the same"
    bucket.call("delete_object", key, IfMatch=second)
    if not _refused(lambda: bucket.put(key, b"five", IfMatch=second)):
        return "a PUT with If-Match made a key that was deleted"
    return ""


def _race(bucket: Bucket, key: str) -> str:
    """Let several writers create the same key at once."""
    with ThreadPoolExecutor(_WRITERS) as pool:
        tries = [
            pool.submit(_refused, lambda n=n: bucket.put(key, b"%d" % n, IfNoneMatch="*"))  # type: ignore[misc]
            for n in range(_WRITERS)
        ]
        refused = [each.result() for each in tries]
    won = refused.count(False)
    if won > 1:
        return f"{won} of {_WRITERS} simultaneous PUTs with If-None-Match: * made the same key"
    return ""


def _complete(bucket: Bucket, key: str) -> None:
    """Try to create `key` by a multipart upload of one part, with the requests of every upload."""
    upload = MultipartUpload.new(bucket, key)
    try:
        sent, parts = upload.send_stream(b"part", io.BytesIO())
        upload.complete(sent, parts)
    except (KeyTaken, UploadGone) as ended:
        # What S3 said decides: one part that it does not take back is no condition that held.
        raise ended.__cause__ or ended from None
    finally:
        upload.abort()


def _refused(write: Callable[[], object]) -> bool:
    """Did the store refuse the write because of its condition?"""
    from botocore.exceptions import ClientError

    try:
        write()
    except ClientError as error:
        if is_precondition(error) or is_missing(error) or is_race(error):
            return True
        raise
    return False
