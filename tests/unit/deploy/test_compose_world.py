"""The variables that the container-less run takes from the compose file are those it would have."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.compose_world import of_trainyard, service_environment
from tests.prometheus import MONITORING, configuration, flags


@pytest.fixture
def variables() -> dict[str, str]:
    return service_environment("proxy", {"http://store:8333": "http://127.0.0.1:9"})


def test_variables_are_filled_in_and_hosts_replaced(variables: dict[str, str]) -> None:
    assert variables["TRAINYARD_S3_ENDPOINT_URL"] == "http://127.0.0.1:9"
    assert variables["AWS_ACCESS_KEY_ID"] == "fake"
    assert variables["AIRFLOW__API__BASE_URL"] == "http://localhost:8088"
    assert not any("$" in value for value in variables.values())


def test_only_ours_are_handed_over(variables: dict[str, str]) -> None:
    ours = of_trainyard(variables)

    assert ours["TRAINYARD_STORE"] == "s3://trainyard/yard"
    assert {name.split("_")[0] for name in ours} == {"TRAINYARD", "AWS"}


def test_prometheus_configuration_differs_in_addresses_and_pace_only() -> None:
    text = (MONITORING / "prometheus.yml").read_text()
    changed = configuration(text, {8080: 18080, 8082: 18082, 9090: 19090}, "1s")

    def rest(text: str) -> list[str]:
        lines = text.replace("127.0.0.1:1", "127.0.0.1:").splitlines()
        return [line for line in lines if "interval" not in line and "timeout" not in line]

    assert "5s" not in changed
    assert "127.0.0.1:18080" in changed
    assert rest(changed) == rest(text)


def test_prometheus_gets_the_flags_of_the_compose_file(tmp_path: Path) -> None:
    found = flags(tmp_path, 1)

    assert f"--config.file={tmp_path}/prometheus.yml" in found
    assert "--storage.tsdb.retention.time=15d" in found
    assert not any("otlp" in flag for flag in found)
