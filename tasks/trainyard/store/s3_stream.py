"""Reads an object of S3 as a stream that survives cut connections."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from trainyard.store.s3_bucket import Bucket, pauses
from trainyard.store.s3_errors import code_of, explained

_BUFFER_BYTES = 1 << 16
"""Small: a read of more goes straight into the caller's memory."""


def open_object(
    bucket: Bucket, key: str, start: int = 0, size: int | None = None, *, version: str = ""
) -> BinaryIO:
    """Open `size` bytes of a key from `start` (None: all to its end); fewer if there are no more.

    Raises:
        NotFound: there is no such key.
        Conflict: it is not `version` (empty: any will do).
        Transient, BadInput: the store cannot be read.
    """
    if size == 0:
        with explained("read", bucket.url_of(key)):
            bucket.look(key)
        return io.BytesIO()
    return cast(
        BinaryIO, io.BufferedReader(_ObjectStream(bucket, key, start, size, version), _BUFFER_BYTES)
    )


class _ObjectStream(io.RawIOBase):
    """The bytes of one object, and of no other that takes its place meanwhile.

    When the connection is cut or silent, the rest is asked for again, on the condition that the
    object is still the same; so often as the settings allow without a byte in between.
    """

    def __init__(
        self, bucket: Bucket, key: str, start: int, size: int | None, version: str
    ) -> None:
        super().__init__()
        self._bucket = bucket
        self._key = key
        self._at = start
        self._end = None if size is None else start + size
        self._version = version
        self._body: Any = None
        self._waits = self._new_waits()
        with explained("read", bucket.url_of(key)):
            self._connect()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        with explained("read", self._bucket.url_of(self._key)):
            while self._body is not None:
                with self._retried():
                    count = int(self._body.readinto(buffer))
                    self._at += count
                    self._waits = self._new_waits()
                    return count
        return 0

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
        super().close()

    def _new_waits(self) -> Iterator[float]:
        return pauses(self._bucket.settings.s3_attempts)

    @contextmanager
    def _retried(self) -> Iterator[None]:
        """Connect again if the block fails because of the connection; raise if nothing helps."""
        from botocore.exceptions import BotoCoreError, HTTPClientError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except (BotoCoreError, HTTPClientError, HTTPError, OSError) as error:
            pause = next(self._waits, None)
            if pause is None:
                raise
            with suppress(OSError):
                self._body.close()
            time.sleep(pause)
            self._connect(error)

    def _connect(self, after: Exception | None = None) -> None:
        from botocore.exceptions import ClientError

        parameters: dict[str, str] = {}
        if self._at or self._end is not None:
            end = "" if self._end is None else str(self._end - 1)
            parameters["Range"] = f"bytes={self._at}-{end}"
        if self._version:
            parameters["IfMatch"] = self._version
        if self._end is not None and after is None and self._connect_quickly(parameters):
            return
        try:
            answer = self._bucket.call("get_object", self._key, **parameters)
        except ClientError as error:
            if code_of(error) != "InvalidRange":
                raise error from after
            # It ends before that offset.
            self._body = None
            return
        self._version = str(answer["ETag"])
        self._body = answer["Body"]
        self._bucket.quick.learn(self._bucket.name(self._key))

    def _connect_quickly(self, parameters: dict[str, str]) -> bool:
        """Connect with less ado, if that is possible: a part is one of thousands."""
        headers = {"Range": parameters["Range"]}
        if self._version:
            headers["If-Match"] = self._version
        if owner := self._bucket.settings.s3_expected_bucket_owner:
            headers["X-Amz-Expected-Bucket-Owner"] = owner
        answer = self._bucket.quick.get(self._bucket.name(self._key), headers)
        if answer is None:
            return False
        self._version, self._body = answer.version, answer.body
        return True
