"""A prefix in an S3 bucket, or in a store that speaks S3's protocol.

The model's revisions are subfolders of the prefix, or contents of the prefix itself (`layout:
snapshot`), which are then named by a digest of names, sizes and ETags. Every read is bound to the
ETag that was listed, and in a versioned bucket to the object's version: what is downloaded is what
was listed, or nothing. A snapshot that was overwritten is found again in the versions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

from trainyard.canonical import digest, short
from trainyard.errors import BadInput, CorruptFile, NotFound, TrainyardError
from trainyard.names import check_revision
from trainyard.settings import Settings
from trainyard.sources.files import inspect_files, unusable
from trainyard.sources.protocol import ResolvedRevision, SourceFile
from trainyard.sources.remote_file import RemoteReader, open_remote
from trainyard.sources.retrying import Failure
from trainyard.sources.revision_names import is_revision, natural
from trainyard.spec.model import S3Source
from trainyard.spec.patterns import selected
from trainyard.store.s3_client import make_client
from trainyard.store.s3_errors import (
    PERMISSIONS_HINT,
    code_of,
    is_missing,
    is_precondition,
    s3_error,
    status_of,
)

CHUNK_BYTES = 1 << 20

NO_VERSION = "null"
"""What S3 calls the version of an object in a bucket without versions."""

CREDENTIALS_HINT = (
    "Check the AWS credentials of this machine (environment, profile or role; TRAINYARD_S3_PROFILE "
    "chooses a profile), and that they may list the bucket and read its objects."
)

_NO_VERSION_LISTING = frozenset({"AccessDenied", "MethodNotAllowed", "NotImplemented"})


@dataclass(frozen=True)
class StoredObject:
    """One version of one object, or the mark that it was deleted."""

    path: str
    """Relative to the prefix."""
    size: int
    etag: str
    version_id: str
    modified: datetime
    current: bool
    """Is it what a reader sees now?"""
    deleted: bool = False

    def as_file(self, path: str) -> SourceFile:
        """Return the listing's entry for it."""
        return SourceFile(path=path, size=self.size, version=f"{self.etag}#{self.version_id}")


