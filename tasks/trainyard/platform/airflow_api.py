"""The few calls of Airflow's public REST API (v2) that Trainyard makes from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import httpx

from trainyard.errors import BadInput, NotFound, Refused, TrainyardError, Transient
from trainyard.platform.pools import Pool

REQUEST_TIMEOUT_S = 30.0

TRIGGER_PAUSES_S = (0.2, 1.0)
"""Before a run is asked for again that Airflow could not start."""


class AirflowApi:
    """A logged-in client; logs in again when its token expires.

    Args:
        url: where Airflow listens, such as `http://127.0.0.1:8080`.
        token: a token that somebody made before; then user and password are not needed.
        embedded: it is the Airflow that `trainyard up` starts, so hints may speak of that.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        url: str,
        username: str = "",
        password: str = "",
        *,
        token: str = "",
        embedded: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._client = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, transport=transport)
        self._login = {"username": username, "password": password}
        self._token = token
        self._embedded = embedded

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Send one request with our token.

        Raises:
            Transient: Airflow cannot be reached, or cannot log anybody in just now.
            BadInput: the login is refused.
        """
        try:
            if not self._token:
                self._log_in()
            response = self._send(method, path, body)
            if response.status_code == 401 and self._login["username"]:
                self._log_in()
                response = self._send(method, path, body)
        except httpx.HTTPError as error:
            raise Transient(
                f"Airflow at {self._client.base_url} cannot be reached: {error}",
                hint="`trainyard up` starts it; logs are in the home's logs folder."
                if self._embedded
                else "See whether it runs and whether TRAINYARD_AIRFLOW_URL is its address.",
            ) from error
        return response

    def _log_in(self) -> None:
        response = self._client.post("/auth/token", json=self._login)
        if response.is_server_error:
            _check(response, "a login")
        if response.status_code != 201:
            raise BadInput(
                f"Airflow refused the login of {self._login['username']!r} "
                f"({response.status_code}).",
                hint="`trainyard where` prints the login of the embedded platform."
                if self._embedded
                else "See TRAINYARD_AIRFLOW_USER and TRAINYARD_AIRFLOW_PASSWORD.",
            )
        self._token = response.json()["access_token"]

    def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._token}"}
        return self._client.request(method, path, json=body, headers=headers)

    def ensure_pool(self, pool: Pool) -> None:
        """Create the pool, or bring an existing one to the wished size."""
        body = {
            "name": pool.name,
            "slots": pool.slots,
            "description": pool.description,
            "include_deferred": True,
        }
        response = self.request("POST", "/api/v2/pools", body)
        if response.status_code == 409:
            response = self.request("PATCH", f"/api/v2/pools/{pool.name}", body)
        _check(response, f"pool {pool.name}")

    def wait_for_dag(self, dag_id: str, *, timeout_s: float = 120.0) -> None:
        """Wait until Airflow has parsed a DAG. Raises Transient with its import errors if not."""
        deadline = time.monotonic() + timeout_s
        while self.request("GET", f"/api/v2/dags/{dag_id}").status_code != 200:
            if time.monotonic() > deadline:
                errors = self.request("GET", "/api/v2/importErrors").text
                raise Transient(
                    f"Airflow did not load the DAG {dag_id} within {timeout_s:.0f} s.",
                    hint=f"Import errors: {errors[:2000]}",
                )
            time.sleep(1)

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any], *, note: str = "") -> bool:
        """Start a run; False if a run of that id exists already.

        The id makes it safe to ask again where Airflow fails by itself, as it does when more ask at
        once than its database takes.

        Raises:
            NotFound: no such DAG.
            BadInput: Airflow refuses the conf, or does not know who asks.
            Refused: this user may not start it.
        """
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf), "note": note}
        response = self.request("POST", f"/api/v2/dags/{dag_id}/dagRuns", body)
        for pause_s in TRIGGER_PAUSES_S:
            if not response.is_server_error:
                break
            time.sleep(pause_s)
            response = self.request("POST", f"/api/v2/dags/{dag_id}/dagRuns", body)
        if response.status_code == 409:
            return False
        _check(response, f"run {run_id} of {dag_id}")
        return True

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return a run as Airflow describes it."""
        response = self.request("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")
        _check(response, f"run {run_id} of {dag_id}")
        found: dict[str, Any] = response.json()
        return found

    def runs(self, dag_id: str, *, most: int = 1000) -> list[dict[str, Any]]:
        """Return the newest runs of a DAG as Airflow describes them; none without such a DAG."""
        found: list[dict[str, Any]] = []
        while len(found) < most:
            # Airflow gives a hundred at a time, whatever is asked for.
            path = f"/api/v2/dags/{dag_id}/dagRuns?limit=100&offset={len(found)}"
            response = self.request("GET", f"{path}&order_by=-run_after")
            if response.status_code == 404:
                return []
            _check(response, f"the runs of {dag_id}")
            page: list[dict[str, Any]] = response.json()["dag_runs"]
            found += page
            if len(page) < 100:
                break
        return found

    def run_state(self, dag_id: str, run_id: str) -> str:
        """Return a run's state, such as `running` or `success`."""
        return str(self.run(dag_id, run_id)["state"])

    def results(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return what the result tasks of an ended run returned; empty where Airflow has nothing.

        That is an experimental part of Airflow's API, so its absence is no error.
        """
        response = self.request("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/wait?interval=1")
        lines = response.text.strip().splitlines() if response.is_success else []
        try:
            results = json.loads(lines[-1]).get("results") if lines else None
        except ValueError:
            return {}
        return results if isinstance(results, dict) else {}

    def log_lines(self, dag_id: str, run_id: str, task: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what the last try of a task logged, oldest first; nothing if that is lost."""
        response = self.request(
            "GET",
            f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task['task_id']}"
            f"/logs/{task.get('try_number') or 1}?full_content=true"
            f"&map_index={task.get('map_index', -1)}",
        )
        content = response.json().get("content", []) if response.is_success else []
        return [line for line in content if isinstance(line, dict)]

    def task_states(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return the task instances of a run as Airflow describes them."""
        response = self.request(
            "GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances?limit=200"
        )
        _check(response, f"tasks of {run_id}")
        instances: list[dict[str, Any]] = response.json()["task_instances"]
        return instances


def _check(response: httpx.Response, what: str) -> None:
    """Turn a refusal into an error of ours."""
    if response.is_success:
        return
    try:
        detail = response.json().get("detail", response.text)
    except ValueError:
        detail = response.text
    kinds: dict[int, type[TrainyardError]] = {
        400: BadInput,
        401: BadInput,
        403: Refused,
        404: NotFound,
        422: BadInput,
    }
    kind = kinds.get(response.status_code, Transient)
    raise kind(f"Airflow refused {what} ({response.status_code}): {detail}")
