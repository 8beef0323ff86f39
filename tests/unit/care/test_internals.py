"""What a store keeps for itself is seen, and removed when nobody goes on with it."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.fake_s3 import FakeS3
from tests.faulty_proxy import Answer
from tests.unit.care.world import POLICY, in_100_days
from tests.unit.store.conformance import PART, content, ranges
from tests.unit.yard import Yard

from trainyard.care.decide import decide_internals
from trainyard.care.facts import Facts
from trainyard.care.gc import Collected, Collection
from trainyard.care.usage import usage
from trainyard.store.locks import acquire_lock
from trainyard.store.parts import Ranges
from trainyard.store.protocol import Internal, Store
from trainyard.store.s3 import S3Store
from trainyard.store.s3_contents import record_key
from trainyard.store.s3_multipart import MultipartUpload

NOW = datetime(2026, 11, 27, tzinfo=UTC)
WEIGHTS = "checkpoints/adder/v1/model.safetensors"
MANIFEST = "checkpoints/adder/v1/manifest.json"


def internal(age_s: float, *, key: str = WEIGHTS, needed: bool = False) -> Internal:
    return Internal("upload", key, 7, NOW - timedelta(seconds=age_s), needed)


class TestDecision:
    def decide(self, found: Internal, **facts: dict[str, str]) -> tuple[bool, str]:
        (decision,) = decide_internals([found], Facts({}, **facts), NOW, POLICY)
        assert (decision.object.kind, decision.object.size) == ("internal", 7)
        return decision.keep, decision.reason

    def test_what_nobody_goes_on_with_goes(self) -> None:
        keep, reason = self.decide(internal(POLICY.grace_s + 1))
        assert not keep
        assert "was cut" in reason

    def test_what_is_young_stays(self) -> None:
        assert self.decide(internal(POLICY.grace_s - 1))[0]

    def test_what_is_used_stays(self) -> None:
        assert self.decide(internal(9 * POLICY.grace_s, needed=True))[0]

    def test_what_somebody_works_on_stays(self) -> None:
        keep, reason = self.decide(
            internal(9 * POLICY.grace_s), held={"checkpoints/adder/v1": "download"}
        )
        assert keep
        assert "download" in reason

    def test_what_belongs_to_others_stays(self) -> None:
        assert self.decide(internal(9 * POLICY.grace_s, key="holiday/pictures.tar"))[0]

    def test_what_is_about_no_key_goes(self) -> None:
        assert not self.decide(internal(9 * POLICY.grace_s, key=""))[0]


def collect(store: Store) -> Collected:
    return collection(store).run()


def collection(store: Store) -> Collection:
    return Collection(store, POLICY, pause_s=0.0, lock_s=60.0, now=in_100_days)


def names(store: Store) -> list[str]:
    return [each.name.partition(" of ")[2] or each.name for each in store.internals()]


@pytest.fixture
def bucket(s3: FakeS3, tmp_path: Path) -> S3Store:
    return s3.store(tmp_path)


def begin(store: S3Store, key: str) -> None:
    """Leave an upload of one part."""
    MultipartUpload.new(store._bucket, key).send_stream(content(PART), io.BytesIO())


class TestBucket:
    def test_uploads_that_were_cut_are_shown_and_ended(self, bucket: S3Store) -> None:
        begin(bucket, WEIGHTS)
        (decision,) = collection(bucket).look()
        assert not decision.keep
        (used,) = usage(Facts({}), [decision])
        assert (used.kind, used.model, used.size, used.freeable) == (
            "internal",
            "adder",
            PART,
            PART,
        )
        assert names(bucket) == [WEIGHTS]

        done = collect(bucket)
        assert [each.size for each in done.deleted] == [PART]
        assert names(bucket) == []

    def test_those_that_somebody_goes_on_with_stay(self, bucket: S3Store) -> None:
        begin(bucket, WEIGHTS)
        with acquire_lock(bucket, MANIFEST, work="download", duration_s=9e9, wait_s=0):
            assert collect(bucket).deleted == ()
        assert names(bucket) == [WEIGHTS]

    def test_those_of_others_in_the_bucket_stay(self, bucket: S3Store) -> None:
        begin(bucket, "holiday/pictures.tar")
        assert collect(bucket).deleted == ()

    def test_what_a_probe_left_goes_and_its_answer_stays(self, bucket: S3Store) -> None:
        for name in ("conditional-writes.json", "probe/1"):
            bucket._bucket.put(f".trainyard/{name}", b"{}")
        collect(bucket)
        assert names(bucket) == [".trainyard/conditional-writes.json"]

    def test_records_go_after_their_objects(self, bucket: S3Store) -> None:
        for key in ("evals/a/x", "evals/b/x"):
            bucket.upload_ranged(key, ranges(content(2 * PART)))
        bucket.delete("evals/a/x")
        kept = {each.name: each.needed for each in bucket.internals()}
        assert kept == {record_key("evals/a/x"): False, record_key("evals/b/x"): True}
        collect(bucket)
        # Nobody needs the other object either.
        assert not any(True for _ in bucket.list("evals"))
        assert names(bucket) == []

    def test_without_the_right_to_see_them_everything_else_goes_on(
        self, s3: FakeS3, bucket: S3Store
    ) -> None:
        begin(bucket, WEIGHTS)
        bucket.put("checkpoints/adder/v1/config.json", b"{}")
        said: list[str] = []
        s3.proxy.fail(
            lambda r: "uploads" in r.query, answer=Answer.error(403, "AccessDenied"), times=9
        )
        made = Collection(
            bucket, POLICY, pause_s=0.0, lock_s=60.0, now=in_100_days, say=said.append
        )
        assert [each.prefix for each in made.run().deleted] == ["checkpoints/adder/v1"]
        assert any("AccessDenied" in line for line in said)


class TestFolder:
    def cut(self, store: Store) -> None:
        data = content(3 << 23)

        def read(start: int, size: int) -> bytes:
            if start >= 2 << 23:
                raise ConnectionResetError
            return data[start : start + size]

        with pytest.raises(ConnectionResetError):
            store.upload_ranged(WEIGHTS, Ranges(len(data), "one", read))

    def test_beginnings_of_files_are_shown_and_removed(self, tmp_path: Path) -> None:
        store = Yard(tmp_path).store
        self.cut(store)
        (found,) = store.internals()
        assert found.size == 2 << 23

        done = collect(store)
        assert [each.size for each in done.deleted] == [2 << 23]
        assert list(store.internals()) == []
        assert list((store.root / ".trainyard" / "partial").iterdir()) == []

    def test_one_that_is_written_stays(self, tmp_path: Path) -> None:
        store = Yard(tmp_path).store
        self.cut(store)
        (found,) = store.internals()
        data = content(3 << 23)

        def read(start: int, size: int) -> bytes:
            store.remove_internal(found)
            return data[start : start + size]

        store.upload_ranged(WEIGHTS, Ranges(len(data), "one", read))
        assert store.read(WEIGHTS).data == data
