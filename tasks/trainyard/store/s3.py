"""The store in a bucket of S3, or of a store that keeps S3's promises.

- Every key is an object of the same name below the prefix, written by one request (or one
  completion of a multipart upload), so it is whole or absent at any moment.
- Whatever must not be replaced is written with `If-None-Match: *`; what was read before is replaced
  and deleted with `If-Match`. S3 decides in one step: nothing is looked at first and written then,
  and nothing is copied.
- The version of a key is its ETag, because conditions take ETags and nothing else: a version id
  can name an old version, but cannot make a write depend on it. An ETag may come back if the very
  same content is written again; a change back and forth is then seen as none, as in a folder.
- Before the first write of a process the store must have shown that its conditions hold.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trainyard.documents.base import FileEntry
from trainyard.errors import BadInput, Conflict, CorruptFile, Transient
from trainyard.names import check_relative_path
from trainyard.settings import Settings
from trainyard.store.parts import Bytes, Ranges, hash_ranges, in_memory
from trainyard.store.protocol import Entry, Internal, Stored
from trainyard.store.s3_bucket import (
    CONTENT_SHA256,
    KEY_BYTES,
    Bucket,
    ConditionFailed,
    Head,
    pauses,
)
from trainyard.store.s3_client import AwsCredentials
from trainyard.store.s3_contents import ContentRecord, recall, remember
from trainyard.store.s3_errors import explained
from trainyard.store.s3_internals import RESERVED, internals, remove_internal
from trainyard.store.s3_multipart import (
    KeyTaken,
    MultipartUpload,
    Sent,
    UploadGone,
    read_as_sent,
    read_fully,
)
from trainyard.store.s3_probe import ensure_conditional_writes
from trainyard.store.s3_stream import open_object
from trainyard.store.transfer import Content

_UPLOADS = 4
"""Tries of an upload that others keep ending."""


class S3Store:
    """A `Store` in a bucket."""

    def __init__(self, settings: Settings, credentials: AwsCredentials | None = None) -> None:
        """Use the bucket that `settings.store` names; nothing is asked of it yet.

        Raises:
            BadInput: the URL is no place in a bucket.
        """
        self._bucket = Bucket(settings, credentials)
        self._probing = threading.Lock()
        self._probed = False

    @property
    def url(self) -> str:
        """The place as `s3://bucket/prefix`."""
        return self._bucket.place.url

    def read(self, key: str) -> Stored:
        """Return the content of `key`. Raises NotFound."""
        self._check(key)
        with explained("read", self._bucket.url_of(key)):
            return self._read(key)

    def exists(self, key: str) -> bool:
        """Tell whether `key` exists."""
        self._check(key)
        return self._head(key) is not None

    def create(self, key: str, data: bytes) -> str:
        """Write `key`, which must not exist. Raises Conflict; Transient if S3 never decided."""
        self._check(key)
        with self._writing(key):
            try:
                return self._bucket.put_if(key, data, IfNoneMatch="*")
            except ConditionFailed as failed:
                if failed.raced:
                    raise Transient(
                        f"Others kept writing {key} in {self.url} at the same moment.",
                        hint="Try again; if it lasts, find out who works on that key.",
                    ) from failed
                raise Conflict(
                    f"{key} exists already in {self.url}.",
                    hint="Stored documents are never replaced; read what is there.",
                ) from failed

    def replace(self, key: str, data: bytes, *, version: str) -> str:
        """Replace `key` if its version still is `version`. Raises Conflict."""
        self._check(key)
        with self._writing(key):
            try:
                return self._bucket.put_if(key, data, IfMatch=_condition(version))
            except ConditionFailed as failed:
                raise self._changed(key, failed) from failed

    def put(self, key: str, data: bytes) -> str:
        """Write `key` whatever it held; the last writer wins."""
        self._check(key)
        with self._writing(key):
            return self._bucket.put(key, data)

    def delete(self, key: str, *, version: str | None = None) -> None:
        """Remove `key`; with `version`, only that one (Conflict otherwise)."""
        self._check(key)
        with self._writing(key):
            if version is None:
                self._bucket.call("delete_object", key)
                return
            try:
                self._bucket.delete_if(key, _condition(version))
            except ConditionFailed as failed:
                raise self._changed(key, failed) from failed

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the keys below the folder `prefix` (empty: all), sorted."""
        folder = prefix.strip("/") and f"{check_relative_path(prefix.rstrip('/'))}/"
        bucket = self._bucket
        skip = len(bucket.name("x")) - 1
        with explained("list", bucket.url_of(folder)):
            pages = bucket.client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket.place.bucket, Prefix=bucket.name(folder), **bucket.owner
            )
            for page in pages:
                for found in page.get("Contents", []):
                    key = found["Key"][skip:]
                    # A name that ends with a slash is a folder that a console made.
                    if key and not key.endswith("/") and not key.startswith(f"{RESERVED}/"):
                        yield Entry(
                            key=key,
                            size=found["Size"],
                            version=found["ETag"],
                            modified_at=found["LastModified"],
                        )

    def open(self, key: str) -> BinaryIO:
        """Open `key` for reading as a stream. Raises NotFound."""
        self._check(key)
        return open_object(self._bucket, key)

    def open_range(self, key: str, start: int, size: int) -> BinaryIO:
        """Open `size` bytes of `key` from the offset `start`. Raises NotFound."""
        self._check(key)
        if start < 0 or size < 0:
            raise ValueError(f"no range of a file: start {start}, size {size}")
        return open_object(self._bucket, key, start, size)

    def upload(self, key: str, source: BinaryIO, *, sha256: str | None = None) -> FileEntry:
        """Store a stream under `key`. Raises CorruptFile, Conflict."""
        self._check(key)
        if sha256 is not None and (head := self._head(key)) is not None:
            return self._kept(key, head, sha256)
        part_bytes = self._bucket.settings.s3_part_bytes
        with self._writing(key):
            try:
                with in_memory(part_bytes):
                    first = read_fully(source, part_bytes)
                    if len(first) < part_bytes:
                        return self._upload_whole(key, first, sha256)
            except KeyTaken as taken:
                return self._kept_if_equal(key, taken.sent)
            upload = MultipartUpload.new(self._bucket, key)
            try:
                sent, parts = upload.send_stream(first, source)
                self._demand(key, sent.content, sha256)
                self._remember(key, upload.complete(sent, parts), sent.content)
            except KeyTaken as taken:
                upload.abort()
                return self._kept_if_equal(key, taken.sent)
            except UploadGone as gone:
                upload.abort()
                raise self._interrupted(key) from gone
            except BaseException:
                upload.abort()
                raise
        return _entry(key, sent.content)

    def upload_ranged(
        self, key: str, source: Ranges, *, sha256: str | None = None, new: bool = False
    ) -> FileEntry:
        """Store a file that can be read in ranges. Raises CorruptFile, Conflict."""
        self._check(key)
        if source.size <= self._bucket.settings.s3_part_bytes:
            if sha256 is not None and not new and (head := self._head(key)) is not None:
                return self._kept(key, head, sha256)
            with self._writing(key):
                try:
                    with in_memory(source.size):
                        return self._upload_whole(key, source.read(0, source.size), sha256)
                except KeyTaken as taken:
                    return self._kept_if_equal(key, taken.sent)
        with self._writing(key):
            for _ in range(_UPLOADS):
                if (head := self._head(key)) is not None:
                    return self._kept_of(key, head, source, sha256)
                try:
                    return self._upload_parts(key, source, sha256)
                except UploadGone:
                    continue
        raise self._interrupted(key)

    def local_path(self, key: str) -> Path | None:
        """Return None: objects have no path."""
        self._check(key)
        return None

    def internals(self) -> Iterator[Internal]:
        """Yield uploads that nobody ended, and what lies in the store's own folder."""
        with explained("list", self.url):
            yield from internals(
                self._bucket, lambda: frozenset(entry.key for entry in self.list(""))
            )

    def remove_internal(self, internal: Internal) -> None:
        """Remove what `internals` found."""
        with explained("remove", f"{internal.name} in {self.url}"):
            remove_internal(self._bucket, internal)

    def _upload_parts(self, key: str, source: Ranges, sha256: str | None) -> FileEntry:
        """Send the parts that are not there yet, and end the upload.

        An upload that is cut by an error or a kill stays, for the next attempt to go on with.
        """
        upload = MultipartUpload.find_or_new(self._bucket, key)
        sent, parts = upload.send_ranges(source)
        try:
            self._demand(key, sent.content, sha256)
            version = upload.complete(sent, parts)
            self._remember(key, version, sent.content, source.identity)
        except KeyTaken as taken:
            upload.abort()
            return self._kept_if_equal(key, taken.sent, source.identity)
        except (CorruptFile, UploadGone):
            upload.abort()
            raise
        return _entry(key, sent.content)

    def _upload_whole(self, key: str, data: Bytes, sha256: str | None) -> FileEntry:
        """Store a file that fits into one request. Raises KeyTaken."""
        content = Content(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        self._demand(key, content, sha256)
        try:
            metadata = {CONTENT_SHA256: content.sha256}
            self._bucket.put_if(key, data, metadata=metadata, IfNoneMatch="*")
        except ConditionFailed as failed:
            raise KeyTaken(Sent(content, self._bucket.checksums.of(data).text)) from failed
        return _entry(key, content)

    def _kept(self, key: str, head: Head, sha256: str) -> FileEntry:
        """Return the entry of a key that exists, if that is its content."""
        found = self._content(key, head)
        if found.sha256 != sha256:
            raise self._other_content(key)
        return _entry(key, found)

    def _kept_of(self, key: str, head: Head, source: Ranges, sha256: str | None) -> FileEntry:
        """Return the entry of a key that exists, if it is the content of `source`."""
        if sha256 is not None:
            return self._kept(key, head, sha256)
        known = recall(self._bucket, key, head.version)
        if known is not None and known.identity == source.identity and known.size == source.size:
            return _entry(key, known.content)
        # Known or not, it is the source that says what it has now.
        return self._kept_if_equal(key, read_as_sent(self._bucket, source), source.identity)

    def _kept_if_equal(self, key: str, sent: Sent, identity: str = "") -> FileEntry:
        """Return the entry of a key that somebody else made, if it has the content of ours."""
        head = self._head(key)
        if head is None:
            raise self._interrupted(key)
        if head.size != sent.content.size:
            raise self._other_content(key)
        # S3's own checksum tells two files apart that differ by accident.
        if CONTENT_SHA256 not in head.metadata and head.checksum == sent.checksum:
            self._remember(key, head.version, sent.content, identity)
        elif self._content(key, head) != sent.content:
            raise self._other_content(key)
        return _entry(key, sent.content)

    def _content(self, key: str, head: Head) -> Content:
        """Return size and hash of a key; it is read back where nobody knows them."""
        if CONTENT_SHA256 in head.metadata:
            return Content(head.size, head.metadata[CONTENT_SHA256])
        known = recall(self._bucket, key, head.version)
        if known is not None:
            return known.content
        content = self._read_back(key, head)
        self._remember(key, head.version, content)
        return content

    def _remember(self, key: str, version: str, content: Content, identity: str = "") -> None:
        """Note what S3 cannot tell of an object of parts."""
        record = ContentRecord(
            key=key,
            version=version,
            size=content.size,
            sha256=content.sha256,
            identity=identity,
        )
        remember(self._bucket, record)

    def _read_back(self, key: str, head: Head) -> Content:
        """Return size and hash of a key, whose content must not change meanwhile."""

        def read(start: int, size: int) -> bytes:
            with open_object(self._bucket, key, start, size, version=head.version) as stream:
                data = read_fully(stream, size)
            if len(data) < size:
                raise self._interrupted(key)
            return data

        return hash_ranges(Ranges(head.size, key, read), self._bucket.settings.s3_part_bytes)

    def _read(self, key: str) -> Stored:
        from botocore.exceptions import BotoCoreError, HTTPClientError
        from urllib3.exceptions import HTTPError

        for pause in (*pauses(self._bucket.settings.s3_attempts), None):
            answer = self._bucket.call("get_object", key)
            try:
                return Stored(data=answer["Body"].read(), version=str(answer["ETag"]))
            except (BotoCoreError, HTTPClientError, HTTPError):
                # Requests are tried again by botocore, but not answers that were cut.
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _head(self, key: str) -> Head | None:
        with explained("look at", self._bucket.url_of(key)):
            return self._bucket.head(key)

    def _check(self, key: str) -> None:
        if check_relative_path(key).split("/")[0] == RESERVED:
            raise BadInput(
                f"Key {key!r} lies in the store's own folder {RESERVED!r}.",
                hint="Use another name.",
            )
        if len(self._bucket.name(key).encode()) > KEY_BYTES:
            raise BadInput(
                f"Key {key!r} is too long for S3: names have at most {KEY_BYTES} bytes.",
                hint="Use shorter names.",
            )

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        """Explain errors of a write; before the first one, find out whether conditions hold."""
        if not self._probed:
            with self._probing:
                if not self._probed:
                    ensure_conditional_writes(self._bucket)
                    self._probed = True
        with explained("write", self._bucket.url_of(key)):
            yield

    def _demand(self, key: str, content: Content, sha256: str | None) -> None:
        if sha256 is not None and content.sha256 != sha256:
            raise CorruptFile(
                f"{key} arrived with sha256 {content.sha256}, but {sha256} was announced.",
                hint="The source is damaged or changed meanwhile; nothing was kept. Try again.",
            )

    def _changed(self, key: str, failed: ConditionFailed) -> Conflict:
        what = "is gone" if failed.gone else "was changed by somebody else"
        return Conflict(f"{key} {what} in {self.url}.", hint="Read it again and repeat the change.")

    def _other_content(self, key: str) -> Conflict:
        return Conflict(
            f"{key} exists in {self.url} with other content.",
            hint="Stored files are never replaced; look at what is there.",
        )

    def _interrupted(self, key: str) -> Transient:
        return Transient(
            f"Somebody else ended the upload of {key} to {self.url}, or removed the file.",
            hint="Try again; if it lasts, find out who works on that key.",
        )


def _condition(version: str) -> str:
    """Return a version as a condition that can only mean that very version."""
    return '"none"' if version in {"", "*"} else version


def _entry(key: str, content: Content) -> FileEntry:
    return FileEntry(path=key, size=content.size, sha256=content.sha256)
