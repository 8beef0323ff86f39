"""The environment variables of the platform's processes: an allow-list plus our own settings."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from trainyard.errors import BadInput
from trainyard.platform import postgres
from trainyard.platform.paths import Choices, PlatformPaths
from trainyard.settings import Settings

PASSED_ON = (
    "HOME",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LOGNAME",
    "PATH",
    "SHELL",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
    "USER",
)
"""Variables of the caller that components get. Anything else (credentials, PYTHON* switches such as
PYTHONDONTWRITEBYTECODE, which makes every start of vLLM tens of seconds slower) stays outside."""

AWS_PASSED_ON = (
    "AWS_ACCESS_KEY_ID",
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)
"""Variables by which boto3 finds credentials; only for those who open a store in S3."""


ONLY_FOR_CLIENTS = {
    "TRAINYARD_AIRFLOW_URL",
    "TRAINYARD_AIRFLOW_USER",
    "TRAINYARD_AIRFLOW_PASSWORD",
    "TRAINYARD_AIRFLOW_TOKEN",
}
"""How `trainyard request` logs in somewhere else is nobody's business here."""


def base_environment() -> dict[str, str]:
    """Return the caller's variables that every component gets."""
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    env["PYTHONUNBUFFERED"] = "1"
    # The judge's matrices are small. On busy processors OpenBLAS's threads wait for each other, and
    # take several times as long as one.
    env["OPENBLAS_NUM_THREADS"] = "1"
    return env


def trainyard_environment(settings: Settings) -> dict[str, str]:
    """Return `settings` as TRAINYARD_* variables with absolute paths, and what the store needs."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("TRAINYARD_") and name not in ONLY_FOR_CLIENTS
    }
    env |= {
        "TRAINYARD_HOME": str(settings.home.resolve()),
        "TRAINYARD_STORE": settings.store_name,
        "TRAINYARD_CATALOGUE": str(settings.catalogue.resolve()),
        "TRAINYARD_ENVIRONMENTS": str(settings.environments.resolve()),
        # Not resolved: a virtual environment's interpreter is a link, and the link is what counts.
        "TRAINYARD_SERVE_PYTHON": str(settings.serving_interpreter.absolute()),
    }
    for name in ("TOKEN", "ENDPOINT"):
        # Under our own name: servers get no variable of ours, so that they never see a token.
        if f"HF_{name}" in os.environ:
            env.setdefault(f"TRAINYARD_HUB_{name}", os.environ[f"HF_{name}"])
    return env | aws_environment(settings)


def aws_environment(settings: Settings) -> dict[str, str]:
    """Return the caller's variables that boto3 finds credentials by, where the store needs them."""
    if not settings.store.startswith("s3://"):
        return {}
    return {name: os.environ[name] for name in AWS_PASSED_ON if name in os.environ}


def airflow_program() -> str:
    """Return the path of the `airflow` command that belongs to this interpreter."""
    beside = Path(sys.executable).parent / "airflow"
    if beside.exists():
        return str(beside)
    found = shutil.which("airflow")
    if found:
        return found
    raise BadInput(
        "Airflow is not installed beside this Python.",
        hint="Run `make setup`, then use .venv/bin/trainyard.",
    )


def airflow_environment(settings: Settings, choices: Choices) -> dict[str, str]:
    """Return the whole environment of Airflow's components."""
    paths = PlatformPaths(settings.home.resolve())
    repository = settings.catalogue.resolve().parents[1]
    passwords = paths.airflow / "passwords.json"
    if settings.airflow_database == "sqlite":
        database = {
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{paths.airflow / 'airflow.db'}"
        }
    else:
        database = {
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": postgres.url(paths, "psycopg2"),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": postgres.url(paths, "asyncpg"),
            # By default 15 connections: of fifty requests at once some would wait 30 s and fail.
            "AIRFLOW__DATABASE__SQL_ALCHEMY_MAX_OVERFLOW": "60",
        }
    return {
        **base_environment(),
        **trainyard_environment(settings),
        **database,
        "AIRFLOW_HOME": str(paths.airflow),
        "AIRFLOW__CORE__DAGS_FOLDER": str(repository / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(repository / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        # Four workers: a release needs one or two at a time, and each holds about 200 MB.
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__FERNET_KEY": choices.fernet_key,
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{choices.api_url}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(choices.api_port),
        "AIRFLOW__API__BASE_URL": choices.api_url,
        "AIRFLOW__API__SECRET_KEY": choices.api_secret_key,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": choices.jwt_secret,
        # A killed worker is noticed after a minute instead of five.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "10",
        "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(paths.airflow / "logs"),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "GX_ANALYTICS_ENABLED": "False",
    }


def write_passwords(settings: Settings, choices: Choices) -> None:
    """Write the password of the one local user where Airflow's SimpleAuthManager reads it."""
    path = PlatformPaths(settings.home).airflow / "passwords.json"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump({"admin": choices.admin_password}, stream)
