"""The proxy and fake servers as real processes, in a home that the tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from tests.serving_world import PATIENCE_S, FakeServer, environment_of, eventually, start_fake

from trainyard.serving.local_router import LocalRouter
from trainyard.serving.protocol import RouteStatus
from trainyard.serving.records import proxy_url
from trainyard.settings import Settings
from trainyard.store.folder import FolderStore

RUN_PROXY = """
from trainyard.serving.proxy import run_proxy
from trainyard.settings import get_settings
run_proxy(get_settings())
"""


@dataclass
class Yard:
    """A home with a proxy that can be killed, and servers."""

    settings: Settings
    proxy: subprocess.Popen[bytes] | None = None
    servers: list[FakeServer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = FolderStore(self.settings.store_root)
        self.router = LocalRouter(self.settings)

    def start_proxy(self) -> str:
        """Start the proxy and return its URL."""
        self.settings.home.mkdir(parents=True, exist_ok=True)
        with (self.settings.home / "proxy.log").open("ab") as log:
            self.proxy = subprocess.Popen(
                [sys.executable, "-c", RUN_PROXY],
                env={**os.environ, **environment_of(self.settings)},
                stdout=log,
                stderr=log,
            )
        return eventually(self._answering_url, why="the proxy answers")

    def _answering_url(self) -> str | None:
        assert self.proxy is not None
        assert self.proxy.poll() is None, self.log
        url = proxy_url(self.settings)
        with suppress(httpx.HTTPError):
            if url and httpx.get(f"{url}/-/health").status_code == 200:
                return url
        return None

    @property
    def log(self) -> str:
        """What the proxy printed."""
        return (self.settings.home / "proxy.log").read_text()

    def end_proxy(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the proxy and return its exit code."""
        assert self.proxy is not None
        self.proxy.send_signal(number)
        return self.proxy.wait(timeout=PATIENCE_S)

    def serve(self, release_id: str, index: int = 0, *, model: str) -> FakeServer:
        """Start a server of a release."""
        server = start_fake(self.settings, release_id, index, model=model)
        self.servers.append(server)
        return server

    def status(self, model: str) -> RouteStatus:
        """Return what the proxy does for a model."""
        return eventually(lambda: self.router.status("staging", model), why="a status")

    def end(self) -> None:
        """Leave nothing running."""
        for server in self.servers:
            server.process.stop(0)
        if self.proxy is not None and self.proxy.poll() is None:
            self.end_proxy()


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    """A home of the test's own."""
    made = Yard(Settings(home=tmp_path / "home"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def shared_yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """A home with a running proxy for tests that use models of their own."""
    made = Yard(Settings(home=tmp_path_factory.mktemp("yard") / "home"))
    made.start_proxy()
    yield made
    made.end()
