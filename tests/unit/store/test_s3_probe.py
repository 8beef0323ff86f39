"""A store must show that its conditional writes hold before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.fake_s3 import FakeS3
from tests.faulty_proxy import Answer, Request
from tests.unit.store.conformance import PART, content, ranges

from trainyard.errors import BadInput, NotFound
from trainyard.store.s3 import S3Store
from trainyard.store.s3_checksums import Checksums
from trainyard.store.s3_probe import RECORD_KEY, ProbeRecord


@pytest.fixture
def store(s3: FakeS3, tmp_path: Path) -> S3Store:
    return s3.store(tmp_path, probed=False)


def again(store: S3Store) -> S3Store:
    """Return the same store as another process has it."""
    other = S3Store(store._bucket.settings)
    other._bucket._client = store._bucket.client
    return other


def names(s3: FakeS3, store: S3Store) -> list[str]:
    found = s3.client.list_objects_v2(Bucket=store._bucket.place.bucket)
    return [each["Key"] for each in found.get("Contents", [])]


def record(s3: FakeS3, store: S3Store) -> ProbeRecord:
    place = {"Bucket": store._bucket.place.bucket, "Key": f"yard/{RECORD_KEY}"}
    return ProbeRecord.model_validate_json(s3.client.get_object(**place)["Body"].read())


def keep(s3: FakeS3, store: S3Store, kept: ProbeRecord) -> None:
    place = {"Bucket": store._bucket.place.bucket, "Key": f"yard/{RECORD_KEY}"}
    s3.client.put_object(**place, Body=kept.to_bytes())


def was_probed(s3: FakeS3) -> bool:
    return any("/probe/" in request.path for request in s3.proxy.requests)


def test_a_good_store_is_probed_once_and_keeps_that(s3: FakeS3, store: S3Store) -> None:
    store.create("a", b"")
    assert was_probed(s3)
    assert names(s3, store) == [f"yard/{RECORD_KEY}", "yard/a"]
    assert record(s3, store).endpoint == s3.proxy.url
    s3.proxy.reset()
    store.create("b", b"")
    assert [request.method for request in s3.proxy.requests] == ["PUT"]
    s3.proxy.reset()
    again(store).create("c", b"")
    assert [request.method for request in s3.proxy.requests] == ["GET", "PUT"]


def test_whoever_only_reads_needs_no_probe(s3: FakeS3, store: S3Store) -> None:
    with pytest.raises(NotFound):
        store.read("a")
    assert not store.exists("a")
    assert list(store.list("")) == []
    assert not was_probed(s3)
    assert names(s3, store) == []


@pytest.mark.parametrize(
    "change",
    [
        {"probed_at": datetime.now(UTC) - timedelta(days=8)},
        {"probed_at": datetime.now(UTC) + timedelta(days=1)},
        {"endpoint": "https://elsewhere"},
        {"bucket": "another"},
        {"version": 0},
    ],
)
def test_a_record_that_does_not_fit_does_not_count(
    s3: FakeS3, store: S3Store, change: dict[str, object]
) -> None:
    store.create("a", b"")
    keep(s3, store, record(s3, store).model_copy(update=change))
    s3.proxy.reset()
    again(store).create("b", b"")
    assert was_probed(s3)


def test_nor_does_rubbish(s3: FakeS3, store: S3Store) -> None:
    place = {"Bucket": store._bucket.place.bucket, "Key": f"yard/{RECORD_KEY}"}
    s3.client.put_object(**place, Body=b"{")
    store.create("a", b"")
    assert record(s3, store).version == 2


def is_put(request: Request) -> bool:
    return request.is_write


@pytest.mark.parametrize(
    ("when", "header", "shown"),
    [
        (is_put, "if-none-match", "a PUT with If-None-Match: * replaced a key that existed"),
        (
            lambda r: r.is_complete,
            "if-none-match",
            "completing a multipart upload with If-None-Match: * replaced",
        ),
        (is_put, "if-match", "a PUT with the If-Match of an older version replaced"),
        (
            lambda r: r.method == "DELETE",
            "if-match",
            "a DELETE with the If-Match of an older version removed",
        ),
        (
            lambda r: "-race" in r.path,
            "if-none-match",
            "8 of 8 simultaneous PUTs with If-None-Match: * made the same key",
        ),
    ],
)
def test_a_store_that_ignores_a_condition_is_refused(
    s3: FakeS3, store: S3Store, when: Callable[[Request], bool], header: str, shown: str
) -> None:
    s3.proxy.semantics.ignored.append((when, header))
    for call in (
        lambda: store.create("a", b""),
        lambda: store.put("a", b""),
        lambda: store.delete("a"),
    ):
        with pytest.raises(BadInput, match=f"does not keep S3's promises.*{re.escape(shown)}"):
            call()
    assert names(s3, store) == []


@pytest.mark.parametrize("algorithm", ["CRC64NVME", "SHA256"])
def test_the_probe_sends_the_requests_of_an_upload(
    s3: FakeS3, tmp_path: Path, algorithm: str
) -> None:
    store = s3.store(tmp_path, probed=False, s3_checksum=algorithm, s3_kms_key_id="alias/yard")
    store.upload_ranged("a", ranges(content(PART + 1)))

    def shape(request: Request) -> tuple[set[str], set[bytes]]:
        ours = {name for name in request.headers if name.startswith(("x-amz-", "if-"))}
        return ours - {"x-amz-date"}, set(re.findall(rb"<(\w+)>", request.body))

    kinds: list[Callable[[Request], bool]] = [
        lambda r: r.begins_upload,
        lambda r: r.is_part,
        lambda r: r.is_complete,
    ]
    for kind in kinds:
        sent = [request for request in s3.proxy.requests if kind(request)]
        probe = [shape(each) for each in sent if "/probe/" in each.path]
        upload = [shape(each) for each in sent if "/probe/" not in each.path]
        assert len(probe) == 1
        assert all(each == probe[0] for each in upload)
        assert any("checksum" in name for name in probe[0][0])


def test_a_part_whose_checksum_cannot_be_kept_is_no_condition_that_held(
    s3: FakeS3, store: S3Store
) -> None:
    s3.proxy.fail(lambda r: r.is_complete, answer=Answer.error(400, "InvalidPart"), times=100)
    with pytest.raises(BadInput, match="S3 says InvalidPart"):
        store.create("a", b"")


def test_the_fake_refuses_a_checksum_that_was_not_announced(s3: FakeS3, store: S3Store) -> None:
    from botocore.exceptions import ClientError

    place = {"Bucket": store._bucket.place.bucket, "Key": "a"}
    client = store._bucket.client
    begun = client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")
    upload = {"UploadId": begun["UploadId"], "PartNumber": 1}
    data = Checksums("CRC64NVME").of(b"x")
    with pytest.raises(ClientError, match="InvalidRequest"):
        client.upload_part(**place, **upload, Body=b"x", ChecksumCRC64NVME=data.text)


def test_a_store_that_knows_no_conditions_is_refused(s3: FakeS3, store: S3Store) -> None:
    unknown = Answer.error(501, "NotImplemented")
    s3.proxy.fail(lambda r: "if-match" in r.headers and is_put(r), answer=unknown, times=100)
    with pytest.raises(BadInput, match="it answers NotImplemented to a conditional write"):
        store.create("a", b"")


def test_a_probe_that_is_forbidden_says_what_is_needed(s3: FakeS3, store: S3Store) -> None:
    s3.proxy.fail(
        lambda r: "/.trainyard/" in r.path, answer=Answer.error(403, "AccessDenied"), times=100
    )
    with pytest.raises(BadInput, match=r"Cannot probe s3://.*Give the role or user the S3 actions"):
        store.create("a", b"")
