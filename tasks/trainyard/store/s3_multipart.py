"""Multipart uploads: parts moved at the same time, checked by S3, found again after a kill.

S3 keeps the parts of an upload that was cut until somebody ends it. The next attempt finds it by
the key, reads the source again for the hash (S3 does not show parts before the end), and sends only
those parts whose size or checksum differ. The end is conditional: it makes the key or fails, so a
file is whole or absent, and never replaced.

CRT (awscrt) moves no bytes here: its transfers can neither end on a condition nor be resumed, nor
hand out the bytes for our hash. It computes the checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from trainyard.store.parts import Bytes, Part, Ranges, in_order, parts_of
from trainyard.store.s3_bucket import Bucket
from trainyard.store.s3_checksums import PartSum
from trainyard.store.s3_errors import code_of, is_precondition, is_race
from trainyard.store.transfer import Content


@dataclass(frozen=True)
class Sent:
    """What is known of a file once all of it was sent or read."""

    content: Content
    checksum: str
    """S3's checksum of the whole, if it was cut as we cut it."""


@dataclass(frozen=True)
class _Chunk:
    """A part with its bytes."""

    number: int
    data: Bytes


@dataclass(frozen=True)
class _Moved:
    """A part that is in the store."""

    number: int
    data: Bytes
    etag: str
    checksum: PartSum


class UploadGone(Exception):
    """The upload was ended by somebody else, or S3 wants it to be made anew."""


class KeyTaken(Exception):
    """The key was made by somebody else meanwhile; carries what we would have stored."""

    def __init__(self, sent: Sent) -> None:
        super().__init__()
        self.sent = sent


class MultipartUpload:
    """One multipart upload of a key."""

    def __init__(self, bucket: Bucket, key: str, upload_id: str) -> None:
        """Go on with an upload that exists."""
        self._bucket = bucket
        self._key = key
        self._upload_id = upload_id
        self._there: Mapping[int, dict[str, Any]] = {}

    @classmethod
    def new(cls, bucket: Bucket, key: str) -> MultipartUpload:
        """Begin an upload.

        It says nothing of the file's sha256: whoever goes on with it could not see that, and might
        have other content.
        """
        answer = bucket.call(
            "create_multipart_upload",
            key,
            ChecksumAlgorithm=bucket.checksums.algorithm,
            ChecksumType=bucket.checksums.kind,
            **bucket.encryption,
        )
        return cls(bucket, key, str(answer["UploadId"]))

    @classmethod
    def find_or_new(cls, bucket: Bucket, key: str) -> MultipartUpload:
        """Find the newest upload of a key that was cut, with its parts, or begin one.

        Older ones are aborted: nobody would go on with them, and they cost storage.
        """
        uploads = (each for each in unfinished(bucket, key) if each["Key"] == bucket.name(key))
        found = sorted(uploads, key=lambda each: str(each.get("Initiated", "")))
        fitting = [number for number, each in enumerate(found) if _same_kind(bucket, each)]
        for older in found[: fitting[-1] if fitting else len(found)]:
            cls(bucket, key, str(older["UploadId"])).abort()
        if not fitting:
            return cls.new(bucket, key)
        upload = cls(bucket, key, str(found[fitting[-1]]["UploadId"]))
        upload._there = {int(part["PartNumber"]): part for part in upload.list_parts()}
        return upload

    def send_ranges(self, source: Ranges) -> tuple[Sent, list[dict[str, Any]]]:
        """Send all of `source` and return what was sent and the list of parts.

        Raises:
            UploadGone: somebody else ended this upload.
        """

        def move(part: Part) -> _Moved:
            return self._send(_Chunk(part.number, source.read(part.start, part.size)))

        parts = parts_of(source.size, self._bucket.settings.s3_part_bytes)
        moved = in_order(parts, move, size_of=lambda part: part.size)
        with closing(moved) as results:
            return _hashed(results, self._bucket)

    def send_stream(self, first: bytes, source: BinaryIO) -> tuple[Sent, list[dict[str, Any]]]:
        """Send `first` and the rest of a stream; as `send_ranges`."""
        moved = in_order(
            _chunks(first, source, self._bucket.settings.s3_part_bytes),
            self._send,
            size_of=lambda chunk: len(chunk.data),
        )
        with closing(moved) as results:
            return _hashed(results, self._bucket)

    def complete(self, sent: Sent, parts: list[dict[str, Any]]) -> str:
        """Make the key of the parts and return its ETag.

        Raises:
            KeyTaken: it exists.
            UploadGone: the upload does not, or S3 wants another.
        """
        from botocore.exceptions import ClientError

        bucket = self._bucket
        whole = {bucket.checksums.field: sent.checksum, "ChecksumType": bucket.checksums.kind}
        try:
            answer = bucket.call(
                "complete_multipart_upload",
                self._key,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
                **whole,
            )
        except ClientError as error:
            if is_precondition(error):
                raise KeyTaken(sent) from error
            if code_of(error) == "NoSuchUpload":
                # Perhaps ended by ourselves: the answer to an earlier try may have been lost.
                raise KeyTaken(sent) from error
            if is_race(error) or code_of(error) == "InvalidPart":
                raise UploadGone from error
            raise
        return str(answer["ETag"])

    def abort(self) -> None:
        """Give the parts up; one that cannot be aborted is the lifecycle rule's to remove."""
        with suppress(Exception):
            self._bucket.call("abort_multipart_upload", self._key, UploadId=self._upload_id)

    def _send(self, chunk: _Chunk) -> _Moved:
        from botocore.exceptions import ClientError

        bucket = self._bucket
        checksum = bucket.checksums.of(chunk.data)
        there = self._there.get(chunk.number)
        if there is not None and (there["Size"], there.get(bucket.checksums.field)) == (
            checksum.size,
            checksum.text,
        ):
            return _Moved(chunk.number, chunk.data, str(there["ETag"]), checksum)
        try:
            answer = bucket.call(
                "upload_part",
                self._key,
                UploadId=self._upload_id,
                PartNumber=chunk.number,
                Body=chunk.data,
                **{bucket.checksums.field: checksum.text},
            )
        except ClientError as error:
            if code_of(error) == "NoSuchUpload":
                raise UploadGone from error
            raise
        return _Moved(chunk.number, chunk.data, str(answer["ETag"]), checksum)

    def list_parts(self) -> Iterable[dict[str, Any]]:
        """Yield the parts that are there."""
        pages = self._bucket.client.get_paginator("list_parts").paginate(
            Bucket=self._bucket.place.bucket,
            Key=self._bucket.name(self._key),
            UploadId=self._upload_id,
            **self._bucket.owner,
        )
        for page in pages:
            yield from page.get("Parts", [])


