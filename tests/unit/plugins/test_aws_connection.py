"""Credentials of an Airflow connection reach a step through its environment, and no other way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainyard.settings import Settings
from trainyard.store.s3 import S3Store

KEY, SECRET, TOKEN = "AKIAEXAMPLE", "hush-hush-secret", "hush-hush-token"


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection `yard_aws` with a key."""
    extra = {"region_name": "eu-central-1", "aws_session_token": TOKEN}
    value = {"conn_type": "aws", "login": KEY, "password": SECRET, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_YARD_AWS", json.dumps(value))


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return Settings(**{"home": tmp_path, "aws_connection": "yard_aws", **changes})


def test_a_step_gets_the_keys_of_the_connection(connection: None, tmp_path: Path) -> None:
    from trainyard_airflow.aws_connection import connection_environment

    assert connection_environment(settings(tmp_path)) == {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_REGION": "eu-central-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }


def test_without_the_setting_nothing_is_looked_up(tmp_path: Path) -> None:
    from trainyard_airflow.aws_connection import connection_credentials, connection_environment

    plain = settings(tmp_path, aws_connection="")
    assert connection_credentials(plain) is None
    assert connection_environment(plain) == {}


def test_a_connection_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    from trainyard_airflow.aws_connection import connection_credentials
    from trainyard_airflow.exceptions import StepRefused

    with pytest.raises(StepRefused, match=r"no connection 'yard_aws'.*TRAINYARD_AWS_CONNECTION"):
        connection_credentials(settings(tmp_path))


def test_a_task_opens_the_store_with_them(connection: None, tmp_path: Path) -> None:
    from trainyard_airflow.aws_connection import open_task_store

    store = open_task_store(settings(tmp_path, store="s3://bucket/yard"))
    assert isinstance(store, S3Store)
    keys = store._bucket.client._request_signer._credentials
    assert (keys.access_key, keys.secret_key, keys.token) == (KEY, SECRET, TOKEN)
    assert store._bucket.client.meta.region_name == "eu-central-1"
