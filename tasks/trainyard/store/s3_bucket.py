"""One bucket, spoken to by keys of the store: requests, conditions, what is there.

Methods raise boto3's own errors unless they say otherwise; callers turn them into ours with
`trainyard.store.s3_errors.explained`, where they know what was tried.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from trainyard.settings import Settings
from trainyard.store.parts import Bytes
from trainyard.store.s3_checksums import Checksums
from trainyard.store.s3_client import AwsCredentials, S3Place, make_client
from trainyard.store.s3_errors import (
    code_of,
    is_missing,
    is_precondition,
    is_race,
    retries_of,
    status_of,
)
from trainyard.store.s3_quick_get import QuickReader

ResultT = TypeVar("ResultT")

WRITE_TOKEN = "trainyard-write"
"""Metadata that names one attempt to write a document, so that its writer knows it again."""

CONTENT_SHA256 = "trainyard-sha256"
"""Metadata with the sha256 of a file, where it was known before the file was sent."""

KEY_BYTES = 1024
"""Bytes that S3 allows for the name of an object."""

_RACES = 8
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True)
class Head:
    """What S3 tells about a key without its content."""

    size: int
    version: str
    """ETag."""
    metadata: Mapping[str, str]
    checksum: str
    """S3's checksum of the whole, in the algorithm of ours; empty if it keeps none."""


class ConditionFailed(Exception):
    """S3 refused a write because of its condition."""

    def __init__(self, *, gone: bool, retried: bool, raced: bool) -> None:
        super().__init__()
        self.gone = gone
        """Is there no such key?"""
        self.retried = retried
        """Was any request sent twice, so that the one without an answer may have been done?"""
        self.raced = raced
        """Did others keep coming in between, so that S3 never decided?"""


def pauses(tries: int) -> Iterator[float]:
    """Yield growing, random pauses in seconds, one less than `tries`."""
    for number in range(tries - 1):
        yield random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**number))


class Bucket:
    """The bucket behind a store, with the folder that the store is in."""

    def __init__(self, settings: Settings, credentials: AwsCredentials | None = None) -> None:
        """Connect at the first request."""
        self.place = S3Place.parse(settings.store)
        self.settings = settings
        self.checksums = Checksums(settings.s3_checksum)
        self._credentials = credentials
        self._client: Any = None
        self._quick: QuickReader | None = None
        self._mutex = threading.Lock()

    @property
    def quick(self) -> QuickReader:
        """What reads ranges of objects with less ado. Raises BadInput."""
        client = self.client
        with self._mutex:
            if self._quick is None:
                self._quick = QuickReader(client, self.place.bucket)
        return self._quick

    @property
    def client(self) -> Any:
        """The S3 client; made at first use. Raises BadInput."""
        with self._mutex:
            if self._client is None:
                self._client = make_client(self.settings, self._credentials)
        return self._client

    def name(self, key: str) -> str:
        """Return the key in the bucket of a key of the store."""
        return f"{self.place.prefix}/{key}" if self.place.prefix else key

    def url_of(self, key: str) -> str:
        """Return the whole URL of a key, for people."""
        return f"{self.place.url}/{key}" if key else self.place.url

    @property
    def owner(self) -> dict[str, str]:
        """The part of every request that names the account it expects."""
        owner = self.settings.s3_expected_bucket_owner
        return {"ExpectedBucketOwner": owner} if owner else {}

    @property
    def encryption(self) -> dict[str, Any]:
        """The part of a new object's request that says how it is encrypted."""
        if not self.settings.s3_kms_key_id:
            return {}
        return {
            "ServerSideEncryption": "aws:kms",
            "SSEKMSKeyId": self.settings.s3_kms_key_id,
            "BucketKeyEnabled": self.settings.s3_bucket_key,
        }

    def call(self, operation: str, key: str, **parameters: Any) -> dict[str, Any]:
        """Do one request about one key."""
        answer: dict[str, Any] = getattr(self.client, operation)(
            Bucket=self.place.bucket, Key=self.name(key), **self.owner, **parameters
        )
        return answer

    def put(
        self,
        key: str,
        data: Bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        **condition: str,
    ) -> str:
        """Write a whole object in one request and return its ETag."""
        answer = self.call(
            "put_object",
            key,
            Body=data,
            Metadata=dict(metadata or {}),
            **{self.checksums.field: self.checksums.of(data).text},
            **self.encryption,
            **condition,
        )
        return str(answer["ETag"])

    def put_if(
        self, key: str, data: Bytes, *, metadata: Mapping[str, str] | None = None, **condition: str
    ) -> str:
        """Write on a condition (IfNoneMatch, IfMatch) and return the ETag.

        An answer may be lost on the way: botocore then tries the write again, and it meets itself.
        So every write carries a token, and a condition that failed after a retry is no failure if
        what is there has it.

        Raises:
            ConditionFailed: the condition does not hold.
        """
        token = secrets.token_hex(16)
        carried = {**(metadata or {}), WRITE_TOKEN: token}
        try:
            return _decided(lambda: self.put(key, data, metadata=carried, **condition))
        except ConditionFailed as failed:
            found = self.head(key) if failed.retried else None
            if found is not None and found.metadata.get(WRITE_TOKEN) == token:
                return found.version
            raise

    def delete_if(self, key: str, version: str) -> None:
        """Delete a key if its ETag is `version`.

        Raises:
            ConditionFailed: it is another, or the key is gone.
        """
        try:
            _decided(lambda: self.call("delete_object", key, IfMatch=version))
        except ConditionFailed as failed:
            # Gone after a try whose answer was lost: by our own hand.
            if not (failed.gone and failed.retried):
                raise

    def look(self, key: str) -> dict[str, Any]:
        """Do a HEAD request; where its refusal has no reason, ask for a byte to hear it."""
        from botocore.exceptions import ClientError

        try:
            return self.call("head_object", key, ChecksumMode="ENABLED")
        except ClientError as error:
            # An answer to HEAD has no body: credentials that ran out are a bare 400 there.
            if status_of(error) != 400:
                raise
            self._say_why(key)
            raise

    def _say_why(self, key: str) -> None:
        """Raise what S3 says to a GET; return if that is nothing against the key."""
        from botocore.exceptions import ClientError

        try:
            self.call("get_object", key, Range="bytes=0-0")["Body"].close()
        except ClientError as error:
            if code_of(error) != "InvalidRange":
                raise

    def head(self, key: str) -> Head | None:
        """Look at a key; None if it does not exist."""
        from botocore.exceptions import ClientError

        try:
            answer = self.look(key)
        except ClientError as error:
            if is_missing(error):
                return None
            raise
        return Head(
            size=int(answer["ContentLength"]),
            version=str(answer["ETag"]),
            metadata=answer.get("Metadata", {}),
            checksum=str(answer.get(self.checksums.field, "")),
        )


def _decided(write: Callable[[], ResultT]) -> ResultT:
    """Do a conditional write until S3 decides it: a race with another write decides nothing.

    Raises:
        ConditionFailed: the condition does not hold, or others kept coming in between.
    """
    from botocore.exceptions import ClientError

    retried = False
    for pause in (*pauses(_RACES), None):
        try:
            return write()
        except ClientError as error:
            # Also a try before a race may have been done: its repetition met itself.
            retried = retried or retries_of(error) > 0
            if is_race(error) and pause is not None:
                time.sleep(pause)
            elif is_race(error) or is_precondition(error) or is_missing(error):
                raise ConditionFailed(
                    gone=is_missing(error), retried=retried, raced=is_race(error)
                ) from error
            else:
                raise
    raise AssertionError("the last try returns or raises")
