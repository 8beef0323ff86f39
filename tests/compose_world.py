"""The platform with the variables and files of `docker-compose.yaml`, but without containers.

PostgreSQL and Prometheus are Debian's, S3 is moto's; the rest is the embedded platform's. What
differs from the containers is where things listen. Besides, `production` asks people before a
promotion, a webhook is told of everything, and a release counts as stuck soon.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import yaml
from tests.fake_s3 import fake_s3
from tests.notice_servers import Webhook, webhook
from tests.platform_world import ENVIRONMENT, Platform, note, wait_for
from tests.prometheus import Prometheus, prometheus

from trainyard.errors import TrainyardError
from trainyard.platform import postgres
from trainyard.platform.environment import base_environment, trainyard_environment
from trainyard.serving.records import choose_port
from trainyard.spec.ways import NoticeKind

REPOSITORY = Path(__file__).parents[1]
SECRETS = {
    "STORE_ACCESS_KEY": "fake",
    "STORE_SECRET_KEY": "fake",
    "POSTGRES_PASSWORD": "fake",
    "AIRFLOW_FERNET_KEY": "fake",
    "AIRFLOW_API_SECRET_KEY": "fake",
    "AIRFLOW_JWT_SECRET": "fake",
}
"""What `.env` would have."""

HOOK = "yard_hook"
"""The connection with the webhook's address."""

STUCK_AFTER_S = 30
"""Seconds after which a release that has not ended counts as stuck here; two days otherwise."""

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+)(?::[-?](?P<default>[^}]*))?\}")


