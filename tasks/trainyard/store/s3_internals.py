"""What a store in a bucket keeps for itself: unfinished uploads, and what is in its own folder.

S3 keeps (and bills) the parts of an upload that was cut until somebody ends it. They are in no
listing of objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from trainyard.store.protocol import Internal
from trainyard.store.s3_bucket import Bucket
from trainyard.store.s3_contents import FOLDER as CONTENTS
from trainyard.store.s3_contents import key_of_record
from trainyard.store.s3_errors import code_of
from trainyard.store.s3_multipart import MultipartUpload, unfinished
from trainyard.store.s3_probe import PROBE_FOLDER

RESERVED = ".trainyard"
"""The folder below the prefix for what the store itself keeps; no key begins with it."""


def internals(bucket: Bucket, keys: Callable[[], frozenset[str]]) -> Iterator[Internal]:
    """Yield what the store keeps for itself.

    Args:
        bucket: of the store.
        keys: returns all keys that exist; called if there are records about any.
    """
    for upload in unfinished(bucket, ""):
        found = _unfinished(bucket, upload)
        if found is not None:
            yield found
    known: frozenset[str] | None = None
    for name, listed in _below(bucket, f"{RESERVED}/"):
        key = key_of_record(name) if name.startswith(f"{CONTENTS}/") else ""
        if key and known is None:
            known = keys()
        yield Internal(
            name=name,
            key=key,
            size=listed["Size"],
            modified_at=listed["LastModified"],
            needed=key in (known or ()) if key else not name.startswith(f"{PROBE_FOLDER}/"),
        )


def remove_internal(bucket: Bucket, internal: Internal) -> None:
    """Remove what `internals` found; what is gone already is fine."""
    if internal.handle:
        MultipartUpload(bucket, internal.key, internal.handle).abort()
    else:
        bucket.call("delete_object", internal.name)


def _unfinished(bucket: Bucket, upload: dict[str, Any]) -> Internal | None:
    """Return an upload with the size of its parts; None if it was ended meanwhile."""
    from botocore.exceptions import ClientError

    key = upload["Key"][len(bucket.name("")) :]
    handle = str(upload["UploadId"])
    try:
        size = sum(int(part["Size"]) for part in MultipartUpload(bucket, key, handle).list_parts())
    except ClientError as error:
        if code_of(error) == "NoSuchUpload":
            return None
        raise
    short = hashlib.sha256(handle.encode()).hexdigest()[:8]
    return Internal(
        name=f"unfinished upload {short} of {key}",
        key=key,
        size=size,
        modified_at=upload.get("Initiated"),
        needed=False,
        handle=handle,
    )


def _below(bucket: Bucket, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name in the store and listing of what lies in a folder."""
    pages = bucket.client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket.place.bucket, Prefix=bucket.name(folder), **bucket.owner
    )
    for page in pages:
        for found in page.get("Contents", []):
            yield found["Key"][len(bucket.name("")) :], found
