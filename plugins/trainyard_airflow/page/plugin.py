"""What Airflow is told about the page. Every component loads this, so it imports very little."""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin

PREFIX = "/trainyard"
"""Where the page is below Airflow's own address."""


def _base_path() -> str:
    """Return the path of Airflow's own address, for installations that are not at a host's root."""
    from urllib.parse import urlsplit

    from airflow.configuration import conf

    return urlsplit(conf.get("api", "base_url", fallback="") or "").path.rstrip("/")


class TrainyardPlugin(AirflowPlugin):
    """The page in the navigation, and the report as a tab of each run."""

    name = "trainyard"
    # Airflow's base class declares it as an attribute of instances, and reads it there.
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

    @property
    def fastapi_apps(self) -> list[Any]:  # type: ignore[override]
        """The page itself. Only the API server asks for it, and only that needs FastAPI."""
        from trainyard_airflow.page.mounted import mounted_page

        return [{"app": mounted_page(), "url_prefix": PREFIX, "name": "Trainyard"}]
