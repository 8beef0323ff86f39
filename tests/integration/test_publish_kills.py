"""Publications that are killed at random moments leave nothing that cannot be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fake_s3 import FakeS3, fake_s3
from tests.killed_store_work import KILLS, Job, run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def s3() -> Iterator[FakeS3]:
    with fake_s3() as running:
        yield running


@pytest.mark.parametrize(("place", "rounds"), KILLS)
def test_whoever_kills_it_no_release_names_what_is_not_there(
    place: str, rounds: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fake = request.getfixturevalue("s3").place() if place == "s3" else {}
    reports = run(Job("publish", str(tmp_path), rounds, 1, s3=fake))

    assert len(reports) == rounds
    assert [each for each in reports if each["wrong"] or not each["finished"]] == []
    assert [each["code"] for each in reports] == [-9] * rounds
