"""The examples of docs/api.md, run as they stand there against a stub of Airflow's API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.api_examples import run_examples

TOKEN = "a-token-of-the-stub"


class FakeAirflowHandler(BaseHTTPRequestHandler):
    """Logs in, starts a run once, and says that it failed."""

    runs: dict[str, Any]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/auth/token":
            known = body == {"username": "ci", "password": 'it\'s "secret"'}
            return self._say(201 if known else 401, {"access_token": TOKEN})
        if not self._logged_in():
            return self._say(401, {})
        assert set(body) == {"logical_date", "dag_run_id", "conf"}
        key = f"{self.path}/{body['dag_run_id']}"
        if key in self.runs:
            return self._say(409, {"detail": "exists"})
        self.runs[key] = body
        return self._say(200, body)

    def do_GET(self) -> None:
        if not self._logged_in():
            return self._say(401, {})
        path = self.path.partition("?")[0]
        assert path.removesuffix("/wait") in self.runs
        if path.endswith("/wait"):
            return self._send(200, b'{"state": "running"}\n{"state": "failed"}\n')
        return self._say(200, {"state": "failed"})

    def _logged_in(self) -> bool:
        return bool(self.headers["Authorization"] == f"Bearer {TOKEN}")

    def _say(self, status: int, answer: Any) -> None:
        self._send(status, json.dumps(answer).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def airflow() -> Iterator[tuple[str, dict[str, Any]]]:
    runs: dict[str, Any] = {}
    handler = type("Handler", (FakeAirflowHandler,), {"runs": runs})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", runs
        server.shutdown()
        thread.join()


def test_the_examples_do_what_the_page_says(
    airflow: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    url, runs = airflow
    states = run_examples(
        tmp_path,
        url=url,
        username="ci",
        password='it\'s "secret"',
        release="adder-0123456789ab",
        environment="production",
    )
    assert [each["state"] for each in states] == ["running", "failed"]
    ((key, body),) = runs.items()
    assert key.startswith("/api/v2/dags/neuron_promote__production/dagRuns/")
    assert body["conf"] == {"model": "adder", "release": "adder-0123456789ab"}
