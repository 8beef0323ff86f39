"""Reads of objects at half of what they cost boto3: for thousands of small files.

A read is signed and sent by the same parts of botocore as always (its signer, its credentials, its
connections with their proxies, certificates and timeouts), but without what botocore does around
them for every operation of every service. Whatever is not a plain success is left to boto3's own
call, with its retries, its redirects and its errors; a store that wants it differently is asked
that way from then on. So is everything should a newer botocore have other parts inside.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any
from urllib.parse import quote

log = logging.getLogger(__name__)

_FAILURES = 3
"""Failures in a row after which quick reads are given up."""


@dataclass(frozen=True)
class QuickAnswer:
    """The beginning of an answer; its body is still to come."""

    version: str
    """The ETag."""
    body: Any
    """A stream; closing it gives its connection back."""


class _Body:
    """A body that goes from the connection straight into the caller's memory.

    urllib3 itself would read it into memory of its own first, and copy it.
    """

    def __init__(self, response: Any, source: HTTPResponse, size: int) -> None:
        self._response = response
        self._source = source
        self._left = size

    @classmethod
    def of(cls, response: Any) -> Any:
        """Return the body of urllib3's response; the response itself if it is of another kind."""
        source = getattr(response, "_fp", None)
        if not isinstance(source, HTTPResponse) or source.chunked or source.length is None:
            return response
        return cls(response, source, source.length)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes. Raises OSError if they end too early."""
        if not self._left:
            return 0
        count = self._source.readinto(memoryview(buffer)[: self._left])
        if not count:
            raise ConnectionResetError(f"{self._left} bytes are missing of an answer")
        self._left -= count
        return count

    def close(self) -> None:
        """Give the connection back if it can be used again; else end it."""
        if self._left:
            self._response.close()
        else:
            self._response.release_conn()


class QuickReader:
    """Reads objects of one bucket with the client's own means; safe for several threads."""

    def __init__(self, client: Any, bucket: str) -> None:
        """Watch where boto3 sends its own reads; nothing is asked of the store yet."""
        self._client = client
        self._base = ""
        """What comes before a name in a URL; empty until boto3 has read something."""
        self._seen = threading.local()
        """Of each thread: where boto3 read last, and what a quick read was refused."""
        self._said = False
        client.meta.events.register("before-send.s3.GetObject", self._watch)
        # Directory buckets want sessions, which are botocore's matter.
        self._failures = _FAILURES if bucket.endswith("--x-s3") else 0

    def get(self, name: str, headers: dict[str, str]) -> QuickAnswer | None:
        """Ask for an object; None if boto3 should do it.

        Args:
            name: the object's name in the bucket.
            headers: such as `Range` and `If-Match`.
        """
        self._seen.refused = ""
        if not self._base or self._failures >= _FAILURES:
            return None
        try:
            answer = self._send(name, headers)
            if answer.status_code in {200, 206} and "ETag" in answer.headers:
                found = QuickAnswer(answer.headers["ETag"], _Body.of(answer.raw))
                self._failures = 0
                return found
            # What else it may be is known better there: missing, forbidden, elsewhere, too busy.
            if answer.status_code not in {500, 503}:
                self._seen.refused = name
            answer.raw.close()
        except Exception as error:
            # Much of what is used here is botocore's own affair, and may be another one tomorrow.
            self._failures += 1
            if not self._said:
                self._said = True
                log.info("A quick read of S3 failed, boto3 does it instead: %r", error)
        return None

    def _send(self, name: str, headers: dict[str, str]) -> Any:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest(
            "GET",
            self._base + _quoted(name),
            headers={**headers, "X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"},
            stream_output=True,
        )
        credentials = self._client._get_credentials().get_frozen_credentials()
        S3SigV4Auth(credentials, "s3", self._client.meta.region_name).add_auth(request)
        return self._client._endpoint.http_session.send(request.prepare())

    def learn(self, name: str) -> None:
        """After a read of an object by boto3, in the same thread: take note of where it is.

        If a quick read of it was refused just before, that was the quick way's fault.
        """
        self._failures += getattr(self._seen, "refused", "") == name
        self._seen.refused = ""
        url = getattr(self._seen, "url", "").partition("?")[0]
        if not self._base and url.endswith("/" + _quoted(name)):
            self._base = url.removesuffix(_quoted(name))

    def _watch(self, request: Any, **_: object) -> None:
        self._seen.url = request.url


def _quoted(name: str) -> str:
    return quote(name, safe="/~")
