from __future__ import annotations

from pathlib import Path

import pytest

from trainyard.platform.environment import trainyard_environment
from trainyard.settings import Settings


def test_a_folder_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert trainyard_environment(Settings(store="here"))["TRAINYARD_STORE"] == str(
        tmp_path.resolve() / "here"
    )


@pytest.mark.parametrize("url", ["s3://bucket/yard", "file:///srv/store"])
def test_a_url_stays_what_it_is(tmp_path: Path, url: str) -> None:
    assert trainyard_environment(Settings(home=tmp_path, store=url))["TRAINYARD_STORE"] == url


def test_only_a_store_in_s3_needs_the_callers_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SOMETHING_ELSE", "x")
    assert "AWS_SECRET_ACCESS_KEY" not in trainyard_environment(Settings(home=tmp_path))
    found = trainyard_environment(Settings(home=tmp_path, store="s3://bucket"))
    assert found["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert "AWS_SOMETHING_ELSE" not in found


def test_how_a_client_logs_in_elsewhere_is_not_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_AIRFLOW_PASSWORD", "secret")
    monkeypatch.setenv("TRAINYARD_S3_REGION", "eu-central-1")
    env = trainyard_environment(Settings(home=tmp_path))
    assert "TRAINYARD_AIRFLOW_PASSWORD" not in env
    assert env["TRAINYARD_S3_REGION"] == "eu-central-1"
