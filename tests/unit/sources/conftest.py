"""Sources behind a network: servers that end with the test, and no long waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.hub_server import HubServer

from trainyard.sources import retrying


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "LONGEST_WAIT_S", 0.01)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running
