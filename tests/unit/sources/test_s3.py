"""A prefix in S3 as a source, against moto's server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.unit.sources.hub_world import model
from tests.unit.sources.model_files import safetensors

from trainyard.errors import BadInput, CorruptFile, NotFound, TrainyardError, Transient
from trainyard.settings import Settings
from trainyard.sources import s3
from trainyard.sources.files import HEAD_BYTES, read_architecture
from trainyard.sources.s3 import S3PrefixSource, StoredObject, earlier
from trainyard.spec.model import S3Source

BIG = safetensors({"embed": [200, 500]})


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class Bucket:
    """A bucket of its own for each test, and the client that fills it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.name = f"models-{uuid.uuid4().hex[:12]}"
        # Patient: the first request makes moto load what it needs.
        self.client = s3._client(self.settings(source_timeout_s=120))
        self.client.create_bucket(Bucket=self.name)

    def settings(self, **changes: Any) -> Settings:
        values: Mapping[str, Any] = {
            "s3_endpoint_url": self.endpoint,
            "s3_region": "us-east-1",
            "s3_addressing_style": "path",
            "source_timeout_s": 10,
            "source_attempts": 3,
            **changes,
        }
        return Settings(**values)

    def keep_versions(self) -> None:
        self.client.put_bucket_versioning(
            Bucket=self.name, VersioningConfiguration={"Status": "Enabled"}
        )

    def put(self, prefix: str, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            self.client.put_object(Bucket=self.name, Key=f"{prefix}{path}", Body=content)

    def source(self, prefix: str = "adder/", **spec: Any) -> S3PrefixSource:
        settings = spec.pop("settings", None) or self.settings()
        uri = f"s3://{self.name}/{prefix}"
        return S3PrefixSource(S3Source(kind="s3", uri=uri, **spec), settings)


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return Bucket(endpoint)


def refused(kind: type[TrainyardError], do: Callable[[], Any]) -> str:
    with pytest.raises(TrainyardError) as caught:
        do()
    assert type(caught.value) is kind
    assert caught.value.hint
    return str(caught.value)


def read(source: S3PrefixSource, revision: str | None, path: str) -> bytes:
    with source.open(source.resolve(revision), path) as stream:
        return stream.read()


class TestSubfolders:
    def test_the_newest_by_name(self, bucket: Bucket) -> None:
        for revision in ("v9", "v10", "v2"):
            bucket.put(f"adder/{revision}/", model())
        bucket.put("adder/", {"README.md": b"x"})
        resolved = bucket.source().resolve(None)
        assert resolved.revision == "v10"
        assert resolved.uri == f"s3://{bucket.name}/adder/v10/"
        assert [f.path for f in resolved.files] == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]

    def test_the_one_that_was_written_last(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for revision in ("v10", "v9"):
            bucket.put(f"adder/{revision}/", model())
        source = bucket.source(latest="modified")
        really = source._objects
        moments = {"v10": datetime(2026, 1, 1, tzinfo=UTC), "v9": datetime(2026, 1, 2, tzinfo=UTC)}

        def listed(below: str) -> list[StoredObject]:
            return [replace(o, modified=moments[o.path.split("/")[0]]) for o in really(below)]

        monkeypatch.setattr(source, "_objects", listed)
        resolved = source.resolve(None)
        assert resolved.revision == "v9"
        with source.open(resolved, "config.json") as stream:
            assert stream.read() == model()["config.json"]

    def test_peek_equals_resolve_and_reads_nothing(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bucket.put("adder/v1/", model())
        resolved = bucket.source().resolve(None)
        monkeypatch.setattr(S3PrefixSource, "_fetch", None)
        assert bucket.source().peek(None) == (resolved.revision, resolved.fingerprint)

    def test_a_bucket_without_a_prefix(self, bucket: Bucket) -> None:
        bucket.put("v1/", model())
        assert bucket.source("").resolve(None).revision == "v1"

    def test_more_objects_than_one_page_has(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bucket.put("adder/v1/", model())
        source = bucket.source()
        paged = (
            s3._client(source._settings)
            .get_paginator("list_object_versions")
            .paginate(Bucket=bucket.name, Prefix="adder/v1/", PaginationConfig={"PageSize": 1})
        )
        monkeypatch.setattr(source, "_pages", lambda *_, **__: list(paged))
        assert len(source.resolve("v1").files) == 3

    def test_missing_revisions_are_named(self, bucket: Bucket) -> None:
        bucket.put("adder/v1/", model())
        message = refused(NotFound, lambda: bucket.source().resolve("v7"))
        assert "Revisions that exist: v1." in message
        refused(NotFound, lambda: bucket.source("nothing/").resolve(None))
        refused(NotFound, lambda: bucket.source("nothing/", latest="modified").resolve(None))
        refused(BadInput, lambda: bucket.source().resolve("../v1"))

    def test_what_is_refused_everywhere_is_refused_here(self, bucket: Bucket) -> None:
        bucket.put("adder/v1/", model(pytorch_model__bin=b"\x80"))
        assert "leave them out" in refused(BadInput, lambda: bucket.source().resolve(None))
        assert bucket.source(ignore_patterns=("*.bin",)).resolve(None)

    def test_names_that_leave_their_folder(self, bucket: Bucket) -> None:
        bucket.put("adder/v1/", model() | {"/absolute.json": b"{}"})
        message = refused(BadInput, lambda: bucket.source().resolve(None))
        assert "not plain relative paths" in message


class TestSnapshot:
    def test_each_content_is_a_revision(self, bucket: Bucket) -> None:
        bucket.put("adder/", model())
        source = bucket.source(layout="snapshot")
        first = source.resolve(None)
        assert len(first.revision) == 12
        bucket.put("adder/", model(fill=1))
        assert source.peek(None)[0] != first.revision
        bucket.put("adder/", model())
        assert source.peek(None) == (first.revision, first.fingerprint)

    def test_an_overwritten_one_is_found_in_the_versions(self, bucket: Bucket) -> None:
        bucket.keep_versions()
        source = bucket.source(layout="snapshot")
        bucket.put("adder/", model(model__safetensors=BIG))
        first = source.resolve(None)
        time.sleep(1.1)  # S3 tells the order of changes to different keys by the second
        bucket.put("adder/", {"model.safetensors": model()["model.safetensors"]})
        bucket.client.delete_object(Bucket=bucket.name, Key="adder/tokenizer.json")
        again = bucket.source(layout="snapshot").resolve(first.revision)
        assert again.fingerprint == first.fingerprint
        assert read(bucket.source(layout="snapshot"), first.revision, "model.safetensors") == BIG

    def test_an_overwritten_one_is_gone_without_versions(self, bucket: Bucket) -> None:
        source = bucket.source(layout="snapshot")
        bucket.put("adder/", model())
        first = source.resolve(None)
        bucket.put("adder/", model(fill=1))
        message = refused(NotFound, lambda: source.resolve(first.revision))
        assert "versioning" in message

    def test_nothing_there(self, bucket: Bucket) -> None:
        refused(NotFound, lambda: bucket.source(layout="snapshot").resolve(None))


def test_earlier_states_follow_times_and_order() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)

    def change(path: str, etag: str, minute: int, *, deleted: bool = False) -> StoredObject:
        when = moment + timedelta(minutes=minute)
        return StoredObject(path, 1, etag, etag, when, current=False, deleted=deleted)

    # As S3 lists them: by key, of each the newest first.
    objects = [change("a", "a2", 3), change("a", "a1", 1), change("b", "", 2, deleted=True)]
    objects.append(change("b", "b1", 1))
    states = [sorted(each.etag for each in state) for state in earlier(objects)]
    assert states[1:] == [["a1", "b1"], ["a1"], ["a2"]]


class TestReading:
    def test_whole_and_in_part(self, bucket: Bucket) -> None:
        bucket.put("adder/v1/", model(model__safetensors=BIG))
        source = bucket.source()
        resolved = source.resolve(None)
        with source.open(resolved, "model.safetensors") as stream:
            assert stream.read() == BIG
            stream.seek(9)
            assert stream.read(4) == BIG[9:13]
        with source.open_range(resolved, "model.safetensors", 150_000, 1_000) as stream:
            assert stream.read() == BIG[150_000:151_000]
        with source.open_range(resolved, "model.safetensors", 3, 0) as stream:
            assert stream.read() == b""
        refused(NotFound, lambda: source.open(resolved, "README.md"))

    def test_of_large_weights_only_the_header(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bucket.put("adder/v1/", model(model__safetensors=BIG))
        source = bucket.source()
        fetched: list[int] = []
        really = source._fetch

        def fetch(key: str, file: Any, first: int, end: int) -> Iterator[bytes]:
            fetched.append(end - first)
            return really(key, file, first, end)

        monkeypatch.setattr(source, "_fetch", fetch)
        resolved = source.resolve(None)
        assert read_architecture(source, resolved).parameters == 100_000
        assert max(fetched) == HEAD_BYTES
        assert len(fetched) == 3

    def test_an_overwrite_is_noticed_without_versions(self, bucket: Bucket) -> None:
        bucket.put("adder/v1/", model(model__safetensors=BIG))
        source = bucket.source()
        resolved = source.resolve(None)
        bucket.put("adder/v1/", {"model.safetensors": BIG[:-1] + b"x"})
        message = refused(BadInput, lambda: source.open(resolved, "model.safetensors").read())
        assert "was overwritten since it was listed" in message

    def test_an_overwrite_changes_nothing_with_versions(self, bucket: Bucket) -> None:
        bucket.keep_versions()
        bucket.put("adder/v1/", model(model__safetensors=BIG))
        source = bucket.source()
        resolved = source.resolve(None)
        bucket.put("adder/v1/", {"model.safetensors": BIG[:-1] + b"x"})
        with source.open(resolved, "model.safetensors") as stream:
            assert stream.read() == BIG

    def test_a_file_that_was_deleted(self, bucket: Bucket) -> None:
        bucket.put("adder/v1/", model())
        source = bucket.source()
        resolved = source.resolve(None)
        bucket.client.delete_object(Bucket=bucket.name, Key="adder/v1/config.json")
        refused(NotFound, lambda: source.open(resolved, "config.json").read())


class TestFailures:
    def test_no_such_bucket(self, bucket: Bucket) -> None:
        source = S3PrefixSource(
            S3Source(kind="s3", uri="s3://no-such-bucket/x/"), bucket.settings()
        )
        assert "There is no bucket" in refused(NotFound, lambda: source.resolve(None))

    def test_a_store_that_has_no_versions(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from botocore.exceptions import ClientError

        bucket.put("adder/v1/", model())
        source = bucket.source()
        really = source._pages

        def pages(operation: str, **arguments: Any) -> Any:
            if operation == "list_object_versions":
                raise ClientError({"Error": {"Code": "AccessDenied"}}, operation)
            return really(operation, **arguments)

        monkeypatch.setattr(source, "_pages", pages)
        assert read(source, None, "config.json") == model()["config.json"]

    def test_no_credentials(
        self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        # Another timeout: a client of its own.
        source = bucket.source(settings=bucket.settings(source_timeout_s=9))
        assert "Unable to locate credentials" in refused(BadInput, lambda: source.peek(None))

    def test_a_profile_that_is_not_there(self, bucket: Bucket) -> None:
        source = bucket.source(settings=bucket.settings(s3_profile="nobody"))
        assert "nobody" in refused(BadInput, lambda: source.peek(None))

    @pytest.mark.parametrize(
        ("code", "status", "kind"),
        [
            ("SlowDown", 503, Transient),
            ("InternalError", 500, Transient),
            ("RequestTimeout", 400, Transient),
            ("AccessDenied", 403, BadInput),
            ("InvalidAccessKeyId", 403, BadInput),
            ("ExpiredToken", 400, Transient),
            ("ExpiredTokenException", 403, Transient),
            ("TooManyRequests", 429, Transient),
            ("PermanentRedirect", 301, BadInput),
            ("PreconditionFailed", 412, BadInput),
            ("NoSuchVersion", 404, NotFound),
            ("InvalidArgument", 400, BadInput),
        ],
    )
    def test_what_s3_answers(
        self, bucket: Bucket, code: str, status: int, kind: type[TrainyardError]
    ) -> None:
        from botocore.exceptions import ClientError

        answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        failure = bucket.source()._failure(ClientError(answer, "GetObject"), "s3://b/k")
        assert failure is not None
        assert type(failure.error) is kind
        assert failure.error.hint

    def test_credentials_that_nobody_hands_out_now_are_worth_another_try(
        self, bucket: Bucket
    ) -> None:
        from botocore.exceptions import CredentialRetrievalError, PartialCredentialsError

        source = bucket.source()
        for error, kind in (
            (CredentialRetrievalError(provider="web-identity", error_msg="busy"), Transient),
            (PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"), BadInput),
        ):
            failure = source._failure(error, "s3://b/k")
            assert failure is not None
            assert type(failure.error) is kind

    def test_what_breaks_on_the_way(self, bucket: Bucket) -> None:
        from botocore.exceptions import (
            EndpointConnectionError,
            FlexibleChecksumError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        source = bucket.source()
        for error in (
            ReadTimeoutError(endpoint_url="x"),
            EndpointConnectionError(endpoint_url="x"),
            ResponseStreamingError(error="cut"),
        ):
            failure = source._failure(error, "s3://b/k")
            assert failure is not None
            assert type(failure.error) is Transient
        failure = source._failure(FlexibleChecksumError(error_msg="x"), "s3://b/k")
        assert failure is not None
        assert type(failure.error) is CorruptFile
        assert source._failure(KeyError("x"), "s3://b/k") is None

    def test_nobody_there(self, bucket: Bucket) -> None:
        source = bucket.source(settings=bucket.settings(s3_endpoint_url="http://127.0.0.1:9"))
        refused(Transient, lambda: source.peek(None))
