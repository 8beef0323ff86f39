"""A promotion that waits for two people, in Airflow's own task runner, database and API server.

    python -m tests.approval_world HOME

prints as JSON what was asked, how each answer was taken, what is kept beside the release and what a
webhook was told. A program of its own, as `tests.permission_world` is; it ends when the question is
answered, because `dag.test` cannot run the rollout, which starts in the triggerer.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests import permission_world
from tests.notice_servers import webhook
from tests.permission_world import MANAGERS, PASSWORD

RUNS = "/api/v2/dags/neuron_promote__production/dagRuns"
PATIENCE_S = 240.0
ENVIRONMENTS = """
schema: trainyard/v1
environments:
  production:
    target: cpu
    allowed: {approve: {users: [ada, eve]}}
    approval: {needs: 2, timeout_s: 600}
    notify: [{kind: webhook, connection: hook}]
"""


class People:
    """The users of the API server, with what each got."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.found: list[tuple[str, int]] = []
        self.headers = {name: self._login(name) for name in permission_world.SIMPLE}
        client.cookies.clear()

    def _login(self, name: str) -> dict[str, str]:
        login = {"username": name, "password": PASSWORD}
        token = self.client.post("/auth/token", json=login).json()["access_token"]
        return {"Authorization": f"Bearer {token}"}

    def question(self) -> Any:
        """Wait until the task waits, and return what it asks."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            asked = self.client.get(f"{RUNS}/~/hitlDetails", headers=self.headers["ada"]).json()
            for each in asked["hitl_details"]:
                waits = each["task_instance"]["state"] == "awaiting_input"
                if waits and not each["response_received"]:
                    return each
            time.sleep(0.2)
        raise AssertionError("nobody was asked")

    def answer(self, asked: Any, name: str) -> None:
        """Approve as somebody."""
        run_id = asked["task_instance"]["dag_run_id"]
        body = {"chosen_options": ["Approve"], "params_input": {"note": f"by {name}"}}
        answer = self.client.patch(
            f"{RUNS}/{run_id}/taskInstances/approve/-1/hitlDetails",
            json=body,
            headers=self.headers[name],
        )
        self.found.append((name, answer.status_code))

    def state(self, asked: Any) -> str:
        """Return the state of the task that asks."""
        run_id = asked["task_instance"]["dag_run_id"]
        path = f"{RUNS}/{run_id}/taskInstances/approve"
        return str(self.client.get(path, headers=self.headers["ada"]).json()["state"])


def talk(app: Any, found: dict[str, Any]) -> None:
    """Answer in the wrong and in the right ways, until the task has ended."""
    from fastapi.testclient import TestClient

    with TestClient(app, raise_server_exceptions=False) as client:
        people = People(client)
        asked = people.question()
        found["subject"], found["body"] = asked["subject"], asked["body"]
        for name in ("vic", "ola", "ada"):
            people.answer(asked, name)
        people.answer(people.question(), "ada")
        people.answer(people.question(), "eve")
        deadline = time.monotonic() + PATIENCE_S
        while people.state(asked) != "success" and time.monotonic() < deadline:
            time.sleep(0.2)
        found["state"], found["answers"] = people.state(asked), people.found


def main(home: Path) -> None:
    """Print what happened, and end."""
    permission_world.ENVIRONMENTS = ENVIRONMENTS
    permission_world.prepare(home)
    os.environ["AIRFLOW__CORE__AUTH_MANAGER"] = MANAGERS["simple"]
    with webhook() as hook:
        connection = {"conn_type": "http", "password": hook.url()}
        os.environ["AIRFLOW_CONN_HOOK"] = json.dumps(connection)
        from airflow.utils.db import initdb

        initdb()
        permission_world.sync_bundles()
        bag = permission_world.write_dags()
        from airflow.api_fastapi.app import create_app
        from tests.page_world import PageWorld

        from trainyard.releases import list_attestations
        from trainyard.store.folder import FolderStore

        yard = Path(os.environ["TRAINYARD_HOME"])
        made = PageWorld(yard, store=FolderStore(yard / "store"))
        release_id = made.publish("first")
        app, found = create_app(), {"release": release_id}

        def finish() -> None:
            talk(app, found)
            kept = list_attestations(made.store, "adder", release_id, "approval")
            found["kept"] = [(each.subject["answer"], each.subject["who"]) for each in kept]
            found["told"] = [body["kind"] for body in hook.bodies]
            print(json.dumps(found), flush=True)
            os._exit(0)

        threading.Thread(target=finish, daemon=True).start()
        # Tasks are run in the main thread only.
        conf = {"model": "adder", "release": release_id}
        bag.dags["neuron_promote__production"].test(run_conf=conf, logical_date=None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
