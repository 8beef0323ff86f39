"""Airflow's real API server with each auth manager, asked by people of every role.

    python -m tests.permission_world HOME

prints what each got, by auth manager, as JSON. A program of its own, because Airflow keeps its
database and its configuration for as long as a process lives; one for both, because its imports
and its tables take most of the time.

The environments file: staging is for the role Stager and for ada, production for ada only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PASSWORD = "only-for-this-test"
CHANNEL = "/trainyard/channels/{environment}/adder"
RUNS = "/api/v2/dags/neuron_promote__{environment}/dagRuns"

SIMPLE = {"vic": "viewer", "ada": "user", "eve": "user", "ola": "op"}
"""Users of SimpleAuthManager, by role."""
FAB = {"vic": "Viewer", "ada": "User", "eve": "User", "ola": "Op", "stu": "Stager"}
"""Users of FAB's. Stager is a role without any right but those that the DAGs give it."""

ENVIRONMENTS = """
schema: trainyard/v1
environments:
  staging:
    target: cpu
    stuck_after_s: 7200
    allowed:
      promote: {users: [ada], roles: [Stager]}
      rollback: {roles: [Stager]}
  production:
    target: cpu
    allowed:
      promote: {users: [ada]}
      rollback: {users: [ada]}
"""


MANAGERS = {
    "simple": "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager",
    "fab": "airflow.providers.fab.auth_manager.fab_auth_manager.FabAuthManager",
}


def prepare(home: Path) -> None:
    """Tell Airflow and Trainyard where everything is, before either is imported."""
    home.mkdir()
    (home / "environments.yaml").write_text(ENVIRONMENTS)
    passwords = home / "passwords.json"
    passwords.write_text(json.dumps(dict.fromkeys(SIMPLE, PASSWORD)))
    os.environ |= {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        # Its tables are made with the others.
        "AIRFLOW__CORE__AUTH_MANAGER": MANAGERS["fab"],
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(
            f"{name}:{role}" for name, role in SIMPLE.items()
        ),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "AIRFLOW__API__SECRET_KEY": "s" * 32,
        "AIRFLOW__API_AUTH__JWT_SECRET": "j" * 64,
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        "TRAINYARD_HOME": str(home / "yard"),
        "TRAINYARD_CATALOGUE": str(REPOSITORY / "dags" / "models"),
        "TRAINYARD_ENVIRONMENTS": str(home / "environments.yaml"),
    }


def fill_database() -> None:
    """Make the tables and the users of FAB."""
    from airflow.utils.db import initdb

    initdb()
    add_users()
    sync_bundles()


def sync_bundles() -> None:
    """Tell the database where DAG files are."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager

    DagBundlesManager().sync_bundles_to_db()


def write_dags() -> Any:
    """Write the DAGs with their rights, as they are with the auth manager of now; return them."""
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db

    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"], bundle_name="dags-folder")
    assert bag.import_errors == {}
    sync_bag_to_db(bag, "dags-folder", None)
    return bag


def add_users() -> None:
    """Add FAB's users; Stager begins without any right."""
    from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder

    with get_application_builder() as builder:
        security = builder.sm
        security.sync_roles()
        security.bulk_sync_roles([{"role": "Stager", "perms": []}])
        for name, role in FAB.items():
            address = f"{name}@yard.example"
            assert security.add_user(name, name, "X", address, security.find_role(role), PASSWORD)


def fill_store() -> None:
    """Put a stable release and one that could be promoted into both environments."""
    from tests.page_world import PageWorld

    from trainyard.store.folder import FolderStore
    from trainyard.store.layout import channel_key

    home = Path(os.environ["TRAINYARD_HOME"])
    made = PageWorld(home, store=FolderStore(home / "store"))
    for name in ("first", "second"):
        made.publish(name)
    made.promote("first")
    staging = made.channel.model_copy(update={"environment": "staging"})
    made.store.put(channel_key("adder", "staging"), staging.to_bytes())


def ask(client: Any, token: str, run_id: str) -> Iterator[tuple[str, Any]]:
    """Yield what somebody sees and gets."""
    headers: Mapping[str, str] = {"Authorization": f"Bearer {token}"} if token else {}
    for environment in ("staging", "production"):
        page = client.get(CHANNEL.format(environment=environment), headers=headers)
        yield f"page {environment}", page.status_code
        buttons = [
            act for act in ("promote", "rollback", "abort") if f'data-opens="{act}"' in page.text
        ]
        yield f"buttons {environment}", buttons
        body = {
            "logical_date": None,
            "dag_run_id": run_id,
            "conf": {"model": "adder", "release": "adder-0123456789ab"},
        }
        answer = client.post(RUNS.format(environment=environment), json=body, headers=headers)
        yield f"promote {environment}", answer.status_code
        if answer.status_code == 200:
            yield f"user {environment}", answer.json()["triggering_user_name"]


def ask_all(manager: str, users: Mapping[str, str]) -> dict[str, Any]:
    """Return what each user got; the one without a name has not logged in."""
    from airflow.api_fastapi.app import create_app, purge_cached_app
    from fastapi.testclient import TestClient

    os.environ["AIRFLOW__CORE__AUTH_MANAGER"] = MANAGERS[manager]
    write_dags()
    purge_cached_app()
    found: dict[str, Any] = {}
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        for name in ("", *users):
            token = ""
            if name:
                login = {"username": name, "password": PASSWORD}
                token = client.post("/auth/token", json=login).json()["access_token"]
            client.cookies.clear()
            found[name] = dict(ask(client, token, f"asked-with-{manager}-by-{name}"))
    return found


def main(home: Path) -> dict[str, Any]:
    """Return what each user got, by auth manager, and when their runs count as stuck."""
    prepare(home)
    fill_database()
    fill_store()
    return {
        "simple": ask_all("simple", SIMPLE),
        "fab": ask_all("fab", FAB),
        "deadlines_s": deadlines_s(),
    }


def deadlines_s() -> dict[str, float]:
    """Return after how many seconds in the queue each run counts as stuck, by DAG and run."""
    from airflow.models.deadline import Deadline
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        return {
            f"{each.dagrun.dag_id}/{each.dagrun.run_id}": (
                each.deadline_time - each.dagrun.queued_at
            ).total_seconds()
            for each in session.scalars(select(Deadline))
        }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
