"""A store with three releases, made once and copied for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fake_s3 import ENVIRONMENT, FakeS3, fake_s3
from tests.unit.care.world import release, serve
from tests.unit.yard import Yard


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a home in which one release serves, one did before, and one is nobody's."""
    home = tmp_path_factory.mktemp("care") / "home"
    yard = Yard(home)
    ids = [release(yard, revision) for revision in ("v1", "v2", "v3")]
    serve(yard, ids[1], ids[0])
    return home


@pytest.fixture
def yard(template: Path, tmp_path: Path) -> Yard:
    """A yard of three releases: one serves, one is its predecessor, one is nobody's."""
    shutil.copytree(template, tmp_path / "home")
    return Yard(tmp_path / "home")


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


@pytest.fixture
def s3_place(s3: FakeS3) -> dict[str, str]:
    """A new bucket, for a process that works in it."""
    return s3.place()
