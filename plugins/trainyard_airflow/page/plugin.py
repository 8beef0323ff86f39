"""What Airflow is told about the page. Every component loads this, so it imports very little."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from airflow.plugins_manager import AirflowPlugin

PREFIX = "/trainyard"
"""Where the page is below Airflow's own address."""

Message = MutableMapping[str, Any]


class LazyPage:
    """The page as an ASGI application that is made at its first request.

    Airflow loads plugins in every component; only the API server ever needs FastAPI and the store.
    """

    def __init__(self) -> None:
        self._app: Any = None

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer a request."""
        if self._app is None:
            from trainyard_airflow.page.app import create_page

            self._app = create_page()
        await self._app(scope, receive, send)


def _base_path() -> str:
    """Return the path of Airflow's own address, for installations that are not at a host's root."""
    from urllib.parse import urlsplit

    from airflow.configuration import conf

    return urlsplit(conf.get("api", "base_url", fallback="") or "").path.rstrip("/")


class TrainyardPlugin(AirflowPlugin):
    """The page in the navigation, and the report as a tab of each run."""

    name = "trainyard"
    # Airflow's base class declares both as attributes of instances, though it reads the class.
    fastapi_apps: list[Any] = [  # noqa: RUF012
        {"app": LazyPage(), "url_prefix": PREFIX, "name": "Trainyard"}
    ]
    external_views: list[Any] = [  # noqa: RUF012
        {
            "name": "Trainyard",
            "href": f"{_base_path()}{PREFIX}/",
            "destination": "nav",
            "url_route": "trainyard",
            "nav_top_level": True,
        },
        {
            "name": "Trainyard",
            "href": f"{_base_path()}{PREFIX}/runs/{{DAG_ID}}/{{RUN_ID}}",
            "destination": "dag_run",
            "url_route": "trainyard-run",
        },
    ]
