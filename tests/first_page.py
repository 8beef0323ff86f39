"""One process that answers one request, for `benchmarks/page.py`: the first one of an API server.

    python tests/first_page.py HOME cold|warm

Prints, as JSON, what the warming took (if there was any) and what the request took, in seconds: of
the clock and of the processor. As in an API server, FastAPI is loaded before; nothing of ours is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from trainyard_airflow.page.mounted import MountedPage

REPOSITORY = Path(__file__).parents[1]


class Anybody:
    """A login that lets everybody do everything."""

    @property
    def user(self) -> Callable[..., Awaitable[Any]]:
        """Return who asks."""

        async def who(request: Request) -> Any:
            return SimpleNamespace(get_name=lambda: "ada")

        return who

    def may(self, user: Any, act: str, dag_id: str) -> bool:
        """Tell that they may."""
        return True


def make(home: Path) -> FastAPI:
    """Return the page of a store in a folder, as the API server makes it."""
    from trainyard.settings import Settings
    from trainyard.store.folder import FolderStore
    from trainyard_airflow.page.app import create_page

    settings = Settings(home=home, environments=REPOSITORY / "dags" / "environments.yaml")
    return create_page(access=Anybody(), settings=settings, store=FolderStore(home / "store"))


def took(act: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that `act` takes: of the clock, and of the processor."""
    passed, processor = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - passed, time.process_time() - processor


def main() -> None:
    home, how = Path(sys.argv[1]), sys.argv[2]
    page = MountedPage(lambda: make(home))
    outer = FastAPI()
    outer.get("/else")(lambda: {})
    outer.mount("/trainyard", page)
    client = TestClient(outer)

    def ask() -> None:
        answer = client.get("/trainyard/")
        assert answer.status_code == 200, answer.text
        assert '<tr class="row">' in answer.text

    # The server has answered something else before; the client is no part of what is measured.
    assert client.get("/else").status_code == 200
    found = {}
    if how == "warm":
        found["warming"] = took(page.warm)
        # By then nothing is fresh any more.
        time.sleep(1.5)
    found["request"] = took(ask)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