def service_environment(name: str, hosts: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a compose service, filled in as Compose does.

    Args:
        name: of the service.
        hosts: addresses by those of the containers, such as `http://store:8333`.
    """
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yaml").read_text())
    found = {}
    for variable, text in compose["services"][name]["environment"].items():
        value = _VARIABLE.sub(
            lambda match: SECRETS.get(match["name"], match["default"] or ""), str(text)
        )
        for container, here in hosts.items():
            value = value.replace(container, here)
        found[variable] = value
    return found


def of_trainyard(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those that are about Trainyard and its store; the platform sets Airflow's itself."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(("TRAINYARD_", "AWS_"))
    }


@dataclass(frozen=True)
class Parts:
    """What runs."""

    platform: Platform
    figures: Prometheus
    """The Prometheus that looks on."""
    hook: Webhook
    """Where notices arrive."""


def environments_text(prometheus_url: str) -> str:
    """Return the environments of compose, judged by this Prometheus, with people in them."""
    text = (REPOSITORY / "k8s" / "compose" / "environments.yaml").read_text()
    file = yaml.safe_load(text.replace("http://127.0.0.1:9090", prometheus_url))
    # The platform has one user, so whoever asks has to answer, too.
    file["environments"][ENVIRONMENT]["approval"] = {"by_requester": True, "timeout_s": 3600}
    file["notify"] = [{"kind": "webhook", "connection": HOOK, "events": list(get_args(NoticeKind))}]
    return yaml.safe_dump(file, sort_keys=False)


def be_impatient(dag_file: Path) -> None:
    """Let runs of a DAG count as stuck after `STUCK_AFTER_S`."""
    text, alert = dag_file.read_text(), "stuck_alert(RELEASE_STUCK_AFTER)"
    assert alert in text
    dag_file.write_text(text.replace(alert, f"stuck_alert(timedelta(seconds={STUCK_AFTER_S}))"))


@contextmanager
def running_like_compose() -> Iterator[Parts]:
    """Start everything in a new home; afterwards nothing of it is left."""
    folder = Path(tempfile.mkdtemp(prefix="trainyard-e2e-"))
    proxy_port, metrics_port = choose_port(), choose_port()
    with ExitStack() as stack:
        s3 = stack.enter_context(fake_s3())
        s3.client.create_bucket(Bucket="trainyard")
        variables = of_trainyard(
            service_environment("airflow-scheduler", {"http://store:8333": s3.proxy.url})
        )
        variables |= {
            "TRAINYARD_PROXY_PORT": str(proxy_port),
            "TRAINYARD_METRICS_PORT": str(metrics_port),
            "TRAINYARD_METRICS_INTERVAL_S": "2",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        stack.enter_context(patch.dict(os.environ, variables))
        seen_by = stack.enter_context(
            prometheus(folder / "prometheus", {8080: proxy_port, 8082: metrics_port})
        )
        hook = stack.enter_context(webhook())
        made = Platform.make(folder, environments=environments_text(seen_by.url))
        be_impatient(folder / "dags" / "neuron_release.py")
        try:
            made.start()
            make_connection(
                made,
                variables["TRAINYARD_AWS_CONNECTION"],
                conn_type="aws",
                login=variables["AWS_ACCESS_KEY_ID"],
                password=variables["AWS_SECRET_ACCESS_KEY"],
            )
            make_connection(made, HOOK, conn_type="http", password=hook.url())
            stack.enter_context(exporter(made))
            yield Parts(made, seen_by, hook)
        finally:
            made.stop()
            if os.environ.get("KEEP_HOME"):
                note(f"kept {made.folder} and {made.paths.postgres}")
            else:
                made.remove()


def make_connection(platform: Platform, name: str, **values: str) -> None:
    """Make a connection of Airflow, such as the one that `k8s/compose/init.sh` makes."""
    body = {"connection_id": name, **values}
    answer = platform.api.request("POST", "/api/v2/connections", body)
    assert answer.is_success, answer.text


@contextmanager
def exporter(platform: Platform) -> Iterator[None]:
    """Run `trainyard metrics`, as the compose service does."""
    log = platform.paths.logs / "metrics.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainyard", "metrics"],
            env=base_environment() | trainyard_environment(platform.settings),
            cwd=platform.folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


# --- losing and restoring -------------------------------------------------------------------------


def dump_database(platform: Platform) -> Path:
    """Back Airflow's database up, as docs/operations.md says, and return the file."""
    dump = platform.folder / "airflow.dump"
    with dump.open("wb") as stream:
        subprocess.run(_postgres(platform, "pg_dump", "--format=custom"), stdout=stream, check=True)
    return dump


def lose_and_restore_database(platform: Platform, dump: Path) -> None:
    """Drop Airflow's database under its feet, and bring the one of the dump back."""
    subprocess.run(_postgres(platform, "dropdb", "--force"), check=True)
    subprocess.run(_postgres(platform, "createdb"), check=True)
    # As one transaction: Airflow goes on writing as soon as it sees a table.
    restore = _postgres(platform, "pg_restore", "--single-transaction", "--dbname")
    with dump.open("rb") as stream:
        subprocess.run(restore, stdin=stream, check=True)
    wait_for(lambda: _answers(platform), "Airflow after the restore", timeout_s=300)


def _postgres(platform: Platform, program: str, *options: str) -> list[str]:
    socket = platform.paths.postgres / "socket"
    connection = [f"--host={socket}", "--username=airflow"]
    return [str(postgres.binaries() / program), *connection, *options, postgres.DATABASE]


def _answers(platform: Platform) -> bool:
    with suppress(TrainyardError):
        return platform.api.request("GET", "/api/v2/dags").is_success
    return False


def copy_store(platform: Platform) -> dict[str, bytes]:
    """Back the store up, as docs/operations.md says: every key with its content."""
    store = platform.store
    return {entry.key: store.read(entry.key).data for entry in store.list("")}


def lose_and_restore_store(platform: Platform, copy: Mapping[str, bytes]) -> None:
    """Empty the store under everything that runs, and bring the copy back."""
    store = platform.store
    for entry in list(store.list("")):
        store.delete(entry.key)
    for key, data in copy.items():
        store.put(key, data)


def verify(platform: Platform, *options: str) -> tuple[int, list[dict[str, str]]]:
    """Run `trainyard verify` and return its exit code and what it found."""
    done = subprocess.run(
        [sys.executable, "-m", "trainyard", "verify", "--json", *options],
        env=base_environment() | trainyard_environment(platform.settings),
        cwd=platform.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)["problems"]
    return done.returncode, found
