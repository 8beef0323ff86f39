"""What Airflow's own auth manager lets each role do on the page."""

from __future__ import annotations

import pytest

from trainyard_airflow.page.access import Act, AirflowAccess


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("VIEWER", {"read"}),
        ("USER", {"read", "start", "mark", "answer"}),
        ("ADMIN", {"read", "start", "mark", "answer"}),
    ],
)
def test_a_viewer_may_only_read(
    role: str, expected: set[Act], monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.api_fastapi import app
    from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser

    monkeypatch.setattr(app, "get_auth_manager", SimpleAuthManager)
    user = SimpleAuthManagerUser(username="ada", role=role)
    acts: tuple[Act, ...] = ("read", "start", "mark", "answer")
    may = {act for act in acts if AirflowAccess().may(user, act, "neuron_promote__production")}
    assert may == expected


def test_the_plugin_tells_airflow_of_the_page_without_making_it() -> None:
    from trainyard_airflow.page.plugin import PREFIX, TrainyardPlugin

    (app,) = TrainyardPlugin().fastapi_apps
    assert app["url_prefix"] == PREFIX
    assert app["app"]._page is None
    assert TrainyardPlugin().fastapi_apps == [app]
    nav, run = TrainyardPlugin.external_views
    assert (nav["destination"], nav["href"]) == ("nav", "/trainyard/")
    assert (run["destination"], run["href"]) == ("dag_run", "/trainyard/runs/{DAG_ID}/{RUN_ID}")
