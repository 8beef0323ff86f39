"""A fake of S3 for the tests of the store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.fake_s3 import ENVIRONMENT, FakeS3, fake_s3


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FakeS3]:
    """A fake of S3 that all tests share."""
    with fake_s3() as running:
        yield running


@pytest.fixture
def s3(s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    """The fake, without faults, and credentials for it."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    s3_server.proxy.reset()
    return s3_server