class S3PrefixSource(RemoteReader):
    """A `Source` in a bucket."""

    def __init__(
        self,
        source: S3Source,
        settings: Settings,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Use the prefix that `source` names; nothing is sent before a revision is resolved."""
        super().__init__(settings.source_attempts, sleep)
        self._source = source
        self._settings = settings
        bucket, _, prefix = source.uri.removeprefix("s3://").partition("/")
        self._bucket = bucket
        self._prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""

    def peek(self, revision: str | None) -> tuple[str, str]:
        """Return revision and fingerprint by listing alone. Raises as `resolve`.

        One request for each thousand objects (with their old versions); one more if the newest of
        several subfolders is asked for.
        """
        name, files = self._listing(revision)
        return name, _fingerprint(files)

    def resolve(self, revision: str | None) -> ResolvedRevision:
        """Resolve a subfolder or a snapshot (None: the newest) and check its files.

        Raises:
            NotFound: bucket, prefix or revision does not exist.
            BadInput: credentials are missing or refused, or files are refused, missing or broken;
                the message names all of them.
            Transient: the store cannot be reached, or answers with errors of its own.
        """
        name, files = self._listing(revision)
        inspection = inspect_files(
            files,
            lambda file, start, size: self._open(name, file, start, size),
            allow_files=self._source.allow_files,
            leave_out="leave them out with `ignore_patterns`",
        )
        if inspection.problems:
            raise unusable(name, self._uri, inspection.problems)
        return ResolvedRevision(
            revision=name,
            uri=self._uri if self._is_snapshot else f"{self._uri}{name}/",
            files=inspection.files,
            fingerprint=_fingerprint(files),
            allowed=inspection.allowed,
        )

    @property
    def _uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    @property
    def _is_snapshot(self) -> bool:
        return self._source.layout == "snapshot"

    def _listing(self, revision: str | None) -> tuple[str, tuple[SourceFile, ...]]:
        """Return the revision and those of its files that the spec's patterns select."""
        if revision is not None:
            check_revision(revision)
        if self._is_snapshot:
            return self._snapshot(revision)
        if revision is None and self._source.latest == "modified":
            return self._last_written()
        name = self._newest_by_name() if revision is None else revision
        files = self._files(o for o in self._objects(f"{name}/") if o.current)
        if not files:
            known = ", ".join(sorted(self._subfolders(), key=natural)) or "none"
            raise NotFound(
                f"{self._uri} has no revision {name!r}.", hint=f"Revisions that exist: {known}."
            )
        return name, files

    def _snapshot(self, revision: str | None) -> tuple[str, tuple[SourceFile, ...]]:
        objects = self._objects("")
        now = self._files(o for o in objects if o.current)
        if not now and revision is None:
            raise self._empty("files")
        if revision in (None, snapshot_name(now)):
            return snapshot_name(now), now
        for then in earlier(objects):
            files = self._files(then)
            if snapshot_name(files) == revision:
                return revision, files
        raise NotFound(
            f"{self._uri} does not hold the files of revision {revision!r} any more.",
            hint="Plan again. In a bucket with versioning, earlier snapshots stay readable.",
        )

    def _last_written(self) -> tuple[str, tuple[SourceFile, ...]]:
        folders: dict[str, list[StoredObject]] = {}
        for found in self._objects(""):
            name, slash, _ = found.path.partition("/")
            if found.current and slash and is_revision(name):
                folders.setdefault(name, []).append(found)
        if not folders:
            raise self._empty("revisions")
        name = max(folders, key=lambda n: (max(o.modified for o in folders[n]), natural(n)))
        return name, self._files(folders[name], below=f"{name}/")

    def _newest_by_name(self) -> str:
        names = self._subfolders()
        if not names:
            raise self._empty("revisions")
        return max(names, key=natural)

    def _subfolders(self) -> list[str]:
        pages = self._pages("list_objects_v2", Prefix=self._prefix, Delimiter="/")
        found = [
            each["Prefix"].removeprefix(self._prefix).rstrip("/")
            for page in pages
            for each in page.get("CommonPrefixes", ())
        ]
        return [name for name in found if is_revision(name)]

    def _objects(self, below: str) -> list[StoredObject]:
        """List the objects below a subfolder, with their old versions if there are any."""
        from botocore.exceptions import ClientError

        prefix = f"{self._prefix}{below}"
        try:
            pages = self._pages("list_object_versions", raw=_NO_VERSION_LISTING, Prefix=prefix)
        except ClientError:
            # Without the right to see versions, or in a store that has none.
            pages = self._pages("list_objects_v2", Prefix=prefix)
        return [each for page in pages for each in _entries(page, prefix)]

    def _pages(
        self, operation: str, *, raw: frozenset[str] = frozenset(), **arguments: str
    ) -> list[dict[str, Any]]:
        """Return all pages of a listing.

        Args:
            operation: name of the client's method.
            raw: error codes that are raised as they are.
            arguments: of that method.
        """

        def request() -> list[dict[str, Any]]:
            pages = _client(self._settings).get_paginator(operation)
            return list(pages.paginate(Bucket=self._bucket, **arguments))

        def judge(error: Exception) -> Failure | None:
            return None if code_of(error) in raw else self._failure(error, self._uri)

        return self._retries.call(request, judge)

    def _files(self, objects: Iterable[StoredObject], *, below: str = "") -> tuple[SourceFile, ...]:
        source = self._source
        files = [found.as_file(found.path.removeprefix(below)) for found in objects]
        return tuple(
            sorted(
                (
                    file
                    for file in files
                    if selected(
                        file.path, allow=source.allow_patterns, ignore=source.ignore_patterns
                    )
                ),
                key=lambda file: file.path,
            )
        )

    def _remote(self, revision: str, file: SourceFile, start: int, size: int) -> BinaryIO:
        folder = "" if self._is_snapshot else f"{revision}/"
        key = f"{self._prefix}{folder}{file.path}"
        name = f"s3://{self._bucket}/{key}"
        return open_remote(
            lambda first, end: self._fetch(key, file, first, end),
            start,
            size,
            name=name,
            retries=self._retries,
            judge=lambda error: self._failure(error, name),
        )

    def _fetch(self, key: str, file: SourceFile, first: int, end: int) -> Iterator[bytes]:
        """Yield bytes `first` up to `end` of an object."""
        etag, _, version_id = str(file.version).rpartition("#")
        arguments: dict[str, str] = {"Bucket": self._bucket, "Key": key, "IfMatch": etag}
        if version_id != NO_VERSION:
            arguments["VersionId"] = version_id
        if (first, end) != (0, file.size):
            # Only without a range (files of one part) does boto3 compare the content with S3's
            # checksum; parts are bound to the ETag and the version alone.
            arguments["Range"] = f"bytes={first}-{end - 1}"
        body = _client(self._settings).get_object(**arguments)["Body"]
        try:
            yield from body.iter_chunks(CHUNK_BYTES)
        finally:
            body.close()

    def _empty(self, what: str) -> NotFound:
        return NotFound(
            f"{self._uri} has no {what}.",
            hint="Check `source.uri` and `source.layout` in the model's spec.",
        )

    def _failure(self, error: Exception, where: str) -> Failure | None:
        """Tell what an exception of boto3 means."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            FlexibleChecksumError,
            HTTPClientError,
        )

        if isinstance(error, FlexibleChecksumError):
            return Failure(
                CorruptFile(
                    f"{where} does not match the checksum that S3 keeps of it.",
                    hint="Nothing was kept. Try again; if it stays so, upload the file again.",
                )
            )
        if isinstance(error, BotoCoreError | ClientError | HTTPClientError):
            return Failure(self._of_source(error, where))
        if isinstance(error, ValueError):
            return Failure(
                BadInput(
                    f"boto3 cannot read {where}: {error}.",
                    hint="Check `source` in the model's spec, and the settings TRAINYARD_S3_*.",
                )
            )
        return None

    def _of_source(self, error: Exception, where: str) -> TrainyardError:
        """Return what an error means, for a source where that is another thing than for a store."""
        if code_of(error) == "NoSuchBucket":
            return NotFound(
                f"There is no bucket {self._bucket!r}.",
                hint="Check `source.uri` in the model's spec, and TRAINYARD_S3_ENDPOINT_URL.",
            )
        if is_missing(error) or status_of(error) == 404:
            return NotFound(f"{where} does not exist any more.", hint="Plan again.")
        if is_precondition(error):
            return BadInput(
                f"{where} was overwritten since it was listed.",
                hint="Plan again; write a new revision under a prefix of its own.",
            )
        found = s3_error(error, "read", where)
        # The rights of a store are others.
        if found.hint == PERMISSIONS_HINT:
            return BadInput(found.message, hint=CREDENTIALS_HINT)
        return found


def snapshot_name(files: Iterable[SourceFile]) -> str:
    """Return the revision that stands for this content of a prefix: 12 hex digits."""
    return short(_fingerprint(files))


def earlier(objects: Sequence[StoredObject]) -> Iterator[list[StoredObject]]:
    """Yield what a prefix held after each change to it, the oldest first.

    Args:
        objects: all versions and deletions as S3 lists them: of each key the newest first.
    """
    changes = list(reversed(objects))
    # Times are whole seconds; a stable sort keeps the order of what is equally old.
    changes.sort(key=lambda change: change.modified)
    held: dict[str, StoredObject] = {}
    for change in changes:
        held[change.path] = change
        yield [each for each in held.values() if not each.deleted]


def _fingerprint(files: Iterable[SourceFile]) -> str:
    """Without the versions: the same content written again is the same revision."""
    return digest([[f.path, f.size, str(f.version).rpartition("#")[0]] for f in files])


def _entries(page: dict[str, Any], prefix: str) -> Iterator[StoredObject]:
    """Yield the objects of one page of either kind of listing."""
    found = [(each, False) for each in (*page.get("Versions", ()), *page.get("Contents", ()))]
    found += [(each, True) for each in page.get("DeleteMarkers", ())]
    for each, deleted in found:
        if each["Key"].endswith("/") and not each.get("Size"):
            continue  # stands for a folder in consoles
        yield StoredObject(
            path=each["Key"].removeprefix(prefix),
            size=each.get("Size", 0),
            etag=each.get("ETag", ""),
            version_id=each.get("VersionId", NO_VERSION),
            modified=each["LastModified"],
            current=each.get("IsLatest", True) and not deleted,
            deleted=deleted,
        )


_MUTEX = threading.Lock()
_CLIENTS: dict[tuple[object, ...], Any] = {}
"""By what they were made with: one serves all threads and sources."""


def _client(settings: Settings) -> Any:
    """Return the client for these settings. Raises BadInput."""
    # It tries nothing again: all sources wait alike.
    own = settings.model_copy(
        update={"s3_attempts": 1, "s3_timeout_s": settings.source_timeout_s, "store": "the source"}
    )
    known = (
        own.s3_endpoint_url,
        own.s3_region,
        own.s3_addressing_style,
        own.s3_profile,
        own.s3_timeout_s,
    )
    with _MUTEX:
        if known not in _CLIENTS:
            _CLIENTS[known] = make_client(own)
        return _CLIENTS[known]
