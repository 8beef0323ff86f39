"""One filled store for all tests of the page that only look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tests.page_world import FakeAccess, PageWorld


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> PageWorld:
    """A store in which a rollout is under way."""
    made = PageWorld(tmp_path_factory.mktemp("page"))
    made.fill()
    return made


@pytest.fixture
def access(world: PageWorld) -> Iterator[FakeAccess]:
    """Who looks; back to somebody who may do everything afterwards."""
    yield world.access
    world.access.name, world.access.allowed = "ada", None


@pytest.fixture
def client(world: PageWorld, access: FakeAccess) -> TestClient:
    """The page, mounted where Airflow mounts it."""
    return mounted(world)


def mounted(world: PageWorld) -> TestClient:
    outer = FastAPI()
    outer.mount("/trainyard", world.app())
    return TestClient(outer)
