from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.fake_s3 import FakeS3
from tests.faulty_proxy import Answer, Fault, Request
from tests.unit.store.conformance import (
    PART,
    StoreConformance,
    content,
    never_read,
    ranges,
    sha256,
    together,
)

from trainyard.errors import BadInput, Conflict, NotFound, StorageFull, Transient
from trainyard.settings import Settings
from trainyard.store.parts import _BUDGET, IN_FLIGHT_BYTES, Ranges
from trainyard.store.s3 import S3Store
from trainyard.store.s3_client import AwsCredentials, S3Place
from trainyard.store.s3_contents import record_key
from trainyard.store.s3_errors import s3_error
from trainyard.store.s3_multipart import MultipartUpload

BUSY = Answer.error(503, "SlowDown")
RACE = Answer.error(409, "ConditionalRequestConflict")


@pytest.fixture
def store(s3: FakeS3, tmp_path: Path) -> S3Store:
    return s3.store(tmp_path)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither botocore's pauses nor ours: a test waits for nothing."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr("trainyard.store.s3_bucket._LONGEST_PAUSE_S", 0.001)


def is_get(request: Request) -> bool:
    return request.method == "GET"


def is_write(request: Request) -> bool:
    return request.is_write


def unfinished(s3: FakeS3, store: S3Store) -> list[str]:
    """The names of the uploads that nobody ended."""
    found = s3.client.list_multipart_uploads(Bucket=store._bucket.place.bucket)
    return [each["Key"] for each in found.get("Uploads", [])]


class TestConformance(StoreConformance):
    pass


class TestConformanceAtTheTopOfABucket(StoreConformance):
    @pytest.fixture
    def store(self, s3: FakeS3, tmp_path: Path) -> S3Store:
        return s3.store(tmp_path, prefix="")

    # What many writers do does not depend on the prefix.
    test_of_64_writers_of_one_document_one_wins = None  # type: ignore[assignment]
    test_of_64_replacers_of_one_version_one_wins = None  # type: ignore[assignment]
    test_32_writers_of_a_channel_lose_no_update = None  # type: ignore[assignment]


class TestConformanceWithSha256(StoreConformance):
    @pytest.fixture
    def store(self, s3: FakeS3, tmp_path: Path) -> S3Store:
        return s3.store(tmp_path, s3_checksum="SHA256")

    test_of_64_writers_of_one_document_one_wins = None  # type: ignore[assignment]
    test_of_64_replacers_of_one_version_one_wins = None  # type: ignore[assignment]
    test_32_writers_of_a_channel_lose_no_update = None  # type: ignore[assignment]


