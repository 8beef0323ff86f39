from __future__ import annotations

from pathlib import Path

import pytest
from tests.fake_s3 import FakeS3
from tests.unit.store.conformance import StoreConformance

from trainyard.store.s3 import S3Store


@pytest.fixture
def store(s3: FakeS3, tmp_path: Path) -> S3Store:
    return s3.store(tmp_path)


class TestConformance(StoreConformance):
    pass
