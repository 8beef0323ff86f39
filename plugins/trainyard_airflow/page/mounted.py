"""The page as Airflow's API server mounts it: made after the server's start, or by a request that
comes before that."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)


class MountedPage(FastAPI):
    """The page behind an application that costs nothing until the API server has started.

    Then a thread makes the page and reads what its first request would have to read, so that nobody
    waits for that. A store that does not answer, or settings that are wrong, stop no server: the
    page says what is wrong to whoever asks for it.

    Args:
        make: makes the page; from the settings of this installation unless a test says otherwise.
    """

    def __init__(self, make: Callable[[], FastAPI] | None = None) -> None:
        super().__init__(
            title="Trainyard", lifespan=_warmed, docs_url=None, redoc_url=None, openapi_url=None
        )
        self._make = make or _page_of_settings
        self._lock = threading.Lock()
        self._page: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        page = self._page
        if page is None:
            page = await run_in_threadpool(self.page)
        await page(scope, receive, send)

    def page(self) -> FastAPI:
        """Return the page; the first call makes it."""
        with self._lock:
            if self._page is None:
                self._page = self._make()
            return self._page

    def warm(self) -> None:
        """Make the page, and read what its first request needs. Raises nothing."""
        try:
            from trainyard_airflow.page.app import warm

            channels = warm(self.page())
        except Exception as error:
            # Of a thread: nobody else would see it. The next request does the same work again.
            log.warning("The Trainyard page is not ready for its first request: %s", error)
        else:
            log.info("The Trainyard page is ready, with %d channels.", channels)


@asynccontextmanager
async def _warmed(app: FastAPI) -> AsyncIterator[None]:
    """Warm the page beside the server's start; Airflow enters this where it mounts the page."""
    assert isinstance(app, MountedPage)
    threading.Thread(target=app.warm, name="trainyard-page-warm", daemon=True).start()
    yield


def _page_of_settings() -> FastAPI:
    from trainyard_airflow.page.app import create_page

    return create_page()


@cache
def mounted_page() -> MountedPage:
    """Return the one of this process."""
    return MountedPage()