@pytest.mark.aws
class TestConformanceOfARealBucket(StoreConformance):
    """Against the bucket and prefix of TRAINYARD_TEST_S3_URL; what it makes there is removed."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[S3Store]:
        url = os.environ.get("TRAINYARD_TEST_S3_URL", "")
        if not url:
            pytest.skip("TRAINYARD_TEST_S3_URL names no bucket")
        store = S3Store(
            Settings(home=tmp_path, store=f"{url.rstrip('/')}/{tmp_path.name}", s3_part_bytes=PART)
        )
        yield store
        for entry in store.list(""):
            store.delete(entry.key)


class TestPlace:
    @pytest.mark.parametrize(
        ("url", "place", "again"),
        [
            ("s3://bucket", S3Place("bucket", ""), "s3://bucket"),
            ("s3://my.bucket-1/", S3Place("my.bucket-1", ""), "s3://my.bucket-1"),
            ("s3://bucket/a/b/", S3Place("bucket", "a/b"), "s3://bucket/a/b"),
        ],
    )
    def test_urls(self, url: str, place: S3Place, again: str) -> None:
        assert S3Place.parse(url) == place
        assert place.url == again

    @pytest.mark.parametrize(
        "url",
        [
            "s3://",
            "s3:///x",
            "s3://Bucket/x",
            "s3://key:secret@bucket/x",
            "s3://bucket:9000/x",
            "s3://bucket/x?region=y",
            "s3://bucket/../x",
            "s3://bucket/a//b",
        ],
    )
    def test_what_is_no_place(self, url: str, tmp_path: Path) -> None:
        with pytest.raises(BadInput):
            S3Store(Settings(home=tmp_path, store=url))

    def test_nothing_is_asked_of_a_store_that_is_only_opened(
        self, s3: FakeS3, tmp_path: Path
    ) -> None:
        s3.proxy.reset()
        S3Store(s3.settings(tmp_path, "s3://nothing"))
        assert s3.proxy.requests == []

    def test_parts_that_fill_the_memory_are_refused(self, tmp_path: Path) -> None:
        assert Settings(home=tmp_path, s3_part_bytes=64 << 20).s3_part_bytes == 64 << 20
        with pytest.raises(ValidationError, match="s3_part_bytes"):
            Settings(home=tmp_path, s3_part_bytes=(64 << 20) + 1)

    def test_secrets_are_not_shown(self) -> None:
        assert "hush" not in repr(AwsCredentials("id", "hush-key", "hush-token"))


class TestObjects:
    def test_keys_are_names_below_the_prefix(self, s3: FakeS3, store: S3Store) -> None:
        store.create("a/b.json", b"one")
        bucket = store._bucket.place.bucket
        found = s3.client.get_object(Bucket=bucket, Key="yard/a/b.json")
        assert found["Body"].read() == b"one"

    def test_what_is_not_ours_is_not_listed(self, s3: FakeS3, store: S3Store) -> None:
        bucket = store._bucket.place.bucket
        for name in ("yard/", "yard/folder/", "yard/.trainyard/x", "yardling", "other/x"):
            s3.client.put_object(Bucket=bucket, Key=name, Body=b"")
        version = store.create("a", b"")
        assert [(found.key, found.version) for found in store.list("")] == [("a", version)]

    def test_its_own_folder_has_no_keys(self, store: S3Store) -> None:
        for key in (".trainyard", ".trainyard/probe/x"):
            with pytest.raises(BadInput, match="store's own folder"):
                store.create(key, b"")

    def test_a_name_that_is_too_long(self, store: S3Store) -> None:
        with pytest.raises(BadInput, match="too long"):
            store.create("ä" * 520, b"")

    def test_a_version_that_would_match_anything_matches_nothing(self, store: S3Store) -> None:
        store.create("a", b"one")
        for version in ("", "*"):
            with pytest.raises(Conflict):
                store.replace("a", b"two", version=version)
            with pytest.raises(Conflict):
                store.delete("a", version=version)
        assert store.read("a").data == b"one"

    def test_everything_is_encrypted_as_told(self, s3: FakeS3, tmp_path: Path) -> None:
        store = s3.store(tmp_path, s3_kms_key_id="alias/yard")
        store.create("document", b"x")
        store.upload("small", io.BytesIO(b"x"))
        store.upload_ranged("large", ranges(content(PART + 1)))
        for key in ("document", "small", "large"):
            found = s3.client.head_object(Bucket=store._bucket.place.bucket, Key=f"yard/{key}")
            assert found["ServerSideEncryption"] == "aws:kms"
            assert found["SSEKMSKeyId"] == "alias/yard"
        begun = [r for r in s3.proxy.requests if r.is_write or r.begins_upload]
        name = "x-amz-server-side-encryption-bucket-key-enabled"
        # The fourth is the store's own record of the large file's hash.
        assert [r.headers[name].lower() for r in begun] == ["true"] * 4

    def test_every_byte_is_sent_with_a_checksum(self, s3: FakeS3, store: S3Store) -> None:
        store.create("document", b"x")
        store.upload_ranged("large", ranges(content(2 * PART)))
        sent = [r for r in s3.proxy.requests if r.method == "PUT"]
        # The document, two parts, and the store's own record of the large file's hash.
        assert len(sent) == 4
        assert all("x-amz-checksum-crc64nvme" in r.headers for r in sent)

    def test_small_files_count_too_among_what_is_in_memory(self, store: S3Store) -> None:
        data = content(1000)

        def all_is_free() -> bool:
            free = _BUDGET.take(IN_FLIGHT_BYTES, wait=False)
            if free:
                _BUDGET.give(IN_FLIGHT_BYTES)
            return free

        class Watched(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                assert not all_is_free()
                return super().read(size)

        def read(start: int, size: int) -> bytes:
            assert not all_is_free()
            return data[start : start + size]

        store.upload("a", Watched(data))
        store.upload_ranged("b", Ranges(len(data), "b", read))
        with pytest.raises(Conflict):
            store.upload("a", Watched(data[1:]))
        assert all_is_free()

    def test_a_store_of_another_account_is_refused(self, s3: FakeS3, tmp_path: Path) -> None:
        store = s3.store(tmp_path, s3_expected_bucket_owner="999999999999")
        for call in (
            lambda: store.read("a"),
            lambda: store.put("a", b""),
            lambda: list(store.list("")),
            lambda: store.upload_ranged("a", ranges(content(PART + 1))),
        ):
            with pytest.raises(BadInput, match="TRAINYARD_S3_EXPECTED_BUCKET_OWNER"):
                call()


class TestLostAnswers:
    """A write is done, but its answer does not arrive; botocore tries again and meets it."""

    @pytest.mark.parametrize("answer", [BUSY, None])
    def test_a_create_knows_its_own_work(
        self, s3: FakeS3, store: S3Store, answer: Answer | None
    ) -> None:
        fault = s3.proxy.fail(is_write, answer=answer, done_all_the_same=True)
        version = store.create("a", b"one")
        assert fault.hits == 1
        assert store.read("a").version == version

    def test_and_that_of_others(self, s3: FakeS3, store: S3Store) -> None:
        store.create("a", b"theirs")
        s3.proxy.fail(is_write, answer=BUSY)
        with pytest.raises(Conflict):
            store.create("a", b"ours")
        assert store.read("a").data == b"theirs"

    def test_also_when_it_met_itself_on_the_way(self, s3: FakeS3, store: S3Store) -> None:
        s3.proxy.fail(is_write, answer=BUSY, done_all_the_same=True)
        s3.proxy.fail(is_write, answer=RACE)
        version = store.create("a", b"one")
        assert store.read("a").version == version
        s3.proxy.fail(is_write, answer=BUSY, done_all_the_same=True)
        s3.proxy.fail(is_write, answer=RACE)
        version = store.replace("a", b"two", version=version)
        assert store.read("a").version == version
        s3.proxy.fail(lambda r: r.method == "DELETE", answer=BUSY, done_all_the_same=True)
        s3.proxy.fail(lambda r: r.method == "DELETE", answer=RACE)
        store.delete("a", version=version)
        assert not store.exists("a")

    def test_a_replace_knows_its_own_work(self, s3: FakeS3, store: S3Store) -> None:
        first = store.create("a", b"one")
        s3.proxy.fail(is_write, answer=BUSY, done_all_the_same=True)
        second = store.replace("a", b"two", version=first)
        assert store.read("a").version == second

    def test_a_delete_knows_its_own_work(self, s3: FakeS3, store: S3Store) -> None:
        version = store.create("a", b"one")
        s3.proxy.fail(lambda r: r.method == "DELETE", answer=BUSY, done_all_the_same=True)
        store.delete("a", version=version)
        assert not store.exists("a")

    def test_a_small_upload_knows_its_own_work(self, s3: FakeS3, store: S3Store) -> None:
        s3.proxy.fail(is_write, answer=BUSY, done_all_the_same=True)
        assert store.upload("a", io.BytesIO(b"one")).sha256 == sha256(b"one")

    @pytest.mark.parametrize("answer", [BUSY, None])
    def test_the_end_of_a_large_upload_knows_its_own_work(
        self, s3: FakeS3, store: S3Store, answer: Answer | None
    ) -> None:
        data = content(2 * PART)
        fault = s3.proxy.fail(
            lambda r: r.is_complete, answer=answer, done_all_the_same=True, times=1
        )
        assert store.upload_ranged("a", ranges(data)).sha256 == sha256(data)
        assert fault.hits == 1
        assert store.read("a").data == data


class TestStorms:
    @pytest.fixture
    def store(self, s3: FakeS3, tmp_path: Path) -> S3Store:
        # A client of its own: botocore allows each only so many retries in a row.
        return s3.store(tmp_path, s3_attempts=5)

    def test_a_short_one_is_sat_out(self, s3: FakeS3, store: S3Store) -> None:
        for status, code in ((503, "SlowDown"), (500, "InternalError")):
            s3.proxy.fail(lambda r: True, answer=Answer.error(status, code), times=2)
        version = store.create("a", b"one")
        assert store.read("a").version == version

    @pytest.mark.parametrize("status", [500, 503])
    def test_a_long_one_is_transient_and_changes_nothing(
        self, s3: FakeS3, store: S3Store, status: int
    ) -> None:
        version = store.create("a", b"one")
        storm = s3.proxy.fail(lambda r: True, answer=Answer.error(status, "SlowDown"), times=10_000)
        calls: list[Callable[[], object]] = [
            lambda: store.read("a"),
            lambda: store.exists("a"),
            lambda: store.create("b", b""),
            lambda: store.replace("a", b"", version=version),
            lambda: store.put("a", b""),
            lambda: store.delete("a"),
            lambda: store.open("a"),
            lambda: list(store.list("")),
            lambda: store.upload("b", io.BytesIO(b"x")),
            lambda: store.upload_ranged("b", ranges(content(PART + 1))),
        ]
        for call in calls:
            before = storm.hits
            with pytest.raises(Transient, match=rf"S3 says (SlowDown|{status})"):
                call()
            # No layer of ours repeats what botocore has tried five times.
            assert 0 < storm.hits - before <= 5
        s3.proxy.faults.clear()
        assert [(each.key, each.version) for each in store.list("")] == [("a", version)]

    def test_parts_that_fail_are_sent_again(self, s3: FakeS3, store: S3Store) -> None:
        data = content(6 * PART)

        def fail(number: str, **how: object) -> Fault:
            return s3.proxy.fail(
                lambda request: request.is_part and request.query["partNumber"] == number, **how
            )

        # Each part has its own failures: of common ones a part could get more than it has tries.
        numbers = [str(number) for number in range(1, 7)]
        faults = [fail(number, answer=BUSY, times=2) for number in numbers]
        faults += [fail(number) for number in numbers]
        assert store.upload_ranged("a", ranges(data)).sha256 == sha256(data)
        assert [fault.hits for fault in faults] == [2] * 6 + [1] * 6

    def test_a_full_store_says_so(self, s3: FakeS3, store: S3Store) -> None:
        full = Answer.error(507, "XMinioStorageFull")
        s3.proxy.fail(is_write, answer=full, times=100)
        with pytest.raises(StorageFull, match="Make room"):
            store.put("a", b"x")


class TestRaces:
    def test_a_race_is_tried_again(self, s3: FakeS3, store: S3Store) -> None:
        races = s3.proxy.fail(is_write, answer=RACE, times=3)
        version = store.create("a", b"one")
        races.hits = 0
        version = store.replace("a", b"two", version=version)
        assert store.read("a").version == version
        s3.proxy.fail(lambda r: r.method == "DELETE", answer=RACE, times=3)
        store.delete("a", version=version)
        assert not store.exists("a")

    def test_one_without_end_changes_nothing(self, s3: FakeS3, store: S3Store) -> None:
        version = store.create("a", b"one")
        s3.proxy.fail(lambda r: r.method in {"PUT", "DELETE"}, answer=RACE, times=10_000)
        with pytest.raises(Transient, match="at the same moment"):
            store.create("b", b"")
        for call in (
            lambda: store.replace("a", b"two", version=version),
            lambda: store.delete("a", version=version),
        ):
            with pytest.raises(Conflict):
                call()
        assert store.read("a").data == b"one"

    def test_a_large_upload_whose_end_met_another_begins_anew(
        self, s3: FakeS3, store: S3Store
    ) -> None:
        data = content(2 * PART)
        s3.proxy.fail(lambda r: r.is_complete, answer=RACE)
        assert store.upload_ranged("a", ranges(data)).sha256 == sha256(data)
        begun = [r for r in s3.proxy.requests if r.begins_upload]
        assert len(begun) == 2

    def test_an_upload_that_somebody_ended_begins_anew(self, s3: FakeS3, store: S3Store) -> None:
        data = content(4 * PART)
        ended: list[str] = []
        only_once = threading.Lock()

        def read(start: int, size: int) -> bytes:
            # Parts are read by several threads; one of them ends the upload.
            if start >= 2 * PART and only_once.acquire(blocking=False):
                place = {"Bucket": store._bucket.place.bucket}
                for each in s3.client.list_multipart_uploads(**place)["Uploads"]:
                    ended.append(each["UploadId"])
                    s3.client.abort_multipart_upload(
                        **place, Key=each["Key"], UploadId=each["UploadId"]
                    )
            return data[start : start + size]

        assert store.upload_ranged("a", Ranges(len(data), "a", read)).sha256 == sha256(data)
        assert ended
        assert store.read("a").data == data

    def test_of_many_that_store_one_large_file_all_end_with_it(
        self, s3: FakeS3, store: S3Store
    ) -> None:
        data = content(3 * PART)
        found: list[str] = []
        together(4, lambda number: found.append(store.upload_ranged("a", ranges(data)).sha256))
        assert found == [sha256(data)] * 4
        assert store.read("a").data == data


class TestCutAnswers:
    def test_a_document_is_read_again(self, s3: FakeS3, store: S3Store) -> None:
        store.create("a", b"x" * 1000)
        s3.proxy.fail(is_get, cut_after=500, times=3)
        assert store.read("a").data == b"x" * 1000

    def test_but_not_for_ever(self, s3: FakeS3, store: S3Store) -> None:
        store.create("a", b"x" * 1000)
        cuts = s3.proxy.fail(is_get, cut_after=500, times=1000)
        with pytest.raises(Transient):
            store.read("a")
        assert cuts.hits == store._bucket.settings.s3_attempts

    def test_a_stream_goes_on_where_it_was_cut(self, s3: FakeS3, store: S3Store) -> None:
        data = content(3_000_000)
        store.upload("a", io.BytesIO(data))
        s3.proxy.reset()
        s3.proxy.fail(is_get, cut_after=1_000_000, times=2)
        with store.open("a") as stream:
            assert stream.read() == data
        asked = [r.headers.get("range", "") for r in s3.proxy.requests]
        assert asked == ["", "bytes=1000000-", "bytes=2000000-"]

    def test_so_does_a_range(self, s3: FakeS3, store: S3Store) -> None:
        data = content(3_000_000)
        store.upload("a", io.BytesIO(data))
        s3.proxy.reset()
        s3.proxy.fail(is_get, cut_after=500_000)
        with store.open_range("a", 1_000_000, 1_000_000) as stream:
            assert stream.read() == data[1_000_000:2_000_000]
        asked = [r.headers["range"] for r in s3.proxy.requests]
        assert asked == ["bytes=1000000-1999999", "bytes=1500000-1999999"]

    def test_a_stream_that_gets_nowhere_ends(self, s3: FakeS3, store: S3Store) -> None:
        store.upload("a", io.BytesIO(content(1_000_000)))
        s3.proxy.fail(is_get, cut_after=0, times=1000)
        with store.open("a") as stream, pytest.raises(Transient, match="Cannot read"):
            stream.read()

    def test_what_took_its_place_meanwhile_is_not_mixed_in(
        self, s3: FakeS3, store: S3Store
    ) -> None:
        store.put("a", content(2_000_000))
        s3.proxy.fail(is_get, cut_after=1_000_000)
        with store.open("a") as stream:
            store.put("a", content(2_000_000, seed=1))
            with pytest.raises(Conflict, match="changed by somebody else"):
                stream.read()

    def test_a_stream_whose_file_is_removed_meanwhile(self, s3: FakeS3, store: S3Store) -> None:
        store.put("a", content(2_000_000))
        s3.proxy.fail(is_get, cut_after=1_000_000)
        with store.open("a") as stream:
            store.delete("a")
            with pytest.raises(NotFound):
                stream.read()


class TestSilence:
    @pytest.fixture
    def store(self, s3: FakeS3, tmp_path: Path) -> S3Store:
        # Long enough for a machine that is busy with other tests.
        return s3.store(tmp_path, s3_timeout_s=1.0, s3_attempts=2)

    def test_a_request_that_is_not_answered_is_given_up(self, s3: FakeS3, store: S3Store) -> None:
        store.create("a", b"one")
        s3.proxy.fail(lambda r: True, silent=True, times=1000)
        for call in (
            lambda: store.read("a"),
            lambda: store.put("a", b""),
            lambda: list(store.list("")),
            lambda: store.upload_ranged("b", ranges(content(PART + 1))),
        ):
            with pytest.raises(Transient, match="Check the network"):
                call()

    def test_one_silence_is_sat_out(self, s3: FakeS3, tmp_path: Path) -> None:
        store = s3.store(tmp_path, s3_timeout_s=1.0, s3_attempts=4)
        data = content(PART + 1)
        s3.proxy.fail(lambda r: r.is_part, silent=True)
        assert store.upload_ranged("a", ranges(data)).sha256 == sha256(data)

    def test_nobody_there(self, s3: FakeS3, tmp_path: Path) -> None:
        nowhere = s3.settings(
            tmp_path, "s3://bucket", s3_endpoint_url="http://127.0.0.1:9", s3_attempts=2
        )
        with pytest.raises(Transient, match="Check the network and the endpoint"):
            S3Store(nowhere).read("a")


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "code", "hint"),
        [
            (403, "AccessDenied", "Give the role or user the S3 actions"),
            (403, "InvalidAccessKeyId", "Check the credentials"),
            (403, "SignatureDoesNotMatch", "Check the credentials"),
            (403, "RequestTimeTooSkewed", "Set the clock"),
            (400, "KMS.NotFoundException", "TRAINYARD_S3_KMS_KEY_ID"),
            (400, "AuthorizationHeaderMalformed", "TRAINYARD_S3_REGION"),
            (404, "NoSuchBucket", "Correct TRAINYARD_STORE"),
            (400, "Surprise", "docs/store.md"),
        ],
    )
    def test_are_bad_input_with_a_hint(
        self, s3: FakeS3, store: S3Store, status: int, code: str, hint: str
    ) -> None:
        s3.proxy.fail(lambda r: True, answer=Answer.error(status, code), times=1000)
        calls: list[Callable[[], Any]] = [
            lambda: store.read("a"),
            lambda: store.create("a", b""),
            lambda: store.open("a"),
            lambda: list(store.list("")),
            lambda: store.upload("a", io.BytesIO(content(PART + 1))),
        ]
        for call in calls:
            with pytest.raises(BadInput, match=f"S3 says {code} .*{hint}") as raised:
                call()
            assert not isinstance(raised.value, NotFound)

    def test_a_look_that_is_forbidden_is_no_absence(self, s3: FakeS3, store: S3Store) -> None:
        s3.proxy.fail(lambda r: r.method == "HEAD", answer=Answer(403, {}, b""))
        with pytest.raises(BadInput, match="Give the role or user"):
            store.exists("a")

    def test_credentials_that_ran_out_are_worth_another_try(
        self, s3: FakeS3, store: S3Store
    ) -> None:
        s3.proxy.fail(lambda r: True, answer=Answer.error(400, "ExpiredToken"), times=100)
        with pytest.raises(Transient, match="ran out"):
            store.read("a")

    def test_also_where_the_answer_cannot_say_so(self, s3: FakeS3, store: S3Store) -> None:
        data = content(10)
        store.upload("a", io.BytesIO(data))
        s3.proxy.fail(lambda r: r.method == "HEAD", answer=Answer(400, {}, b""), times=100)
        ran_out = s3.proxy.fail(is_get, answer=Answer.error(400, "ExpiredToken"), times=100)
        calls: list[Callable[[], Any]] = [
            lambda: store.exists("a"),
            lambda: store.open_range("a", 0, 0),
            lambda: store.upload("a", io.BytesIO(data), sha256=sha256(data)),
        ]
        for call in calls:
            with pytest.raises(Transient, match="ran out"):
                call()
        ran_out.times = 0
        # Nothing is wrong with a GET: the refusal stands.
        with pytest.raises(BadInput, match="S3 says 400"):
            store.exists("a")
        assert [r.headers["range"] for r in s3.proxy.requests if is_get(r)] == ["bytes=0-0"] * 4

    def test_too_many_requests_are_worth_another_try(self, s3: FakeS3, store: S3Store) -> None:
        s3.proxy.fail(is_write, answer=Answer.error(429, "TooManyRequests"), times=100)
        with pytest.raises(Transient, match="TooManyRequests"):
            store.put("a", b"")

    def test_so_are_credentials_that_nobody_hands_out_now(self) -> None:
        from botocore.exceptions import CredentialRetrievalError

        error = CredentialRetrievalError(provider="web-identity", error_msg="throttled")
        found = s3_error(error, "read", "s3://bucket/a")
        assert isinstance(found, Transient)
        assert "throttled" in str(found)

    def test_no_credentials(
        self, s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(BadInput, match=r"Unable to locate credentials.*TRAINYARD_AWS_CONN"):
            S3Store(s3.settings(tmp_path, "s3://bucket")).read("a")

    def test_no_such_profile(self, s3: FakeS3, tmp_path: Path) -> None:
        settings = s3.settings(tmp_path, "s3://bucket", s3_profile="nobody")
        with pytest.raises(BadInput, match="nobody"):
            S3Store(settings).read("a")

    def test_an_endpoint_that_is_none(self, s3: FakeS3, tmp_path: Path) -> None:
        settings = s3.settings(tmp_path, "s3://bucket", s3_endpoint_url="over there")
        with pytest.raises(BadInput, match="TRAINYARD_S3_ENDPOINT_URL"):
            S3Store(settings).read("a")

    def test_a_bit_that_was_flipped_on_the_way_is_noticed(self, s3: FakeS3, store: S3Store) -> None:
        s3.proxy.fail(lambda r: r.is_part or r.is_write, flip=True, times=2)
        with pytest.raises(Transient, match="BadDigest"):
            store.create("a", b"one")
        data = content(2 * PART)
        with pytest.raises(Transient, match="BadDigest"):
            store.upload_ranged("b", ranges(data))
        assert list(store.list("")) == []
        assert store.upload_ranged("b", ranges(data)).sha256 == sha256(data)


class TestResume:
    def cut(self, store: S3Store, data: bytes, at: int) -> None:
        def read(start: int, size: int) -> bytes:
            if start >= at:
                raise ConnectionResetError
            return data[start : start + size]

        with pytest.raises(ConnectionResetError):
            store.upload_ranged("a", Ranges(len(data), "a", read))

    def test_only_what_is_missing_is_moved(self, s3: FakeS3, store: S3Store) -> None:
        data = content(8 * PART + 5)
        self.cut(store, data, 6 * PART)
        assert s3.proxy.part_bytes[f"/{store._bucket.place.bucket}/yard/a"] == 6 * PART
        s3.proxy.reset()
        assert store.upload_ranged("a", ranges(data)).sha256 == sha256(data)
        assert s3.proxy.part_bytes[f"/{store._bucket.place.bucket}/yard/a"] == 2 * PART + 5
        assert store.read("a").data == data

    def test_a_part_with_other_content_is_moved_again(self, s3: FakeS3, store: S3Store) -> None:
        data = content(4 * PART)
        self.cut(store, data, 3 * PART)
        self.cut(store, content(PART, seed=1) + data[PART:], PART)
        s3.proxy.reset()
        assert store.upload_ranged("a", ranges(data)).sha256 == sha256(data)
        assert s3.proxy.part_bytes[f"/{store._bucket.place.bucket}/yard/a"] == 2 * PART
        assert store.read("a").data == data

    def test_parts_of_another_size_do_not_count(
        self, s3: FakeS3, store: S3Store, tmp_path: Path
    ) -> None:
        data = content(4 * PART)
        self.cut(store, data, 3 * PART)
        wider = S3Store(s3.settings(tmp_path, store.url, s3_part_bytes=PART + 1))
        wider._probed = True
        assert wider.upload_ranged("a", ranges(data)).sha256 == sha256(data)
        assert store.read("a").data == data

    def test_another_algorithm_begins_anew(
        self, s3: FakeS3, store: S3Store, tmp_path: Path
    ) -> None:
        data = content(3 * PART)
        self.cut(store, data, 2 * PART)
        other = S3Store(s3.settings(tmp_path, store.url, s3_checksum="SHA256"))
        other._probed = True
        assert other.upload_ranged("a", ranges(data)).sha256 == sha256(data)
        assert unfinished(s3, store) == []

    def test_older_uploads_of_the_key_are_given_up(self, s3: FakeS3, store: S3Store) -> None:
        data = content(3 * PART)
        for key in ("a", "a", "a.other"):
            MultipartUpload.new(store._bucket, key)
        self.cut(store, data, 2 * PART)
        assert sorted(unfinished(s3, store)) == ["yard/a", "yard/a.other"]
        assert store.upload_ranged("a", ranges(data)).sha256 == sha256(data)
        assert unfinished(s3, store) == ["yard/a.other"]

    def test_what_was_stored_of_parts_is_known_by_its_record(
        self, s3: FakeS3, store: S3Store
    ) -> None:
        data = content(2 * PART)
        entry = store.upload_ranged("a", ranges(data))
        s3.proxy.reset()
        nothing = Ranges(len(data), "one", never_read)
        assert store.upload_ranged("a", nothing, sha256=sha256(data)) == entry
        assert store.upload_ranged("a", nothing) == entry
        bucket = store._bucket.place.bucket
        assert [(r.method, r.path) for r in s3.proxy.requests] == [
            ("HEAD", f"/{bucket}/yard/a"),
            ("GET", f"/{bucket}/yard/.trainyard/contents/a.json"),
        ] * 2

    def test_other_names_for_the_content_are_compared_without_reading_it_back(
        self, s3: FakeS3, store: S3Store
    ) -> None:
        data = content(2 * PART)
        store.upload_ranged("a", ranges(data))
        s3.proxy.reset()
        assert store.upload_ranged("a", ranges(data, "another")).sha256 == sha256(data)
        assert {r.method for r in s3.proxy.requests if r.path.endswith("/yard/a")} == {"HEAD"}

    def test_a_record_of_another_version_says_nothing(self, s3: FakeS3, store: S3Store) -> None:
        data = content(2 * PART)
        store.upload_ranged("a", ranges(data))
        store.put("a", content(2 * PART, seed=1))
        with pytest.raises(Conflict, match="other content"):
            store.upload_ranged("a", ranges(data), sha256=sha256(data))

    def test_a_damaged_record_says_nothing(self, s3: FakeS3, store: S3Store) -> None:
        data = content(2 * PART)
        entry = store.upload_ranged("a", ranges(data))
        store._bucket.put(record_key("a"), b"{")
        assert store.upload("a", io.BytesIO(), sha256=sha256(data)) == entry

    def test_a_record_that_cannot_be_written_costs_nothing_else(
        self, s3: FakeS3, store: S3Store
    ) -> None:
        s3.proxy.fail(
            lambda r: "contents" in r.path, answer=Answer.error(403, "AccessDenied"), times=9
        )
        data = content(2 * PART)
        assert store.upload_ranged("a", ranges(data)).sha256 == sha256(data)

    def test_a_record_fits_into_a_name_or_is_not_made(self, s3: FakeS3, store: S3Store) -> None:
        data, key = content(2 * PART), "k" * 1010
        entry = store.upload_ranged(key, ranges(data))
        assert store.upload(key, io.BytesIO(), sha256=sha256(data)) == entry

    def test_without_a_record_it_is_read_back_several_parts_at_a_time(
        self, s3: FakeS3, store: S3Store
    ) -> None:
        data = content(2 * PART + 5)
        entry = store.upload_ranged("a", ranges(data))
        for _ in range(2):
            store._bucket.call("delete_object", record_key("a"))
            s3.proxy.reset()
            assert store.upload("a", io.BytesIO(), sha256=sha256(data)) == entry
            asked = [r for r in s3.proxy.requests if is_get(r) and r.path.endswith("/yard/a")]
            wanted = [(0, PART - 1), (PART, 2 * PART - 1), (2 * PART, 2 * PART + 4)]
            assert sorted(r.headers["range"] for r in asked) == sorted(
                f"bytes={first}-{last}" for first, last in wanted
            )
            assert all("if-match" in r.headers for r in asked)
        s3.proxy.reset()
        with pytest.raises(Conflict, match="other content"):
            store.upload("a", io.BytesIO(), sha256=sha256(b""))
        # It was remembered now.
        assert not [r for r in s3.proxy.requests if is_get(r) and r.path.endswith("/yard/a")]

    def test_but_not_if_another_took_its_place_meanwhile(self, s3: FakeS3, store: S3Store) -> None:
        store.upload_ranged("a", ranges(content(2 * PART)))
        found = store._bucket.head("a")
        assert found is not None
        store.put("a", content(2 * PART, seed=1))
        with pytest.raises(Conflict, match="changed by somebody else"):
            store._read_back("a", found)

    def test_a_stream_that_failed_leaves_no_upload(self, s3: FakeS3, store: S3Store) -> None:
        class Breaks(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                if self.tell() >= 2 * PART:
                    raise ConnectionResetError
                return super().read(size)

        with pytest.raises(ConnectionResetError):
            store.upload("a", Breaks(content(3 * PART)))
        assert unfinished(s3, store) == []

    @pytest.mark.parametrize("answer", [RACE, Answer.error(400, "InvalidPart")])
    def test_nor_does_one_whose_end_was_refused(
        self, s3: FakeS3, store: S3Store, answer: Answer
    ) -> None:
        s3.proxy.fail(lambda r: r.is_complete, answer=answer)
        with pytest.raises(Transient, match="Try again"):
            store.upload("a", io.BytesIO(content(2 * PART)))
        assert unfinished(s3, store) == []
