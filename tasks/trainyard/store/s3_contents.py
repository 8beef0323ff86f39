"""What this store knows of objects that were made of parts: their sha256, which S3 cannot tell.

A small record lies below `.trainyard/contents/`, under the key it is about. It is written once the
object is there, and counts only for the very version that it names: one of an object that was
replaced says nothing. Records spare a download that goes on the reading of what it stored before;
one that is missing costs just that. Garbage collection removes those whose object is gone.
"""

from __future__ import annotations

import logging

from trainyard.documents.base import Document
from trainyard.errors import CorruptFile
from trainyard.store.documents import parse_document
from trainyard.store.s3_bucket import KEY_BYTES, Bucket
from trainyard.store.s3_errors import explained, is_missing
from trainyard.store.transfer import Content

log = logging.getLogger(__name__)

FOLDER = ".trainyard/contents"


class ContentRecord(Document):
    """The content of one version of a key."""

    key: str
    version: str
    """The ETag."""
    size: int
    """Bytes."""
    sha256: str
    identity: str = ""
    """What the content was called by its source, as `Ranges.identity`; empty: it had no name."""

    @property
    def content(self) -> Content:
        """Size and hash."""
        return Content(size=self.size, sha256=self.sha256)


def record_key(key: str) -> str:
    """Return where the record of a key lies."""
    return f"{FOLDER}/{key}.json"


def key_of_record(name: str) -> str:
    """Return the key that the record `name` is about."""
    return name.removeprefix(f"{FOLDER}/").removesuffix(".json")


def remember(bucket: Bucket, record: ContentRecord) -> None:
    """Write a record; whatever happens to it, the object is stored."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    name = record_key(record.key)
    if len(bucket.name(name).encode()) > KEY_BYTES:
        return
    try:
        bucket.put(name, record.to_bytes())
    except (BotoCoreError, ClientError, HTTPClientError) as error:
        log.warning("The sha256 of %s is not remembered: %s", record.key, error)


def recall(bucket: Bucket, key: str, version: str) -> ContentRecord | None:
    """Return what is known of a version of a key; None if nothing is. Raises as `explained`."""
    from botocore.exceptions import ClientError

    name = record_key(key)
    if len(bucket.name(name).encode()) > KEY_BYTES:
        return None
    with explained("read", bucket.url_of(name)):
        try:
            data = bucket.call("get_object", name)["Body"].read()
            record = parse_document(data, name, ContentRecord)
        except CorruptFile:
            return None
        except ClientError as error:
            if is_missing(error):
                return None
            raise
    return record if (record.key, record.version) == (key, version) else None