def unfinished(bucket: Bucket, beginning: str) -> Iterable[dict[str, Any]]:
    """Yield the uploads, of keys that begin so, that nobody ended."""
    pages = bucket.client.get_paginator("list_multipart_uploads").paginate(
        Bucket=bucket.place.bucket, Prefix=bucket.name(beginning), **bucket.owner
    )
    for page in pages:
        yield from page.get("Uploads", [])


def _same_kind(bucket: Bucket, upload: Mapping[str, Any]) -> bool:
    """Was it begun with the checksum that we use?"""
    return upload.get("ChecksumAlgorithm") == bucket.checksums.algorithm


def _chunks(first: bytes, source: BinaryIO, part_bytes: int) -> Iterable[_Chunk]:
    number, data = 1, first
    while data:
        yield _Chunk(number, data)
        number, data = number + 1, read_fully(source, part_bytes)


def read_fully(source: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, or all there are until the end."""
    pieces = []
    while size and (piece := source.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _hashed(moved: Iterable[_Moved], bucket: Bucket) -> tuple[Sent, list[dict[str, Any]]]:
    """Hash the parts in their order; return the whole, and the list for S3."""
    sha256 = hashlib.sha256()
    sums: list[PartSum] = []
    parts: list[dict[str, Any]] = []
    for part in moved:
        sha256.update(part.data)
        sums.append(part.checksum)
        parts.append(
            {
                "PartNumber": part.number,
                "ETag": part.etag,
                bucket.checksums.field: part.checksum.text,
            }
        )
    content = Content(size=sum(each.size for each in sums), sha256=sha256.hexdigest())
    return Sent(content, bucket.checksums.of_file(sums)), parts


def read_as_sent(bucket: Bucket, source: Ranges) -> Sent:
    """Read all of `source` and return what would have been sent; nothing is."""

    def read(part: Part) -> _Moved:
        data = source.read(part.start, part.size)
        return _Moved(part.number, data, "", bucket.checksums.of(data))

    parts = parts_of(source.size, bucket.settings.s3_part_bytes)
    with closing(in_order(parts, read, size_of=lambda part: part.size)) as results:
        return _hashed(results, bucket)[0]
