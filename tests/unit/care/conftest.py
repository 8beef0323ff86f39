"""A store with three releases, made once and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
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
