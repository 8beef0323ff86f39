"""One namespace for a run of the tests, and nothing of it left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.place import Missing, Place, place, told

from trainyard.kubernetes.client import Cluster


@pytest.fixture(scope="session")
def shared() -> Iterator[Path]:
    """A folder that pods see too."""
    if told("SHARED"):
        folder = Path(tempfile.mkdtemp(prefix="trainyard-test-", dir=told("SHARED")))
    else:
        folder = Path(tempfile.mkdtemp(prefix="trainyard-test-"))
    # Pods may run as another user than the tests.
    os.chmod(folder, 0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def here(shared: Path) -> Iterator[Place]:
    """The place where pods of this run are."""
    try:
        with place(shared) as found:
            yield found
    except Missing as missing:
        pytest.fail(f"Something is missing for the tests of a real cluster: {missing}")


@pytest.fixture
def cluster(here: Place) -> Cluster:
    """The cluster's API as the tests' own user."""
    return here.cluster
